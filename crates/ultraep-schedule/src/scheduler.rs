//! Chunked prefill with continuous batching.
//!
//! ```text
//! compose:  for each rank, with its share of the chunk budget (in tokens, and in work where context counts):
//!               one token for every sequence that decodes
//!               then prompts that were begun, in the order they were begun, as much as fits; the first at least one token
//!           while a rank has budget left: the request at the head of the queue starts
//!               on the rank with most work left among those that have room for all its KV (lowest of equals);
//!               when none has room, the queue waits: nothing overtakes
//! ```
//!
//! A request is bound to a rank when it starts, not when it arrives: no rank idles while another has a queue. KV is taken
//! whole at the start, so no sequence is ever evicted. Decode comes first and a rank has at most as many sequences as budget,
//! so that tokens flow while long prompts run. Cost of composing: O(sequences + requests started x N).

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::{Batch, Chunk, Limits, LimitsError, Phase, Released};

/// Names a request. The caller's number; no two requests at the same time may share one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RequestId(pub u64);

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Its name.
    pub id: RequestId,
    /// Tokens of the prompt; at least 1.
    pub prompt_tokens: u32,
    /// Tokens to produce; 0 for a prefill alone.
    pub new_tokens: u32,
}

impl Request {
    /// KV that it needs, in tokens: every position that is computed. The last token produced is not.
    pub fn kv_tokens(&self) -> u64 {
        u64::from(self.prompt_tokens) + u64::from(self.new_tokens.saturating_sub(1))
    }
}

/// Why a request was not admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// Nothing to run.
    #[error("the prompt is empty")]
    Empty,
    /// It needs more than a rank ever has.
    #[error("prompt and new tokens need a KV cache of {needed} tokens; a rank has {limit}")]
    NeverFits {
        /// KV needed, in tokens.
        needed: u64,
        /// KV budget of a rank, in tokens.
        limit: u32,
    },
    /// As many wait as may; later it may be admitted.
    #[error("{queued} requests wait already, which is the limit")]
    QueueFull {
        /// Requests that wait.
        queued: usize,
    },
}

/// A request that was started.
#[derive(Clone, Copy, Debug)]
struct Sequence {
    request: Request,
    /// Positions computed.
    computed: u32,
}

impl Sequence {
    fn decodes(&self) -> bool {
        self.computed >= self.request.prompt_tokens
    }

    /// Runs the next `tokens` positions.
    fn advance(&mut self, rank: usize, tokens: u32) -> Chunk {
        let (request, start) = (self.request, self.computed);
        self.computed += tokens;
        // Position `prompt_tokens - 1 + n` produces token n.
        let produces = self.computed.checked_sub(request.prompt_tokens).filter(|_| request.new_tokens > 0);
        Chunk {
            request: request.id,
            rank,
            start,
            tokens,
            phase: if start < request.prompt_tokens { Phase::Prefill } else { Phase::Decode },
            reserves: None,
            produces,
            ends: u64::from(self.computed) >= request.kv_tokens(),
        }
    }
}

#[derive(Clone, Debug)]
struct RankState {
    kv_free: u32,
    /// In the order they were begun.
    sequences: Vec<Sequence>,
    /// Budget left in the batch that is composed: tokens and work.
    tokens_left: u32,
    work_left: u64,
    chunks: Vec<Chunk>,
}

/// The state of all requests: those that wait and those that run.
#[derive(Clone, Debug)]
pub struct Scheduler {
    limits: Limits,
    queue: VecDeque<Request>,
    ranks: Vec<RankState>,
    released: Vec<Released>,
    queued_tokens: u64,
}

impl Scheduler {
    /// With nothing to do.
    pub fn new(limits: Limits) -> Result<Self, LimitsError> {
        limits.validate()?;
        let rank = RankState {
            kv_free: limits.kv_tokens_per_rank,
            sequences: Vec::new(),
            tokens_left: 0,
            work_left: 0,
            chunks: Vec::new(),
        };
        let ranks = vec![rank; limits.ranks];
        Ok(Self { limits, queue: VecDeque::new(), ranks, released: Vec::new(), queued_tokens: 0 })
    }

    /// Its bounds.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Puts a request at the end of the queue, or refuses it at once.
    pub fn admit(&mut self, request: Request) -> Result<(), Refusal> {
        if request.prompt_tokens == 0 {
            return Err(Refusal::Empty);
        }
        let (needed, limit) = (request.kv_tokens(), self.limits.kv_tokens_per_rank);
        if needed > u64::from(limit) {
            return Err(Refusal::NeverFits { needed, limit });
        }
        if self.queue.len() >= self.limits.queue_max {
            return Err(Refusal::QueueFull { queued: self.queue.len() });
        }
        self.queued_tokens += u64::from(request.prompt_tokens);
        self.queue.push_back(request);
        Ok(())
    }

    /// Forgets a request, wherever it stands; gives whether it was there. Its KV is free from the next batch on.
    pub fn cancel(&mut self, id: RequestId) -> bool {
        if let Some(at) = self.queue.iter().position(|r| r.id == id) {
            let request = self.queue.remove(at);
            self.queued_tokens -= request.map_or(0, |r| u64::from(r.prompt_tokens));
            return true;
        }
        for (rank, state) in self.ranks.iter_mut().enumerate() {
            if let Some(at) = state.sequences.iter().position(|s| s.request.id == id) {
                state.release(at, rank, &mut self.released);
                return true;
            }
        }
        false
    }

