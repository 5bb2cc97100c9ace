//! Finds and reads plan, model, machine and system files. A bad one is one line: file, line, field, what is allowed.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, Error};
use ultraep_baselines::{HistoryParams, LplbLinks, PolicyKind};
use ultraep_plan::{TransferMode, TransferParams};
use ultraep_replay::Hardware;
use ultraep_sim::{Calibrated, Machine, ModelSpec, SyncRule, System, bounded};

use super::plan_file::{Plan, n, optional};

use crate::error::CliError;

macro_rules! built_in {
    ($folder:literal, $($name:literal),*) => {
        [$(($name, include_str!(concat!("../../../../../", $folder, "/", $name, ".toml")))),*]
    };
}

/// Plans that come with the program.
pub(super) const PLANS: [(&str, &str); 13] = built_in!(
    "sims",
    "calibrate",
    "figure-11",
    "figure-12",
    "figure-13",
    "figure-14",
    "figure-15",
    "figure-16",
    "figure-17",
    "events",
    "faults",
    "scale",
    "sweep",
    "sweep-large"
);
const MACHINES: [(&str, &str); 1] = built_in!("sims", "paper-rack");
const MODELS: [(&str, &str); 5] =
    built_in!("models", "qwen3-235b-a22b", "glm4.5-106b-a12b", "glm4.7-358b", "deepseek-v3-671b-a37b", "moe-288b");
const SYSTEMS: &str = include_str!("../../../../../sims/systems.toml");

/// Largest file.
const MAX_BYTES: u64 = 1 << 20;

