//! The persistent engine of one rank: its worker threads, and work handed to them.

use super::job::{Job, Moved};
use super::schedule::Tile;
use super::worker::{Step, Worker};
use crate::sync::{AtomicU32, AtomicU64, Ordering};
use crate::{Fabric, FabricError, OperationKind};
use core::time::Duration;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::{self, JoinHandle};
use ultraep_plan::Rank;

/// What an engine is started with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineSpec {
    /// Worker threads beside the rank's own, which works whenever it waits.
    pub background: usize,
    /// The most tasks that a plan gives a rank, stripes counted apart; more take memory when they come.
    pub tasks: usize,
    /// A weight sync that reads and writes at least so many bytes in the whole group stores past the caches. What wins depends
    /// on the machine's last-level cache: see [`EngineSpec::STREAMING_FROM_BYTES`].
    pub streaming_from_bytes: u64,
}

impl EngineSpec {
    /// 32 MiB, the last-level cache of the machine where this was measured. There 2 ranks take with streaming stores 1.5 to 1.9
    /// times as long at 13 MB, 1.2 times at 25 MB, equally long at 36 MB and 0.7 times at 400 MB.
    pub const STREAMING_FROM_BYTES: u64 = 32 << 20;
}

impl Default for EngineSpec {
    /// No background threads: the rank's own does all.
    fn default() -> Self {
        Self { background: 0, tasks: 64, streaming_from_bytes: Self::STREAMING_FROM_BYTES }
    }
}

/// Moves tiles with threads that are created once. One piece of work at a time: `prepare`, `go`, something else, `help`, `drain`.
///
/// Worker threads need no core permit: they stand for the copy engines of an accelerator. With no background threads all work
/// is done in [`TileEngine::help`], under the rank's own permit.
pub(crate) struct TileEngine {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    own: Worker,
    spec: EngineSpec,
    in_flight: bool,
    /// Background workers that may be at the work in hand.
    helpers: usize,
}

struct Shared {
    /// Written only when no worker is at it.
    job: RwLock<Job>,
    /// Number of the next tile.
    next: AtomicU64,
    state: Mutex<State>,
    wake: Condvar,
    /// A worker's thread has started.
    start: Condvar,
    /// Workers stop where they are.
    abort: AtomicU32,
}

