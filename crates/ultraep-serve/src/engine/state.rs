//! What the ranks and the edge share: the scheduler and every request's state, under one lock held for microseconds.

use std::collections::HashMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use ultraep_model::{Inferred, VOCABULARY, Wanted};
use ultraep_schedule::{Batch, Chunk, Limits, LimitsError, Request, RequestId, Scheduler};

use super::request::{Event, FinishReason, Generation, Sampler, ScoredToken, SubmitError, score};
use crate::metrics::{Metrics, Outcome};

/// How the engine stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// The ranks are being started for the first time.
    Starting,
    /// All ranks are up.
    Serving,
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

/// One request.
struct Entry {
    generation: Generation,
    /// Prompt, then what was produced.
    tokens: Vec<u8>,
    scored: Vec<ScoredToken>,
    sampler: Sampler,
    events: mpsc::Sender<Event>,
    arrived: Instant,
}

struct State {
    scheduler: Scheduler,
    entries: HashMap<RequestId, Entry>,
    next_id: u64,
    health: Health,
    /// A rank that is to fail, for drills.
    doomed: Option<usize>,
}

/// Shared by all handles of an engine, its supervisor and its ranks.
pub(super) struct Shared {
    state: Mutex<State>,
    work: Condvar,
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
    /// A rank that is to fail in this batch.
    pub(super) doomed: Option<usize>,
}

