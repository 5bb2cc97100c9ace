//! Files of the engines that load a placement.
//!
//! | format | who loads it | text |
//! |---|---|---|
//! | `sglang` | SGLang, `--init-expert-location FILE.json` | `{"physical_to_logical_map": [[...], ...]}`, a row for **every** layer of the model, layers without experts too; no other key |
//! | `vllm` | builds with `eplb_config.initial_expert_map_path` (vLLM pull request 49572; no release so far) | `[[...], ...]`, a row for each MoE layer in order, as its EPLB holds `physical_to_logical_map` |
//! | `vllm-ascend` | vLLM-Ascend, `expert_map_path` | `{"moe_layer_count", "layer_list": [{"layer_id", "device_count", "device_list": [{"device_id", "device_expert"}]}]}` |
//! | `trtllm` | TensorRT-LLM, `moe_config.load_balancer` | YAML: `num_slots`, `initial_global_assignments: {layer: [...]}`, `layer_updates_per_iter` |
//!
//! Sources, looked up for this: SGLang `python/sglang/srt/eplb/expert_location.py` (the file's keys are passed on as
//! arguments, and -1 would be taken for the last expert), vLLM `vllm/distributed/eplb/eplb_state.py`, vLLM-Ascend
//! `vllm_ascend/ops/expert_load_balancer.py` (lists of equal length, one index for each expert on a device), TensorRT-LLM
//! `examples/wide_ep/ep_load_balancer/generate_eplb_config.py` and `MoeLoadBalancerConfig`. None of them knows an empty slot.

mod json;
mod yaml;

use std::fmt;
use std::str::FromStr;

use crate::map::held;
use crate::{EMPTY, MapError, MapShape, PlacementMap};

/// Largest text that is read.
pub const MAX_TEXT_BYTES: usize = 16 << 20;

/// A format of placement files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapFormat {
    /// SGLang's `--init-expert-location`.
    Sglang,
    /// A list for each MoE layer, as vLLM's EPLB holds its map.
    Vllm,
    /// vLLM-Ascend's expert map.
    VllmAscend,
    /// TensorRT-LLM's configuration of its load balancer.
    TrtLlm,
}

impl MapFormat {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Sglang, Self::Vllm, Self::VllmAscend, Self::TrtLlm];

    /// Name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sglang => "sglang",
            Self::Vllm => "vllm",
            Self::VllmAscend => "vllm-ascend",
            Self::TrtLlm => "trtllm",
        }
    }

    /// How the engine is told of the file.
    pub const fn usage(self) -> &'static str {
        match self {
            Self::Sglang => {
                "SGLang: --init-expert-location FILE --ep-num-redundant-experts P-E (the name must end in .json)"
            }
            Self::Vllm => {
                "vLLM: no release loads a placement; builds with pull request 49572 take it as \
                 --eplb-config '{\"initial_expert_map_path\": \"FILE\"}'"
            }
            Self::VllmAscend => {
                "vLLM-Ascend: --additional-config '{\"eplb_config\": {\"expert_map_path\": \"FILE\"}}' \
                 (before 0.13: {\"expert_map_path\": \"FILE\"})"
            }
            Self::TrtLlm => "TensorRT-LLM: moe_config: {load_balancer: FILE} in the extra LLM API options",
        }
    }
}

impl fmt::Display for MapFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for MapFormat {
    type Err = ParseMapFormatError;

    fn from_str(name: &str) -> Result<Self, ParseMapFormatError> {
        let found = Self::ALL.into_iter().find(|format| format.name() == name);
        found.ok_or_else(|| ParseMapFormatError { got: name.to_owned() })
    }
}

/// A name that no format has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no placement format {got:?}: allowed are {}", MapFormat::ALL.map(MapFormat::name).join(", "))]
pub struct ParseMapFormatError {
    /// As given.
    pub got: String,
}

/// What a file may leave out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadHints {
    /// `N`; needed for all formats but `vllm-ascend`.
    pub ranks: Option<usize>,
    /// `E`; the highest expert that occurs plus one where it is not given.
    pub experts: Option<usize>,
}

/// Why a text gave no map.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// Too long.
    #[error("{got} bytes: allowed are up to {MAX_TEXT_BYTES}")]
    TooLong {
        /// Its length.
        got: usize,
    },
    /// Not well-formed, or not what a placement looks like.
    #[error("line {line}: {reason}")]
    Syntax {
        /// Where, from 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// Well-formed, but no format that is known.
    #[error(
        "no placement: allowed are SGLang's {{\"physical_to_logical_map\": [[...]]}}, a list of lists, vLLM-Ascend's \
         {{\"layer_list\": [...]}} and TensorRT-LLM's initial_global_assignments"
    )]
    Unknown,
    /// Rows of different lengths.
    #[error("layer {layer}: {got} physical experts; the first has {expected}")]
    Ragged {
        /// Row.
        layer: usize,
        /// Its entries.
        got: usize,
        /// Entries of the first row.
        expected: usize,
    },
    /// The format does not hold the number of ranks.
    #[error("how many ranks is not in the file: --ranks says it")]
    NoRanks,
    /// Other ranks than asked for.
    #[error("{got} devices in the file; {expected} ranks are asked for")]
    Ranks {
        /// In the file.
        got: usize,
        /// As asked.
        expected: usize,
    },
    /// Physical experts that cannot be the same on every rank.
    #[error("{physical} physical experts on {ranks} ranks: every rank must have the same number")]
    Uneven {
        /// `P`.
        physical: usize,
        /// `N`.
        ranks: usize,
    },
    /// A number out of limits.
    #[error(transparent)]
    Map(#[from] MapError),
}

