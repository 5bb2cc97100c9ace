//! From pieces to microbatches of counts `[N, E]`, for a group of any size.
//!
//! Choices of tokens are collected layer by layer into windows of a set number of tokens; a window is a microbatch, and its
//! tokens are shared over source ranks by a [`SourceRule`]: which rank a token came from is then made up, and so is
//! locality. Counts are microbatches as they are; [`spread`] brings their source axis to `N` ranks.
//!
//! # Spreading `S` sources over `N` ranks
//!
//! Put all sources in a line of equal stretches, and the ranks in the same line; a rank takes from each source in proportion
//! to what of its stretch lies in the rank's. In units of `1 / lcm(S, N)` of the line, with `W` units a source, `c` tokens
//! and `x` units into the source's stretch:
//!
//! ```text
//! taken(x) = floor((c x + o) / W),   o = expert * 7919 mod W
//! share    = taken(end) - taken(begin)
//! ```
//!
//! *Exact*: shares of a source telescope to `floor((c W + o) / W) - floor(o / W) = c`. *Merging is exact merging*: where `N`
//! divides `S` a rank takes whole sources. *No rank is favoured*: the offset `o` moves the rounding about with the expert.

use std::collections::BTreeMap;
use std::collections::VecDeque;

use ultraep_plan::{MAX_EXPERTS, MAX_RANKS, MAX_TOKENS};
use ultraep_trace::NO_EXPERT;

use crate::{ImportError, Load, Piece, Recording, Sources};

/// Most memory of the windows of all layers, in bytes.
pub const MAX_WINDOW_BYTES: usize = 1 << 30;
/// Most memory of microbatches that are put in order, in bytes.
pub const MAX_SORT_BYTES: usize = 1 << 30;

/// Which source rank a token is given to where the recording does not know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SourceRule {
    /// The window is cut into `N` blocks of consecutive tokens of equal length, up to one: as sequences lie on ranks.
    #[default]
    Blocks,
    /// Token `j` of the window to rank `j mod N`.
    RoundRobin,
}

impl SourceRule {
    /// Name on the command line and in files.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Blocks => "blocks",
            Self::RoundRobin => "round-robin",
        }
    }

    /// Source of token `token` of `tokens`.
    fn source(self, token: usize, tokens: usize, ranks: usize) -> usize {
        match self {
            Self::Blocks => token * ranks / tokens,
            Self::RoundRobin => token % ranks,
        }
    }
}

/// The group that microbatches are made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grouping {
    /// `N`, source ranks.
    pub ranks: usize,
    /// `E`, experts.
    pub experts: usize,
    /// Tokens of a microbatch over all ranks, where single tokens are recorded.
    pub microbatch_tokens: usize,
    /// Which rank they come from.
    pub rule: SourceRule,
    /// Tokens that each recorded token stands for, at least 1.
    pub scale: u32,
}

impl Grouping {
    /// How the source axis comes about, for reports; `None` when it is as recorded.
    pub fn describe_sources(&self, sources: Sources) -> Option<String> {
        let ranks = self.ranks;
        match sources {
            Sources::Ranks(recorded) if recorded == ranks => None,
            Sources::Ranks(recorded) if recorded.is_multiple_of(ranks) => {
                Some(format!("sources: {recorded} recorded ranks merged into {ranks}"))
            }
            Sources::Ranks(recorded) => {
                Some(format!("sources: {recorded} recorded ranks spread over {ranks}: locality is partly synthetic"))
            }
            Sources::Tokens => Some(format!(
                "sources: {} tokens a microbatch given to ranks by {}: locality (remote tokens) is synthetic",
                self.microbatch_tokens,
                match self.rule {
                    SourceRule::Blocks => "blocks of consecutive tokens",
                    SourceRule::RoundRobin => "turns (round-robin)",
                }
            )),
            Sources::Totals => {
                Some("sources: only totals are recorded, spread evenly over ranks: locality is synthetic".to_owned())
            }
        }
    }
}

/// Why no microbatch could be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GroupingError {
    /// A number outside its limits.
    #[error("{what} {got}: allowed are 1 to {max}")]
    Range {
        /// Which.
        what: &'static str,
        /// As given.
        got: usize,
        /// Most.
        max: usize,
    },
    /// An expert that the group does not have.
    #[error("layer {layer}: expert {got}; the group has {experts}")]
    Expert {
        /// Where.
        layer: u32,
        /// As recorded.
        got: usize,
        /// `E`.
        experts: usize,
    },
    /// More tokens in a microbatch than a problem may hold.
    #[error("step {step}, layer {layer}: {got} tokens in one microbatch, allowed are up to {MAX_TOKENS}")]
    TooManyTokens {
        /// Where.
        step: u64,
        /// Where.
        layer: u32,
        /// As recorded, times the scale.
        got: u64,
    },
    /// The windows of all layers would take too much memory.
    #[error("windows of {layers} layers take over {MAX_WINDOW_BYTES} bytes: take fewer tokens a microbatch")]
    Memory {
        /// Layers seen.
        layers: usize,
    },
    /// The microbatches that have to be put in order would take too much memory.
    #[error(
        "over {MAX_SORT_BYTES} bytes of microbatches would have to be put in order: take larger ones, or fewer files"
    )]
    Order,
    /// The recording could not be read.
    #[error(transparent)]
    Import(#[from] ImportError),
}

