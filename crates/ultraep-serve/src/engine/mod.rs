//! The live engine: EP ranks as threads under a supervisor, driven batch by batch by the scheduler.
//!
//! ```text
//! edge ── submit, cancel ──► Shared (scheduler, requests) ◄── rank 0: next step, results
//!                                                                │ a channel to each rank, then a barrier
//!                                          all ranks: run their chunks, leave logits, finish the batch (synchronisation points)
//! supervisor: starts the ranks; when one is lost all requests end, and it starts them again
//! watchdog: says when nothing is heard of the ranks any more
//! ```
//!
//! What is wrong with one request ends that request: its rank leaves its chunk out and says why, and the batch goes on. Ranks
//! start again only when the group is broken: one of them was lost or hangs, or a collective failed.
//!
//! Ranks wait for work in the fabric's barrier, where they hold no core; rank 0 waits for requests and lets everyone go
//! round once a tick, so that the fabric's timeout keeps telling the dead from the idle.

mod entry;
mod request;
mod state;
mod watchdog;

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::mpsc;
use ultraep_baselines::PolicyKind;
use ultraep_fabric::{Fabric, Operation, run_threads};
use ultraep_runtime::{RuntimeConfig, RuntimeError};
use ultraep_schedule::{Limits, RequestId};

pub use request::{Event, FinishReason, Generation, Sampling, ScoredToken, SubmitError};
pub use state::Health;

use crate::metrics::Metrics;
use crate::rank::{ChunkInput, GroupConfig, Ran, RankEngine};
use crate::record::Observer;
use crate::{ServeError, ServedModel};
use state::{Drill, Shared, Step, Submitted, Work};
use watchdog::Watchdog;

/// What an engine is built from.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// The EP group. Its first policy balances every batch with prompt tokens; batches of decode alone run under its last.
    pub group: GroupConfig,
    /// Bounds of queue, batches and KV.
    pub limits: Limits,
    /// A request that has not started after this time is given up: [`Event::Expired`].
    pub queue_timeout: Duration,
}

/// A running engine. Dropping it stops it without finishing anything.
pub struct Engine {
    handle: EngineHandle,
    supervisor: Option<JoinHandle<()>>,
}

/// A way to the engine; clones are the same engine.
#[derive(Clone)]
pub struct EngineHandle {
    shared: Arc<Shared>,
    model: ServedModel,
    limits: Limits,
}

/// A request under way. Dropping it cancels the request and frees its work.
pub struct Subscription {
    id: RequestId,
    seed: Option<u64>,
    events: mpsc::Receiver<Event>,
    shared: Arc<Shared>,
}

impl Subscription {
    /// What happens next; none after the last event.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    /// As [`Subscription::next`], for a thread that may wait.
    pub fn next_blocking(&mut self) -> Option<Event> {
        self.events.blocking_recv()
    }

    /// The seed of its draws: the one it asked for, or the one it got. With it, the same request gives the same answer again.
    /// None where nothing is drawn (temperature 0): there it always does.
    pub fn seed(&self) -> Option<u64> {
        self.seed
    }

    /// A drill: the next chunk of this request is one that its rank cannot run, as if it had a fault.
    pub fn spoil(&self) {
        self.shared.spoil(self.id);
    }

    /// As [`Subscription::next`], from a poll function.
    pub fn poll_next(&mut self, context: &mut std::task::Context<'_>) -> std::task::Poll<Option<Event>> {
        self.events.poll_recv(context)
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.shared.cancel(self.id);
    }
}

impl EngineHandle {
    /// Takes a request, or says at once why not.
    pub fn submit(&self, generation: Generation) -> Result<Subscription, SubmitError> {
        let mut one = self.submit_all(vec![generation])?;
        one.pop().ok_or_else(|| SubmitError::Unavailable("the engine took nothing".into()))
    }

    /// Takes all of these requests, or says at once why not and takes none.
    pub fn submit_all(&self, generations: Vec<Generation>) -> Result<Vec<Subscription>, SubmitError> {
        let submitted = self.shared.submit(generations)?.into_iter();
        let follow = |Submitted { id, seed, events }| Subscription { id, seed, events, shared: self.shared.clone() };
        Ok(submitted.map(follow).collect())
    }

    /// Most tokens of a prompt with its new tokens: the model's context, or the KV budget of a rank where that is less. What
    /// is longer is refused with [`SubmitError::TooLong`].
    pub fn context_tokens(&self) -> usize {
        self.shared.context_tokens
    }

