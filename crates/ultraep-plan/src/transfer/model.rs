//! What a transfer costs, and what a transfer planner may do.

use core::fmt;
use core::str::FromStr;

/// Most chunks that one expert may be cut into.
pub const MAX_CHUNKS: u64 = 1 << 12;

/// Most stripes that an expert may be cut into.
pub const MAX_STRIPES: u32 = 4;

/// Most nanoseconds that a chunk or a hop may take: about four seconds. Sums over all chunks of all experts fit `u64`.
const MAX_NS: u64 = u32::MAX as u64;

/// What the fabric takes for chunks of experts.
///
/// A rank sends one chunk at a time, `send_ns` each, and takes in one chunk at a time, `receive_ns` each; both at once. The
/// first byte of a chunk is at its receiver `hop_ns` after sending began. So a chunk whose sending starts at `s` is taken
/// in from `max(s + hop_ns, end of the receiver's chunk before)`, and is complete, its flag set and seen, when
/// `receive_ns` have passed since then and `hop_ns + send_ns` since `s`. The fabric between holds what waits.
///
/// ```text
/// sender    |--send_ns--|
/// receiver     hop_ns  |----receive_ns----|        complete; a relay may send it from here on
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TransferModel {
    /// Bytes of one expert's weights.
    pub expert_bytes: u64,
    /// Bytes of a chunk, the unit of readiness; the last one may be shorter and counts as full.
    pub chunk_bytes: u64,
    /// Time of a chunk on its sender's link.
    pub send_ns: u64,
    /// Time of a chunk on its receiver's link.
    pub receive_ns: u64,
    /// Latency of a hop: until the first byte of a chunk is there, flag and look-up included.
    pub hop_ns: u64,
}

/// Why a [`TransferModel`] was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TransferModelError {
    /// No bytes or too many chunks.
    #[error("experts of {expert_bytes} bytes in chunks of {chunk_bytes}: allowed are 1 to {MAX_CHUNKS} chunks")]
    Chunks {
        /// Bytes of an expert.
        expert_bytes: u64,
        /// Bytes of a chunk.
        chunk_bytes: u64,
    },
    /// A time outside its limits.
    #[error("{what} of {got} ns: allowed are {least} to {MAX_NS}")]
    Time {
        /// Which time.
        what: &'static str,
        /// What it was.
        got: u64,
        /// The least that is allowed.
        least: u64,
    },
}

impl TransferModel {
    /// A model of links that carry `link_bytes_per_s` (at least 1) in each direction. Times are rounded up.
    pub fn of_link(expert_bytes: u64, chunk_bytes: u64, link_bytes_per_s: u64, hop_ns: u64) -> Self {
        let ns = (u128::from(chunk_bytes) * 1_000_000_000).div_ceil(u128::from(link_bytes_per_s.max(1)));
        let ns = u64::try_from(ns).unwrap_or(u64::MAX).max(1);
        Self { expert_bytes, chunk_bytes, send_ns: ns, receive_ns: ns, hop_ns }
    }

    /// Checks the limits.
    pub fn check(&self) -> Result<(), TransferModelError> {
        let &Self { expert_bytes, chunk_bytes, send_ns, receive_ns, hop_ns } = self;
        if expert_bytes == 0 || chunk_bytes == 0 || expert_bytes.div_ceil(chunk_bytes) > MAX_CHUNKS {
            return Err(TransferModelError::Chunks { expert_bytes, chunk_bytes });
        }
        for (what, got, least) in [("send time", send_ns, 1), ("receive time", receive_ns, 1), ("hop", hop_ns, 0)] {
            if !(least..=MAX_NS).contains(&got) {
                return Err(TransferModelError::Time { what, got, least });
            }
        }
        Ok(())
    }

    /// Chunks of an expert.
    pub fn chunks(&self) -> u64 {
        self.expert_bytes.div_ceil(self.chunk_bytes)
    }

    /// From the start of sending a chunk to its being complete at an idle receiver.
    pub fn delay_ns(&self) -> u64 {
        self.hop_ns + self.send_ns.max(self.receive_ns)
    }
}

impl Default for TransferModel {
    /// One expert of Qwen3-235B in bf16 (36 MiB) in chunks of 8 tiles of 32 KiB over links of 900 GB/s a direction, 2 us a
    /// hop.
    fn default() -> Self {
        Self::of_link(3 * 4096 * 1536 * 2, 8 * 32 * 1024, 900_000_000_000, 2_000)
    }
}

/// Who sends an expert to its replicas.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TransferMode {
    /// Its home rank alone.
    Direct,
    /// Home rank and relays where that is predicted to be faster, else the home rank alone.
    #[default]
    Adaptive,
    /// Home rank and relays for every expert that may have them (see [`TransferParams`]).
    Relay,
}

impl TransferMode {
    /// All modes.
    pub const ALL: [Self; 3] = [Self::Direct, Self::Adaptive, Self::Relay];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Adaptive => "adaptive",
            Self::Relay => "relay",
        }
    }
}

