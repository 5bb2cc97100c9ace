//! Ranks as threads that move the same experts again and again, beside the machine's own limit.

use std::sync::Mutex;
use std::time::Duration;

use indicatif::ProgressBar;
use ultraep_fabric::stream::{EngineSpec, GradReduce, Masters, Moved, Slots, TileEngine, WeightSync};
use ultraep_fabric::{AccessError, Fabric, FabricError, GroupSpec, Operation, Region, run_threads};
use ultraep_plan::{Topology, Transfer, TransferPlan, Transfers};

use super::limit::{Gate, Loop, Share, families, shares, timed};
use crate::error::CliError;

/// Runs that do not count.
const WARM_UP: usize = 3;

/// What is done again and again.
pub(super) enum Work<'a> {
    /// Weight sync of these plans, one after another.
    Sync(&'a [TransferPlan]),
    /// Grad reduce.
    Reduce,
}

/// One size of experts at one imbalance.
pub(super) struct Case<'a> {
    pub(super) topology: &'a Topology,
    pub(super) transfers: &'a Transfers,
    pub(super) slots: &'a Slots,
    pub(super) work: Work<'a>,
    pub(super) engine: EngineSpec,
    pub(super) iterations: usize,
    pub(super) progress: &'a ProgressBar,
}

/// Medians.
#[derive(Default)]
pub(super) struct Outcome {
    /// Of each plan, in nanoseconds.
    pub(super) p50_ns: Vec<u64>,
    pub(super) fastest_ns: Vec<u64>,
    /// All ranks' bytes, by plan.
    pub(super) moved: Vec<Moved>,
    /// The loop with the best median, and that.
    pub(super) limit: (String, u64),
}

/// What can go wrong on a rank.
#[derive(Debug, thiserror::Error)]
enum RankError {
    #[error(transparent)]
    Fabric(#[from] FabricError),
    #[error(transparent)]
    Access(#[from] AccessError),
    #[error(transparent)]
    Layout(#[from] ultraep_fabric::stream::LayoutError),
    #[error("this fabric's windows are not host memory")]
    NotHostMemory,
    #[error("expert {0}: a replica differs from its master")]
    Differs(ultraep_plan::Expert),
    #[error("another rank gave up")]
    GivenUp,
}

/// Where ranks meet, and where all threads do.
#[derive(Clone, Copy)]
struct Gates<'a> {
    all: &'a Gate,
    ranks: &'a Gate,
}

/// Breaks the gates when a rank gives up.
struct Opener<'a>(Gates<'a>, bool);

impl Drop for Opener<'_> {
    fn drop(&mut self) {
        if !self.1 {
            self.0.all.break_open();
            self.0.ranks.break_open();
        }
    }
}

/// Times of one rank, by plan and by loop, and what it moved.
struct Times {
    plans: Vec<Vec<Duration>>,
    loops: Vec<Vec<Duration>>,
    moved: Vec<Moved>,
}

