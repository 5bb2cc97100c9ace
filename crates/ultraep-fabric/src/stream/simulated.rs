//! Workers of a whole group under a seeded scheduler, with stores that arrive late and out of order.
//!
//! Every rank runs its part of a plan with several workers, all in one thread. At each turn the scheduler either lets a
//! worker make a step or lets one store of some worker arrive. Stores of a worker arrive in any order, except that a count
//! arrives only when all stores before it have (release). Whatever the order: nothing blocks for good, and every slot has
//! its master's bytes.

use super::schedule::{Geometry, Schedule, Tile};
use super::worker::{Hands, Step, Worker};
use crate::sync::AtomicU64;
use proptest::prelude::*;
use std::cell::RefCell;
use std::collections::HashMap;
use ultraep_plan::{
    Expert, Instance, PhysicalIndex, Plan, Rank, SplitRule, Topology, TopologySpec, TransferMode, TransferModel,
    TransferParams, TransferPlan, TransferPlanner, Transfers, TreeRule,
};

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }
}

/// (rank, physical index of a replica).
type Slot = (usize, usize);

/// A protocol with an error in it, so that the test is seen to find it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Planted {
    Nothing,
    /// Tiles are counted before they are stored.
    CountFirst,
    /// A rank forwards before it sends its own masters.
    RelaysFirst,
}

enum Store {
    Bytes { slot: Slot, at: usize, bytes: Vec<u8> },
    Count { slot: Slot, chunk: usize },
}

/// What has arrived, and what is on its way.
struct World {
    slots: HashMap<Slot, Vec<u8>>,
    counts: HashMap<(Slot, usize), usize>,
    on_their_way: Vec<Vec<Store>>,
}

impl World {
    /// Lets one store of this worker arrive, if there is one.
    fn arrive(&mut self, worker: usize, random: &mut Random) -> bool {
        let queue = &mut self.on_their_way[worker];
        let first_count = queue.iter().position(|store| matches!(store, Store::Count { .. }));
        // Any store, or a count with nothing before it.
        let may = |(index, store): (usize, &Store)| match store {
            Store::Bytes { .. } => true,
            Store::Count { .. } => Some(index) == first_count && index == 0,
        };
        let ready: Vec<usize> =
            queue.iter().enumerate().filter(|&(index, store)| may((index, store))).map(|(index, _)| index).collect();
        if ready.is_empty() {
            return false;
        }
        match queue.remove(ready[random.below(ready.len())]) {
            Store::Bytes { slot, at, bytes } => {
                let place = self.slots.get_mut(&slot).expect("a slot of the plan");
                place[at..at + bytes.len()].copy_from_slice(&bytes);
            }
            Store::Count { slot, chunk } => *self.counts.entry((slot, chunk)).or_default() += 1,
        }
        true
    }
}

struct Stream {
    /// The slot that is forwarded; `None` for a master.
    from: Option<Slot>,
    expert: usize,
    to: Vec<(Slot, bool)>,
}

/// One rank's part.
struct Part {
    schedule: Schedule,
    next: AtomicU64,
    streams: Vec<Stream>,
}

struct SimulatedHands<'a> {
    world: &'a RefCell<World>,
    part: &'a Part,
    worker: usize,
    planted: Planted,
}

fn master_byte(expert: usize, at: usize) -> u8 {
    (expert * 89 + at * 7 + at / 251 + 1) as u8
}

impl SimulatedHands<'_> {
    fn count(&self, tile: &Tile) {
        let stream = &self.part.streams[tile.stream];
        let counts = stream.to.iter().filter(|(_, feeds)| *feeds);
        let counts = counts.map(|&(slot, _)| Store::Count { slot, chunk: tile.chunk });
        self.world.borrow_mut().on_their_way[self.worker].extend(counts);
    }
}

impl Hands for SimulatedHands<'_> {
    fn ready(&mut self, tile: &Tile) -> bool {
        let Some(slot) = self.part.streams[tile.stream].from else { return true };
        let arrived = self.world.borrow().counts.get(&(slot, tile.chunk)).copied().unwrap_or(0);
        arrived == self.part.schedule.geometry().tiles(tile.chunk)
    }

    fn look_ahead(&mut self, _tile: &Tile) {}

    fn move_tile(&mut self, tile: &Tile) {
        if self.planted == Planted::CountFirst {
            self.count(tile);
        }
        let stream = &self.part.streams[tile.stream];
        let range = tile.start..tile.start + tile.bytes;
        let mut world = self.world.borrow_mut();
        let bytes: Vec<u8> = match stream.from {
            None => range.map(|at| master_byte(stream.expert, at)).collect(),
            Some(slot) => world.slots[&slot][range].to_vec(),
        };
        let stores = stream.to.iter().map(|&(slot, _)| Store::Bytes { slot, at: tile.start, bytes: bytes.clone() });
        world.on_their_way[self.worker].extend(stores);
    }

    fn publish(&mut self, tile: &Tile) {
        if self.planted != Planted::CountFirst {
            self.count(tile);
        }
    }
}

