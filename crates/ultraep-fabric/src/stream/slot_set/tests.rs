//! Slots under seeded schedules: a reader that is slow never sees its slots overwritten.

use super::*;
use crate::simulated::{Simulation, run_simulated};
use crate::stream::{ExpertLayout, Masters, TileSizes, WeightFormat};
use crate::{GroupError, GroupSpec};
use ultraep_plan::{
    Instance, PhysicalIndex, Plan, SplitRule, TopologySpec, TransferMode, TransferParams, TransferPlan,
    TransferPlanner, Transfers,
};

const RANKS: usize = 4;
const SYNCS: u64 = 4;

/// Expert `n` lives on rank `n`; experts 0 and 1 have a replica on every other rank: two slots a rank, and relays.
struct Ground {
    topology: Topology,
    transfers: Transfers,
    plan: TransferPlan,
    slots: Slots,
    grads: Slots,
    spec: GroupSpec,
}

fn ground() -> Ground {
    let spec = TopologySpec { ranks: RANKS, experts: RANKS, domain_ranks: RANKS, slots_per_rank: 2 };
    let topology = Topology::new(spec).expect("a small group");
    let mut plan = Plan::default();
    plan.begin(SplitRule::LocalFirstExact);
    for expert in 0..RANKS {
        let instance = |rank, index| Instance { rank: Rank::new(rank), physical: PhysicalIndex::new(index), quota: 1 };
        plan.push_instance(instance(expert, 0));
        let replicas = (0..RANKS).filter(|&rank| rank != expert && expert < 2);
        replicas.for_each(|rank| plan.push_instance(instance(rank, if rank < 2 { 1 } else { 1 + expert })));
        plan.end_expert();
    }
    let mut transfers = Transfers::new(&topology);
    transfers.list(&topology, &plan);
    let layout = ExpertLayout::new(&WeightFormat::F32.shards(8, 4)).expect("it fits");
    let sizes = TileSizes { tile_bytes: 64, chunk_bytes: 128 };
    let mut spec = GroupSpec::new(RANKS);
    let [slots, grads] = [0, 1].map(|index| Slots::new(crate::WindowId::new(index), layout.clone(), sizes, 2));
    for (name, slots) in [("weights", &slots), ("gradients", &grads)] {
        spec.add_window(name, slots.window_bytes().expect("it fits"));
    }
    let params = TransferParams { mode: TransferMode::Relay, max_stripes: 1, ..TransferParams::default() };
    let mut planned = TransferPlan::new(&topology);
    let model = slots.model(1_000_000_000, 0).expect("a good model");
    TransferPlanner::new(&topology, model, params).expect("a good model").plan(&transfers, &mut planned);
    assert!(planned.depth() > 1, "the case must relay");
    Ground { topology, transfers, plan: planned, slots, grads, spec }
}

/// What every word of an expert is for the n-th sync.
fn word(expert: usize, sync: u64) -> f32 {
    (expert as u64 * 1000 + sync) as f32
}

/// What the slots of `rank` hold after the n-th sync: `(expert, words)`.
fn received<'a>(ground: &'a Ground, set: &'a SlotSet, rank: Rank) -> Result<Vec<(usize, &'a [f32])>, String> {
    let words = set.read::<f32>().map_err(|error| error.to_string())?;
    let of = |transfer: &ultraep_plan::Transfer| {
        let slot = set.slot(&ground.topology, transfer.physical).expect("two slots");
        let range = ground.slots.range(slot);
        (transfer.expert.index(), &words[range.start / 4..range.end / 4])
    };
    Ok(ground.transfers.received_by(rank).map(of).collect())
}

/// Some turns for the others.
fn dawdle(fabric: &mut dyn Fabric, turns: u64) -> Result<(), String> {
    let me = fabric.rank();
    let signal = |fabric: &mut dyn Fabric| fabric.run(Operation::Signal { rank: me, signal: 0, add: 1 }).map(drop);
    (0..turns).try_for_each(|_| signal(fabric)).map_err(|error| error.to_string())
}