    /// Says whether a prompt with its new tokens is within [`EngineHandle::context_tokens`].
    pub fn check_length(&self, prompt_tokens: usize, new_tokens: u32) -> Result<(), SubmitError> {
        state::check_length(prompt_tokens, new_tokens, self.shared.context_tokens).map(drop)
    }

    /// How it stands.
    pub fn health(&self) -> Health {
        self.shared.health()
    }

    /// The model that is served.
    pub fn model(&self) -> &ServedModel {
        &self.model
    }

    /// Its bounds.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// What it counts.
    pub fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }

    /// Takes nothing new from now on; what was admitted is finished, then the ranks end.
    pub fn drain(&self) {
        self.shared.drain();
    }

    /// Ends every request at once.
    pub fn abort(&self) {
        self.shared.lose_all("the server is shutting down");
    }

    /// A drill: `rank` fails in the next batch, as if it had a fault.
    pub fn fail_rank(&self, rank: usize) {
        self.shared.drill(Drill::Fail(rank));
    }

    /// A drill: `rank` does nothing, from the next batch on until what is given back is dropped.
    #[must_use = "the rank goes on when this is dropped"]
    pub fn hang_rank(&self, rank: usize) -> Sender<()> {
        let (hold, held) = channel();
        self.shared.drill(Drill::Hang(rank, Arc::new(Mutex::new(held))));
        hold
    }
}

impl Engine {
    /// Starts the ranks.
    pub fn start(
        model: ServedModel,
        config: EngineConfig,
        observer: Option<Arc<dyn Observer>>,
    ) -> Result<Self, ServeError> {
        config.limits.validate()?;
        if let Some(kind) = config.group.policies.iter().find(|kind| kind.forces_routing()) {
            return Err(ServeError::ForcedRouting(kind.name()));
        }
        let threads = candle_core::utils::get_num_threads();
        if threads != 1 {
            return Err(ServeError::Train(ultraep_train::TrainError::TensorThreads { threads }));
        }
        let runtime = config.group.runtime(&model)?;
        let metrics = Metrics::default();
        let shared = Shared::new(config.limits, model.context_tokens(), config.queue_timeout, metrics)?;
        let shared = Arc::new(shared);
        let handle = EngineHandle { shared: shared.clone(), model: model.clone(), limits: config.limits };
        let watchdog = Watchdog::start(shared.clone(), config.group.timeout, observer.clone())?;
        let supervisor = Supervisor { shared, model, config, runtime, observer, _watchdog: watchdog };
        let thread = std::thread::Builder::new().name("supervisor".into()).spawn(move || supervisor.run());
        let thread = thread.map_err(ServeError::io("start a thread"))?;
        Ok(Self { handle, supervisor: Some(thread) })
    }

    /// A way to it.
    pub fn handle(&self) -> EngineHandle {
        self.handle.clone()
    }

    /// Finishes what was admitted, and waits for the ranks to end.
    pub fn stop(mut self) {
        self.handle.drain();
        self.join();
    }

    fn join(&mut self) {
        if let Some(thread) = self.supervisor.take() {
            // A panic of the supervisor was reported by its thread.
            let _ = thread.join();
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.handle.drain();
        self.handle.abort();
        self.join();
    }
}

struct Supervisor {
    shared: Arc<Shared>,
    model: ServedModel,
    config: EngineConfig,
    runtime: RuntimeConfig,
    observer: Option<Arc<dyn Observer>>,
    /// Ends with the supervisor.
    _watchdog: Watchdog,
}

/// Least and longest time between two starts of the ranks.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

impl Supervisor {
    fn run(self) {
        let mut wait = BACKOFF.0;
        loop {
            let before = self.shared.metrics.batches();
            let ended = self.run_group();
            let reason = ended.err();
            if let Some(reason) = &reason {
                self.shared.metrics.restart();
                if let Some(observer) = &self.observer {
                    observer.ranks_lost(reason);
                }
            }
            if !self.shared.down(reason) {
                return;
            }
            // Ranks that did some work start again at once; a fault at every start must not spin.
            wait = if self.shared.metrics.batches() > before { BACKOFF.0 } else { (wait * 2).min(BACKOFF.1) };
            std::thread::sleep(wait);
        }
    }

    /// One life of the group: until it is told to stop, or a rank is lost.
    fn run_group(&self) -> Result<(), String> {
        let spec = self.config.group.group(&self.runtime);
        let channels: Vec<_> = (0..spec.ranks).map(|_| channel()).collect();
        let (senders, receivers): (Vec<_>, Vec<_>) = channels.into_iter().unzip();
        let board = Board {
            senders: Mutex::new(Some(senders)),
            receivers: receivers.into_iter().map(|r| Mutex::new(Some(r))).collect(),
            results: (0..spec.ranks).map(|_| Mutex::new(Ran::default())).collect(),
        };
        let result = run_threads(&spec, |fabric| {
            let rank = fabric.rank().index();
            // This comes back only when every thread has ended, and one that hangs may never: who finds it out says so.
            self.run_rank(fabric, &board).inspect_err(|error| self.shared.broken(&blame(rank, error)))
        });
        result.map(drop).map_err(|error| error.to_string())
    }

