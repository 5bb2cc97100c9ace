//! `metrics.jsonl`: one JSON object a line, told apart by `type`.

use serde::{Deserialize, Deserializer, Serialize};

/// One line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Metric {
    /// A training step.
    Step(StepMetrics),
    /// Loss on held-out text.
    Validation(ValidationMetrics),
    /// One policy measured on one step's load.
    Policy(PolicyMeasurement),
    /// A step of the same training under another policy.
    Reference(ReferenceMetrics),
    /// A line of a later version; read, never written.
    #[serde(other)]
    Unknown,
}

impl Metric {
    /// The step it belongs to, if it is known.
    pub fn step(&self) -> Option<u64> {
        match self {
            Self::Step(metrics) => Some(metrics.step),
            Self::Validation(metrics) => Some(metrics.step),
            Self::Policy(metrics) => Some(metrics.step),
            Self::Reference(metrics) => Some(metrics.step),
            Self::Unknown => None,
        }
    }
}

/// Imbalance (max over mean of rank loads; 1.0 is perfect) over the layers and microbatches of a step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Imbalance {
    /// Mean over layers and microbatches.
    pub mean: f64,
    /// The worst layer and microbatch.
    pub worst: f64,
}

/// Where the time of a step goes, in nanoseconds of parallel time, forward and backward together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StepParts {
    /// Attention, norms, embedding, loss.
    pub dense_ns: u64,
    /// Gate, top-k, counts and their all-gather.
    pub router_ns: u64,
    /// Planning.
    pub plan_ns: u64,
    /// Logical routing to physical routing.
    pub reroute_ns: u64,
    /// Weight sync from its start to its end, hidden or not. Not part of the sum: see `exposed_sync_ns`.
    pub weight_sync_ns: u64,
    /// Weight sync beyond reroute: what of it is on the critical path.
    pub exposed_sync_ns: u64,
    /// Dispatch and combine.
    pub all_to_all_ns: u64,
    /// Grouped GEMMs over physical experts.
    pub experts_ns: u64,
    /// Grad reduce of replicas: adding, and what of the transfer the backward of router and attention does not hide.
    pub grad_reduce_exposed_ns: u64,
    /// All-reduce of dense gradients.
    pub all_reduce_ns: u64,
    /// Optimizer.
    pub optimizer_ns: u64,
}

impl StepParts {
    /// Names and values, in the order of the tables.
    pub fn named(&self) -> [(&'static str, u64); 11] {
        [
            ("dense", self.dense_ns),
            ("router", self.router_ns),
            ("plan", self.plan_ns),
            ("reroute", self.reroute_ns),
            ("weight sync", self.weight_sync_ns),
            ("exposed sync", self.exposed_sync_ns),
            ("all-to-all", self.all_to_all_ns),
            ("experts", self.experts_ns),
            ("grad reduce", self.grad_reduce_exposed_ns),
            ("all-reduce", self.all_reduce_ns),
            ("optimizer", self.optimizer_ns),
        ]
    }

    /// Sum of the parts on the critical path: all but [`StepParts::weight_sync_ns`].
    pub fn critical_ns(&self) -> u64 {
        let critical = Self { weight_sync_ns: 0, ..*self };
        critical.named().iter().fold(0, |sum, &(_, ns)| sum.saturating_add(ns))
    }

    /// Extra time that balancing puts on the critical path: plan and exposed sync.
    pub fn balancing_ns(&self) -> u64 {
        self.plan_ns.saturating_add(self.exposed_sync_ns)
    }
}

/// A training step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Optimizer step, from 0.
    pub step: u64,
    /// Mean cross-entropy over the step's tokens, in nats; null in JSON where it is not finite.
    #[serde(deserialize_with = "null_as_nan")]
    pub loss: f64,
    /// Tokens trained on, over all ranks and microbatches.
    pub tokens: u64,
    /// Tokens by parallel time.
    pub tokens_per_s: f64,
    /// As routed.
    pub imbalance_before: Imbalance,
    /// As planned.
    pub imbalance_after: Imbalance,
    /// Parallel time of the step.
    pub parallel_step_ns: u64,
    /// Where it went.
    pub parts: StepParts,
    /// Wall time of the step, where ranks do not outnumber cores.
    #[serde(default)]
    pub wall_ns: Option<u64>,
}

/// Loss on held-out text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ValidationMetrics {
    /// The last step trained before it was measured.
    pub step: u64,
    /// Mean cross-entropy in nats; null in JSON where it is not finite.
    #[serde(deserialize_with = "null_as_nan")]
    pub loss: f64,
    /// Tokens it was measured on.
    pub tokens: u64,
}

/// A step of the same training, from the same seed on the same batches, under another policy: for its loss curve.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReferenceMetrics {
    /// The policy.
    pub policy: String,
    /// Optimizer step, from 0.
    pub step: u64,
    /// Mean cross-entropy in nats; null in JSON where it is not finite.
    #[serde(deserialize_with = "null_as_nan")]
    pub loss: f64,
}

/// One policy measured on one step's load.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicyMeasurement {
    /// Its name.
    pub policy: String,
    /// The step whose load it was.
    pub step: u64,
    /// Tokens of the step, over all ranks and microbatches.
    pub tokens: u64,
    /// As routed.
    pub imbalance_before: Imbalance,
    /// As planned.
    pub imbalance_after: Imbalance,
    /// Mean number of replicas a layer.
    pub replicas_per_layer: f64,
    /// Token choices processed on another rank than their source, over all.
    pub tokens_crossed_fraction: f64,
    /// Most tokens on one rank in a layer and microbatch: what activation memory must hold.
    pub peak_tokens_per_rank: u64,
    /// Parallel time of the step.
    pub parallel_step_ns: u64,
    /// Where it went.
    pub parts: StepParts,
    /// Wall time, where ranks do not outnumber cores.
    #[serde(default)]
    pub wall_ns: Option<u64>,
}

/// JSON has no NaN: it is written as null.
fn null_as_nan<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}
