//! The machine's own limit: the same reads and writes by as many threads, each what its rank moves, in plain loops.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ultraep_fabric::stream::{PlainCopy, plain_add_and_zero};
use ultraep_fabric::{AccessError, Region};

/// Bytes of the loops that go by tiles or blocks.
const TILE_BYTES: usize = 32 * 1024;
const BLOCK_BYTES: usize = 4 * 1024;

/// One plain loop.
#[derive(Clone, Copy, Debug)]
pub(super) enum Loop {
    /// Copies, by this many bytes at a time.
    Copy(PlainCopy, usize),
    /// One pass over sum and replica after another.
    AddByReplica,
    /// All replicas of a block, then the next block.
    AddFused,
    /// The same with the engine's instructions.
    AddEngine,
}

impl Loop {
    pub(super) const COPIES: [Self; 4] = [
        Self::Copy(PlainCopy::Memcpy, usize::MAX),
        Self::Copy(PlainCopy::Memcpy, TILE_BYTES),
        Self::Copy(PlainCopy::Cached, TILE_BYTES),
        Self::Copy(PlainCopy::Streaming, TILE_BYTES),
    ];
    pub(super) const SUMS: [Self; 3] = [Self::AddByReplica, Self::AddFused, Self::AddEngine];

    pub(super) fn name(self) -> String {
        match self {
            Self::Copy(how, usize::MAX) => format!("{} whole", how.name()),
            Self::Copy(how, _) => format!("{} by tiles", how.name()),
            Self::AddByReplica => "replica by replica".to_owned(),
            Self::AddFused => "fused blocks".to_owned(),
            Self::AddEngine => "engine's blocks".to_owned(),
        }
    }
}

/// What one worker of a rank reads once and writes to (or adds from) so many places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stream {
    pub(super) words: usize,
    pub(super) targets: usize,
}

/// The memory of one thread and what it moves of each plan. Threads share nothing, as the ranks of a plan write to different
/// places.
pub(super) struct Share {
    plans: Vec<Vec<Stream>>,
    sources: Vec<Region>,
    targets: Vec<Region>,
}

impl Share {
    /// Memory for the largest plan, from where the engine's is, all pages touched.
    ///
    /// # Errors
    /// None: the memory is its own.
    pub(super) fn new(plans: Vec<Vec<Stream>>) -> Result<Self, AccessError> {
        let (mut sources, mut targets) = (Vec::<usize>::new(), Vec::<usize>::new());
        for plan in &plans {
            let of_targets = plan.iter().flat_map(|stream| std::iter::repeat_n(stream.words, stream.targets));
            grow(&mut sources, plan.iter().map(|stream| stream.words));
            grow(&mut targets, of_targets);
        }
        let filled = |sizes: Vec<usize>, value: f32| {
            let regions = sizes.into_iter().map(|words| {
                let region = Region::zeroed(words * size_of::<f32>());
                region.write::<f32>()?.fill(value);
                Ok(region)
            });
            regions.collect::<Result<Vec<_>, AccessError>>()
        };
        Ok(Self { plans, sources: filled(sources, 1.0)?, targets: filled(targets, 0.5)? })
    }

    pub(super) fn run(&self, plan: usize, how: Loop) -> Result<(), AccessError> {
        let mut sources = self.sources.iter().map(Region::write::<f32>).collect::<Result<Vec<_>, _>>()?;
        let mut targets = self.targets.iter().map(Region::write::<f32>).collect::<Result<Vec<_>, _>>()?;
        let mut places = targets.iter_mut();
        for (source, &Stream { words, targets }) in sources.iter_mut().zip(&self.plans[plan]) {
            let source = &mut source[..words];
            let mut targets: Vec<&mut [f32]> = places.by_ref().take(targets).map(|place| &mut place[..words]).collect();
            match how {
                Loop::Copy(copy, tile) => {
                    copy.fan_out_words(source, &mut targets, tile.min(size_of_val(&*source)));
                }
                Loop::AddByReplica => targets.iter_mut().for_each(|replica| {
                    ultraep_device::math::add(source, replica);
                    replica.fill(0.0);
                }),
                Loop::AddFused => fused(source, &mut targets),
                Loop::AddEngine => plain_add_and_zero(source, &mut targets, BLOCK_BYTES / size_of::<f32>()),
            }
        }
        Ok(())
    }
}

