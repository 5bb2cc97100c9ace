//! Weight sync and grad reduce of random plans, in every format, against what each expert's bytes must be.

use crate::case::{Case, Ending, Need, Random, Report, all_equal, all_well, digest, ensure, plain, text};
use std::time::Duration;
use ultraep_fabric::stream::{
    EngineSpec, ExpertLayout, GradReduce, MasterShard, Masters, Shard, SlotSet, Slots, TileSizes, WeightFormat,
    WeightSync,
};
use ultraep_fabric::{Fabric, FabricError, GroupSpec, Operation, Region, WindowId};
use ultraep_plan::{
    Expert, Instance, PhysicalIndex, Plan, Rank, SplitRule, Topology, TopologySpec, TransferMode, TransferParams,
    TransferPlan, TransferPlanner, Transfers, TreeRule,
};

const WEIGHTS: WindowId = WindowId::new(0);
const GRADS: WindowId = WindowId::new(1);
const SLOTS: usize = 3;
/// The largest expert is 40 x 24 of f32, with all its shards and flags.
const PART: usize = SLOTS * 32 * 1024;
/// Plans of one group, unless `STREAM_PLANS` says otherwise.
const PLANS: u64 = 12;
/// What lies between masters.
const GAP: u8 = 0xEE;

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "streams_of_random_plans",
        ranks: &[2, 5, 8],
        seeds: &[1],
        needs: &[],
        spec: windows,
        main: random_plans,
        verify: all_well,
    },
    Case {
        name: "streams_under_core_permits",
        ranks: &[6],
        seeds: &[2, 3],
        needs: &[Need::CorePermits],
        spec: windows_and_one_core,
        main: random_plans,
        verify: all_well,
    },
    Case {
        name: "streams_are_refused",
        ranks: &[2],
        seeds: &[1],
        needs: &[],
        spec: windows,
        main: refusals,
        verify: all_equal,
    },
    Case {
        name: "stream_from_a_rank_that_hangs",
        ranks: &[3],
        seeds: &[0, 1],
        needs: &[Need::RealTime],
        spec: impatient,
        main: home_hangs,
        verify: names_home_as_missing,
    },
    Case {
        name: "stream_from_a_rank_that_fails",
        ranks: &[3],
        seeds: &[0, 1],
        needs: &[],
        spec: windows,
        main: home_fails,
        verify: names_home_as_lost,
    },
];

fn windows(ranks: usize) -> GroupSpec {
    let mut spec = plain(ranks);
    spec.add_window("slots", PART);
    spec.add_window("slots' gradients", PART);
    spec
}

fn windows_and_one_core(ranks: usize) -> GroupSpec {
    GroupSpec { cores: 1, ..windows(ranks) }
}

/// One plan, the same on every rank that has the same seed.
struct Subject {
    topology: Topology,
    transfers: Transfers,
    plan: TransferPlan,
    format: WeightFormat,
    slots: Slots,
    grads: Slots,
    /// Gaps between rows, shards and experts of masters.
    gap: usize,
    shards: Vec<Shard>,
    grad_shards: Vec<Shard>,
    engine: EngineSpec,
    seed: u64,
}

