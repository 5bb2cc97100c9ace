//! A running group allocates nothing: every operation, counted on each rank's thread.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};
use ultraep_fabric::stream::{
    EngineSpec, ExpertLayout, GradReduce, Masters, SlotSet, Slots, TileSizes, WeightFormat, WeightSync,
};
use ultraep_fabric::{Fabric, FabricError, GroupSpec, Operation, Region, RemoteSpan, Span, run_threads};
use ultraep_plan::{
    Instance, PhysicalIndex, Plan, Rank, SplitRule, Topology, TopologySpec, TransferMode, TransferParams, TransferPlan,
    TransferPlanner, Transfers,
};

thread_local! {
    /// Allocations of this thread.
    static COUNT: Cell<usize> = const { Cell::new(0) };
}

/// Allocations of all threads.
static TOTAL: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: hands every call on to the system's allocator, whose promises it keeps.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // At a thread's end the counter may be gone; nothing is counted then.
        let _ = COUNT.try_with(|count| count.set(count.get() + 1));
        TOTAL.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promises are those of the system's allocator.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        // SAFETY: allocated by `alloc` above, so by the system's allocator.
        unsafe { System.dealloc(start, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// One test, as the second half counts on all threads.
#[test]
fn what_runs_allocates_nothing() {
    a_running_group_allocates_nothing();
    a_running_tile_engine_allocates_nothing();
}

fn a_running_group_allocates_nothing() {
    for cores in [0, 1] {
        let mut spec = GroupSpec { cores, ..GroupSpec::new(3) };
        let window = spec.add_window("window", 4096);
        let counts = run_threads(&spec, |mut fabric: Box<dyn Fabric>| -> Result<usize, FabricError> {
            let (me, ranks) = (fabric.rank(), fabric.ranks());
            let (data, all) = (Region::zeroed(1 << 20), Region::zeroed(ranks << 10));
            let sizes = vec![8; ranks];
            let to: Vec<_> = (0..ranks).map(|rank| RemoteSpan { rank: Rank::new(rank), window, offset: 64 }).collect();
            let before = COUNT.get();
            for round in 1..20 {
                let part = |bytes| Span::part(&data, 0, bytes);
                fabric.run_stamped(Operation::Barrier, round)?;
                fabric.run_stamped(Operation::AllGather { send: part(1 << 10), recv: Span::whole(&all) }, round)?;
                fabric.run_stamped(Operation::AllReduceSumF32 { data: Span::whole(&data) }, round)?;
                let send = part(8 * ranks);
                let exchange = Operation::AllToAll { send, send_bytes: &sizes, recv: window, recv_bytes: &sizes };
                fabric.run_stamped(exchange, round)?;
                fabric.run_stamped(Operation::Open { window }, round)?;
                fabric.run_stamped(Operation::Put { from: part(999), to: &to }, round)?;
                fabric.run_stamped(Operation::Get { from: to[0], to: part(999) }, round)?;
                let next = Rank::new((me.index() + 1) % ranks);
                fabric.run_stamped(Operation::Signal { rank: next, signal: 0, add: 1 }, round)?;
                fabric.run_stamped(Operation::AwaitSignal { signal: 0, at_least: round }, round)?;
                fabric.run_stamped(Operation::Close { window }, round)?;
            }
            let after = COUNT.get();
            fabric.leave()?;
            Ok(after - before)
        });
        assert_eq!(counts.expect("all ranks end well"), [0; 3], "with {cores} core permits");
        assert!(COUNT.get() > 0, "the counter counts");
    }
}

/// Expert 0 on all ranks, through relays; weights and gradients, with a worker thread on each rank.
fn a_running_tile_engine_allocates_nothing() {
    const RANKS: usize = 4;
    let topology = Topology::new(TopologySpec { ranks: RANKS, experts: RANKS, domain_ranks: RANKS, slots_per_rank: 1 });
    let topology = topology.expect("within all limits");
    let mut plan = Plan::default();
    plan.begin(SplitRule::LocalFirstExact);
    for expert in 0..RANKS {
        let instance = |rank, index| Instance { rank: Rank::new(rank), physical: PhysicalIndex::new(index), quota: 1 };
        plan.push_instance(instance(expert, 0));
        (1..RANKS).filter(|_| expert == 0).for_each(|rank| plan.push_instance(instance(rank, 1)));
        plan.end_expert();
    }
    let mut transfers = Transfers::new(&topology);
    transfers.list(&topology, &plan);
    let layout = ExpertLayout::new(&WeightFormat::F32.shards(64, 64)).expect("it fits");
    let sizes = TileSizes { tile_bytes: 1024, chunk_bytes: 4096 };
    let mut spec = GroupSpec::new(RANKS);
    let (weights, grads) = (ultraep_fabric::WindowId::new(0), ultraep_fabric::WindowId::new(1));
    let [slots, grad_slots] = [weights, grads].map(|window| Slots::new(window, layout.clone(), sizes, 1));
    spec.add_window("weights", slots.window_bytes().expect("it fits"));
    spec.add_window("gradients", grad_slots.window_bytes().expect("it fits"));
    let model = slots.model(1_000_000_000, 100).expect("a good model");
    let params = TransferParams { mode: TransferMode::Relay, ..TransferParams::default() };
    let mut planned = TransferPlan::new(&topology);
    TransferPlanner::new(&topology, model, params).expect("a good model").plan(&transfers, &mut planned);
    assert!(planned.depth() > 1, "the case must relay");
    let counts = run_threads(&spec, |mut fabric: Box<dyn Fabric>| -> Result<usize, FabricError> {
        let fabric = &mut *fabric;
        let region = Region::zeroed(layout.bytes());
        let masters = Masters::packed(&layout, 1, &region, layout.bytes()).expect("it fits");
        let engine = EngineSpec { background: 1, tasks: 16, ..EngineSpec::default() };
        let mut slots = SlotSet::new(fabric, slots.clone(), engine)?;
        let mut grad_slots = SlotSet::new(fabric, grad_slots.clone(), engine)?;
        let mut before = 0;
        for round in 0..40 {
            if round == 10 {
                // Buffers have their sizes by now; threads took what they take when the engine was made.
                fabric.run(Operation::Barrier)?;
                before = TOTAL.load(Ordering::Relaxed);
                fabric.run(Operation::Barrier)?;
            }
            slots.sync(fabric, &WeightSync { topology: &topology, plan: &planned, masters: &masters }, 1, 0)?;
            slots.join(fabric)?;
            slots.drain(fabric)?;
            let reduce = GradReduce { topology: &topology, transfers: &transfers, masters: &masters };
            grad_slots.reduce(fabric, &reduce, 1, 0)?;
            grad_slots.join(fabric)?;
        }
        fabric.run(Operation::Barrier)?;
        let after = TOTAL.load(Ordering::Relaxed);
        fabric.run(Operation::Barrier)?;
        Ok(after - before)
    });
    assert_eq!(counts.map_err(|error| error.to_string()), Ok(vec![0; RANKS]));
}
