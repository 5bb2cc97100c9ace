//! Solving, splitting, checking in and assigning allocate nothing, from the very first microbatch on.

mod common;

use common::{Rng, Skew, skewed, topology};
use ultraep_plan::{
    BoundTables, Cursor, Greedy, GreedyParams, HardwareModel, Plan, Policy, Problem, Rank, RouteTable, SplitWorkspace,
    Tally, TransferClock, TransferMode, TransferModel, TransferParams, TransferPlan, TransferPlanner, Transfers,
    Ultraep, UltraepParams, UltraepV1, UltraepV1Params, Unbalanced, digest_counts, digest_plan, split_source,
};

#[test]
fn nothing_is_allocated_while_running() {
    for (experts, ranks, domain, slots) in
        [(256, 64, 64, 2), (128, 64, 64, 1), (64, 16, 4, 3), (40, 16, 16, 2), (8, 8, 8, 0)]
    {
        let topology = topology(ranks, experts, domain, slots);
        let own = Rank::new(ranks / 2);
        let (params, model) = (UltraepParams { min_quota: 1, ..UltraepParams::default() }, HardwareModel::default());
        let mut policies: [Box<dyn Policy>; 5] = [
            Box::new(Unbalanced::new(&topology)),
            Box::new(Greedy::new(&topology, GreedyParams { min_quota: 1, ..GreedyParams::default() })),
            Box::new(UltraepV1::new(&topology, UltraepV1Params::default())),
            Box::new(Ultraep::new(&topology, params)),
            Box::new(Ultraep::cost_aware(&topology, params, model).expect("a model")),
        ];
        let physical = experts.div_ceil(ranks) + slots;
        let mut tally = Tally::new(&topology);
        let mut plan = Plan::for_slots(&topology);
        let mut workspace = SplitWorkspace::new(&topology);
        let mut shares = vec![0; experts + ranks * slots];
        let mut table = RouteTable::new(&topology, physical);
        table.reserve(4096);
        let mut cursor = Cursor::new(&topology);
        let mut transfers = Transfers::new(&topology);
        for seed in 0..12 {
            let ratio = 1.0 + 0.6 * (seed % 6) as f64;
            let counts = skewed(&mut Rng(seed), &topology, Skew::Power, ratio.min(0.7 * ranks as f64), 4096);
            let row = &counts[own.index() * experts..(own.index() + 1) * experts];
            let ids: Vec<i32> = (0..experts).flat_map(|e| std::iter::repeat_n(e as i32, row[e] as usize)).collect();
            let mut assigned = vec![0; ids.len()];
            for policy in &mut policies {
                let info = allocation_counter::measure(|| {
                    let problem = Problem::tallied(&topology, &counts, own, &mut tally).expect("valid");
                    policy.solve(&problem, &mut plan).expect("a plan");
                    let shares = &mut shares[..plan.instances().len()];
                    split_source(&problem, &plan, own, &mut workspace, shares).expect("a split");
                    table.prepare(&plan, shares).expect("a table");
                    table.start(&mut cursor);
                    table.assign(&mut cursor, &ids, &mut assigned).expect("assigned");
                    transfers.list(&topology, &plan);
                    std::hint::black_box(digest_plan(&plan) ^ digest_counts(&counts));
                });
                assert_eq!(info.count_total, 0, "{} on {ranks} ranks, seed {seed}", policy.name());
            }
        }
    }
}

#[test]
fn nothing_is_allocated_while_transfers_are_planned() {
    let (v1, deep) = (TransferParams::v1(), TransferParams { min_replicas: 0, ..TransferParams::default() });
    let model = TransferModel { expert_bytes: 1 << 20, ..TransferModel::default() };
    for (experts, ranks, domain, slots) in [(256, 64, 64, 2), (64, 16, 4, 3), (40, 16, 16, 2), (8, 8, 8, 0)] {
        let topology = topology(ranks, experts, domain, slots);
        let mut policy = Ultraep::new(&topology, UltraepParams { min_quota: 1, ..UltraepParams::default() });
        let mut plan = Plan::for_slots(&topology);
        let mut transfers = Transfers::new(&topology);
        let mut planners: Vec<TransferPlanner> = [v1, deep]
            .iter()
            .flat_map(|&params| TransferMode::ALL.map(|mode| TransferParams { mode, ..params }))
            .map(|params| TransferPlanner::new(&topology, model, params).expect("a model"))
            .collect();
        let mut clock = TransferClock::new(&topology, model).expect("a model");
        let mut tables = BoundTables::new(&topology, model).expect("a model");
        let mut scheduled = TransferPlan::new(&topology);
        for seed in 0..12 {
            let ratio = (1.0 + 0.6 * (seed % 6) as f64).min(0.7 * ranks as f64);
            let counts = skewed(&mut Rng(seed), &topology, Skew::HotRank, ratio, 4096);
            policy.solve(&Problem::new(&topology, &counts).expect("valid"), &mut plan).expect("a plan");
            transfers.list(&topology, &plan);
            for planner in &mut planners {
                let info = allocation_counter::measure(|| {
                    let choice = planner.plan(&transfers, &mut scheduled);
                    std::hint::black_box((choice, clock.run(&scheduled), tables.bound(&transfers)));
                });
                assert_eq!(info.count_total, 0, "{:?} on {ranks} ranks, seed {seed}", planner.params());
            }
        }
    }
}

/// The measurement itself sees allocations.
#[test]
fn an_allocation_is_counted() {
    assert!(allocation_counter::measure(|| drop(std::hint::black_box(vec![1]))).count_total > 0);
}