impl Shared {
    pub(super) fn new(limits: Limits, queue_timeout: Duration, metrics: Metrics) -> Result<Self, LimitsError> {
        let state = State {
            scheduler: Scheduler::new(limits)?,
            entries: HashMap::new(),
            next_id: 0,
            health: Health::Starting,
            doomed: None,
        };
        Ok(Self { state: Mutex::new(state), work: Condvar::new(), queue_timeout, metrics })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn health(&self) -> Health {
        self.lock().health.clone()
    }

    pub(super) fn doom(&self, rank: usize) {
        self.lock().doomed = Some(rank);
        self.work.notify_all();
    }

    /// Takes a request, or says at once why not.
    pub(super) fn submit(&self, generation: Generation) -> Result<(RequestId, mpsc::Receiver<Event>), SubmitError> {
        let mut state = self.lock();
        match &state.health {
            Health::Serving | Health::Starting => {}
            Health::Restarting { reason } => {
                return Err(SubmitError::Unavailable(format!("the ranks are being restarted: {reason}")));
            }
            Health::Draining | Health::Stopped => {
                return Err(SubmitError::Unavailable("the server is shutting down".into()));
            }
        }
        let id = RequestId(state.next_id);
        let prompt_tokens = u32::try_from(generation.prompt.len()).unwrap_or(u32::MAX);
        state.scheduler.admit(Request { id, prompt_tokens, new_tokens: generation.new_tokens })?;
        state.next_id += 1;
        // Room for all that can happen: sending never waits for a slow reader.
        let (events, receiver) = mpsc::channel(generation.new_tokens as usize + 3);
        let entry = Entry {
            tokens: generation.prompt.clone(),
            scored: Vec::new(),
            sampler: Sampler::new(generation.sampling),
            events,
            arrived: Instant::now(),
            generation,
        };
        state.entries.insert(id, entry);
        self.show(&state);
        self.work.notify_all();
        Ok((id, receiver))
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
            // A reader that went away needs no word.
            let _ = entry.events.try_send(Event::Lost(reason.to_string()));
            self.metrics.request(Outcome::Lost);
        }
        state.doomed = None;
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
            |state: &mut State| state.scheduler.is_idle() && state.doomed.is_none() && state.health != Health::Draining;
        let waited = self.work.wait_timeout_while(self.lock(), tick, idle);
        let (mut state, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() {
            return Step::Idle;
        }
        if state.scheduler.is_idle() && state.health == Health::Draining {
            return Step::Stop;
        }
        let mut work = Work { doomed: state.doomed.take(), ..Work::default() };
        state.expire(self.queue_timeout);
        let State { scheduler, entries, .. } = &mut *state;
        scheduler.compose(&mut work.batch);
        work.inputs = work.batch.chunks().iter().map(|chunk| input(entries.get(&chunk.request), chunk)).collect();
        self.show(&state);
        Step::Run(work)
    }

    /// Takes in what a batch gave; `inferred` by rank.
    pub(super) fn complete(&self, work: &Work, inferred: Vec<Inferred>) {
        let mut state = self.lock();
        let mut logits: Vec<_> = inferred.iter().map(|i| i.logits.chunks_exact(VOCABULARY)).collect();
        for (chunk, (_, wanted)) in work.batch.chunks().iter().zip(&work.inputs) {
            let rows = match wanted {
                Wanted::Nothing => 0,
                Wanted::Last => 1,
                Wanted::All => chunk.tokens as usize,
            };
            let rows: Vec<&[f32]> = logits[chunk.rank].by_ref().take(rows).collect();
            let State { scheduler, entries, .. } = &mut *state;
            // A request that was cancelled meanwhile is not there any more.
            let Some(entry) = entries.get_mut(&chunk.request) else { continue };
            let finished = entry.take(chunk, &rows, &self.metrics);
            if let Some(reason) = finished {
                let _ = entry.events.try_send(Event::Finished(reason));
                entries.remove(&chunk.request);
                scheduler.cancel(chunk.request);
                self.metrics.request(Outcome::Finished);
            }
        }
        self.show(&state);
    }
}

impl State {
    /// Ends requests that have waited too long to start. Under lasting overload the queue would otherwise bring each to the ranks
    /// just before its client gives up, and all their work would be for nothing.
    fn expire(&mut self, limit: Duration) {
        // The queue is in the order of arrival.
        while let Some(id) = self.scheduler.longest_queued()
            && self.entries.get(&id).is_none_or(|entry| entry.arrived.elapsed() >= limit)
        {
            self.scheduler.cancel(id);
            if let Some(entry) = self.entries.remove(&id) {
                let _ = entry.events.try_send(Event::Expired);
            }
        }
    }
}

/// Tokens of a chunk, and the logits wanted.
fn input(entry: Option<&Entry>, chunk: &Chunk) -> (Vec<u8>, Wanted) {
    // The scheduler and the entries change under one lock, so there is one; tokens of nobody are harmless.
    let Some(entry) = entry else { return (vec![0; chunk.tokens as usize], Wanted::Nothing) };
    let start = chunk.start as usize;
    let tokens = entry.tokens[start..start + chunk.tokens as usize].to_vec();
    let scores_prompt = entry.generation.score_prompt && start < entry.generation.prompt.len();
    let wanted = match (scores_prompt, chunk.produces) {
        (true, _) => Wanted::All,
        (false, Some(_)) => Wanted::Last,
        (false, None) => Wanted::Nothing,
    };
    (tokens, wanted)
}

impl Entry {
    /// Takes in a chunk's logits; gives how it ended, if it did.
    fn take(&mut self, chunk: &Chunk, rows: &[&[f32]], metrics: &Metrics) -> Option<FinishReason> {
        let (prompt, top) = (self.generation.prompt.len(), self.generation.top);
        let start = chunk.start as usize;
        metrics.tokens(chunk.phase, chunk.tokens);
        if self.generation.score_prompt && start < prompt {
            if start == 0 {
                self.scored.push(ScoredToken { token: self.tokens[0], logprob: None, top: Vec::new() });
            }
            // Position p scores token p + 1, as far as it is of the prompt.
            let next = self.tokens[start + 1..prompt].iter();
            self.scored.extend(rows.iter().zip(next).map(|(logits, &token)| score(logits, token, top)));
        }
        let prefilled = start < prompt && start + chunk.tokens as usize >= prompt;
        if prefilled {
            metrics.ttft(self.arrived.elapsed());
            if self.generation.score_prompt {
                let _ = self.events.try_send(Event::Prompt(std::mem::take(&mut self.scored)));
            }
        }
        if let (Some(_), Some(logits)) = (chunk.produces, rows.last()) {
            let token = self.sampler.choose(logits);
            self.tokens.push(token);
            let _ = self.events.try_send(Event::Token(score(logits, token, top)));
            let output = &self.tokens[prompt..];
            if self.generation.stop.iter().any(|stop| !stop.is_empty() && output.ends_with(stop)) {
                return Some(FinishReason::Stop);
            }
        }
        chunk.ends.then_some(FinishReason::Length)
    }
}
