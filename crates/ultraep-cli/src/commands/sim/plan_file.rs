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
    /// Routed experts of the recorded model, where the recording does not say and its last experts never occur.
    #[serde(default, deserialize_with = "optional::<1, 4096, _>")]
    pub(super) recorded_experts: Option<u32>,
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde::de::DeserializeOwned;

    const DOCS: &str = include_str!("../../../../../docs/simulator.md");

    /// Rows of the table under a heading: key and default.
    fn documented(heading: &str) -> Vec<(String, String)> {
        let (_, rest) = DOCS.split_once(&format!("\n### {heading}\n")).expect(heading);
        let section = rest.split("\n### ").next().expect("a section");
        let cells =
            |line: &str| line.split('|').map(|cell| cell.trim().trim_matches('`').to_owned()).collect::<Vec<_>>();
        let rows = section.lines().filter(|line| line.starts_with("| `"));
        rows.map(|line| (cells(line)[1].clone(), cells(line)[3].clone())).collect()
    }

    /// Keys are those of the parser, defaults what it takes where a key is not given.
    fn check<T: DeserializeOwned + PartialEq + std::fmt::Debug>(heading: &str, least: &str) {
        let documented = documented(heading);
        let refused = toml::from_str::<T>(&format!("{least}\nno_such_key = 1\n")).expect_err("unknown").to_string();
        let known: Vec<&str> = refused.split('`').skip(1).step_by(2).filter(|word| *word != "no_such_key").collect();
        let keys: Vec<&str> = documented.iter().map(|(key, _)| key.as_str()).collect();
        let mut sorted = (keys.clone(), known.iter().copied().filter(|k| !k.contains(' ')).collect::<Vec<_>>());
        sorted.0.sort_unstable();
        sorted.1.sort_unstable();
        sorted.1.dedup();
        assert_eq!(sorted.0, sorted.1, "{heading}: {refused}");
        let plain: T = toml::from_str(least).expect(heading);
        for (key, default) in &documented {
            let is_required = least.lines().any(|line| line.starts_with(&format!("{key} = ")));
            assert_eq!(default == "-", is_required, "{heading}: {key}");
            if is_required {
                let without: Vec<&str> = least.lines().filter(|line| !line.starts_with(&format!("{key} = "))).collect();
                assert!(toml::from_str::<T>(&without.join("\n")).is_err(), "{heading}: {key} is not required");
            } else if !default.is_empty() {
                let given: T = toml::from_str(&format!("{least}\n{key} = {default}\n")).expect(key);
                assert_eq!(given, plain, "{heading}: {key} = {default} is not the default");
            }
        }
    }

    #[test]
    fn every_key_is_documented_with_its_default() {
        check::<Plan>("Top level", "title = \"\"\nexperiment = \"training\"\nmachine = \"m\"");
        check::<Case>("`[[case]]`", "name = \"\"\nmodel = \"m\"");
        check::<Load>("`load`", "");
        check::<SlowRank>("`slow`", "rank = 1\nspeed_percent = 50");
        check::<Paper>("`paper`", "system = \"none\"\nmetric = \"tflops\"\nvalue = 1.0");
        check::<Grid>("`[grid]`", "ratios = [2.0]\nworkload = \"process\"");
        check::<Sweep>("`[sweep]`", "");
        check::<Prefill>("`[prefill]`", "rates = [10]");
        let times = |name| format!("{name} = [1.0, 1.0, 1.0]\n");
        let names = ["ideal_forward_ms", "ideal_backward_ms", "none_forward_ms", "none_backward_ms"];
        check::<Calibration>("`[calibration]`", &format!("ideal_tflops = 1.0\n{}", names.map(times).concat()));
    }

    #[test]
    fn the_plans_in_the_docs_are_plans() {
        let blocks: Vec<&str> = DOCS.split("```toml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
        let kinds: Vec<Experiment> =
            blocks.iter().map(|text| toml::from_str::<Plan>(text).expect(text).experiment).collect();
        let all = [Experiment::Training, Experiment::Balancing, Experiment::Sweep, Experiment::Prefill];
        assert_eq!(kinds, all);
    }
}