/// Why a map has no such file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// An empty slot, which no engine knows.
    #[error("layer {layer}, rank {rank}: an empty slot: {format} has no place for one")]
    Empty {
        /// Row.
        layer: usize,
        /// Rank.
        rank: usize,
        /// Which format.
        format: MapFormat,
    },
    /// An expert that is nowhere.
    #[error("layer {layer}: expert {expert} is on no rank")]
    Missing {
        /// Row.
        layer: usize,
        /// Expert.
        expert: usize,
    },
    /// Two copies on one rank where the format can hold one.
    #[error("layer {layer}: two copies of expert {expert} on rank {rank}: vllm-ascend can hold one")]
    Twice {
        /// Row.
        layer: usize,
        /// Rank.
        rank: usize,
        /// Expert.
        expert: usize,
    },
}

/// Reads a placement; which format it is, its contents say.
pub fn read(text: &str, hints: ReadHints) -> Result<(PlacementMap, MapFormat), ReadError> {
    if text.len() > MAX_TEXT_BYTES {
        return Err(ReadError::TooLong { got: text.len() });
    }
    let first = text.trim_start_matches('\u{feff}').trim_start().chars().next();
    match first {
        Some('{' | '[') => json::read(text.trim_start_matches('\u{feff}'), hints),
        _ => Ok((yaml::read(text, hints)?, MapFormat::TrtLlm)),
    }
}

/// Writes a placement. `model_layers`: layers of the model, those without experts too; only `sglang` needs them, and takes
/// the highest layer number of the map plus one where they are not given.
pub fn write(map: &PlacementMap, format: MapFormat, model_layers: Option<usize>) -> Result<String, WriteError> {
    let findings = map.findings();
    if let Some(&(layer, expert)) = findings.missing.first() {
        return Err(WriteError::Missing { layer, expert });
    }
    let shape = map.shape();
    let ranks = || (0..shape.layers).flat_map(|layer| (0..shape.ranks).map(move |rank| (layer, rank)));
    if let Some((layer, rank)) = ranks().find(|&(layer, rank)| map.on(layer, rank).contains(&EMPTY)) {
        return Err(WriteError::Empty { layer, rank, format });
    }
    if let (MapFormat::VllmAscend, Some(&(layer, rank, expert))) = (format, findings.twice.first()) {
        return Err(WriteError::Twice { layer, rank, expert });
    }
    Ok(match format {
        MapFormat::Sglang => json::write_sglang(map, model_layers),
        MapFormat::Vllm => json::write_rows((0..shape.layers).map(|layer| map.row(layer).to_vec())) + "\n",
        MapFormat::VllmAscend => json::write_ascend(map),
        MapFormat::TrtLlm => yaml::write(map),
    })
}

/// A map of rows that all ranks share evenly. Rows are checked against each other.
fn map_of_rows(rows: Vec<Vec<i64>>, numbers: Option<Vec<u32>>, hints: ReadHints) -> Result<PlacementMap, ReadError> {
    let physical = rows.first().map_or(0, Vec::len);
    if let Some((layer, row)) = rows.iter().enumerate().find(|(_, row)| row.len() != physical) {
        return Err(ReadError::Ragged { layer, got: row.len(), expected: physical });
    }
    let ranks = hints.ranks.ok_or(ReadError::NoRanks)?;
    if ranks == 0 || physical == 0 || !physical.is_multiple_of(ranks) {
        return Err(ReadError::Uneven { physical, ranks });
    }
    let layers = rows.len();
    let entries: Vec<i64> = rows.into_iter().flatten().collect();
    map_of_entries(layers, ranks, physical / ranks, &entries, numbers, hints.experts)
}

fn map_of_entries(
    layers: usize,
    ranks: usize,
    slots_per_rank: usize,
    entries: &[i64],
    numbers: Option<Vec<u32>>,
    experts: Option<usize>,
) -> Result<PlacementMap, ReadError> {
    let highest = entries.iter().copied().max().unwrap_or(0).max(0);
    let experts = experts.unwrap_or_else(|| usize::try_from(highest).unwrap_or(usize::MAX).saturating_add(1));
    // What does not fit is refused by the map, which names the place.
    let narrow = |&entry: &i64| i32::try_from(entry).unwrap_or(i32::MAX);
    let shape = MapShape { layers, ranks, slots_per_rank, experts };
    let map = PlacementMap::new(shape, entries.iter().map(narrow).collect())?;
    Ok(match numbers {
        Some(numbers) => map.with_layer_numbers(numbers)?,
        None => map,
    })
}

/// Experts of one rank's slots, as numbers.
fn experts_on(map: &PlacementMap, layer: usize, rank: usize) -> Vec<usize> {
    held(map.on(layer, rank)).collect()
}

/// The beginning of what a file says, for an error.
fn shortened(text: &str) -> String {
    text.chars().take(40).collect()
}