fn subject(ranks: usize, seed: u64) -> Result<Subject, String> {
    let mut random = Random(seed);
    let mut below = |limit: usize| random.below(limit as u64) as usize;
    let experts = ranks + below(ranks + 1);
    let spec = TopologySpec { ranks, experts, domain_ranks: ranks, slots_per_rank: SLOTS };
    let topology = Topology::new(spec).map_err(text)?;
    let mut plan = Plan::default();
    plan.begin(SplitRule::LocalFirstExact);
    let mut used = vec![0; ranks];
    for expert in 0..experts {
        let home = topology.home(Expert::new(expert));
        let instance = |rank: Rank, physical| Instance { rank, physical: PhysicalIndex::new(physical), quota: 1 };
        plan.push_instance(instance(home, expert - topology.masters(home).start));
        let chance = below(5);
        for rank in (0..ranks).map(Rank::new).filter(|&rank| rank != home) {
            let used = &mut used[rank.index()];
            if *used < SLOTS && below(4) < chance {
                plan.push_instance(instance(rank, topology.masters(rank).len() + *used));
                *used += 1;
            }
        }
        plan.end_expert();
    }
    let mut transfers = Transfers::new(&topology);
    transfers.list(&topology, &plan);
    let format = WeightFormat::ALL[below(5)];
    let (hidden, intermediate) = (1 + below(40), 1 + below(24));
    let of = |format: WeightFormat| {
        let shards = format.shards(hidden, intermediate);
        ExpertLayout::new(&shards).map(|layout| (shards, layout)).map_err(text)
    };
    let ((shards, layout), (grad_shards, grad_layout)) = (of(format)?, of(WeightFormat::F32)?);
    let sizes = TileSizes { tile_bytes: 64 << below(4), chunk_bytes: 128 << below(5) };
    let slots = Slots::new(WEIGHTS, layout, sizes, SLOTS);
    let grads = Slots::new(GRADS, grad_layout, sizes, SLOTS);
    let params = TransferParams {
        mode: TransferMode::ALL[below(3)],
        tree: [TreeRule::TwoLevel, TreeRule::Deep, TreeRule::Deep][below(3)],
        max_stripes: 1 + below(4) as u32,
        ..TransferParams::default()
    };
    let model = slots.model(1_000_000_000, below(500) as u64).map_err(text)?;
    let mut planned = TransferPlan::new(&topology);
    TransferPlanner::new(&topology, model, params).map_err(text)?.plan(&transfers, &mut planned);
    let streaming_from_bytes = [0, u64::MAX][below(2)];
    let engine = EngineSpec { background: below(3), tasks: 0, streaming_from_bytes };
    let gap = 4 * below(5);
    Ok(Subject { topology, transfers, plan: planned, format, slots, grads, gap, shards, grad_shards, engine, seed })
}

/// Byte `at` of a packed expert.
fn byte(seed: u64, expert: usize, at: usize) -> u8 {
    Random(seed ^ (expert as u64) << 32 ^ at as u64).next() as u8
}

/// Gradient `at` that the instance of an expert on `rank` adds; the first of all is the master's.
fn gradient(seed: u64, expert: usize, rank: Rank, at: usize) -> f32 {
    let noise = Random(seed ^ (expert as u64) << 40 ^ (rank.index() as u64) << 24 ^ at as u64).next();
    (noise >> 40) as f32 / 1e5 - 80.0
}

/// A rank's masters, strided: each byte is `value(expert, packed byte)`, gaps are [`GAP`].
fn masters(
    slots: &Slots,
    shards: &[Shard],
    subject: &Subject,
    rank: Rank,
    value: impl Fn(usize, usize) -> u8,
) -> Result<Masters, String> {
    let (own, gap) = (subject.topology.masters(rank), subject.gap);
    let of = |(index, shard): (usize, &Shard)| {
        let (range, row_bytes) = (slots.layout().range(index), shard.columns * shard.element.bytes());
        let row_stride = row_bytes + gap;
        let expert_stride = shard.rows * row_stride + gap;
        let mut memory = vec![GAP; (gap + own.len() * expert_stride).next_multiple_of(4)];
        for (place, expert) in own.clone().enumerate() {
            for (row, column) in (0..shard.rows).flat_map(|row| (0..row_bytes).map(move |column| (row, column))) {
                let at = gap + place * expert_stride + row * row_stride + column;
                memory[at] = value(expert, range.start + row * row_bytes + column);
            }
        }
        // Of words, so that gradients can be read as what they are.
        let words = memory.chunks_exact(4).map(|word| f32::from_ne_bytes([word[0], word[1], word[2], word[3]]));
        MasterShard { region: Region::from_vec(words.collect()), offset: gap, expert_stride, row_stride }
    };
    let regions = shards.iter().enumerate().map(of).collect();
    Masters::new(slots.layout(), own.len(), regions).map_err(text)
}

