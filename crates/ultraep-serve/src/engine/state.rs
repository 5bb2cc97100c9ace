//! What the ranks and the edge share: the scheduler and every request's state, under one lock held for microseconds.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc;
use ultraep_model::{VOCABULARY, Wanted};
use ultraep_schedule::{Batch, Chunk, Limits, LimitsError, Request, RequestId, Scheduler};

use super::entry::Entry;
use super::request::{Event, Generation, SubmitError, drawn_seed};
use crate::metrics::{Metrics, Outcome};
use crate::rank::Ran;

/// How the engine stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// The ranks are being started for the first time.
    Starting,
    /// All ranks are up.
    Serving,
    /// Nothing was heard of the ranks for too long: one hangs. When they go on all is as before.
    Stalled {
        /// For how long.
        reason: String,
    },
    /// A rank was lost; the ranks are being started again.
    Restarting {
        /// Which rank and why.
        reason: String,
    },
    /// Finishing what was admitted; nothing new is taken.
    Draining,
    /// All ranks have ended.
    Stopped,
}

/// Something that a rank is to do wrong, to see what comes of it.
#[derive(Clone, Debug)]
pub(super) enum Drill {
    /// The rank fails.
    Fail(usize),
    /// The rank does nothing until the other end of the channel is dropped.
    Hang(usize, Arc<Mutex<Receiver<()>>>),
}

/// What is needed to follow a request.
pub(super) struct Submitted {
    pub(super) id: RequestId,
    /// The seed of its draws, if chance has a part in it.
    pub(super) seed: Option<u64>,
    pub(super) events: mpsc::Receiver<Event>,
}

struct State {
    scheduler: Scheduler,
    entries: HashMap<RequestId, Entry>,
    next_id: u64,
    health: Health,
    drill: Option<Drill>,
}

/// Shared by all handles of an engine, its supervisor and its ranks.
pub(super) struct Shared {
    state: Mutex<State>,
    work: Condvar,
    /// Most tokens of a prompt with its new tokens: what the ranks' tables of positions and a rank's KV both have room for. The
    /// one place that admission, the HTTP edge and the ranks have it from.
    pub(super) context_tokens: usize,
    /// How often rank 0 has shown that the ranks go on.
    pub(super) beats: AtomicU64,
    /// Longest time that a request waits before it starts.
    queue_timeout: Duration,
    pub(super) metrics: Metrics,
}

/// What rank 0 decided that all ranks run next.
#[derive(Debug)]
pub(super) enum Step {
    /// A batch, with what it needs of the requests.
    Run(Work),
    /// Nothing came within the tick.
    Idle,
    /// The end.
    Stop,
}

/// A batch with its tokens.
#[derive(Debug, Default)]
pub(super) struct Work {
    pub(super) batch: Batch,
    /// One for each chunk: its tokens, and the logits wanted.
    pub(super) inputs: Vec<(Vec<u8>, Wanted)>,
    pub(super) drill: Option<Drill>,
}