impl fmt::Display for TransferMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that is no mode's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no such mode: allowed are direct, adaptive, relay")]
pub struct ParseTransferModeError;

impl FromStr for TransferMode {
    type Err = ParseTransferModeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|mode| mode.name() == text).ok_or(ParseTransferModeError)
    }
}

/// How relay trees are built.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TreeRule {
    /// As released in v1.0.0: two levels, `floor(sqrt(replicas))` relays, whatever the model says.
    TwoLevel,
    /// As deep as the model says: trees under the budget of sends a rank whose predicted time is least.
    #[default]
    Deep,
}

/// What a transfer planner may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TransferParams {
    /// Who sends.
    pub mode: TransferMode,
    /// How trees are built.
    pub tree: TreeRule,
    /// Replicas that an expert needs for relays; less than 2 counts as 2.
    pub min_replicas: u32,
    /// Most relays of an expert (of each of its stripes); 0 means none.
    pub max_relays: u32,
    /// Copies by which relaying must lower the critical fan-out (the most copies that one rank sends). For
    /// [`TreeRule::TwoLevel`] expert by expert, among home rank and relays, over the account so far; for
    /// [`TreeRule::Deep`] over all ranks. Mode [`TransferMode::Relay`] ignores it.
    pub min_fanout_gain: u32,
    /// Most stripes that [`TreeRule::Deep`] may cut an expert into, each with a tree of its own; at most [`MAX_STRIPES`], 0
    /// counts as 1. Where one is as good as two, there is one.
    pub max_stripes: u32,
    /// Where the estimate is at least so many percent below what direct takes at least, adaptive [`TreeRule::Deep`] trusts it
    /// and does not run the exact model, which costs far more than the rest of planning; `None`: it always runs, and then
    /// adaptive is never slower than direct under the model.
    pub trusted_gain_percent: Option<u32>,
    /// Groups whose domains have at most this many ranks go direct in mode [`TransferMode::Adaptive`].
    pub direct_ranks: u32,
}

impl TransferParams {
    /// The rule of v1.0.0: two levels, about `sqrt(|H(e)| - 1)` relays for an expert with 4 replicas and more where that lowers
    /// the critical fan-out by 2 and more; fabrics of 8 ranks and fewer go direct.
    pub const fn v1() -> Self {
        Self {
            mode: TransferMode::Adaptive,
            tree: TreeRule::TwoLevel,
            min_replicas: 4,
            max_relays: u32::MAX,
            min_fanout_gain: 2,
            max_stripes: 1,
            trusted_gain_percent: None,
            direct_ranks: 8,
        }
    }
}

impl TransferParams {
    /// Stripes that may be tried, from 1.
    pub(super) fn most_stripes(&self) -> u32 {
        self.max_stripes.clamp(1, MAX_STRIPES)
    }
}

impl Default for TransferParams {
    /// Adaptive, trees as deep and stripes as many as pays, no thresholds: the predicted time decides. Estimates are trusted
    /// from 5% on: over solved plans of 64 ranks they are within 4% of the exact model (tests/transfers).
    fn default() -> Self {
        Self {
            mode: TransferMode::Adaptive,
            tree: TreeRule::Deep,
            min_replicas: 2,
            max_relays: u32::MAX,
            min_fanout_gain: 0,
            max_stripes: 4,
            trusted_gain_percent: Some(5),
            direct_ranks: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_checked() {
        let model = TransferModel::default();
        assert_eq!((model.chunks(), model.send_ns, model.check()), (144, 292, Ok(())));
        let error = |model: TransferModel| model.check().expect_err("refused");
        let chunks = |expert_bytes, chunk_bytes| error(TransferModel { expert_bytes, chunk_bytes, ..model });
        assert_eq!(chunks(0, 1), TransferModelError::Chunks { expert_bytes: 0, chunk_bytes: 1 });
        assert_eq!(chunks(1, 0), TransferModelError::Chunks { expert_bytes: 1, chunk_bytes: 0 });
        assert!(matches!(chunks(MAX_CHUNKS + 1, 1), TransferModelError::Chunks { .. }));
        assert!(matches!(error(TransferModel { send_ns: 0, ..model }), TransferModelError::Time { least: 1, .. }));
        assert!(matches!(error(TransferModel { receive_ns: 0, ..model }), TransferModelError::Time { .. }));
        assert!(matches!(error(TransferModel { hop_ns: 1 << 32, ..model }), TransferModelError::Time { .. }));
        assert_eq!(TransferModel { hop_ns: 0, ..model }.check(), Ok(()));
        assert_eq!(TransferModel::of_link(1, 1, 0, 0).check(), Ok(()));
    }

    #[test]
    fn modes_have_names() {
        for mode in TransferMode::ALL {
            assert_eq!(mode.name().parse(), Ok(mode));
        }
        assert_eq!("rely".parse::<TransferMode>(), Err(ParseTransferModeError));
    }
}