/// A system of `systems.toml`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SystemFile {
    #[serde(deserialize_with = "policy")]
    policy: PolicyKind,
    sync: Sync,
    relay: Option<Relay>,
    #[serde(default, deserialize_with = "bounded::<0, 1000000000000000, _, _>")]
    bytes_per_s: u64,
    #[serde(default, deserialize_with = "bounded::<0, 1000000000, _, _>")]
    start_ns: u64,
    /// Replicas that an expert needs for relays, instead of the rule's.
    #[serde(default, deserialize_with = "optional::<2, 1024, _>")]
    min_replicas: Option<u32>,
    #[serde(default, deserialize_with = "bounded::<0, 1000000000, _, _>")]
    plan_ns: u64,
    #[serde(default = "n::<1>", deserialize_with = "bounded::<1, 16777216, _, _>")]
    min_quota: u32,
    #[serde(default = "n::<3>", deserialize_with = "bounded::<1, 1000, _, _>")]
    history_steps: u32,
    /// Most variables of a linear program that is solved (`lplb`).
    #[serde(default = "n::<512>", deserialize_with = "bounded::<0, 100000, _, _>")]
    max_variables: u32,
    /// Ranks of a node of LPLB's torus; without it replicas go where load is least (`lplb`).
    #[serde(default, deserialize_with = "optional::<1, 1024, _>")]
    torus_ranks: Option<u32>,
    /// Where the numbers are from.
    #[serde(default)]
    #[allow(dead_code, reason = "for people who read the file")]
    source: String,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Sync {
    Never,
    Transfers,
    Collectives,
    Placement,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Relay {
    Direct,
    V1,
    Deep,
}

fn policy<'de, D: Deserializer<'de>>(from: D) -> Result<PolicyKind, D::Error> {
    String::deserialize(from)?.parse().map_err(D::Error::custom)
}

/// Parses a file; an error names file, line and what is allowed.
pub(super) fn parse<T: DeserializeOwned>(name: &str, text: &str) -> Result<T, CliError> {
    toml::from_str(text).map_err(|error| {
        let start = error.span().map_or(0, |span| span.start.min(text.len()));
        let line = text[..start].matches('\n').count();
        let shown = text.lines().nth(line).unwrap_or_default().trim();
        let message = error.message().replace('\n', " ");
        CliError::Input(format!("{name}: line {}: `{shown}`: {message}", line + 1))
    })
}

/// The text of a built-in file or of one on disk, and the name to call it by.
fn find(what: &str, name: &str, built_in: &[(&'static str, &'static str)]) -> Result<String, CliError> {
    if let Some((_, text)) = built_in.iter().find(|(known, _)| *known == name) {
        return Ok((*text).to_string());
    }
    let known = built_in.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    let refused = |why: String| CliError::Input(format!("{what} {name:?}: {why}; allowed are a file or {known}"));
    let size = std::fs::metadata(Path::new(name)).map_err(|error| refused(error.to_string()))?.len();
    if size > MAX_BYTES {
        return Err(refused(format!("{size} bytes, at most {MAX_BYTES}")));
    }
    std::fs::read_to_string(name).map_err(|error| refused(error.to_string()))
}

/// A plan, built in or a file.
pub(super) fn plan(name: &str) -> Result<Plan, CliError> {
    let plan: Plan = parse(name, &find("plan", name, &PLANS)?)?;
    if plan.case.is_empty() {
        return Err(CliError::Input(format!("{name}: no [[case]]: a plan needs one and more")));
    }
    Ok(plan)
}

/// A machine file: hardware by name, what else is known, what was calibrated.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct MachineFile {
    name: String,
    /// A hardware file, as `ultraep replay --hardware` takes it.
    hardware: String,
    #[serde(deserialize_with = "bounded::<1, MAX_RATE, _, _>")]
    scale_out_bytes_per_s: u64,
    #[serde(deserialize_with = "bounded::<1, MAX_RATE, _, _>")]
    memory_bytes_per_s: u64,
    #[serde(deserialize_with = "bounded::<1, MAX_RATE, _, _>")]
    memory_bytes: u64,
    #[serde(deserialize_with = "bounded::<0, MAX_NS, _, _>")]
    hop_ns: u64,
    #[serde(deserialize_with = "bounded::<4096, 1073741824, _, _>")]
    chunk_bytes: u64,
    #[serde(deserialize_with = "bounded::<1, 65536, _, _>")]
    chunk_tokens: u32,
    #[serde(deserialize_with = "bounded::<0, MAX_NS, _, _>")]
    count_ns: u64,
    #[serde(deserialize_with = "bounded::<0, MAX_NS, _, _>")]
    sync_start_ns: u64,
    calibrated: Calibrated,
    sources: Vec<String>,
}

const MAX_RATE: u64 = 1_000_000_000_000_000_000;
const MAX_NS: u64 = 1_000_000_000;

/// A machine, built in or a file.
pub(super) fn machine(name: &str) -> Result<Machine, CliError> {
    let file: MachineFile = parse(name, &find("machine", name, &MACHINES)?)?;
    let hardware = Hardware::find(&file.hardware).map_err(|error| CliError::Input(format!("{name}: {error}")))?;
    Ok(Machine {
        name: file.name,
        domain_ranks: hardware.domain_ranks,
        link_bytes_per_s: hardware.link_bytes_per_s,
        scale_out_bytes_per_s: file.scale_out_bytes_per_s,
        memory_bytes_per_s: file.memory_bytes_per_s,
        memory_bytes: file.memory_bytes,
        hop_ns: file.hop_ns,
        tile_rows: hardware.tile_rows,
        gemm_ns: hardware.gemm_ns,
        chunk_bytes: file.chunk_bytes,
        chunk_tokens: file.chunk_tokens,
        count_ns: file.count_ns,
        reroute_ns: hardware.reroute_ns,
        sync_start_ns: file.sync_start_ns,
        calibrated: file.calibrated,
        sources: hardware.sources.into_iter().chain(file.sources).collect(),
    })
}

/// A model, built in or a file.
pub(in crate::commands) fn model(name: &str) -> Result<ModelSpec, CliError> {
    let model: ModelSpec = parse(name, &find("model", name, &MODELS)?)?;
    if model.dense_layers >= model.layers {
        let ModelSpec { layers, dense_layers, .. } = model;
        return Err(CliError::Input(format!("{name}: dense_layers {dense_layers}: allowed are 0 to {}", layers - 1)));
    }
    Ok(model)
}

