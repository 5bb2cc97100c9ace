//! Ranks as threads that move the same experts again and again, beside the machine's own limit.

use std::time::Duration;

use indicatif::ProgressBar;
use ultraep_fabric::stream::{EngineSpec, GradReduce, Masters, Moved, SlotSet, Slots, WeightSync};
use ultraep_fabric::{AccessError, Fabric, FabricError, GroupSpec, Region, run_threads};
use ultraep_plan::{Rank, Topology, Transfer, TransferPlan, Transfers};

use super::limit::{Gate, Loop, Share, Stream, timed};
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

/// What one plan took.
#[derive(Clone, Debug)]
pub(super) struct Outcome {
    /// Median and least, in nanoseconds.
    pub(super) p50_ns: u64,
    pub(super) fastest_ns: u64,
    /// All ranks' bytes.
    pub(super) moved: Moved,
    /// Bytes that the busiest rank's threads read and write, over the mean of the ranks.
    pub(super) busiest: f64,
    /// The loop with the best median, and that.
    pub(super) limit: (String, u64),
    /// That loop's time over the plan's, run by run: lower quartile, median, upper quartile.
    pub(super) of_limit: [f64; 3],
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

/// Of one plan on one rank.
#[derive(Clone, Default)]
struct Times {
    /// By loop, run by run: what the loop took, and the plan just before it.
    loops: Vec<Vec<(Duration, Duration)>>,
    moved: Moved,
}

/// The middle, or another part of the way, of sorted values.
fn quantile<T: Copy + Default>(sorted: &[T], parts: usize, of: usize) -> T {
    sorted.get(sorted.len() * parts / of).copied().unwrap_or_default()
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

    /// What a rank's own thread, or one of its workers, reads and writes: by plan. All of them move equal parts of a rank's
    /// streams.
    fn streams(&self, rank: Rank) -> Vec<Vec<Stream>> {
        let words = self.slots.layout().bytes().div_ceil(size_of::<f32>());
        let parts = 1 + self.engine.background;
        match self.work {
            Work::Sync(plans) => plans
                .iter()
                .map(|plan| {
                    let words = words.div_ceil(parts * plan.stripes().max(1) as usize);
                    plan.streams(rank).map(|stream| Stream { words, targets: stream.len() }).collect()
                })
                .collect(),
            Work::Reduce => {
                let words = words.div_ceil(parts);
                let experts = self.transfers.all().chunk_by(|a, b| a.expert == b.expert);
                let of_rank = experts.filter(|of_expert| of_expert[0].from == rank);
                vec![of_rank.map(|of_expert| Stream { words, targets: of_expert.len() }).collect()]
            }
        }
    }

    /// Measures: for each plan what it took.
    pub(super) fn run(&self) -> Result<Vec<Outcome>, CliError> {
        let ranks = self.topology.ranks();
        let mut spec = GroupSpec::new(ranks);
        let bytes = self
            .slots
            .window_bytes()
            .ok_or_else(|| CliError::input("--expert-bytes: more than there are addresses"))?;
        spec.add_window("slots", bytes);
        let (gate, ranks_gate) = (Gate::new(ranks * (1 + self.engine.background)), Gate::new(ranks));
        let gates = Gates { all: &gate, ranks: &ranks_gate };
        let results = run_threads(&spec, |fabric| self.rank(fabric, gates)).map_err(CliError::failure)?;
        Ok((0..self.plans()).map(|plan| self.outcome(plan, &results)).collect())
    }

    /// Times are from the last to come to the last to go, so every rank has the same.
    fn outcome(&self, plan: usize, ranks: &[Vec<Times>]) -> Outcome {
        let sorted = |times: &mut dyn Iterator<Item = Duration>| {
            let mut sorted: Vec<u64> = times.map(|time| time.as_nanos() as u64).collect();
            sorted.sort_unstable();
            sorted
        };
        let loops = &ranks[0][plan].loops;
        let medians = loops.iter().map(|pairs| quantile(&sorted(&mut pairs.iter().map(|&(limit, _)| limit)), 1, 2));
        let (best, limit_ns) = medians.enumerate().min_by_key(|&(_, ns)| ns).unwrap_or_default();
        let times = sorted(&mut loops.iter().flatten().map(|&(_, time)| time));
        let of_limit = loops[best].iter().map(|(limit, time)| limit.as_secs_f64() / time.as_secs_f64());
        let mut of_limit: Vec<f64> = of_limit.collect();
        of_limit.sort_unstable_by(f64::total_cmp);
        let sum = |moved: Moved| moved.read_bytes + moved.written_bytes;
        let of_rank = || ranks.iter().map(|times| sum(times[plan].moved));
        let moved = ranks.iter().fold(Moved::default(), |all, times| Moved {
            read_bytes: all.read_bytes + times[plan].moved.read_bytes,
            written_bytes: all.written_bytes + times[plan].moved.written_bytes,
        });
        let mean = sum(moved) as f64 / ranks.len() as f64;
        Outcome {
            p50_ns: quantile(&times, 1, 2),
            fastest_ns: quantile(&times, 0, 1),
            moved,
            busiest: if mean > 0.0 { of_rank().max().unwrap_or(0) as f64 / mean } else { 1.0 },
            limit: (self.loops()[best].name(), limit_ns),
            of_limit: [1, 2, 3].map(|quarter| quantile(&of_limit, quarter, 4)),
        }
    }

    fn rank(&self, mut fabric: Box<dyn Fabric>, gates: Gates<'_>) -> Result<Vec<Times>, RankError> {
        let rank = fabric.rank();
        let times = std::thread::scope(|scope| {
            let mut opener = Opener(gates, false);
            for _ in 0..self.engine.background {
                scope.spawn(move || {
                    let Ok(share) = Share::new(self.streams(rank)) else {
                        gates.all.break_open();
                        return;
                    };
                    for _ in 0..WARM_UP + self.iterations {
                        for plan in 0..self.plans() {
                            if self.loops().iter().any(|&how| timed(gates.all, &share, plan, how).is_none()) {
                                return;
                            }
                        }
                    }
                });
            }
            let times = self.measure(&mut *fabric, gates)?;
            opener.1 = true;
            Ok::<_, RankError>(times)
        })?;
        fabric.leave()?;
        Ok(times)
    }

    fn measure(&self, fabric: &mut dyn Fabric, gates: Gates<'_>) -> Result<Vec<Times>, RankError> {
        let (rank, layout) = (fabric.rank(), self.slots.layout());
        let own = self.topology.masters(rank);
        // All pages are touched before anything is measured.
        let region = Region::zeroed(own.len() * layout.slot_bytes());
        region.write::<u8>()?.iter_mut().enumerate().for_each(|(at, byte)| *byte = pattern(own.start, layout, at));
        let masters = Masters::packed(layout, own.len(), &region, layout.slot_bytes())?;
        let mut set = SlotSet::new(fabric, self.slots.clone(), self.engine)?;
        set.write::<u8>()?.fill(0);
        let share = Share::new(self.streams(rank))?;
        let loops = vec![Vec::with_capacity(self.iterations); self.loops().len()];
        let mut times = vec![Times { loops, moved: Moved::default() }; self.plans()];
        for iteration in 0..WARM_UP + self.iterations {
            let counts = iteration >= WARM_UP;
            for (plan, times) in times.iter_mut().enumerate() {
                // One of the other, so that both find the caches full of the other's memory.
                for (&how, of_loop) in self.loops().iter().zip(&mut times.loops) {
                    let (time, moved) = self.once(fabric, gates.ranks, &mut set, plan, &masters)?;
                    let limit = timed(gates.all, &share, plan, how).ok_or(RankError::GivenUp)?;
                    times.moved = moved;
                    of_loop.extend(counts.then_some((limit, time)));
                }
            }
            if rank.index() == 0 {
                self.progress.inc(1);
            }
        }
        if let Work::Sync(_) = self.work {
            self.check(set.read::<u8>()?, fabric)?;
        }
        Ok(times)
    }

    /// One sync or reduce: from when all ranks are ready until the last has all that it receives.
    fn once(
        &self,
        fabric: &mut dyn Fabric,
        gate: &Gate,
        set: &mut SlotSet,
        plan: usize,
        masters: &Masters,
    ) -> Result<(Duration, Moved), RankError> {
        let Self { topology, transfers, .. } = *self;
        let workers = self.engine.background;
        let start = gate.pass().ok_or(RankError::GivenUp)?;
        let moved = match self.work {
            Work::Sync(plans) => set.sync(fabric, &WeightSync { topology, plan: &plans[plan], masters }, workers, 0)?,
            Work::Reduce => set.reduce(fabric, &GradReduce { topology, transfers, masters }, workers, 0)?,
        };
        set.join(fabric)?;
        set.drain(fabric)?;
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