impl Shared {
    /// For a model of sequences of up to `model_context` tokens.
    pub(super) fn new(
        limits: Limits,
        model_context: usize,
        queue_timeout: Duration,
        metrics: Metrics,
    ) -> Result<Self, LimitsError> {
        let context_tokens = model_context.min(limits.kv_tokens_per_rank as usize);
        let state = State {
            scheduler: Scheduler::new(limits)?,
            entries: HashMap::new(),
            next_id: 0,
            health: Health::Starting,
            drill: None,
        };
        let (state, work, beats) = (Mutex::new(state), Condvar::new(), AtomicU64::new(0));
        Ok(Self { state, work, context_tokens, beats, queue_timeout, metrics })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn health(&self) -> Health {
        self.lock().health.clone()
    }

    pub(super) fn drill(&self, drill: Drill) {
        self.lock().drill = Some(drill);
        self.work.notify_all();
    }

    /// A drill: the request's next chunk is one that its rank cannot run.
    pub(super) fn spoil(&self, id: RequestId) {
        if let Some(entry) = self.lock().entries.get_mut(&id) {
            entry.spoiled = true;
        }
    }

    /// Takes all of these requests, or says at once why not and takes none.
    pub(super) fn submit(&self, generations: Vec<Generation>) -> Result<Vec<Submitted>, SubmitError> {
        let mut state = self.lock();
        match &state.health {
            Health::Serving | Health::Starting => {}
            Health::Stalled { reason } => return Err(SubmitError::Unavailable(reason.clone())),
            Health::Restarting { reason } => {
                return Err(SubmitError::Unavailable(format!("the ranks are being restarted: {reason}")));
            }
            Health::Draining | Health::Stopped => {
                return Err(SubmitError::Unavailable("the server is shutting down".into()));
            }
        }
        let mut submitted = Vec::with_capacity(generations.len());
        for generation in generations {
            match state.submit(generation, self.context_tokens) {
                Ok(one) => submitted.push(one),
                Err(error) => {
                    // Nobody has composed meanwhile: they are all in the queue, and leave no trace.
                    for Submitted { id, .. } in submitted {
                        state.entries.remove(&id);
                        state.scheduler.cancel(id);
                    }
                    return Err(error);
                }
            }
        }
        self.show(&state);
        self.work.notify_all();
        Ok(submitted)
    }

    /// Frees what a request holds; nothing when it is complete.
    pub(super) fn cancel(&self, id: RequestId) {
        let mut state = self.lock();
        if state.entries.remove(&id).is_some() {
            state.scheduler.cancel(id);
            self.metrics.request(Outcome::Cancelled);
            self.show(&state);
            self.work.notify_all();
        }
    }

    fn show(&self, state: &State) {
        let limits = state.scheduler.limits();
        let kv = (0..limits.ranks).map(|rank| u64::from(state.scheduler.kv_used(rank))).sum();
        self.metrics.queue(state.scheduler.queued(), state.scheduler.running(), kv);
    }

    /// All ranks are up.
    pub(super) fn up(&self) {
        let mut state = self.lock();
        if matches!(state.health, Health::Starting | Health::Restarting { .. }) {
            state.health = Health::Serving;
        }
    }

    /// All ranks have come to another step.
    pub(super) fn beat(&self) {
        self.beats.fetch_add(1, Ordering::Relaxed);
        let mut state = self.lock();
        if matches!(state.health, Health::Stalled { .. }) {
            state.health = Health::Serving;
        }
    }

    /// Nothing has been heard of the ranks for too long, since they had come to `beats` steps.
    pub(super) fn stalled(&self, beats: u64, reason: String) {
        let mut state = self.lock();
        if state.health == Health::Serving && self.beats.load(Ordering::Relaxed) == beats {
            state.health = Health::Stalled { reason };
        }
    }

    /// A rank was lost, or one of them has named another that hangs: nothing can be finished, and the ranks start again once all
    /// of them have ended.
    pub(super) fn broken(&self, reason: &str) {
        {
            let mut state = self.lock();
            if matches!(state.health, Health::Starting | Health::Serving | Health::Stalled { .. }) {
                state.health = Health::Restarting { reason: reason.to_string() };
            }
        }
        self.lose_all(reason);
    }

    /// Takes nothing new; what was admitted is finished.
    pub(super) fn drain(&self) {
        let mut state = self.lock();
        if state.health != Health::Stopped {
            state.health = Health::Draining;
        }
        self.work.notify_all();
    }

    /// Ends every request with `reason`: their KV is lost.
    pub(super) fn lose_all(&self, reason: &str) {
        let mut state = self.lock();
        state.scheduler.reset();
        for (_, entry) in state.entries.drain() {
            entry.tell(Event::Lost(reason.to_string()));
            self.metrics.request(Outcome::Lost);
        }
        state.drill = None;
        self.show(&state);
        self.work.notify_all();
    }

    /// The ranks are gone. Whether they are to be started again.
    pub(super) fn down(&self, reason: Option<String>) -> bool {
        let restart = {
            let mut state = self.lock();
            match (&state.health, &reason) {
                (Health::Draining | Health::Stopped, _) | (_, None) => state.health = Health::Stopped,
                (_, Some(reason)) => state.health = Health::Restarting { reason: reason.clone() },
            }
            state.health != Health::Stopped
        };
        self.lose_all(reason.as_deref().unwrap_or("the server has stopped"));
        restart
    }

    /// The next step, waiting for one for at most `tick`.
    pub(super) fn next(&self, tick: Duration) -> Step {
        let idle =
            |state: &mut State| state.scheduler.is_idle() && state.drill.is_none() && state.health != Health::Draining;
        let waited = self.work.wait_timeout_while(self.lock(), tick, idle);
        let (mut state, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() {
            return Step::Idle;
        }
        if state.scheduler.is_idle() && state.health == Health::Draining {
            return Step::Stop;
        }
        let mut work = Work { drill: state.drill.take(), ..Work::default() };
        state.expire(self.queue_timeout, &self.metrics);
        let State { scheduler, entries, .. } = &mut *state;
        scheduler.compose(&mut work.batch);
        let input = |chunk: &Chunk| Entry::input(entries.get(&chunk.request), chunk);
        work.inputs = work.batch.chunks().iter().map(input).collect();
        self.show(&state);
        Step::Run(work)
    }

    /// Takes in what a batch gave, by rank.
    pub(super) fn complete(&self, work: &Work, ran: &[Ran]) {
        let mut state = self.lock();
        let mut results: Vec<_> = ran.iter().map(Results::new).collect();
        for (chunk, (_, wanted)) in work.batch.chunks().iter().zip(&work.inputs) {
            let rows = results[chunk.rank].next(*wanted, chunk.tokens as usize);
            let State { scheduler, entries, .. } = &mut *state;
            // A request that was cancelled meanwhile is not there any more.
            let Some(entry) = entries.get_mut(&chunk.request) else { continue };
            let last = match rows {
                Ok(rows) => entry.take(chunk, &rows, &self.metrics),
                Err(reason) => Some(Event::Failed(reason.to_string())),
            };
            if let Some(last) = last {
                let failed = matches!(last, Event::Failed(_));
                entry.tell(last);
                entries.remove(&chunk.request);
                scheduler.cancel(chunk.request);
                self.metrics.request(if failed { Outcome::Failed } else { Outcome::Finished });
            }
        }
        self.show(&state);
    }
}

/// Refuses what is longer than a sequence may be; gives the prompt's tokens as the scheduler counts them.
pub(super) fn check_length(prompt_tokens: usize, new_tokens: u32, limit: usize) -> Result<u32, SubmitError> {
    let fits = prompt_tokens.saturating_add(new_tokens as usize) <= limit;
    let tokens = u32::try_from(prompt_tokens).ok().filter(|_| fits);
    tokens.ok_or(SubmitError::TooLong { prompt_tokens, new_tokens, limit })
}

/// What a rank gave, chunk by chunk.
struct Results<'a> {
    logits: std::slice::ChunksExact<'a, f32>,
    refused: std::iter::Peekable<std::slice::Iter<'a, (usize, String)>>,
    number: usize,
}

impl<'a> Results<'a> {
    fn new(ran: &'a Ran) -> Self {
        let logits = ran.inferred.logits.chunks_exact(VOCABULARY);
        Self { logits, refused: ran.refused.iter().peekable(), number: 0 }
    }

