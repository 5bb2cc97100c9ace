//! What bounds a scheduler.

use serde::{Deserialize, Serialize};

/// Bounds of a [`crate::Scheduler`]; everything it holds is bounded by them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// `N`, ranks of the EP group.
    pub ranks: usize,
    /// Chunk budget: most tokens of a batch over all ranks. Dealt evenly: a rank runs at most the `N`-th part of it.
    pub chunk_tokens: u32,
    /// KV budget of a rank, in tokens. A request takes its whole share when it starts and gives it back when it ends, so
    /// nothing that was started ever waits for memory.
    pub kv_tokens_per_rank: u32,
    /// Most sequences on a rank at a time.
    pub sequences_per_rank: usize,
    /// Most requests that wait.
    pub queue_max: usize,
}

/// Why limits were refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LimitsError {
    /// Something that must be at least 1 is 0.
    #[error("{0} is 0; it must be at least 1")]
    Zero(&'static str),
    /// The budget has no token for every rank.
    #[error("a chunk budget of {chunk_tokens} tokens over {ranks} ranks: each rank needs at least 1")]
    Budget {
        /// The budget.
        chunk_tokens: u32,
        /// `N`.
        ranks: usize,
    },
    /// More sequences than one batch has tokens for: some would never decode.
    #[error(
        "{sequences} sequences a rank, but its share of the chunk budget is {share} tokens; allowed is at most that"
    )]
    Sequences {
        /// Sequences a rank.
        sequences: usize,
        /// A rank's share of the budget.
        share: u32,
    },
}

impl Limits {
    /// A rank's share of the chunk budget, in tokens.
    pub fn chunk_tokens_per_rank(&self) -> u32 {
        u32::try_from(self.ranks).map_or(0, |ranks| self.chunk_tokens.checked_div(ranks).unwrap_or(0))
    }

    /// Checks that they fit together.
    pub fn validate(&self) -> Result<(), LimitsError> {
        let sizes = [
            ("ranks", self.ranks),
            ("KV tokens of a rank", self.kv_tokens_per_rank as usize),
            ("sequences of a rank", self.sequences_per_rank),
            ("length of the queue", self.queue_max),
        ];
        if let Some((name, _)) = sizes.into_iter().find(|&(_, size)| size == 0) {
            return Err(LimitsError::Zero(name));
        }
        let share = self.chunk_tokens_per_rank();
        if share == 0 {
            return Err(LimitsError::Budget { chunk_tokens: self.chunk_tokens, ranks: self.ranks });
        }
        if self.sequences_per_rank > share as usize {
            return Err(LimitsError::Sequences { sequences: self.sequences_per_rank, share });
        }
        Ok(())
    }
}
