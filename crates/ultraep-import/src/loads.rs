//! The loads of one layer out of any recording, for commands that plan it: counts `[N, E]`, a matrix a microbatch.

use ultraep_load::{LoadMatrix, MatrixError};

use crate::{Grouping, GroupingError, Inputs, Microbatch, Microbatches, OpenOptions, RecordingInfo, Sources, survey};
use crate::{ImportError, SourceRule};

/// Most microbatches that are kept.
const MAX_MICROBATCHES: usize = 1 << 16;

/// Which loads of a recording, and how they are made where tokens or totals are recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The layer; may be left open where there is one only.
    pub layer: Option<u32>,
    /// The step; `None` takes all.
    pub step: Option<u64>,
    /// Ranks of the group; may be left open where they are recorded.
    pub ranks: Option<usize>,
    /// Tokens of a microbatch over all ranks, where single tokens are recorded.
    pub microbatch_tokens: usize,
    /// Which rank they come from.
    pub rule: SourceRule,
    /// Tokens that each recorded token stands for.
    pub scale: u32,
}

/// The loads of one layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerLoads {
    /// What the recording is.
    pub info: RecordingInfo,
    /// Which layer.
    pub layer: u32,
    /// A matrix a microbatch, in order.
    pub loads: Vec<LoadMatrix>,
    /// What a user should know: how sources were made, how the recording ended.
    pub notes: Vec<String>,
}

/// Why a recording gave no loads.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadsError {
    /// It cannot be read.
    #[error(transparent)]
    Import(#[from] ImportError),
    /// No microbatches could be made.
    #[error("{name}: {source}")]
    Grouping {
        /// The recording.
        name: String,
        /// Why.
        source: Box<GroupingError>,
    },
    /// A load that cannot be planned.
    #[error("{name}: {source}")]
    Matrix {
        /// The recording.
        name: String,
        /// Why.
        source: MatrixError,
    },
    /// Several layers, and none was chosen.
    #[error("{name}: {count} layers ({layers}): choose one with --layer, or use replay")]
    Layers {
        /// The recording.
        name: String,
        /// How many.
        count: usize,
        /// The first ones.
        layers: String,
    },
    /// A layer or step that is not there.
    #[error("{name}: no {what} {got}: there are {there}")]
    Absent {
        /// The recording.
        name: String,
        /// `layer` or `step`.
        what: &'static str,
        /// Which.
        got: u64,
        /// What there is.
        there: String,
    },
    /// The number of ranks is not recorded.
    #[error("{name}: {kind}, which do not say how many ranks there are: give --ranks")]
    Ranks {
        /// The recording.
        name: String,
        /// What is recorded.
        kind: &'static str,
    },
    /// Nothing is recorded.
    #[error("{name}: nothing is recorded in it")]
    Empty {
        /// The recording.
        name: String,
    },
}

/// Reads the loads of one layer. `name` is what errors call the recording.
pub fn read_loads(
    inputs: &Inputs,
    options: &OpenOptions,
    choice: &Choice,
    name: &str,
) -> Result<LayerLoads, LoadsError> {
    let name = name.to_owned();
    let mut recording = inputs.open(&options.unshown())?;
    let info = recording.info().clone();
    let found = survey(&mut *recording)?;
    let experts = options.experts.or(info.experts).unwrap_or(found.experts);
    if found.layers.is_empty() || experts == 0 {
        return Err(LoadsError::Empty { name });
    }
    let listed = |layers: &mut dyn Iterator<Item = u32>| {
        let first: Vec<String> = layers.take(8).map(|layer| layer.to_string()).collect();
        let more = if found.layers.len() > first.len() { ", .." } else { "" };
        format!("{}{more}", first.join(", "))
    };
    let layers = listed(&mut found.layers.keys().copied());
    let layer = match (choice.layer, found.layers.len()) {
        (Some(layer), _) if found.layers.contains_key(&layer) => layer,
        (Some(layer), _) => {
            return Err(LoadsError::Absent { name, what: "layer", got: layer.into(), there: layers });
        }
        (None, 1) => found.layers.keys().next().copied().unwrap_or(0),
        (None, count) => return Err(LoadsError::Layers { name, count, layers }),
    };
    let kind = match info.sources {
        Sources::Tokens => "single tokens",
        Sources::Totals | Sources::Ranks(_) => "totals of experts",
    };
    let ranks = choice.ranks.or(info.ranks).ok_or(LoadsError::Ranks { name: name.clone(), kind })?;
    let &Choice { microbatch_tokens, rule, scale, .. } = choice;
    let grouping = Grouping { ranks, experts, microbatch_tokens, rule, scale };
    let mut recording = inputs.open(options)?;
    let refused = |source: GroupingError| match source {
        GroupingError::Import(error) => LoadsError::Import(error),
        source => LoadsError::Grouping { name: name.clone(), source: Box::new(source) },
    };
    let mut microbatches = Microbatches::new(&mut *recording, grouping).map_err(refused)?;
    let (mut loads, mut one, mut steps) = (Vec::new(), Microbatch::default(), None::<(u64, u64)>);
    while loads.len() < MAX_MICROBATCHES && microbatches.next(&mut one).map_err(refused)? {
        if one.layer != layer {
            continue;
        }
        let (first, last) = steps.unwrap_or((one.step, one.step));
        steps = Some((first.min(one.step), last.max(one.step)));
        if choice.step.is_none_or(|step| step == one.step) {
            let counts = std::mem::take(&mut one.counts);
            let matrix = LoadMatrix::new(ranks, experts, counts);
            loads.push(matrix.map_err(|source| LoadsError::Matrix { name: name.clone(), source })?);
        }
    }
    let leftover = microbatches.leftover().tokens;
    if loads.is_empty() {
        return Err(match (choice.step, steps) {
            (Some(got), Some((first, last))) => {
                LoadsError::Absent { name, what: "step", got, there: format!("{first} to {last}") }
            }
            _ => LoadsError::Empty { name },
        });
    }
    let mut notes = info.notes.clone();
    notes.extend(grouping.describe_sources(info.sources));
    if leftover > 0 {
        notes.push(format!("{leftover} tokens at the ends of layers fill no microbatch and are left out"));
    }
    notes.extend(recording.ending());
    Ok(LayerLoads { info, layer, loads, notes })
}