    /// The logits of the rank's next chunk, or why it did not run.
    fn next(&mut self, wanted: Wanted, tokens: usize) -> Result<Vec<&'a [f32]>, &'a str> {
        let number = self.number;
        self.number += 1;
        if let Some((_, reason)) = self.refused.next_if(|(refused, _)| *refused == number) {
            return Err(reason);
        }
        let rows = match wanted {
            Wanted::Nothing => 0,
            Wanted::Last => 1,
            Wanted::All => tokens,
        };
        Ok(self.logits.by_ref().take(rows).collect())
    }
}

impl State {
    /// Puts a request into the queue, or says why not.
    fn submit(&mut self, generation: Generation, context_tokens: usize) -> Result<Submitted, SubmitError> {
        let new_tokens = generation.new_tokens;
        let prompt_tokens = check_length(generation.prompt.len(), new_tokens, context_tokens)?;
        let id = RequestId(self.next_id);
        self.scheduler.admit(Request { id, prompt_tokens, new_tokens })?;
        self.next_id += 1;
        let seed = generation.sampling.seed.unwrap_or_else(|| drawn_seed(id.0));
        let drawn = generation.sampling.draws();
        let (entry, events) = Entry::new(generation, seed);
        self.entries.insert(id, entry);
        let seed = drawn.then_some(seed);
        Ok(Submitted { id, seed, events })
    }

    /// Ends requests that have waited too long to start. Under lasting overload the queue would otherwise bring each to the ranks
    /// just before its client gives up, and all their work would be for nothing.
    fn expire(&mut self, limit: Duration, metrics: &Metrics) {
        // The queue is in the order of arrival.
        while let Some(id) = self.scheduler.longest_queued()
            && self.entries.get(&id).is_none_or(|entry| entry.arrived.elapsed() >= limit)
        {
            self.scheduler.cancel(id);
            if let Some(entry) = self.entries.remove(&id) {
                entry.tell(Event::Expired);
                metrics.request(Outcome::Rejected);
            }
        }
    }
}