fn random_plans(mut fabric: Box<dyn Fabric>, seed: u64) -> Report {
    let plans = std::env::var("STREAM_PLANS").ok().and_then(|plans| plans.parse().ok()).unwrap_or(PLANS);
    let mut report = 0;
    for plan in 0..plans {
        let seed = seed * 1_000_000 + plan;
        let subject = subject(fabric.ranks(), seed)?;
        let of_plan = sync(&mut *fabric, &subject).and_then(|weights| {
            let grads = reduce(&mut *fabric, &subject)?;
            Ok([weights, grads])
        });
        let of_plan = of_plan.map_err(|why| format!("plan {plan}, {}: {why}", subject.format))?;
        report = digest(report, &of_plan.map(u64::to_le_bytes).concat());
    }
    fabric.leave().map_err(text)?;
    Ok(report)
}

/// Weight sync, and that every slot of this rank holds its master's bytes.
fn sync(fabric: &mut dyn Fabric, subject: &Subject) -> Report {
    let Subject { topology, plan, slots, seed, .. } = subject;
    let rank = fabric.rank();
    let masters = masters(slots, &subject.shards, subject, rank, |expert, at| byte(*seed, expert, at))?;
    let mut set = SlotSet::new(fabric, slots.clone(), subject.engine).map_err(text)?;
    set.sync(fabric, &WeightSync { topology, plan, masters: &masters }, 2, 0).map_err(text)?;
    set.join(fabric).map_err(text)?;
    let bytes = set.read::<u8>().map_err(text)?;
    let mut seen = 0;
    for transfer in subject.transfers.received_by(rank) {
        let slot = slots.slot(topology, rank, transfer.physical).ok_or("a replica without a slot")?;
        let got = &bytes[slots.range(slot)];
        for at in (0..slots.layout().shards()).flat_map(|shard| slots.layout().range(shard)) {
            let want = byte(*seed, transfer.expert.index(), at);
            ensure(got[at] == want, || format!("expert {}: byte {at} is {}, not {want}", transfer.expert, got[at]))?;
            seen = digest(seen, &[got[at]]);
        }
    }
    set.drain(fabric).map_err(text)?;
    Ok(seen)
}

/// Grad reduce, and that masters hold the sums of the written order, gaps nothing else, and slots 0.
fn reduce(fabric: &mut dyn Fabric, subject: &Subject) -> Report {
    let Subject { topology, transfers, grads, seed, .. } = subject;
    let rank = fabric.rank();
    let mut set = SlotSet::new(fabric, grads.clone(), subject.engine).map_err(text)?;
    {
        let words = set.write::<f32>().map_err(text)?;
        for transfer in transfers.received_by(rank) {
            let slot = grads.slot(topology, rank, transfer.physical).ok_or("a replica without a slot")?;
            let first = grads.range(slot).start / 4;
            for (at, word) in words[first..first + grads.layout().bytes() / 4].iter_mut().enumerate() {
                *word = gradient(*seed, transfer.expert.index(), rank, at);
            }
        }
    }
    let value = |expert: usize, at: usize| gradient(*seed, expert, rank, at / 4).to_ne_bytes()[at % 4];
    let masters_of = masters(grads, &subject.grad_shards, subject, rank, value)?;
    set.reduce(fabric, &GradReduce { topology, transfers, masters: &masters_of }, 1, 0).map_err(text)?;
    set.join(fabric).map_err(text)?;
    let sum = |expert: usize, at: usize| {
        let replicas = transfers.all().iter().filter(|transfer| transfer.expert.index() == expert);
        let first = gradient(*seed, expert, rank, at);
        replicas.fold(first, |sum, transfer| sum + gradient(*seed, expert, transfer.to, at))
    };
    // The same masters again, with the sums in them: equal bits, gaps included.
    let want =
        masters(grads, &subject.grad_shards, subject, rank, |expert, at| sum(expert, at / 4).to_ne_bytes()[at % 4])?;
    let mut seen = 0;
    for master in 0..masters_of.experts() {
        for (shard, (got, want)) in masters_of.of(master).iter().zip(want.of(master)).enumerate() {
            let (got, want) = (got.region.read::<u8>().map_err(text)?, want.region.read::<u8>().map_err(text)?);
            ensure(*got == *want, || format!("gradients of master {master}, shard {shard} are not the sums"))?;
            seen = digest(seen, &got);
        }
    }
    let words = set.read::<f32>().map_err(text)?;
    for transfer in transfers.received_by(rank) {
        let slot = grads.slot(topology, rank, transfer.physical).ok_or("a replica without a slot")?;
        for shard in 0..grads.layout().shards() {
            let range = grads.layout().range(shard);
            let first = (grads.range(slot).start + range.start) / 4;
            let zero = words[first..first + range.len() / 4].iter().all(|word| word.to_bits() == 0);
            ensure(zero, || format!("the slot of expert {} is not zeroed", transfer.expert))?;
        }
    }
    Ok(seen)
}