/// One layer's load in one microbatch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Microbatch {
    /// Step; where tokens are collected, the number of the window in its layer.
    pub step: u64,
    /// Microbatch within the step.
    pub microbatch: u32,
    /// Layer.
    pub layer: u32,
    /// `lambda[r,e]`, `[N, E]` row-major.
    pub counts: Vec<u32>,
}

/// Tokens at the end that fill no window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leftover {
    /// Tokens left out, over all layers.
    pub tokens: u64,
    /// Tokens in windows, over all layers.
    pub used_tokens: u64,
}

/// The microbatches of a recording. Within a layer in order; between layers as the recording has them.
pub struct Microbatches<'a> {
    recording: &'a mut dyn Recording,
    grouping: Grouping,
    piece: Piece,
    /// Tokens of `piece` that are in windows already.
    taken: usize,
    windows: BTreeMap<u32, Window>,
    window_bytes: usize,
    /// Layers whose last window is still to be given out.
    rest: Option<VecDeque<u32>>,
    leftover: Leftover,
}

/// The tokens of a layer that wait for their window to be full.
#[derive(Debug, Default)]
struct Window {
    ids: Vec<u16>,
    /// Where each token's experts end in `ids`.
    ends: Vec<usize>,
    made: u64,
}

impl Window {
    fn bytes(&self) -> usize {
        self.ids.capacity() * size_of::<u16>() + self.ends.capacity() * size_of::<usize>()
    }
}

impl<'a> Microbatches<'a> {
    /// Over what is left of `recording`.
    pub fn new(recording: &'a mut dyn Recording, grouping: Grouping) -> Result<Self, GroupingError> {
        range("ranks", grouping.ranks, MAX_RANKS)?;
        range("experts", grouping.experts, MAX_EXPERTS)?;
        range("tokens a microbatch", grouping.microbatch_tokens, MAX_TOKENS as usize)?;
        range("scale", grouping.scale as usize, MAX_TOKENS as usize)?;
        let (piece, windows) = (Piece::default(), BTreeMap::new());
        Ok(Self {
            recording,
            grouping,
            piece,
            taken: 0,
            windows,
            window_bytes: 0,
            rest: None,
            leftover: Leftover::default(),
        })
    }

    /// Makes the next microbatch into memory that is reused; false at the end.
    ///
    /// A last window that is not full is left out, unless it is the only one of its layer ([`Microbatches::leftover`]).
    pub fn next(&mut self, out: &mut Microbatch) -> Result<bool, GroupingError> {
        while self.rest.is_none() {
            if self.take_piece(out)? {
                return Ok(true);
            }
            self.taken = 0;
            if !self.recording.next(&mut self.piece)? {
                self.rest = Some(self.windows.keys().copied().collect());
            }
        }
        while let Some(layer) = self.rest.as_mut().and_then(VecDeque::pop_front) {
            let Some(window) = self.windows.get(&layer).filter(|w| !w.ends.is_empty()) else { continue };
            if window.made == 0 {
                self.close_window(layer, out)?;
                return Ok(true);
            }
            self.leftover.tokens += window.ends.len() as u64;
        }
        Ok(false)
    }

    /// All that is left, in the order of steps: windows of tokens come layer by layer in most logs. Takes at most
    /// [`MAX_SORT_BYTES`].
    pub fn in_order(&mut self) -> Result<Vec<Microbatch>, GroupingError> {
        let (mut all, mut bytes, mut microbatch) = (Vec::new(), 0, Microbatch::default());
        while self.next(&mut microbatch)? {
            bytes += microbatch.counts.len() * size_of::<u32>() + size_of::<Microbatch>();
            if bytes > MAX_SORT_BYTES {
                return Err(GroupingError::Order);
            }
            all.push(std::mem::take(&mut microbatch));
        }
        all.sort_by_key(|m| (m.step, m.microbatch, m.layer));
        Ok(all)
    }

    /// Tokens used and left out so far; all of them after the last microbatch.
    pub fn leftover(&self) -> Leftover {
        self.leftover
    }