#[derive(Default)]
struct State {
    /// Counts pieces of work.
    work: u64,
    /// Whether workers may still join in.
    open: bool,
    /// How many may.
    helpers: usize,
    /// The tile that the rank's own worker had in hand when it went.
    left: Option<Tile>,
    /// The tile that a background worker is blocked on.
    blocked: Option<Tile>,
    /// Workers at it.
    active: usize,
    /// Workers whose threads run.
    started: usize,
    stop: bool,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn job(&self) -> std::sync::RwLockReadGuard<'_, Job> {
        self.job.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl TileEngine {
    /// Starts the threads and waits until they run: what a thread takes at its start is taken then.
    ///
    /// # Errors
    /// [`FabricError::Os`] when a thread cannot be started.
    pub(crate) fn new(spec: EngineSpec) -> Result<Self, FabricError> {
        let shared = Arc::new(Shared {
            job: RwLock::new(Job::with_capacity(spec.tasks)),
            next: AtomicU64::new(0),
            state: Mutex::default(),
            wake: Condvar::new(),
            start: Condvar::new(),
            abort: AtomicU32::new(0),
        });
        let (threads, own) = (Vec::new(), Worker::default());
        let mut engine = Self { shared, threads, own, spec, in_flight: false, helpers: 0 };
        for index in 0..spec.background {
            let shared = Arc::clone(&engine.shared);
            let thread = thread::Builder::new().name(format!("tiles {index}"));
            // On an error the engine is dropped, which ends the threads so far.
            let thread = thread.spawn(move || background(&shared, index));
            engine.threads.push(thread.map_err(|error| FabricError::os("spawn a thread", error))?);
        }
        let state = engine.shared.state();
        let started = engine.shared.start.wait_while(state, |state| state.started < spec.background);
        drop(started.unwrap_or_else(PoisonError::into_inner));
        Ok(engine)
    }

    /// What it was started with.
    pub(crate) fn spec(&self) -> EngineSpec {
        self.spec
    }

    /// Takes this work in hand and says what it moves on this rank; workers begin with [`TileEngine::go`]. On an error nothing is in
    /// hand.
    ///
    /// # Errors
    /// [`FabricError::InFlight`] when work is in hand; what `build` returns.
    pub(crate) fn prepare(
        &mut self,
        rank: Rank,
        build: impl FnOnce(&mut Job) -> Result<Moved, FabricError>,
    ) -> Result<Moved, FabricError> {
        if self.in_flight {
            let operation = OperationKind::Stream;
            return Err(FabricError::InFlight { operation, rank, in_flight: operation });
        }
        let mut job = self.shared.job.write().unwrap_or_else(PoisonError::into_inner);
        let built = build(&mut job);
        if built.is_err() {
            job.clear();
        }
        drop(job);
        self.in_flight = built.is_ok();
        built
    }

    /// Lets at most `workers` background workers begin.
    pub(crate) fn go(&mut self, workers: usize) {
        let shared = &*self.shared;
        let tiles = shared.job().schedule.tiles();
        // Relaxed: workers see these after they have taken the state's lock below.
        shared.next.store(0, Ordering::Relaxed);
        shared.abort.store(0, Ordering::Relaxed);
        shared.state().blocked = None;
        self.own = Worker::default();
        self.helpers = if tiles > 0 { workers.min(self.spec.background) } else { 0 };
        if self.helpers > 0 {
            let mut state = shared.state();
            (state.work, state.open, state.helpers, state.left) = (state.work + 1, true, self.helpers, None);
            drop(state);
            shared.wake.notify_all();
        }
    }

    /// Plants a bug: see [`Job`].
    #[cfg(test)]
    pub(super) fn ignore_credits(&mut self) {
        self.shared.job.write().unwrap_or_else(PoisonError::into_inner).ignores_credits = true;
    }

    /// Whether the work in hand changes masters.
    pub(crate) fn adds_to_masters(&self) -> bool {
        self.in_flight && self.shared.job().adds_to_masters()
    }

    /// Works as the rank's own worker until no tile is left to take; or, if there are background workers, until its tile has to wait
    /// and `enough` holds: they do the rest. Does nothing when no work is in hand.
    ///
    /// # Errors
    /// The group's failure; [`FabricError::Timeout`], which names the rank that was waited for. The work is over then, and the
    /// memory given back.
    pub(crate) fn help(&mut self, fabric: &mut dyn Fabric, enough: &dyn Fn() -> bool) -> Result<(), FabricError> {
        if !self.in_flight {
            return Ok(());
        }
        let result = self.work_along(fabric, enough);
        if result.is_err() {
            self.end();
        }
        result
    }

    fn work_along(&mut self, fabric: &mut dyn Fabric, enough: &dyn Fn() -> bool) -> Result<(), FabricError> {
        let shared = Arc::clone(&self.shared);
        let job = shared.job();
        let others = self.helpers > 0;
        if others && let Some(tile) = shared.state().left.take() {
            self.own.take_back(tile);
        }
        loop {
            match self.own.step(&job.schedule, &shared.next, &mut &*job) {
                Step::Moved => {}
                Step::Done => break,
                Step::Blocked(tile) if others && enough() => {
                    self.own = Worker::default();
                    let mut state = shared.state();
                    (state.left, state.work) = (Some(tile), state.work + 1);
                    drop(state);
                    shared.wake.notify_all();
                    break;
                }
                Step::Blocked(tile) => {
                    let rank = fabric.rank();
                    let peer = job.awaited(&tile).unwrap_or(rank);
                    let direct = fabric.direct().ok_or(FabricError::NoDirectAccess { rank })?;
                    // A tile may wait for one rank's chunk and then for another's credit: only the one that is awaited is to blame.
                    let another = || peer != rank && job.awaited(&tile) != Some(peer);
                    direct.wait_until(peer, &|| job.is_ready(&tile) || another() || (others && enough()))?;
                }
            }
        }
        job.fence();
        Ok(())
    }

    /// Waits until all tiles of the work in hand are moved; after [`TileEngine::help`] has found none to take. Does nothing when no
    /// work is in hand.
    ///
    /// # Errors
    /// As for [`TileEngine::help`].
    pub(crate) fn drain(&mut self, fabric: &mut dyn Fabric) -> Result<(), FabricError> {
        if !self.in_flight {
            return Ok(());
        }
        let result = self.wait_for_workers(fabric);
        self.end();
        result
    }

    /// Background workers that have not woken up yet need not.
    fn wait_for_workers(&self, fabric: &mut dyn Fabric) -> Result<(), FabricError> {
        let shared = &*self.shared;
        shared.state().open = false;
        let rank = fabric.rank();
        loop {
            let (active, blocked) = {
                let state = shared.state();
                (state.active, state.blocked)
            };
            if active == 0 {
                return Ok(());
            }
            let job = shared.job();
            let awaited = || blocked.as_ref().and_then(|tile| job.awaited(tile));
            // A worker that has not noticed that its tile is ready waits for nobody but this rank's own processor.
            let peer = awaited().unwrap_or(rank);
            let moved = || {
                let state = shared.state();
                state.active == 0 || state.blocked != blocked || (peer != rank && awaited() != Some(peer))
            };
            fabric.direct().ok_or(FabricError::NoDirectAccess { rank })?.wait_until(peer, &moved)?;
        }
    }

    /// Gives the memory of the work in hand back if all its tiles are moved.
    pub(crate) fn end_if_done(&mut self) {
        let left = |state: &State| state.active > 0 || state.left.is_some();
        let tiles = self.shared.job().schedule.tiles();
        if self.in_flight && self.shared.next.load(Ordering::Relaxed) >= tiles && !left(&self.shared.state()) {
            self.end();
        }
    }

    /// Ends the work in flight, whatever is left of it, and gives its memory back.
    fn end(&mut self) {
        let shared = &*self.shared;
        {
            let mut state = shared.state();
            (state.open, state.left) = (false, None);
        }
        // Relaxed: a hint to look, nothing is read because of it.
        shared.abort.store(1, Ordering::Relaxed);
        // Waits for the workers that are still at it: they hold the job.
        shared.job.write().unwrap_or_else(PoisonError::into_inner).clear();
        self.in_flight = false;
    }
}

impl Drop for TileEngine {
    fn drop(&mut self) {
        self.shared.state().stop = true;
        self.end();
        self.shared.wake.notify_all();
        for thread in self.threads.drain(..) {
            // A worker does not panic; if it did, it has said so on its thread.
            let _ = thread.join();
        }
    }
}

/// A worker thread's life.
fn background(shared: &Shared, index: usize) {
    let mut seen = 0;
    shared.state().started += 1;
    shared.start.notify_one();
    loop {
        let mut state = shared.state();
        loop {
            if state.stop {
                return;
            }
            if state.work != seen {
                seen = state.work;
                if state.open && index < state.helpers {
                    break;
                }
            }
            state = shared.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.active += 1;
        // Before the state's lock is let go: whoever ends the work after this waits for the job's.
        let job = shared.job();
        drop(state);
        work(shared, &job);
        job.fence();
        shared.state().active -= 1;
        if let Some(reach) = job.reach() {
            reach.ring(reach.rank());
        }
    }
}

/// Works until no tile is left to take, or the work is over for another reason.
fn work(shared: &Shared, job: &Job) {
    let (mut worker, mut tries) = (Worker::default(), 0);
    loop {
        match worker.step(&job.schedule, &shared.next, &mut &*job) {
            Step::Done => match shared.state().left.take() {
                Some(tile) => worker.take_back(tile),
                None => return,
            },
            Step::Moved if tries == 0 => {}
            Step::Moved => {
                tries = 0;
                shared.state().blocked = None;
            }
            Step::Blocked(tile) => {
                if tries == 0 {
                    shared.state().blocked = Some(tile);
                }
                let failed = job.reach().is_none_or(super::Reach::has_failed);
                if failed || shared.abort.load(Ordering::Relaxed) != 0 {
                    return;
                }
                pause(&mut tries);
            }
        }
    }
}

/// Waits a little longer from time to time.
fn pause(tries: &mut u32) {
    *tries = tries.saturating_add(1);
    match *tries {
        0..64 => core::hint::spin_loop(),
        64..256 => thread::yield_now(),
        _ => thread::sleep(Duration::from_micros(50)),
    }
}