/// Syncs one after another without any other collective: rank 1 reads slowly, and looks at its slots again and again.
fn read_slowly(ground: &Ground, mut fabric: Box<dyn Fabric>, seed: u64, planted: bool) -> Result<(), String> {
    let fabric = &mut *fabric;
    let (rank, text) = (fabric.rank(), |error: FabricError| error.to_string());
    let region = Region::zeroed(ground.slots.layout().bytes());
    let masters = Masters::packed(ground.slots.layout(), 1, &region, 0).map_err(|error| error.to_string())?;
    let mut set = SlotSet::new(fabric, ground.slots.clone(), EngineSpec::default()).map_err(text)?;
    if planted {
        set.engine.ignore_credits();
    }
    for sync in 1..=SYNCS {
        set.drain(fabric).map_err(text)?;
        region.write::<f32>().map_err(|error| error.to_string())?.fill(word(rank.index(), sync));
        let work = WeightSync { topology: &ground.topology, plan: &ground.plan, masters: &masters };
        set.sync(fabric, &work, 0, sync).map_err(text)?;
        set.join(fabric).map_err(text)?;
        for look in 0..1 + 3 * u64::from(rank.index() == 1) {
            dawdle(fabric, look * (1 + (seed + sync) % 3))?;
            for (expert, words) in received(ground, &set, rank)? {
                if let Some(other) = words.iter().find(|&&got| got != word(expert, sync)) {
                    return Err(format!("sync {sync}, look {look}: expert {expert} holds {other}"));
                }
            }
        }
    }
    set.drain(fabric).map_err(text)
}

fn run(ground: &Ground, seed: u64, planted: bool) -> Result<(), GroupError<String>> {
    let simulation = Simulation { direct: true, ..Simulation::new(seed) };
    let main = |fabric: Box<dyn Fabric>| read_slowly(ground, fabric, seed, planted);
    run_simulated(&ground.spec, &simulation, main)?.result.map(drop)
}

#[test]
fn a_slow_reader_never_sees_its_slots_overwritten() {
    let ground = ground();
    for seed in 0..1000 {
        if let Err(error) = run(&ground, seed, false) {
            panic!("seed {seed}: {error}");
        }
    }
}

#[test]
fn writers_that_do_not_wait_for_credit_are_found() {
    let ground = ground();
    let found = (0..1000).filter_map(|seed| run(&ground, seed, true).err().map(|error| (seed, error.to_string())));
    let first = found.into_iter().find(|(_, error)| error.contains("holds"));
    assert!(first.is_some(), "no seed of 1000 shows a slot that was overwritten");
}

/// Rank 0 starts a sync and a reduce and goes on to a barrier without joining either: its workers feed the others, who do join.
#[test]
fn a_home_that_never_joins_still_feeds_its_replicas() {
    let ground = ground();
    let result = crate::run_threads(&ground.spec, |mut fabric| -> Result<(), String> {
        let fabric = &mut *fabric;
        let (rank, text) = (fabric.rank(), |error: FabricError| error.to_string());
        let region = Region::from_vec(vec![word(rank.index(), 1); ground.slots.layout().bytes() / 4]);
        let sums = Region::from_vec(vec![1.0_f32; ground.grads.layout().bytes() / 4]);
        let [masters, grads] = [&region, &sums].map(|region| Masters::packed(ground.slots.layout(), 1, region, 0));
        let (masters, grads) = (masters.expect("it fits"), grads.expect("it fits"));
        let engine = EngineSpec { background: 1, ..EngineSpec::default() };
        let mut weights = SlotSet::new(fabric, ground.slots.clone(), engine).map_err(text)?;
        let mut slots = SlotSet::new(fabric, ground.grads.clone(), engine).map_err(text)?;
        for transfer in ground.transfers.received_by(rank) {
            let slot = slots.slot(&ground.topology, transfer.physical).expect("two slots");
            let range = ground.grads.range(slot);
            slots.write::<f32>().map_err(|error| error.to_string())?[range.start / 4..range.end / 4].fill(1.0);
        }
        let sync = WeightSync { topology: &ground.topology, plan: &ground.plan, masters: &masters };
        weights.sync(fabric, &sync, 1, 0).map_err(text)?;
        let reduce = GradReduce { topology: &ground.topology, transfers: &ground.transfers, masters: &grads };
        slots.reduce(fabric, &reduce, 1, 0).map_err(text)?;
        if rank.index() != 0 {
            weights.join(fabric).map_err(text)?;
            slots.join(fabric).map_err(text)?;
            for (expert, words) in received(&ground, &weights, rank)? {
                assert!(words.iter().all(|&got| got == word(expert, 1)), "expert {expert} on rank {rank}");
            }
            assert!(slots.read::<f32>().expect("joined").iter().all(|&grad| grad == 0.0), "zeroed on rank {rank}");
        }
        // The others come here only once they have what they need of rank 0, which is here all the while.
        fabric.run(Operation::Barrier).map_err(text)?;
        weights.join(fabric).map_err(text)?;
        slots.join(fabric).map_err(text)?;
        let sum = if rank.index() < 2 { RANKS as f32 } else { 1.0 };
        assert!(sums.read::<f32>().expect("summed").iter().all(|&got| got == sum), "sums of rank {rank}");
        fabric.run(Operation::Barrier).map_err(text)?;
        Ok(())
    });
    result.expect("all ranks end well");
}