    /// Uses the piece up; true when a microbatch was made, which may leave some of the piece for the next call.
    fn take_piece(&mut self, out: &mut Microbatch) -> Result<bool, GroupingError> {
        let (step, layer) = (self.piece.step, self.piece.layer);
        match &mut self.piece.load {
            Load::Counts { counts, .. } if counts.is_empty() => Ok(false),
            Load::Counts { sources, counts } => {
                let columns = counts.len() / (*sources).max(1);
                if columns > self.grouping.experts {
                    return Err(GroupingError::Expert { layer, got: columns - 1, experts: self.grouping.experts });
                }
                spread(counts, *sources, self.grouping.ranks, self.grouping.experts, &mut out.counts);
                counts.clear();
                (out.step, out.microbatch, out.layer) = (step, self.piece.microbatch, layer);
                self.scale(out)?;
                Ok(true)
            }
            Load::Choices { per_token, ids } => {
                let window = self.windows.entry(layer).or_default();
                let before = window.bytes();
                let room = self.grouping.microbatch_tokens - window.ends.len();
                let left = ids.get(self.taken * *per_token..).unwrap_or_default();
                for token in left.chunks_exact(*per_token).take(room) {
                    window.ids.extend(token.iter().filter(|&&id| id != NO_EXPERT));
                    window.ends.push(window.ids.len());
                    self.taken += 1;
                }
                self.window_bytes = self.window_bytes + window.bytes() - before;
                let is_full = window.ends.len() == self.grouping.microbatch_tokens;
                if self.window_bytes > MAX_WINDOW_BYTES {
                    return Err(GroupingError::Memory { layers: self.windows.len() });
                }
                if is_full {
                    self.close_window(layer, out)?;
                }
                Ok(is_full)
            }
        }
    }

    /// Counts a window's tokens by source and empties it.
    fn close_window(&mut self, layer: u32, out: &mut Microbatch) -> Result<(), GroupingError> {
        let Grouping { ranks, experts, rule, .. } = self.grouping;
        let Some(window) = self.windows.get_mut(&layer) else { return Ok(()) };
        out.counts.clear();
        out.counts.resize(ranks * experts, 0);
        let mut start = 0;
        for (token, &end) in window.ends.iter().enumerate() {
            let row = rule.source(token, window.ends.len(), ranks) * experts;
            for &id in &window.ids[start..end] {
                if usize::from(id) >= experts {
                    return Err(GroupingError::Expert { layer, got: usize::from(id), experts });
                }
                out.counts[row + usize::from(id)] += 1;
            }
            start = end;
        }
        self.leftover.used_tokens += window.ends.len() as u64;
        (out.step, out.microbatch, out.layer) = (window.made, 0, layer);
        window.made += 1;
        window.ids.clear();
        window.ends.clear();
        self.scale(out)
    }

    fn scale(&self, out: &mut Microbatch) -> Result<(), GroupingError> {
        let total: u64 = out.counts.iter().map(|&c| u64::from(c)).sum();
        let got = total.saturating_mul(u64::from(self.grouping.scale));
        if got > u64::from(MAX_TOKENS) {
            return Err(GroupingError::TooManyTokens { step: out.step, layer: out.layer, got });
        }
        out.counts.iter_mut().for_each(|count| *count *= self.grouping.scale);
        Ok(())
    }
}

fn range(what: &'static str, got: usize, max: usize) -> Result<(), GroupingError> {
    if (1..=max).contains(&got) { Ok(()) } else { Err(GroupingError::Range { what, got, max }) }
}

/// Brings counts of `sources` rows, `[sources, columns]`, to `[ranks, experts]` in `out`; columns that are missing are 0.
/// Every expert keeps its total. The module says how.
pub fn spread(counts: &[u32], sources: usize, ranks: usize, experts: usize, out: &mut Vec<u32>) {
    out.clear();
    out.resize(ranks * experts, 0);
    if sources == 0 || counts.is_empty() {
        return;
    }
    let columns = counts.len() / sources;
    if sources == ranks && columns == experts {
        out.copy_from_slice(counts);
        return;
    }
    let line = (sources * ranks / gcd(sources, ranks)) as u64;
    let (of_source, of_rank) = (line / sources as u64, line / ranks as u64);
    for (source, row) in counts.chunks_exact(columns).enumerate() {
        let begin = source as u64 * of_source;
        let ranks_touched = (begin / of_rank)..(begin + of_source).div_ceil(of_rank);
        for rank in ranks_touched {
            let from = (rank * of_rank).max(begin) - begin;
            let to = ((rank + 1) * of_rank).min(begin + of_source) - begin;
            let out_row = &mut out[rank as usize * experts..][..experts];
            for (expert, (&count, sum)) in row.iter().zip(out_row).enumerate() {
                let offset = expert as u64 * 7919 % of_source;
                let taken = |units: u64| (u64::from(count) * units + offset) / of_source;
                *sum += (taken(to) - taken(from)) as u32;
            }
        }
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}
