//! The persistent engine of one rank: its worker threads, and work handed to them.

use super::job::{GradReduce, Job, Moved, WeightSync};
use super::portable::Portable;
use super::worker::{Step, Worker};
use crate::sync::{AtomicU32, AtomicU64, Ordering};
use crate::{AccessError, Fabric, FabricError, OperationKind};
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

/// Moves tiles with threads that are created once. One piece of work at a time: `start`, something else, `wait`.
///
/// On a fabric without [`Fabric::direct`] access the same is done by put and get, at once and without relays.
///
/// Worker threads need no core permit: they stand for the copy engines of an accelerator. With no background threads all work
/// is done in [`TileEngine::wait`], under the rank's own permit.
pub struct TileEngine {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    own: Worker,
    spec: EngineSpec,
    in_flight: bool,
    portable: Portable,
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
    /// The rank that a blocked background worker waits for, plus 1.
    blocked_on: AtomicU32,
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
    pub fn new(spec: EngineSpec) -> Result<Self, FabricError> {
        let shared = Arc::new(Shared {
            job: RwLock::new(Job::with_capacity(spec.tasks)),
            next: AtomicU64::new(0),
            state: Mutex::default(),
            wake: Condvar::new(),
            start: Condvar::new(),
            blocked_on: AtomicU32::new(0),
            abort: AtomicU32::new(0),
        });
        let (threads, own, portable) = (Vec::new(), Worker::default(), Portable::default());
        let mut engine = Self { shared, threads, own, spec, in_flight: false, portable };
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
    #[must_use]
    pub fn spec(&self) -> EngineSpec {
        self.spec
    }

    /// Hands a weight sync to at most `workers` background workers, and says what it moves. Complete on this rank after
    /// [`TileEngine::wait`], everywhere once the window is closed.
    ///
    /// # Errors
    /// [`FabricError::InFlight`] when work is in flight; [`FabricError::Access`] when the
    /// window is not open or the masters are in use; [`FabricError::OutOfRange`] when the plan does not fit the slots; the group's
    /// failure. Nothing is moved then.
    pub fn start_sync(
        &mut self,
        fabric: &mut dyn Fabric,
        sync: &WeightSync<'_>,
        workers: usize,
    ) -> Result<Moved, FabricError> {
        if fabric.direct().is_none() {
            return self.portable.sync(fabric, sync);
        }
        let streaming_from = self.spec.streaming_from_bytes;
        self.start(fabric, sync.slots.window(), workers, |job, reach| job.sync(sync, reach, streaming_from))
    }

    /// Hands a grad reduce to at most `workers` background workers, and says what it moves. Replicas' gradients of a rank are 0
    /// once the window is closed.
    ///
    /// # Errors
    /// As for [`TileEngine::start_sync`].
    pub fn start_reduce(
        &mut self,
        fabric: &mut dyn Fabric,
        reduce: &GradReduce<'_>,
        workers: usize,
    ) -> Result<Moved, FabricError> {
        reduce.slots.layout().check_gradients().map_err(|_| not_f32(fabric.rank(), reduce.slots))?;
        if fabric.direct().is_none() {
            return self.portable.reduce(fabric, reduce);
        }
        self.start(fabric, reduce.slots.window(), workers, |job, reach| job.reduce(reduce, reach))
    }

    fn start(
        &mut self,
        fabric: &mut dyn Fabric,
        window: crate::WindowId,
        helpers: usize,
        build: impl FnOnce(&mut Job, super::Reach) -> Result<Moved, FabricError>,
    ) -> Result<Moved, FabricError> {
        let (rank, operation) = (fabric.rank(), OperationKind::Stream);
        if self.in_flight {
            return Err(FabricError::InFlight { operation, rank, in_flight: operation });
        }
        let reach = fabric.direct().ok_or(FabricError::NoDirectAccess { rank })?.reach(window)?;
        let shared = &*self.shared;
        let mut job = shared.job.write().unwrap_or_else(PoisonError::into_inner);
        let moved = match build(&mut job, reach) {
            Ok(moved) => moved,
            Err(error) => {
                job.clear();
                return Err(error);
            }
        };
        let tiles = job.schedule.tiles();
        drop(job);
        // Relaxed: workers see these after they have taken the state's lock below.
        shared.next.store(0, Ordering::Relaxed);
        shared.abort.store(0, Ordering::Relaxed);
        shared.blocked_on.store(0, Ordering::Relaxed);
        self.own = Worker::default();
        self.in_flight = true;
        if tiles > 0 && helpers > 0 {
            let mut state = shared.state();
            (state.work, state.open, state.helpers) = (state.work + 1, true, helpers);
            drop(state);
            shared.wake.notify_all();
        }
        Ok(moved)
    }

    /// Whether nothing is left to do of the work in flight.
    #[must_use]
    pub fn is_done(&self) -> bool {
        let tiles = self.shared.job().schedule.tiles();
        self.shared.next.load(Ordering::Relaxed) >= tiles && self.shared.state().active == 0
    }

    /// Works with the others until all of this rank's tiles are moved. Does nothing when no work is in flight.
    ///
    /// # Errors
    /// The group's failure; [`FabricError::Timeout`], which names the rank whose tiles did not come. The work is over then, and
    /// the memory given back.
    pub fn wait(&mut self, fabric: &mut dyn Fabric) -> Result<(), FabricError> {
        if !self.in_flight {
            return Ok(());
        }
        let result = self.help(fabric).and_then(|()| self.drain(fabric));
        self.end();
        result
    }

    /// Works as the rank's own worker until no tile is left to take.
    fn help(&mut self, fabric: &mut dyn Fabric) -> Result<(), FabricError> {
        let job = self.shared.job();
        loop {
            match self.own.step(&job.schedule, &self.shared.next, &mut &*job) {
                Step::Moved => {}
                Step::Done => break,
                Step::Blocked(tile) => {
                    let rank = fabric.rank();
                    let peer = job.awaited(&tile).unwrap_or(rank);
                    let direct = fabric.direct().ok_or(FabricError::NoDirectAccess { rank })?;
                    direct.wait_until(peer, &|| job.is_ready(&tile))?;
                }
            }
        }
        job.fence();
        Ok(())
    }

    /// Waits for the background workers that are at it; those that have not woken up yet need not.
    fn drain(&self, fabric: &mut dyn Fabric) -> Result<(), FabricError> {
        let shared = &*self.shared;
        shared.state().open = false;
        let rank = fabric.rank();
        loop {
            let blocked_on = shared.blocked_on.load(Ordering::Relaxed);
            let peer = blocked_on.checked_sub(1).map_or(rank, |peer| Rank::new(peer as usize));
            if shared.state().active == 0 {
                return Ok(());
            }
            let moved = || shared.state().active == 0 || shared.blocked_on.load(Ordering::Relaxed) != blocked_on;
            fabric.direct().ok_or(FabricError::NoDirectAccess { rank })?.wait_until(peer, &moved)?;
        }
    }

    /// Ends the work in flight, whatever is left of it, and gives its memory back.
    fn end(&mut self) {
        let shared = &*self.shared;
        shared.state().open = false;
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

/// Gradients that cannot be added.
fn not_f32(rank: Rank, slots: &super::Slots) -> FabricError {
    let source = AccessError::Ragged { bytes: slots.layout().bytes(), size: size_of::<f32>() };
    let subject = "gradients that are not all f32";
    FabricError::Access { operation: OperationKind::Stream, rank, subject, source }
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
            Step::Done => return,
            Step::Moved if tries == 0 => {}
            Step::Moved => {
                tries = 0;
                shared.blocked_on.store(0, Ordering::Relaxed);
            }
            Step::Blocked(tile) => {
                if tries == 0 {
                    let peer = job.awaited(&tile).map_or(0, |peer| peer.index() as u32 + 1);
                    shared.blocked_on.store(peer, Ordering::Relaxed);
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
