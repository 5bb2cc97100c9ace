//! What one batch runs.

use crate::RequestId;

/// What a chunk's tokens are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Part of the prompt.
    Prefill,
    /// The token produced last, to produce the next.
    Decode,
}

/// Consecutive tokens of one sequence in one batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Whose.
    pub request: RequestId,
    /// The rank that the sequence lives on.
    pub rank: usize,
    /// Position of the first token in the sequence.
    pub start: u32,
    /// How many; at least 1.
    pub tokens: u32,
    /// What they are.
    pub phase: Phase,
    /// KV that the sequence takes on its rank, in tokens, when this is its first chunk.
    pub reserves: Option<u32>,
    /// Number of the new token, from 0, that comes out of this chunk's last position.
    pub produces: Option<u32>,
    /// Whether the request is complete after this batch.
    pub ends: bool,
}

/// A sequence that is over: its KV is free from this batch on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Released {
    /// Whose.
    pub request: RequestId,
    /// Where it lived.
    pub rank: usize,
}

/// One batch. Chunks come by rank; on a rank, decode first, then prefill in order of admission.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    pub(crate) chunks: Vec<Chunk>,
    /// First chunk of every rank, `[N + 1]`.
    pub(crate) first: Vec<usize>,
    pub(crate) released: Vec<Released>,
}

impl Batch {
    /// All chunks, by rank.
    pub fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    /// Chunks of a rank; none for a rank that does not exist.
    pub fn of_rank(&self, rank: usize) -> &[Chunk] {
        match (self.first.get(rank), self.first.get(rank + 1)) {
            (Some(&from), Some(&to)) => &self.chunks[from..to],
            _ => &[],
        }
    }

    /// Sequences that ended or were cancelled since the batch before. Their KV counts as free for this batch's new ones, so
    /// it must be freed first.
    pub fn released(&self) -> &[Released] {
        &self.released
    }

    /// Whether there is nothing to run.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// Tokens of all ranks.
    pub fn tokens(&self) -> u64 {
        self.chunks.iter().map(|c| u64::from(c.tokens)).sum()
    }

    /// Tokens of a rank.
    pub fn tokens_of_rank(&self, rank: usize) -> u64 {
        self.of_rank(rank).iter().map(|c| u64::from(c.tokens)).sum()
    }

    /// Whether it has prompt tokens; without them it is decode alone.
    pub fn has_prefill(&self) -> bool {
        self.chunks.iter().any(|c| c.phase == Phase::Prefill)
    }
}