/// Raises each of `sizes` to what is asked in its place.
fn grow(sizes: &mut Vec<usize>, asked: impl Iterator<Item = usize>) {
    for (index, words) in asked.enumerate() {
        match sizes.get_mut(index) {
            Some(size) => *size = (*size).max(words),
            None => sizes.push(words),
        }
    }
}

fn fused(master: &mut [f32], replicas: &mut [&mut [f32]]) {
    let block = BLOCK_BYTES / size_of::<f32>();
    for (index, sums) in master.chunks_mut(block).enumerate() {
        for replica in replicas.iter_mut() {
            let part = &mut replica[index * block..][..sums.len()];
            ultraep_device::math::add(sums, part);
            part.fill(0.0);
        }
    }
}

/// Where threads meet; broken when one of them gives up, so that none waits for it. With no more threads than cores they wait
/// awake: threads that sleep before every run are woken one after another, and often onto one core.
pub(super) struct Gate {
    threads: usize,
    awake: bool,
    start: Instant,
    /// Turns that are over. `pass` of the last to come releases `last_ns`, that of the others acquires it.
    turns: AtomicU64,
    /// When the last one came, in nanoseconds since `start`.
    last_ns: AtomicU64,
    broken: AtomicBool,
    arrived: Mutex<usize>,
    turned: Condvar,
}

impl Gate {
    pub(super) fn new(threads: usize) -> Self {
        let awake = std::thread::available_parallelism().is_ok_and(|cores| threads <= cores.get());
        Self {
            threads,
            awake,
            start: Instant::now(),
            turns: AtomicU64::new(0),
            last_ns: AtomicU64::new(0),
            broken: AtomicBool::new(false),
            arrived: Mutex::new(0),
            turned: Condvar::new(),
        }
    }

    fn arrived(&self) -> MutexGuard<'_, usize> {
        self.arrived.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for all; when the last one came, or `None` when the gate is broken. (Not when the caller went on: on a machine
    /// with fewer cores than threads others may be done by then.)
    pub(super) fn pass(&self) -> Option<Duration> {
        let turn = self.turns.load(Ordering::Relaxed);
        let mut arrived = self.arrived();
        *arrived += 1;
        if *arrived == self.threads {
            *arrived = 0;
            self.last_ns.store(self.start.elapsed().as_nanos() as u64, Ordering::Relaxed);
            self.turns.store(turn + 1, Ordering::Release);
            self.turned.notify_all();
        }
        let waits = || self.turns.load(Ordering::Acquire) == turn && !self.broken.load(Ordering::Relaxed);
        if self.awake {
            drop(arrived);
            for spin in 1_u64.. {
                if !waits() {
                    break;
                }
                if spin.is_multiple_of(1024) { std::thread::yield_now() } else { std::hint::spin_loop() }
            }
        } else {
            drop(self.turned.wait_while(arrived, |_| waits()));
        }
        // The next turn needs this thread, so this is still the turn's.
        let last = Duration::from_nanos(self.last_ns.load(Ordering::Relaxed));
        (!self.broken.load(Ordering::Relaxed)).then_some(last)
    }

    pub(super) fn break_open(&self) {
        let _arrived = self.arrived();
        self.broken.store(true, Ordering::Relaxed);
        self.turned.notify_all();
    }
}

/// Runs one thread's share between two gates: the time from when all were ready until all were done; `None` when the gate is
/// broken.
pub(super) fn timed(gate: &Gate, share: &Share, plan: usize, how: Loop) -> Option<Duration> {
    let start = gate.pass()?;
    // Its memory is its own, and no guard outlives a run.
    share.run(plan, how).ok()?;
    Some(gate.pass()? - start)
}
