//! What bounds a scheduler.

use serde::{Deserialize, Serialize};

/// Bounds of a [`crate::Scheduler`]; everything it holds is bounded by them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// `N`, ranks of the EP group.
    pub ranks: usize,
    /// Chunk budget: most tokens of a batch over all ranks. Dealt evenly: a rank runs at most the `N`-th part of it.
    pub chunk_tokens: u32,
    /// Tokens of context whose attention is as much work as all else that is done for a token. A token at position `p` then
    /// weighs `1 + p / context_per_token`, and a rank's share of the budget bounds the weight of its tokens, too: chunks shrink
    /// as their context grows, and ranks end a batch together. 0 counts tokens alone.
    pub context_per_token: u32,
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

    /// A rank's share of the budget as work: in units of `1 / context_per_token` tokens, or of tokens where context does not
    /// count.
    pub(crate) fn work_per_rank(&self) -> u64 {
        u64::from(self.chunk_tokens_per_rank()) * u64::from(self.context_per_token.max(1))
    }

    /// Work of `tokens` tokens from position `start` on.
    pub(crate) fn work(&self, start: u32, tokens: u32) -> u64 {
        let (context, start, tokens) = (u64::from(self.context_per_token), u64::from(start), u64::from(tokens));
        if context == 0 { tokens } else { tokens * (context + start) + tokens * tokens.saturating_sub(1) / 2 }
    }

    /// Most tokens from position `start` on whose work is at most `work`.
    pub(crate) fn tokens_for(&self, start: u32, work: u64) -> u32 {
        let context = u64::from(self.context_per_token);
        if context == 0 {
            return u32::try_from(work).unwrap_or(u32::MAX);
        }
        // t (c + s) + t (t - 1) / 2 <= w, solved for t.
        let b = 2 * (context + u64::from(start)) - 1;
        let root = (b * b).saturating_add(work.saturating_mul(8)).isqrt();
        u32::try_from(root.saturating_sub(b) / 2).unwrap_or(u32::MAX)
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