/// Work at the wrong time, or that does not fit, is refused and moves nothing; the group goes on.
fn refusals(mut fabric: Box<dyn Fabric>, seed: u64) -> Report {
    // The first seed whose plan has a replica on each rank.
    let seeds = (seed * 1000..).map(|seed| subject(2, seed));
    let both = |subject: &Subject| subject.transfers.receives().iter().all(|&copies| copies > 0);
    let subject = seeds.filter_map(Result::ok).find(both).ok_or("no such plan")?;
    let Subject { topology, plan, slots, .. } = &subject;
    let rank = fabric.rank();
    let masters = masters(slots, &subject.shards, &subject, rank, |_, _| 1)?;
    let work = WeightSync { topology, plan, masters: &masters };
    let engine = EngineSpec { background: 1, ..subject.engine };
    let window = fabric.window(WEIGHTS).ok_or("no window")?;
    let take = |slots: &Slots, fabric: &mut dyn Fabric| SlotSet::new(fabric, slots.clone(), engine);
    {
        let _guard = window.read::<u8>().map_err(text)?;
        let refused = take(slots, &mut *fabric).err();
        ensure(matches!(refused, Some(FabricError::Access { .. })), || format!("a window in use: {refused:?}"))?;
    }
    let large = Slots::new(WEIGHTS, slots.layout().clone(), TileSizes::WEIGHTS, PART);
    let refused = take(&large, &mut *fabric).err();
    ensure(matches!(refused, Some(FabricError::OutOfRange { .. })), || format!("a small window: {refused:?}"))?;
    let few = Slots::new(WEIGHTS, slots.layout().clone(), TileSizes::WEIGHTS, 0);
    let refused = take(&few, &mut *fabric).map_err(text)?.sync(&mut *fabric, &work, 2, 0);
    ensure(matches!(refused, Err(FabricError::OutOfRange { .. })), || format!("no slots: {refused:?}"))?;
    let mut set = take(slots, &mut *fabric).map_err(text)?;
    let refused = take(slots, &mut *fabric).err();
    ensure(matches!(refused, Some(FabricError::Access { .. })), || format!("taken twice: {refused:?}"))?;
    set.sync(&mut *fabric, &work, 2, 0).map_err(text)?;
    ensure(set.read::<u8>().is_err(), || "slots can be read while they are written".to_owned())?;
    ensure(window.read::<u8>().is_err(), || "the window can be read while it is written".to_owned())?;
    let open = fabric.run(Operation::Open { window: WEIGHTS });
    ensure(matches!(open, Err(FabricError::Access { .. })), || format!("opened under a stream: {open:?}"))?;
    if fabric.direct().is_some() {
        let own = masters.of(0)[0].region.write::<f32>();
        ensure(own.is_err(), || "masters can be written while they are sent".to_owned())?;
    }
    set.join(&mut *fabric).map_err(text)?;
    set.join(&mut *fabric).map_err(text)?;
    set.drain(&mut *fabric).map_err(text)?;
    ensure(masters.of(0)[0].region.write::<f32>().is_ok(), || "masters are still in use".to_owned())?;
    ensure(window.read::<u8>().is_err(), || "the window can be read beside the set".to_owned())?;
    set.read::<u8>().map_err(text)?;
    fabric.leave().map_err(text)?;
    Ok(1)
}

