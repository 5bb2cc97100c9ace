//! The streaming model that every reader fills.

use std::fmt;

use crate::ImportError;

/// A recording being read, piece by piece.
pub trait Recording: Send {
    /// What is known before reading.
    fn info(&self) -> &RecordingInfo;

    /// Reads the next piece into memory that is reused; false at the end. Pieces of one layer come in order.
    fn next(&mut self, piece: &mut Piece) -> Result<bool, ImportError>;

    /// A word on how the recording ended, where something is missing: known after the last piece.
    fn ending(&self) -> Option<String> {
        None
    }
}

/// What a recording is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordingInfo {
    /// Its format.
    pub format: Format,
    /// `E`, where the format says; otherwise only a [`crate::survey`] tells.
    pub experts: Option<usize>,
    /// Experts chosen for each token, where the format says.
    pub top_k: Option<usize>,
    /// What is known about where tokens came from.
    pub sources: Sources,
    /// Ranks of the EP group, where the format says; also where it does not keep the source axis.
    pub ranks: Option<usize>,
    /// Ranks in a domain and slots on a rank when it was recorded, where the format says.
    pub domain_ranks: Option<usize>,
    /// Slots on each rank, where the format says and all are equal.
    pub slots_per_rank: Option<usize>,
    /// What a user should know: what was left out, what the format cannot hold.
    pub notes: Vec<String>,
    /// Anything else it says about itself.
    pub metadata: Vec<(String, String)>,
}

impl RecordingInfo {
    pub(crate) fn new(format: Format, sources: Sources) -> Self {
        Self {
            format,
            experts: None,
            top_k: None,
            sources,
            ranks: match sources {
                Sources::Ranks(ranks) => Some(ranks),
                Sources::Tokens | Sources::Totals => None,
            },
            domain_ranks: None,
            slots_per_rank: None,
            notes: Vec::new(),
            metadata: Vec::new(),
        }
    }
}

/// What a recording knows about the source axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sources {
    /// Counts by source rank, of this many.
    Ranks(usize),
    /// Single tokens in order, not where they were: sources are made by a [`crate::SourceRule`].
    Tokens,
    /// Totals of experts only: sources are made by spreading them evenly.
    Totals,
}

/// A format of recordings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// Our own traces.
    Uet,
    /// A run folder with a trace in it.
    RunFolder,
    /// moe-beyond CSV.
    MoeBeyond,
    /// vLLM MoE logger JSONL.
    VllmLogger,
    /// JSON of counts by layer and expert.
    ExpertCounts,
    /// Plain matrices.
    Matrices,
    /// UltraEP v1 `ultra_ep_trace_v1`.
    UltraEpV1,
    /// SGLang's expert distribution recorder.
    Sglang,
    /// TensorRT-LLM statistics.
    TensorRtLlm,
    /// Megatron router trace.
    Megatron,
    /// FLAME-MoE parquet.
    FlameMoe,
    /// Our own traces as parquet.
    UetParquet,
    /// Arrays of expert ids: `topk_ids` `[tokens, K]`, `routed_experts` `[tokens, layers, K]`.
    ExpertIds,
    /// A routing map `[tokens, E]` of 0 and 1.
    RoutingMap,
    /// A table with a row a (layer, expert), or a row a choice.
    LongTable,
    /// HarMoEny's folders: a folder a rank, a CSV a layer, a row an iteration.
    Harmoeny,
    /// JSON of forward passes: the experts of every token by layer.
    Passes,
    /// JSON of counts by rank and call.
    CallLog,
    /// Megatron-core `mcore_ep_load_dump_v1`.
    McoreLoadDump,
    /// Pickled `collections.Counter` of experts.
    Counters,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Uet => "trace of ours (.uet)",
            Self::RunFolder => "run folder of ours",
            Self::MoeBeyond => "moe-beyond CSV",
            Self::VllmLogger => "vLLM MoE logger",
            Self::ExpertCounts => "expert counts JSON",
            Self::Matrices => "plain matrices",
            Self::UltraEpV1 => "UltraEP v1 trace",
            Self::Sglang => "SGLang recorder",
            Self::TensorRtLlm => "TensorRT-LLM statistics",
            Self::Megatron => "Megatron router trace",
            Self::FlameMoe => "FLAME-MoE parquet",
            Self::UetParquet => "trace of ours as parquet",
            Self::ExpertIds => "array of expert ids",
            Self::RoutingMap => "routing map",
            Self::LongTable => "table of layers and experts",
            Self::Harmoeny => "HarMoEny folder",
            Self::Passes => "JSON of passes",
            Self::CallLog => "JSON of calls by rank",
            Self::McoreLoadDump => "Megatron-core load dump",
            Self::Counters => "pickled counters",
        })
    }
}

/// Part of a recording: some load of one layer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    /// Step or forward pass. For [`Load::Choices`] of no meaning to a replay; in a vLLM log it counts the engine's starts.
    pub step: u64,
    /// Microbatch within the step.
    pub microbatch: u32,
    /// MoE layer, by the recording's own number.
    pub layer: u32,
    /// The load.
    pub load: Load,
}

/// The load of a piece.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Load {
    /// Consecutive tokens of the layer: the experts each chose, `[tokens, per_token]` row-major,
    /// [`ultraep_trace::NO_EXPERT`] where there is none.
    Choices {
        /// `K`, at least 1.
        per_token: usize,
        /// The experts.
        ids: Vec<u16>,
    },
    /// A whole microbatch: `lambda[r,e]`, `[sources, E]` row-major, in tokens. One row where only totals are known.
    Counts {
        /// Rows.
        sources: usize,
        /// The counts.
        counts: Vec<u32>,
    },
}

impl Default for Load {
    fn default() -> Self {
        Self::Counts { sources: 0, counts: Vec::new() }
    }
}

impl Piece {
    /// Makes it choices of `per_token` experts a token and gives their list, emptied.
    pub(crate) fn choices(&mut self, per_token: usize) -> &mut Vec<u16> {
        if !matches!(self.load, Load::Choices { .. }) {
            self.load = Load::Choices { per_token, ids: Vec::new() };
        }
        match &mut self.load {
            Load::Choices { per_token: of_piece, ids } => {
                *of_piece = per_token;
                ids.clear();
                ids
            }
            Load::Counts { .. } => unreachable!("made choices above"),
        }
    }

    /// Makes it counts of `sources` rows and gives their list, emptied.
    pub(crate) fn counts(&mut self, sources: usize) -> &mut Vec<u32> {
        if !matches!(self.load, Load::Counts { .. }) {
            self.load = Load::default();
        }
        match &mut self.load {
            Load::Counts { sources: of_piece, counts } => {
                *of_piece = sources;
                counts.clear();
                counts
            }
            Load::Choices { .. } => unreachable!("made counts above"),
        }
    }
}