impl Case<'_> {
    fn plans(&self) -> usize {
        match self.work {
            Work::Sync(plans) => plans.len(),
            Work::Reduce => 1,
        }
    }

    fn loops(&self) -> &'static [Loop] {
        match self.work {
            Work::Sync(_) => &Loop::COPIES,
            Work::Reduce => &Loop::SUMS,
        }
    }

    /// Turns of an iteration: in each a plan, then a loop, so that both find the caches full of the other's memory.
    fn turns(&self) -> usize {
        self.plans().max(self.loops().len())
    }

    /// Measures.
    pub(super) fn run(&self) -> Result<Outcome, CliError> {
        let ranks = self.topology.ranks();
        let mut spec = GroupSpec::new(ranks);
        let bytes = self
            .slots
            .window_bytes()
            .ok_or_else(|| CliError::input("--expert-bytes: more than there are addresses"))?;
        spec.add_window("slots", bytes);
        let threads = ranks * (1 + self.engine.background);
        let mut families = families(self.transfers, self.slots.layout().bytes().div_ceil(size_of::<f32>()));
        let shares = shares(&mut families, threads);
        let (gate, ranks_gate) = (Gate::new(threads), Gate::new(ranks));
        let gates = Gates { all: &gate, ranks: &ranks_gate };
        let results = run_threads(&spec, |fabric| self.rank(fabric, &shares, gates)).map_err(CliError::failure)?;
        let median = |times: &[Duration]| {
            let mut sorted = times.to_vec();
            sorted.sort_unstable();
            sorted.get(sorted.len() / 2).map_or(0, |time| time.as_nanos() as u64)
        };
        let Some(first) = results.first() else { return Ok(Outcome::default()) };
        let loops = self.loops().iter().zip(&first.loops).map(|(how, times)| (how.name(), median(times)));
        let of_plan = |plan: usize| {
            results.iter().fold(Moved::default(), |sum, of_rank| Moved {
                read_bytes: sum.read_bytes + of_rank.moved[plan].read_bytes,
                written_bytes: sum.written_bytes + of_rank.moved[plan].written_bytes,
            })
        };
        Ok(Outcome {
            p50_ns: first.plans.iter().map(|times| median(times)).collect(),
            fastest_ns: first
                .plans
                .iter()
                .map(|times| times.iter().min().map_or(0, |time| time.as_nanos() as u64))
                .collect(),
            moved: (0..self.plans()).map(of_plan).collect(),
            limit: loops.min_by_key(|(_, ns)| *ns).unwrap_or_default(),
        })
    }

    fn rank(
        &self,
        mut fabric: Box<dyn Fabric>,
        all: &[Mutex<Share<'_>>],
        gates: Gates<'_>,
    ) -> Result<Times, RankError> {
        let (rank, workers) = (fabric.rank().index(), self.engine.background);
        let own = &all[rank * (1 + workers)..][..1 + workers];
        let rounds = (WARM_UP + self.iterations) * self.turns();
        let times = std::thread::scope(|scope| {
            let mut opener = Opener(gates, false);
            for share in &own[1..] {
                scope.spawn(move || {
                    for round in 0..rounds {
                        if timed(gates.all, share, self.loops()[round % self.turns() % self.loops().len()]).is_none() {
                            return;
                        }
                    }
                });
            }
            let times = self.measure(&mut *fabric, gates, &own[0])?;
            opener.1 = true;
            Ok::<_, RankError>(times)
        })?;
        fabric.leave()?;
        Ok(times)
    }

    fn measure(&self, fabric: &mut dyn Fabric, gates: Gates<'_>, share: &Mutex<Share<'_>>) -> Result<Times, RankError> {
        let (rank, layout) = (fabric.rank(), self.slots.layout());
        let own = self.topology.masters(rank);
        // All pages are touched before anything is measured.
        let region = Region::zeroed(own.len() * layout.slot_bytes());
        region.write::<u8>()?.iter_mut().enumerate().for_each(|(at, byte)| *byte = pattern(own.start, layout, at));
        let masters = Masters::packed(layout, own.len(), &region, layout.slot_bytes())?;
        let part = fabric.window(self.slots.window()).ok_or(RankError::NotHostMemory)?;
        part.write::<u8>()?.fill(0);
        let mut engine = TileEngine::new(self.engine)?;
        let (plans, loops) = (vec![Vec::new(); self.plans()], vec![Vec::new(); self.loops().len()]);
        let mut times = Times { plans, loops, moved: vec![Moved::default(); self.plans()] };
        for iteration in 0..WARM_UP + self.iterations {
            for turn in 0..self.turns() {
                let (plan, of_loop) = (turn % self.plans(), turn % self.loops().len());
                let (time, moved) = self.once(fabric, gates.ranks, &mut engine, plan, &masters, &part)?;
                times.plans[plan].push(time);
                times.moved[plan] = moved;
                let time = timed(gates.all, share, self.loops()[of_loop]).ok_or(RankError::GivenUp)?;
                times.loops[of_loop].push(time);
            }
            if iteration < WARM_UP {
                times.plans.iter_mut().chain(&mut times.loops).for_each(Vec::clear);
            }
            if rank.index() == 0 {
                self.progress.inc(1);
            }
        }
        if let Work::Sync(_) = self.work {
            self.check(&part.read::<u8>()?, fabric)?;
        }
        Ok(times)
    }

    /// One sync or reduce: from when all ranks are ready until the last has closed its window.
    fn once(
        &self,
        fabric: &mut dyn Fabric,
        gate: &Gate,
        engine: &mut TileEngine,
        plan: usize,
        masters: &Masters,
        part: &Region,
    ) -> Result<(Duration, Moved), RankError> {
        let Self { topology, transfers, slots, .. } = *self;
        let (rank, window, workers) = (fabric.rank(), slots.window(), self.engine.background);
        let start = gate.pass().ok_or(RankError::GivenUp)?;
        let moved = match self.work {
            Work::Sync(plans) => {
                let plan = &plans[plan];
                slots.lower_flags(part, topology, plan, rank)?;
                fabric.run(Operation::Open { window }, 0)?;
                engine.start_sync(fabric, &WeightSync { slots, topology, plan, masters }, workers)?
            }
            Work::Reduce => {
                fabric.run(Operation::Open { window }, 0)?;
                engine.start_reduce(fabric, &GradReduce { slots, topology, transfers, masters }, workers)?
            }
        };
        engine.wait(fabric)?;
        fabric.run(Operation::Close { window }, 0)?;
        Ok((gate.pass().ok_or(RankError::GivenUp)? - start, moved))
    }

    /// That every replica has its master's bytes.
    fn check(&self, part: &[u8], fabric: &dyn Fabric) -> Result<(), RankError> {
        let (rank, layout) = (fabric.rank(), self.slots.layout());
        for &Transfer { expert, from, physical, .. } in self.transfers.received_by(rank) {
            let Some(slot) = self.slots.slot(self.topology, rank, physical) else { continue };
            let (slot, first) = (&part[self.slots.range(slot)], self.topology.masters(from).start);
            let offset = (expert.index() - first) * layout.slot_bytes();
            let mut shards = (0..layout.shards()).flat_map(|shard| layout.range(shard));
            if !shards.all(|at| slot[at] == pattern(first, layout, offset + at)) {
                return Err(RankError::Differs(expert));
            }
        }
        Ok(())
    }
}

/// Byte `at` of a rank's masters; small finite numbers when read as `f32`.
fn pattern(first_expert: usize, layout: &ultraep_fabric::stream::ExpertLayout, at: usize) -> u8 {
    let (expert, at) = (first_expert + at / layout.slot_bytes(), at % layout.slot_bytes());
    ((expert * 7 + at * 13 + at / 4099) % 61) as u8
}
