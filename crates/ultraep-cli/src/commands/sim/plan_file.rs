//! The plan file: what it may say, field by field, within which limits.

use std::path::PathBuf;

use serde::Deserialize;
use serde::de::{Deserializer, Error};
use ultraep_sim::{Fidelity, bounded};

/// What a plan simulates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Experiment {
    /// Training steps, every system on every case.
    Training,
    /// The machine's constants.
    Calibration,
    /// Balancing and weight sync alone, on synthetic loads of given imbalance.
    Balancing,
    /// Training steps over a grid of configurations.
    Sweep,
    /// Prefill serving: throughput when saturated, time to the first token at given rates.
    Prefill,
}

/// What a simulation measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Metric {
    Tflops,
    OfIdeal,
    OverNone,
    Imbalance,
    ForwardExpertsMs,
    ForwardAllToAllMs,
    ForwardRestMs,
    BackwardExpertsMs,
    BackwardAllToAllMs,
    BackwardRestMs,
    KeptPeak,
    LayerPeak,
    StepMs,
    Replicas,
    Fanout,
    Remote,
    TokensPerS,
    SyncMs,
    TtftMs,
    RecoveryMs,
    Relayed,
    MemoryGb,
    ActivationsGb,
    ActivationsOverIdeal,
}

/// A published number.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Paper {
    pub(super) system: String,
    pub(super) metric: Metric,
    pub(super) value: f64,
    /// Whether something was fitted to it.
    #[serde(default)]
    pub(super) calibrated: bool,
    /// Initial imbalance it is for; all of the grid unless given.
    pub(super) ratio: Option<f64>,
}

/// A load process: fitted to mean imbalances, or given.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Load {
    /// A recording instead: a file or folder that `ultraep replay` reads.
    pub(super) recording: Option<PathBuf>,
    /// Mean imbalance as routed, to fit to.
    #[serde(default, deserialize_with = "imbalance")]
    pub(super) none: Option<u64>,
    /// Mean imbalance under `eplb`, to fit to.
    #[serde(default, deserialize_with = "imbalance")]
    pub(super) eplb: Option<u64>,
    /// Share of experts' variance that is new in every microbatch, in thousandths, where `eplb` does not say.
    #[serde(default, deserialize_with = "bounded::<0, 1000, _, _>")]
    pub(super) drift_permille: u32,
    /// Lasting difference of experts, thousandths of an octave.
    #[serde(default, deserialize_with = "optional::<0, 6000, _>")]
    pub(super) skew: Option<u32>,
    /// Difference of experts that is new in every microbatch.
    #[serde(default, deserialize_with = "optional::<0, 6000, _>")]
    pub(super) drift: Option<u32>,
    /// Difference of sources.
    #[serde(default = "spread", deserialize_with = "bounded::<0, 6000, _, _>")]
    pub(super) spread: u32,
    /// Difference of layers.
    #[serde(default, deserialize_with = "bounded::<0, 6000, _, _>")]
    pub(super) layer_spread: u32,
    /// Difference of microbatches.
    #[serde(default, deserialize_with = "bounded::<0, 6000, _, _>")]
    pub(super) microbatch_spread: u32,
}

/// A rank below full speed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SlowRank {
    #[serde(deserialize_with = "bounded::<0, 1023, _, _>")]
    pub(super) rank: u32,
    #[serde(deserialize_with = "bounded::<1, 100, _, _>")]
    pub(super) speed_percent: u32,
}

/// What backward runs again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Recomputation {
    /// The least under which an even load fits the machine's memory.
    #[default]
    Auto,
    Nothing,
    Attention,
    Layer,
}

/// One workload on one machine.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Case {
    pub(super) name: String,
    pub(super) model: String,
    #[serde(default = "n::<64>", deserialize_with = "bounded::<1, 1024, _, _>")]
    pub(super) ranks: u32,
    /// All ranks unless given, where they fit the machine's domain; else the machine's domain.
    #[serde(default, deserialize_with = "optional::<1, 1024, _>")]
    pub(super) domain: Option<u32>,
    #[serde(default = "n::<2>", deserialize_with = "bounded::<0, 64, _, _>")]
    pub(super) slots: u32,
    /// Tokens of a rank in a microbatch.
    #[serde(default = "n::<8192>", deserialize_with = "bounded::<1, 1048576, _, _>")]
    pub(super) tokens: u32,
    #[serde(default = "n::<4096>", deserialize_with = "bounded::<1, 4194304, _, _>")]
    pub(super) sequence: u32,
    #[serde(default = "n::<8>", deserialize_with = "bounded::<1, 4096, _, _>")]
    pub(super) microbatches: u32,
    #[serde(default = "n::<1>", deserialize_with = "bounded::<1, 256, _, _>")]
    pub(super) stages: u32,
    /// Chunks of layers on a stage: interleaving.
    #[serde(default = "n::<1>", deserialize_with = "bounded::<1, 256, _, _>")]
    pub(super) chunks: u32,
    #[serde(default = "n::<1>", deserialize_with = "bounded::<1, 1048576, _, _>")]
    pub(super) data_parallel: u32,
    #[serde(default = "n::<1>", deserialize_with = "bounded::<1, 1024, _, _>")]
    pub(super) groups_sampled: u32,
    #[serde(default = "n::<6>", deserialize_with = "bounded::<1, 1024, _, _>")]
    pub(super) layers_sampled: u32,
    #[serde(default)]
    pub(super) recompute: Recomputation,
    #[serde(default = "n::<100>", deserialize_with = "bounded::<1, 10000, _, _>")]
    pub(super) bandwidth_percent: u32,
    #[serde(default)]
    pub(super) load: Load,
    /// Routed experts of a layer, instead of the model's.
    #[serde(default, deserialize_with = "optional::<1, 65535, _>")]
    pub(super) experts: Option<u32>,
    /// Experts that a token chooses, instead of the model's.
    #[serde(default, deserialize_with = "optional::<1, 256, _>")]
    pub(super) top_k: Option<u32>,
    #[serde(default)]
    pub(super) slow: Vec<SlowRank>,
    /// Whether the planner knows of slow ranks.
    #[serde(default = "yes")]
    pub(super) speeds_known: bool,
    #[serde(default, deserialize_with = "bounded::<0, 100, _, _>")]
    pub(super) jitter_percent: u32,
    #[serde(default)]
    pub(super) stale_counts: bool,
    #[serde(default, deserialize_with = "bounded::<0, 1000000, _, _>")]
    pub(super) late_plan_us: u32,
    /// Ranks lost from a group of `ranks` and so many more: their experts have new homes.
    #[serde(default, deserialize_with = "bounded::<0, 1023, _, _>")]
    pub(super) lost_ranks: u32,
    #[serde(default)]
    pub(super) paper: Vec<Paper>,
}

