//! What came out of a step: figures from the runs of its groups.

use ultraep_plan::time::at_rate_ps;

use serde::{Serialize, Serializer};

use crate::balancer::{SyncRule, System};
use crate::footprint::Footprint;
use crate::layer::LayerTimes;
use crate::memory::ActivationPeaks;
use crate::pipeline::{Op, Schedule};
use crate::runner::{Group, Sums};
use crate::span::Span;
use crate::step::StepSpec;
/// Optimizer traffic of a parameter: gradient, master weight and two moments read, three of them and the weight written.
const OPTIMIZER_BYTES: u64 = 28;
/// Weight and optimizer state of a parameter, moved when an expert is placed elsewhere.
const STATE_BYTES: u64 = 16;

/// What one system makes of a step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SystemReport {
    /// The system.
    pub system: String,
    /// Time of the step.
    pub step_ps: u64,
    /// Mean forward of a layer with experts.
    pub forward: LayerTimes,
    /// Mean backward of a layer with experts.
    pub backward: LayerTimes,
    /// Mean imbalance as routed.
    pub imbalance_before: f64,
    /// Mean imbalance after balancing.
    pub imbalance: f64,
    /// Largest imbalance after balancing.
    pub imbalance_worst: f64,
    /// Mean number of replicas of a layer.
    pub replicas: f64,
    /// Mean of the most replicas of one expert.
    pub fanout: f64,
    /// Share of rows that another rank than their source processes.
    pub remote_fraction: f64,
    /// Share of the pipeline's time that stages wait.
    pub bubble_fraction: f64,
    /// All-reduce of gradients that backward does not hide.
    pub all_reduce_ps: u64,
    /// Optimizer.
    pub optimizer_ps: u64,
    /// Experts placed anew, share of one step.
    pub placement_ps: u64,
    /// Model operations a second and accelerator, in tera.
    pub tflops: f64,
    /// Tokens a second, all accelerators together.
    pub tokens_per_s: f64,
    /// Peaks of activation memory.
    #[serde(skip)]
    pub peaks: ActivationPeaks,
    /// Memory of the fullest rank.
    pub memory: Footprint,
    /// Events handled; 0 in closed form.
    pub events: u64,
    /// Digest of all that happened; in files as 16 hexadecimal digits.
    #[serde(serialize_with = "hexadecimal")]
    pub digest: u64,
}

fn hexadecimal<S: Serializer>(digest: &u64, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(&format_args!("{digest:016x}"))
}

/// All that came out of a step.
#[derive(Clone, Debug)]
pub struct StepReport {
    /// Figures.
    pub system: SystemReport,
    /// The pipeline of the slowest group.
    pub ops: Vec<(Op, u64, u64)>,
    /// What each rank did when in the first forward and backward op of the first stage; empty in closed form or unless asked
    /// for.
    pub spans: Vec<Span>,
}

pub(crate) fn report(spec: &StepSpec, system: &System, schedule: &Schedule, sums: Sums, group: Group) -> StepReport {
    let layers_of_stage = u64::from(spec.model.layers.div_ceil(spec.pipeline.stages));
    let of_experts = u64::from(spec.model.experts.div_ceil(spec.ranks)) * spec.model.expert_parameters();
    let shared = u64::from(spec.model.shared_experts) * spec.model.expert_parameters();
    let dense = spec.model.attention.parameters(spec.model.hidden) + shared;
    let (experts, dense) = (layers_of_stage * of_experts, layers_of_stage * dense);
    // Gradients in fp32; experts are reduced over the groups, dense parameters over all their ranks.
    let ring =
        |bytes: u64, members: u64| (u128::from(bytes) * 2 * u128::from(members - 1) / u128::from(members)) as u64;
    let groups = u64::from(spec.data_parallel);
    let bytes = ring(experts.saturating_mul(4), groups).saturating_add(ring(4 * dense, groups * u64::from(spec.ranks)));
    let all_reduce = at_rate_ps(bytes, spec.machine.scale_out_bytes_per_s).saturating_sub(group.last_backward_ps);
    let owned = experts.div_ceil(groups) + dense.div_ceil(groups * u64::from(spec.ranks));
    let optimizer_ps = at_rate_ps(owned.saturating_mul(OPTIMIZER_BYTES), spec.machine.memory_bytes_per_s);
    let placement_ps = placement_ps(spec, system, &sums);
    let parts = [all_reduce, optimizer_ps, placement_ps];
    let step_ps = parts.into_iter().fold(group.timeline_ps, u64::saturating_add);
    let count = sums.loads.max(1) as f64;
    let tokens = u64::from(spec.pipeline.microbatches) * u64::from(spec.batch.tokens_per_rank) * u64::from(spec.ranks);
    let seconds = step_ps.max(1) as f64 / 1e12;
    let tokens_per_s = (tokens * groups) as f64 / seconds;
    let stages = group.busy_ps.len().max(1) as f64;
    let busy = group.busy_ps.iter().sum::<u64>() as f64 / (stages * group.timeline_ps.max(1) as f64);
    let system = SystemReport {
        system: system.name.clone(),
        step_ps,
        forward: sums.forward.over(sums.passes[0]),
        backward: sums.backward.over(sums.passes[1]),
        imbalance_before: sums.before / count,
        imbalance: sums.after / count,
        imbalance_worst: sums.worst,
        replicas: sums.replicas as f64 / count,
        fanout: sums.fanout as f64 / count,
        remote_fraction: sums.remote / count,
        bubble_fraction: 1.0 - busy,
        all_reduce_ps: all_reduce,
        optimizer_ps,
        placement_ps,
        tflops: tokens_per_s * spec.model.token_flops(spec.batch.sequence) as f64 / spec.gpus() as f64 / 1e12,
        tokens_per_s,
        peaks: sums.peaks,
        memory: Footprint::training(spec, system.sync, schedule, &sums.peaks),
        events: sums.events,
        digest: sums.digest,
    };
    StepReport { system, ops: group.ops, spans: group.spans }
}

/// Moving experts when they are placed anew, as a share of one of the steps between two placements.
fn placement_ps(spec: &StepSpec, system: &System, sums: &Sums) -> u64 {
    let (SyncRule::Placement { bytes_per_s } | SyncRule::Collectives { bytes_per_s, .. }) = system.sync else {
        return 0;
    };
    let sampled = u64::from(spec.layers_sampled.min(spec.model.moe_layers()) * spec.groups_sampled).max(1);
    let layers = u64::from(spec.model.moe_layers()).div_ceil(u64::from(spec.pipeline.stages));
    let state = STATE_BYTES * spec.model.expert_parameters();
    let moved = u128::from(state) * u128::from(sums.moved) * u128::from(layers) / u128::from(sampled);
    let moved = u64::try_from(moved).unwrap_or(u64::MAX);
    let steps = (system.history.interval as u64).div_ceil(u64::from(spec.pipeline.microbatches)).max(1);
    at_rate_ps(moved, bytes_per_s) / steps
}