    fn run_rank(&self, fabric: Box<dyn Fabric>, board: &Board) -> Result<(), ServeError> {
        let rank = fabric.rank().index();
        let mut engine = RankEngine::new(fabric, &self.model, &self.runtime)?;
        let ended = || ServeError::Ranks("the way to rank 0 is gone".into());
        let steps = taken(&board.receivers[rank]).ok_or_else(ended)?;
        let senders = if rank == 0 { taken(&board.senders) } else { None };
        let tick = self.config.group.timeout / 4;
        barrier(&engine)?;
        if rank == 0 {
            self.shared.up();
        }
        loop {
            if let Some(senders) = &senders {
                let step = Arc::new(self.shared.next(tick));
                senders.iter().try_for_each(|to| to.send(step.clone())).map_err(|_| ended())?;
            }
            // The step was sent before rank 0 came here, so past the barrier it is there.
            barrier(&engine)?;
            if rank == 0 {
                self.shared.beat();
            }
            let step: Arc<Step> = steps.try_recv().map_err(|_| ended())?;
            match &*step {
                Step::Idle => {}
                Step::Stop => return engine.leave(),
                Step::Run(work) => self.run_batch(rank, &mut engine, work, board)?,
            }
        }
    }

    fn run_batch(&self, rank: usize, engine: &mut RankEngine, work: &Work, board: &Board) -> Result<(), ServeError> {
        match &work.drill {
            Some(Drill::Fail(doomed)) if *doomed == rank => {
                return Err(ServeError::Ranks(format!("rank {rank} fails as it was told to")));
            }
            Some(Drill::Hang(doomed, until)) if *doomed == rank => {
                // It ends when the other side is dropped.
                let _ = until.lock().unwrap_or_else(PoisonError::into_inner).recv();
            }
            _ => {}
        }
        let first: usize = (0..rank).map(|r| work.batch.of_rank(r).len()).sum();
        let own = &work.inputs[first..first + work.batch.of_rank(rank).len()];
        let inputs: Vec<_> = own.iter().map(|(tokens, wanted)| ChunkInput { tokens, wanted: *wanted }).collect();
        let ran = engine.run(&work.batch, &inputs, self.policy(work))?;
        *board.results[rank].lock().unwrap_or_else(PoisonError::into_inner) = ran;
        let (time, synced_ns, records) = engine.finish_batch()?;
        if rank == 0 {
            let take = |slot: &Mutex<Ran>| std::mem::take(&mut *slot.lock().unwrap_or_else(PoisonError::into_inner));
            self.shared.complete(work, &board.results.iter().map(take).collect::<Vec<_>>());
            self.shared.metrics.batch(&time, synced_ns, &records);
            if let Some(observer) = &self.observer {
                observer.batch(&records);
            }
        }
        Ok(())
    }

    /// Decode alone is bound by memory and gains nothing from balancing.
    fn policy(&self, work: &Work) -> PolicyKind {
        let kinds = &self.config.group.policies;
        let kind = if work.batch.has_prefill() { kinds.first() } else { kinds.last() };
        kind.copied().unwrap_or_default()
    }
}

/// What the ranks of one life of the group share.
struct Board {
    senders: Mutex<Option<Vec<Sender<Arc<Step>>>>>,
    receivers: Vec<Mutex<Option<Receiver<Arc<Step>>>>>,
    /// What every rank's last batch gave: written before the batch is finished, taken by rank 0 after.
    results: Vec<Mutex<Ran>>,
}

/// What a rank's error says of whom: the fabric names the rank that it is about, all others are this rank's own.
fn blame(rank: usize, error: &ServeError) -> String {
    match error {
        ServeError::Fabric(error) | ServeError::Runtime(RuntimeError::Fabric(error)) => error.to_string(),
        error => format!("rank {rank}: {error}"),
    }
}

fn taken<T>(slot: &Mutex<Option<T>>) -> Option<T> {
    slot.lock().unwrap_or_else(PoisonError::into_inner).take()
}

fn barrier(engine: &RankEngine) -> Result<(), ServeError> {
    let mut experts = engine.experts().lock();
    experts.endpoint.fabric().run(Operation::Barrier)?;
    Ok(())
}