/// The systems of these names; `microbatches` is what a step has.
pub(super) fn systems(names: &[String], microbatches: u32) -> Result<Vec<System>, CliError> {
    let known: BTreeMap<String, SystemFile> = parse("systems.toml", SYSTEMS)?;
    let system = |name: &String| {
        let Some(file) = known.get(name) else {
            let all = known.keys().cloned().collect::<Vec<_>>().join(", ");
            return Err(CliError::Input(format!("no system {name:?}: allowed are {all}")));
        };
        let relay = match file.relay {
            Some(Relay::Direct) => TransferParams { mode: TransferMode::Direct, ..TransferParams::default() },
            Some(Relay::V1) => TransferParams::v1(),
            Some(Relay::Deep) | None => TransferParams::default(),
        };
        let relay = TransferParams { min_replicas: file.min_replicas.unwrap_or(relay.min_replicas), ..relay };
        let window = (file.history_steps * microbatches) as usize;
        Ok(System {
            name: name.clone(),
            policy: file.policy,
            sync: match file.sync {
                Sync::Never => SyncRule::Never,
                Sync::Transfers => SyncRule::Transfers(relay),
                Sync::Collectives => SyncRule::Collectives { start_ns: file.start_ns, bytes_per_s: file.bytes_per_s },
                Sync::Placement => SyncRule::Placement { bytes_per_s: file.bytes_per_s },
            },
            plan_ns: file.plan_ns,
            min_quota: file.min_quota,
            history: HistoryParams { window, interval: window },
            max_variables: file.max_variables as usize,
            links: match file.torus_ranks {
                Some(ranks) => LplbLinks::Torus { node_ranks: ranks as usize },
                None => LplbLinks::LeastLoaded,
            },
        })
    };
    names.iter().map(system).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_built_in_file_is_valid() {
        for (name, _) in PLANS {
            let plan = plan(name).unwrap();
            machine(&plan.machine).unwrap();
            systems(&plan.systems, 8).unwrap();
            for case in &plan.case {
                model(&case.model).unwrap();
            }
        }
        for (name, billions) in
            [("qwen3-235b-a22b", 235), ("glm4.5-106b-a12b", 106), ("glm4.7-358b", 358), ("deepseek-v3-671b-a37b", 671)]
        {
            let model = model(name).unwrap();
            let got = model.parameters() as f64 / 1e9;
            assert!((got / f64::from(billions) - 1.0).abs() < 0.05, "{name}: {got} billion parameters");
            assert!(!model.sources.is_empty());
        }
    }

    #[test]
    fn a_bad_file_names_line_field_and_what_is_allowed() {
        let good = PLANS[1].1;
        for (from, to, words) in [
            ("data_parallel = 4", "data_parallel = 0", "`data_parallel = 0`: 0: allowed are 1 to 1048576"),
            ("data_parallel = 4", "data_paralel = 4", "unknown field `data_paralel`"),
            ("none = 2.86", "none = 0.5", "imbalance 0.5: allowed are 1.0 (even) to 64.0"),
            ("metric = \"tflops\"", "metric = \"flops\"", "unknown variant `flops`, expected one of `tflops`"),
            ("experiment = \"training\"", "experiment = 3", "experiment"),
            ("machine =", "machines =", "machines"),
        ] {
            assert!(good.contains(from), "{from}");
            let error = parse::<Plan>("plan", &good.replacen(from, to, 1)).unwrap_err().to_string();
            let line = good.lines().position(|l| l.contains(from)).unwrap() + 1;
            assert!(error.contains(words) && !error.contains('\n'), "{error}");
            assert!(error.starts_with(&format!("plan: line {line}: ")), "{error}");
        }
    }
}