/// A random group and plan.
fn random_plan(random: &mut Random) -> (Topology, TransferPlan) {
    let ranks = 2 + random.below(6);
    let (experts, slots_per_rank) = (ranks + random.below(ranks + 1), 1 + random.below(3));
    let spec = TopologySpec { ranks, experts, domain_ranks: ranks, slots_per_rank };
    let topology = Topology::new(spec).expect("within all limits");
    let mut plan = Plan::default();
    plan.begin(SplitRule::LocalFirstExact);
    let mut used = vec![0; ranks];
    for expert in 0..experts {
        let home = topology.home(Expert::new(expert));
        let instance = |rank: usize, physical| Instance {
            rank: Rank::new(rank),
            physical: PhysicalIndex::new(physical),
            quota: 1,
        };
        plan.push_instance(instance(home.index(), expert - topology.masters(home).start));
        let chance = random.below(4);
        for rank in (0..ranks).filter(|&rank| rank != home.index()) {
            if used[rank] < slots_per_rank && random.below(4) < chance {
                plan.push_instance(instance(rank, topology.masters(Rank::new(rank)).len() + used[rank]));
                used[rank] += 1;
            }
        }
        plan.end_expert();
    }
    let mut transfers = Transfers::new(&topology);
    transfers.list(&topology, &plan);
    let tree = [TreeRule::TwoLevel, TreeRule::Deep][random.below(2)];
    let params = TransferParams {
        mode: TransferMode::ALL[random.below(3)],
        tree,
        max_stripes: 1 + random.below(4) as u32,
        ..TransferParams::default()
    };
    let model = TransferModel::of_link(4096, 128, 1_000_000_000, random.below(500) as u64);
    let mut planner = TransferPlanner::new(&topology, model, params).expect("a good model");
    let mut transfer_plan = TransferPlan::new(&topology);
    planner.plan(&transfers, &mut transfer_plan);
    (topology, transfer_plan)
}

/// Each rank's part of a plan, and the slots of all.
fn parts(plan: &TransferPlan, geometry: Geometry, planted: Planted) -> (Vec<Part>, HashMap<Slot, Vec<u8>>) {
    let mut slots = HashMap::new();
    let fed: Vec<usize> = (0..plan.tasks().len()).filter_map(|task| plan.feeder(task)).collect();
    let mut task = 0;
    let part = |rank: usize| {
        let mut schedule = Schedule::with_capacity(0);
        schedule.begin(geometry, plan.stripes() as usize);
        let mut streams = Vec::new();
        for stream in plan.streams(Rank::new(rank)) {
            let to = stream.iter().map(|each| {
                let slot = (each.transfer.to.index(), each.transfer.physical.index());
                slots.insert(slot, vec![0; geometry.bytes]);
                task += 1;
                (slot, fed.contains(&(task - 1)))
            });
            let first = &stream[0];
            let from = first.waits_for.map(|physical| (rank, physical.index()));
            streams.push((
                first.stripe.index as usize,
                Stream { from, expert: first.transfer.expert.index(), to: to.collect() },
            ));
        }
        if planted == Planted::RelaysFirst {
            streams.reverse();
        }
        streams.iter().for_each(|(stripe, _)| schedule.push(*stripe));
        Part { schedule, next: AtomicU64::new(0), streams: streams.into_iter().map(|(_, stream)| stream).collect() }
    };
    ((0..plan.ranks()).map(part).collect(), slots)
}

/// Runs a random plan; what went wrong, if anything did.
fn run(seed: u64, planted: Planted) -> Result<(), String> {
    let mut random = Random(seed);
    let (_, plan) = random_plan(&mut random);
    let geometry = Geometry::new(1 + random.below(3000), 64 * (1 + random.below(6)), 64);
    let (parts, slots) = parts(&plan, geometry, planted);
    let expected: HashMap<Slot, usize> = plan
        .tasks()
        .iter()
        .map(|task| ((task.transfer.to.index(), task.transfer.physical.index()), task.transfer.expert.index()))
        .collect();
    let mut workers: Vec<(usize, Worker, bool)> = Vec::new();
    for rank in 0..parts.len() {
        let count = if planted == Planted::RelaysFirst { 1 } else { 1 + random.below(3) };
        workers.extend((0..count).map(|_| (rank, Worker::default(), false)));
    }
    let on_their_way = workers.iter().map(|_| Vec::new()).collect();
    let world = RefCell::new(World { slots, counts: HashMap::new(), on_their_way });
    loop {
        // From a random worker on, the first that can do something: a step, or a store that arrives.
        let count = workers.len();
        let first = random.below(count);
        let steps_first = random.below(2) == 0;
        let mut moved = false;
        for index in (0..count).map(|i| (first + i) % count) {
            let (rank, worker, done) = &mut workers[index];
            let mut step = |done: &mut bool| {
                let part = &parts[*rank];
                let mut hands = SimulatedHands { world: &world, part, worker: index, planted };
                let step = if *done { Step::Done } else { worker.step(&part.schedule, &part.next, &mut hands) };
                *done |= step == Step::Done;
                step == Step::Moved
            };
            moved = match steps_first {
                true => step(done) || world.borrow_mut().arrive(index, &mut random),
                false => world.borrow_mut().arrive(index, &mut random) || step(done),
            };
            if moved {
                break;
            }
        }
        if !moved {
            break;
        }
    }
    if let Some((rank, ..)) = workers.iter().find(|(_, _, done)| !done) {
        return Err(format!("rank {rank} is blocked for good"));
    }
    for (slot, bytes) in &world.borrow().slots {
        let expert = expected[slot];
        if let Some(at) = (0..bytes.len()).find(|&at| bytes[at] != master_byte(expert, at)) {
            return Err(format!("slot {slot:?}: byte {at} is not that of expert {expert}"));
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_schedule_ends_with_every_replica_equal_to_its_master(seed in any::<u64>()) {
        let result = run(seed, Planted::Nothing);
        prop_assert!(result.is_ok(), "seed {seed}: {result:?}");
    }
}

#[test]
fn planted_errors_are_found() {
    for (planted, what) in [(Planted::CountFirst, "is not that of"), (Planted::RelaysFirst, "blocked for good")] {
        let found = (0..400).filter_map(|seed| run(seed, planted).err()).find(|error| error.contains(what));
        assert!(found.is_some(), "no seed of 400 shows: {what}");
    }
}