fn impatient(ranks: usize) -> GroupSpec {
    GroupSpec { timeout: Duration::from_millis(300), ..windows(ranks) }
}

/// A chain 0 -> 1 -> 2 in which rank 0 starts nothing and hangs; or returns an error. Whoever waits for its
/// tiles says so.
fn chain(mut fabric: Box<dyn Fabric>, seed: u64, at_home: impl Fn(&mut dyn Fabric) -> Report) -> Report {
    let spec = TopologySpec { ranks: 3, experts: 3, domain_ranks: 3, slots_per_rank: SLOTS };
    let topology = Topology::new(spec).map_err(text)?;
    let mut plan = Plan::default();
    plan.begin(SplitRule::LocalFirstExact);
    for expert in 0..3 {
        let instance = |rank, index| Instance { rank: Rank::new(rank), physical: PhysicalIndex::new(index), quota: 1 };
        plan.push_instance(instance(expert, 0));
        (1..3).filter(|_| expert == 0).for_each(|rank| plan.push_instance(instance(rank, 1)));
        plan.end_expert();
    }
    let mut transfers = Transfers::new(&topology);
    transfers.list(&topology, &plan);
    let layout = ExpertLayout::new(&WeightFormat::F32.shards(40, 24)).map_err(text)?;
    let slots = Slots::new(WEIGHTS, layout, TileSizes { tile_bytes: 512, chunk_bytes: 1024 }, SLOTS);
    let model = slots.model(1_000_000_000, 0).map_err(text)?;
    let params = TransferParams { mode: TransferMode::Relay, max_stripes: 1, ..TransferParams::default() };
    let mut planned = TransferPlan::new(&topology);
    TransferPlanner::new(&topology, model, params).map_err(text)?.plan(&transfers, &mut planned);
    let rank = fabric.rank();
    let region = Region::zeroed(slots.layout().bytes());
    let masters = Masters::packed(slots.layout(), 1, &region, 0).map_err(text)?;
    if rank.index() == 0 {
        return at_home(&mut *fabric);
    }
    let work = WeightSync { topology: &topology, plan: &planned, masters: &masters };
    let engine = EngineSpec { background: seed as usize % 2, ..EngineSpec::default() };
    let mut set = SlotSet::new(&mut *fabric, slots, engine).map_err(text)?;
    set.sync(&mut *fabric, &work, 1, 0).map_err(text)?;
    set.join(&mut *fabric).map_err(text)?;
    Ok(0)
}

fn home_hangs(fabric: Box<dyn Fabric>, seed: u64) -> Report {
    chain(fabric, seed, |_| {
        std::thread::sleep(Duration::from_millis(900));
        Err("(deliberate) it hung".to_owned())
    })
}

fn home_fails(fabric: Box<dyn Fabric>, seed: u64) -> Report {
    chain(fabric, seed, |_| Err("(deliberate) it gave up".to_owned()))
}

fn names_home_as_missing(ending: &Ending) -> Result<(), String> {
    let (rank, why) = ending.failure.as_ref().ok_or("the group ended well")?;
    ensure(*rank == Some(Rank::new(0)), || format!("{rank:?} is named: {why}"))?;
    // Who runs into the timeout first depends on the machine: the one that waits for tiles, or one behind it.
    ensure(why.contains(" timed out "), || format!("not what was waited for: {why}"))
}

fn names_home_as_lost(ending: &Ending) -> Result<(), String> {
    let (rank, why) = ending.failure.as_ref().ok_or("the group ended well")?;
    ensure(*rank == Some(Rank::new(0)), || format!("{rank:?} is named: {why}"))?;
    ensure(ending.elapsed < Duration::from_secs(5), || format!("it took {:?}", ending.elapsed))
}
