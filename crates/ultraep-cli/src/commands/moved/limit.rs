//! The machine's own limit: the same reads and writes in plain loops, shared out evenly over as many threads.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ultraep_fabric::stream::{PlainCopy, plain_add_and_zero};
use ultraep_plan::Transfers;

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

/// One expert and its replicas, as `f32` words (whose bytes are copied).
pub(super) struct Family {
    master: Vec<f32>,
    replicas: Vec<Vec<f32>>,
}

/// Memory for the loops: every replicated expert once, every replica once; all pages touched.
pub(super) fn families(transfers: &Transfers, words: usize) -> Vec<Family> {
    let filled = |value: f32| vec![value; words];
    let family = |of_expert: &[ultraep_plan::Transfer]| Family {
        master: filled(1.0),
        replicas: of_expert.iter().map(|_| filled(0.5)).collect(),
    };
    transfers.all().chunk_by(|a, b| a.expert == b.expert).map(family).collect()
}

/// What one thread moves: pieces of masters with the same pieces of their replicas.
#[derive(Default)]
pub(super) struct Share<'a> {
    pieces: Vec<(&'a mut [f32], Vec<&'a mut [f32]>)>,
}

/// Shares all families out evenly, by words read and written.
pub(super) fn shares(families: &mut [Family], threads: usize) -> Vec<Mutex<Share<'_>>> {
    let total: usize = families.iter().map(|family| family.master.len() * (1 + family.replicas.len())).sum();
    let per_thread = total.div_ceil(threads).max(1);
    let mut shares: Vec<Share<'_>> = (0..threads).map(|_| Share::default()).collect();
    let mut done = 0;
    for Family { master, replicas } in families {
        let weight = 1 + replicas.len();
        let mut master = &mut master[..];
        let mut replicas: Vec<&mut [f32]> = replicas.iter_mut().map(Vec::as_mut_slice).collect();
        while !master.is_empty() {
            let thread = (done / per_thread).min(threads - 1);
            let left = ((thread + 1) * per_thread).saturating_sub(done).div_ceil(weight).max(1);
            let words = left.next_multiple_of(16).min(master.len());
            let (piece, rest) = master.split_at_mut(words);
            let (pieces, rests): (Vec<_>, Vec<_>) = replicas.into_iter().map(|r| r.split_at_mut(words)).unzip();
            (master, replicas) = (rest, rests);
            shares[thread].pieces.push((piece, pieces));
            done += words * weight;
        }
    }
    shares.into_iter().map(Mutex::new).collect()
}

impl Share<'_> {
    pub(super) fn run(&mut self, how: Loop) {
        for (master, replicas) in &mut self.pieces {
            match how {
                Loop::Copy(copy, tile) => copy.fan_out_words(master, replicas, tile.min(size_of_val(&**master))),
                Loop::AddByReplica => replicas.iter_mut().for_each(|replica| {
                    ultraep_device::math::add(master, replica);
                    replica.fill(0.0);
                }),
                Loop::AddFused => fused(master, replicas),
                Loop::AddEngine => plain_add_and_zero(master, replicas, BLOCK_BYTES / size_of::<f32>()),
            }
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

/// Where threads meet; broken when one of them gives up, so that none waits for it.
pub(super) struct Gate {
    state: Mutex<GateState>,
    turned: Condvar,
    threads: usize,
}

struct GateState {
    arrived: usize,
    turns: u64,
    broken: bool,
    /// When the last one arrived.
    last: Instant,
}

impl Gate {
    pub(super) fn new(threads: usize) -> Self {
        let state = GateState { arrived: 0, turns: 0, broken: false, last: Instant::now() };
        Self { state: Mutex::new(state), turned: Condvar::new(), threads }
    }

    fn state(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for all; when the last one came, or `None` when the gate is broken. (Not when the caller woke up: on a machine
    /// with fewer cores than threads others may be done by then.)
    pub(super) fn pass(&self) -> Option<Instant> {
        let mut state = self.state();
        state.arrived += 1;
        let turn = state.turns;
        if state.arrived == self.threads {
            (state.arrived, state.turns, state.last) = (0, turn + 1, Instant::now());
            self.turned.notify_all();
        }
        while state.turns == turn && !state.broken {
            state = self.turned.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        // The next turn needs this thread, so this is still the turn's.
        (!state.broken).then_some(state.last)
    }

    pub(super) fn break_open(&self) {
        self.state().broken = true;
        self.turned.notify_all();
    }
}

/// Runs one thread's share between two gates: the time from when all were ready until all were done; `None` when the gate is
/// broken.
pub(super) fn timed(gate: &Gate, share: &Mutex<Share<'_>>, how: Loop) -> Option<Duration> {
    let mut share = share.lock().unwrap_or_else(PoisonError::into_inner);
    let start = gate.pass()?;
    share.run(how);
    Some(gate.pass()? - start)
}