/// Loads of given imbalance, for balancing and weight sync.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Grid {
    pub(super) ratios: Vec<f64>,
    #[serde(default = "n::<4>", deserialize_with = "bounded::<1, 1000, _, _>")]
    pub(super) seeds: u32,
    pub(super) workload: String,
    /// Published means over the whole grid.
    #[serde(default)]
    pub(super) paper: Vec<Paper>,
}

/// Requests of a prefill experiment.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Prefill {
    /// Arrivals a second, one experiment each; the saturated one comes by itself.
    pub(super) rates: Vec<u32>,
    #[serde(default = "n::<2000>", deserialize_with = "bounded::<1, 1000000, _, _>")]
    pub(super) requests: u32,
    /// Least tokens of a prompt.
    #[serde(default = "n::<256>", deserialize_with = "bounded::<1, 1048576, _, _>")]
    pub(super) least_tokens: u32,
    /// Most tokens of a prompt.
    #[serde(default = "n::<32768>", deserialize_with = "bounded::<1, 1048576, _, _>")]
    pub(super) most_tokens: u32,
    /// Batches between two placements of historical systems.
    #[serde(default = "n::<50>", deserialize_with = "bounded::<1, 1000, _, _>")]
    pub(super) history_batches: u32,
}

/// Configurations of a sweep: every combination that can exist.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Sweep {
    /// Routed experts for each rank, instead of the model's.
    #[serde(default, deserialize_with = "optional::<1, 64, _>")]
    pub(super) experts_per_rank: Option<u32>,
    #[serde(default)]
    pub(super) ranks: Vec<u32>,
    #[serde(default)]
    pub(super) domain: Vec<u32>,
    #[serde(default)]
    pub(super) slots: Vec<u32>,
    #[serde(default)]
    pub(super) bandwidth_percent: Vec<u32>,
    #[serde(default)]
    pub(super) tokens: Vec<u32>,
    #[serde(default)]
    pub(super) top_k: Vec<u32>,
}

/// Published numbers that the machine is fitted to.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Calibration {
    pub(super) ideal_tflops: f64,
    pub(super) ideal_forward_ms: [f64; 3],
    pub(super) ideal_backward_ms: [f64; 3],
    pub(super) none_forward_ms: [f64; 3],
    pub(super) none_backward_ms: [f64; 3],
}

/// A plan file.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Plan {
    pub(super) title: String,
    #[serde(default)]
    pub(super) source: String,
    pub(super) experiment: Experiment,
    pub(super) machine: String,
    #[serde(default)]
    pub(super) systems: Vec<String>,
    #[serde(default)]
    pub(super) metrics: Vec<Metric>,
    #[serde(default)]
    pub(super) fidelity: Fidelity,
    #[serde(default = "n::<1>", deserialize_with = "bounded::<0, 4294967295, _, _>")]
    pub(super) seed: u32,
    #[serde(default)]
    pub(super) notes: Vec<String>,
    #[serde(default)]
    pub(super) case: Vec<Case>,
    pub(super) grid: Option<Grid>,
    pub(super) sweep: Option<Sweep>,
    pub(super) prefill: Option<Prefill>,
    pub(super) calibration: Option<Calibration>,
}

pub(super) fn n<const N: u32>() -> u32 {
    N
}

fn yes() -> bool {
    true
}

/// Sources differ by 0.7 octaves unless a plan says otherwise.
fn spread() -> u32 {
    700
}

pub(super) fn optional<'de, const LEAST: u64, const MOST: u64, D: Deserializer<'de>>(
    from: D,
) -> Result<Option<u32>, D::Error> {
    bounded::<LEAST, MOST, u32, D>(from).map(Some)
}

/// An imbalance, in thousandths.
fn imbalance<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    let got = f64::deserialize(from)?;
    let permille = (got * 1000.0).round();
    if (1000.0..=64_000.0).contains(&permille) {
        return Ok(Some(permille as u64));
    }
    Err(D::Error::custom(format!("imbalance {got}: allowed are 1.0 (even) to 64.0")))
}
