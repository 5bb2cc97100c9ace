//! From counts to the physical expert of every token, on one source rank.
//!
//! `cargo run -p ultraep-plan --example 01_plan`

use ultraep_plan::{
    Cursor, Expert, Plan, Policy, Problem, Rank, Ratio, RouteTable, SplitWorkspace, Tally, Topology, TopologySpec,
    Transfers, Ultraep, UltraepParams, check_plan, digest_plan, split_source,
};

pub(crate) fn main() {
    // Four ranks, two experts each, one slot a rank; everyone likes expert 2.
    let topology =
        Topology::new(TopologySpec { ranks: 4, experts: 8, domain_ranks: 4, slots_per_rank: 1 }).expect("valid");
    let row = [10, 20, 400, 30, 10, 10, 10, 22];
    let counts: Vec<u32> = row.iter().copied().cycle().take(32).collect();

    // Everything is sized once; from here on nothing allocates.
    let own = Rank::new(3);
    let mut tally = Tally::new(&topology);
    let mut policy = Ultraep::new(&topology, UltraepParams { beta: Ratio::BETA, min_quota: 16 });
    let mut plan = Plan::for_slots(&topology);
    let mut workspace = SplitWorkspace::new(&topology);
    let mut shares = vec![0; topology.experts() + 4];
    let mut table = RouteTable::new(&topology, 3);
    let mut cursor = Cursor::new(&topology);
    let mut transfers = Transfers::new(&topology);

    let problem = Problem::tallied(&topology, &counts, own, &mut tally).expect("counts of this group");
    policy.solve(&problem, &mut plan).expect("a plan");
    let report = check_plan(&problem, &plan, &policy.rules()).expect("every rule kept");
    println!("rank loads {:?} -> {:?}", report.rank_load_before, report.rank_load_after);
    println!("{:?}, digest {:016x}", plan.domains()[0], digest_plan(&plan));
    transfers.list(&topology, &plan);
    for t in transfers.all() {
        println!("expert {} goes from rank {} to rank {}, physical expert {}", t.expert, t.from, t.to, t.physical);
    }

    // This rank's tokens, two choices each (here simply in order), find their physical experts.
    let shares = &mut shares[..plan.instances().len()];
    split_source(&problem, &plan, own, &mut workspace, shares).expect("a split");
    println!("rank {own} sends its tokens of expert 2 to {:?}", &shares[plan.range(Expert::new(2))]);
    let ids: Vec<i32> = (0..8).flat_map(|e| std::iter::repeat_n(e, row[e as usize] as usize)).collect();
    let mut physical = vec![0; ids.len()];
    table.prepare(&plan, shares).expect("a table");
    table.start(&mut cursor);
    table.assign(&mut cursor, &ids, &mut physical).expect("ids that were counted");

    let at_home = physical.iter().filter(|&&p| table.locate(p).is_some_and(|(rank, _)| rank == own)).count();
    println!("{at_home} of {} tokens stay on rank {own}", ids.len());
    assert_eq!(report.rank_load_before, [120, 1720, 80, 128]);
    assert!(report.rank_load_after.iter().all(|&load| load <= 517)); // 1.01 times the mean of 512
    assert_eq!(plan.replicas(), 3);
}