    /// Forgets everything, as when the ranks were lost with all their KV; gives what was there: running ones by rank, then
    /// those that waited.
    pub fn reset(&mut self) -> Vec<RequestId> {
        let running = self.ranks.iter().flat_map(|r| &r.sequences).map(|s| s.request.id);
        let all = running.chain(self.queue.iter().map(|r| r.id)).collect();
        self.queue.clear();
        self.queued_tokens = 0;
        self.released.clear();
        for rank in &mut self.ranks {
            rank.sequences.clear();
            rank.kv_free = self.limits.kv_tokens_per_rank;
        }
        all
    }

    /// Composes the next batch into `batch` (its memory is reused) and takes it as run: sequences stand behind it, and those
    /// that it ends are gone from the next batch on.
    pub fn compose(&mut self, batch: &mut Batch) {
        batch.released.clear();
        batch.released.append(&mut self.released);
        let (share, work) = (self.limits.chunk_tokens_per_rank(), self.limits.work_per_rank());
        for (rank, state) in self.ranks.iter_mut().enumerate() {
            (state.tokens_left, state.work_left) = (share, work);
            state.continue_begun(&self.limits, rank);
        }
        self.start_queued();
        batch.chunks.clear();
        batch.first.clear();
        for (rank, state) in self.ranks.iter_mut().enumerate() {
            batch.first.push(batch.chunks.len());
            batch.chunks.append(&mut state.chunks);
            state.end_complete(rank, &mut self.released);
        }
        batch.first.push(batch.chunks.len());
    }

    fn start_queued(&mut self) {
        while let Some(&request) = self.queue.front() {
            let kv = request.kv_tokens();
            let room = |state: &RankState| {
                state.tokens_left > 0
                    && state.work_left >= self.limits.work(0, 1)
                    && state.sequences.len() < self.limits.sequences_per_rank
                    && u64::from(state.kv_free) >= kv
            };
            let open = self.ranks.iter().enumerate().filter(|(_, state)| room(state));
            let Some((rank, _)) = open.max_by_key(|&(rank, state)| (state.work_left, std::cmp::Reverse(rank))) else {
                break;
            };
            self.queue.pop_front();
            self.queued_tokens -= u64::from(request.prompt_tokens);
            self.ranks[rank].start(&self.limits, rank, request);
        }
    }

    /// Requests that wait.
    pub fn queued(&self) -> usize {
        self.queue.len()
    }

    /// The one that has waited longest.
    pub fn longest_queued(&self) -> Option<RequestId> {
        self.queue.front().map(|request| request.id)
    }

    /// Prompt tokens that wait in the queue or in prompts that were begun.
    pub fn waiting_tokens(&self) -> u64 {
        let begun = self.ranks.iter().flat_map(|r| &r.sequences);
        let left = begun.map(|s| u64::from(s.request.prompt_tokens.saturating_sub(s.computed)));
        self.queued_tokens + left.sum::<u64>()
    }

    /// Requests that were started and are not complete.
    pub fn running(&self) -> usize {
        self.ranks.iter().map(|r| r.sequences.len()).sum()
    }

    /// KV taken on a rank, in tokens.
    pub fn kv_used(&self, rank: usize) -> u32 {
        self.ranks.get(rank).map_or(0, |state| self.limits.kv_tokens_per_rank - state.kv_free)
    }

    /// Whether [`Scheduler::compose`] would give neither chunks nor released sequences.
    pub fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.released.is_empty() && self.running() == 0
    }
}

impl RankState {
    /// Gives the next tokens to everything that was begun: decode first, then prompts.
    fn continue_begun(&mut self, limits: &Limits, rank: usize) {
        for at in 0..self.sequences.len() {
            if self.sequences[at].decodes() {
                self.advance(limits, rank, at, 1);
            }
        }
        let mut first = true;
        for at in 0..self.sequences.len() {
            let Sequence { request, computed } = self.sequences[at];
            // What decoded above has decoded before: a prompt is never complete at the start of a batch.
            let left = request.prompt_tokens.saturating_sub(computed);
            if left > 0 {
                // The oldest prompt goes on even where its context alone fills the budget.
                let least = u32::from(std::mem::take(&mut first));
                let fits = limits.tokens_for(computed, self.work_left).max(least);
                self.advance(limits, rank, at, left.min(fits));
            }
        }
    }

    /// Runs up to `tokens` tokens of a sequence, as many as the batch has left.
    fn advance(&mut self, limits: &Limits, rank: usize, at: usize, tokens: u32) -> Option<&mut Chunk> {
        let tokens = tokens.min(self.tokens_left);
        if tokens == 0 {
            return None;
        }
        let chunk = self.sequences[at].advance(rank, tokens);
        self.tokens_left -= tokens;
        self.work_left = self.work_left.saturating_sub(limits.work(chunk.start, tokens));
        self.chunks.push(chunk);
        self.chunks.last_mut()
    }

    fn start(&mut self, limits: &Limits, rank: usize, request: Request) {
        // `admit` has compared it with the budget of a rank, which has 32 bits.
        let kv = request.kv_tokens() as u32;
        self.kv_free -= kv;
        self.sequences.push(Sequence { request, computed: 0 });
        let tokens = request.prompt_tokens.min(limits.tokens_for(0, self.work_left));
        if let Some(chunk) = self.advance(limits, rank, self.sequences.len() - 1, tokens) {
            chunk.reserves = Some(kv);
        }
    }

    fn release(&mut self, at: usize, rank: usize, released: &mut Vec<Released>) {
        let sequence = self.sequences.remove(at);
        self.kv_free += sequence.request.kv_tokens() as u32;
        released.push(Released { request: sequence.request.id, rank });
    }

    fn end_complete(&mut self, rank: usize, released: &mut Vec<Released>) {
        let complete = |s: &Sequence| u64::from(s.computed) >= s.request.kv_tokens();
        while let Some(at) = self.sequences.iter().position(complete) {
            self.release(at, rank, released);
        }
    }
}
