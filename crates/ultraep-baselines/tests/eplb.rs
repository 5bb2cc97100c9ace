//! The EPLB heuristic against its published example, its history, and its known waste.

use ultraep_baselines::{BuildError, Eplb, EplbExact, EplbParams, ExpertGroups, HistoryParams};
use ultraep_plan::{Expert, Plan, Policy, Problem, Rank, Topology, TopologySpec};

fn group(ranks: usize, experts: usize, slots_per_rank: usize) -> Topology {
    Topology::new(TopologySpec { ranks, experts, domain_ranks: ranks, slots_per_rank }).unwrap()
}

fn every(interval: usize, window: usize) -> EplbParams {
    EplbParams { history: HistoryParams { window, interval }, groups: None }
}

/// Counts with all tokens from source 0.
fn from_source_0(topology: &Topology, loads: &[u32]) -> Vec<u32> {
    let mut counts = vec![0; topology.ranks() * topology.experts()];
    counts[..loads.len()].copy_from_slice(loads);
    counts
}

fn solve(policy: &mut dyn Policy, topology: &Topology, counts: &[u32]) -> Plan {
    let mut plan = Plan::for_slots(topology);
    policy.solve(&Problem::new(topology, counts).unwrap(), &mut plan).unwrap();
    plan
}

/// The example of the EPLB release: 12 experts in 4 groups, 2 nodes, 8 GPUs, 16 physical experts.
#[test]
fn hierarchical_placement_is_the_published_one() {
    let topology = group(8, 12, 0).with_slots(&[0, 0, 0, 0, 1, 1, 1, 1]).unwrap();
    let groups = Some(ExpertGroups { groups: 4, nodes: 2 });
    let layers = [
        (
            [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
            [[5, 6], [5, 7], [8, 4], [3, 4], [10, 9], [10, 2], [0, 1], [11, 1]],
        ),
        (
            [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
            [[7, 10], [6, 8], [6, 11], [8, 9], [2, 4], [5, 1], [5, 0], [3, 1]],
        ),
    ];
    for (loads, expected) in layers {
        let mut eplb = Eplb::new(&topology, EplbParams { groups, ..every(1, 1) }).unwrap();
        let counts = from_source_0(&topology, &loads);
        eplb.observe(&Problem::new(&topology, &counts).unwrap());
        for (rank, mut expected) in expected.into_iter().enumerate() {
            let here = eplb.placement().iter().filter(|(_, r)| r.index() == rank);
            let mut got: Vec<_> = here.map(|(e, _)| e.index()).collect();
            got.sort_unstable();
            expected.sort_unstable();
            assert_eq!(got, expected, "rank {rank}");
        }
    }
}

#[test]
fn masters_only_until_the_interval_is_over_then_from_the_window_just_past() {
    let topology = group(2, 4, 1);
    let old = from_source_0(&topology, &[100, 1, 1, 1]);
    let new = from_source_0(&topology, &[1, 1, 1, 100]);
    let mut eplb = Eplb::new(&topology, every(2, 1)).unwrap();
    let copies = |plan: &Plan, expert: usize| -> u32 { plan.range(Expert::new(expert)).map(|i| plan.copies(i)).sum() };

    eplb.observe(&Problem::new(&topology, &old).unwrap());
    assert_eq!(solve(&mut eplb, &topology, &new).replicas(), 0, "one microbatch is no interval yet");
    eplb.observe(&Problem::new(&topology, &new).unwrap());
    let plan = solve(&mut eplb, &topology, &old);
    assert_eq!((copies(&plan, 0), copies(&plan, 3)), (1, 3), "the window holds only the microbatch just past");
    eplb.observe(&Problem::new(&topology, &old).unwrap());
    assert_eq!(solve(&mut eplb, &topology, &old), plan, "no new placement inside an interval");
}

#[test]
fn two_copies_on_one_rank_become_one_instance_with_both_shares() {
    // One expert is all the load, so both extra copies are its: three copies of it on two ranks.
    let topology = group(2, 2, 1);
    let counts = from_source_0(&topology, &[90, 0]);
    let mut eplb = Eplb::new(&topology, every(1, 1)).unwrap();
    eplb.observe(&Problem::new(&topology, &counts).unwrap());
    let plan = solve(&mut eplb, &topology, &counts);
    let hot = plan.of(Expert::new(0));
    assert_eq!(hot.iter().map(|i| (i.rank.index(), i.quota)).collect::<Vec<_>>(), [(0, 60), (1, 30)]);
    assert_eq!(plan.wasted_copies(), 1);
}

#[test]
fn a_moved_master_keeps_its_place_in_the_plan_with_no_tokens() {
    let topology = group(2, 4, 0);
    let counts = from_source_0(&topology, &[50, 40, 1, 1]);
    let mut eplb = Eplb::new(&topology, every(1, 1)).unwrap();
    eplb.observe(&Problem::new(&topology, &counts).unwrap());
    let plan = solve(&mut eplb, &topology, &counts);
    let of = |e: usize| plan.of(Expert::new(e)).iter().map(|i| (i.rank.index(), i.physical.index(), i.quota));
    assert_eq!(of(1).collect::<Vec<_>>(), [(0, 1, 0), (1, 2, 40)], "replica behind the masters of rank 1");
}

#[test]
fn exact_heuristic_gives_each_slot_to_the_most_loaded_copy() {
    let topology = group(4, 4, 1);
    let counts = from_source_0(&topology, &[100, 60, 10, 10]);
    let plan = solve(&mut EplbExact::new(&topology), &topology, &counts);
    // Copies in turn: of 100, of 60, of 50, of 33. The replica of 60 (30 each) goes first, to rank 2; those of 100 (25
    // each) to ranks 3 and 1; the last finds only its home's slot free and is dropped.
    let of = |e: usize| plan.of(Expert::new(e)).iter().map(|i| (i.rank.index(), i.quota)).collect::<Vec<_>>();
    assert_eq!(of(0), [(0, 34), (1, 33), (3, 33)]);
    assert_eq!(of(1), [(1, 30), (2, 30)]);
    assert_eq!(plan.replicas(), 3);
}

#[test]
fn exact_heuristic_makes_no_copy_that_nothing_needs() {
    let topology = group(4, 4, 2);
    let plan = solve(&mut EplbExact::new(&topology), &topology, &from_source_0(&topology, &[1, 1, 1, 0]));
    assert_eq!(plan.replicas(), 0);
    let slow = topology.with_speeds(&[1024, 1024, 0, 1024]).unwrap();
    let plan = solve(&mut EplbExact::new(&slow), &slow, &from_source_0(&slow, &[500, 300, 20, 10]));
    let on_2 = plan.instances().iter().filter(|i| i.rank == Rank::new(2)).count();
    assert_eq!((on_2, plan.replicas()), (1, 6), "no replica on a rank of speed weight 0");
}

#[test]
fn what_it_cannot_serve_is_refused_when_built() {
    let topology = group(4, 8, 1);
    for (groups, nodes) in [(3, 1), (4, 3), (0, 1), (4, 0), (8, 8)] {
        let params = EplbParams { groups: Some(ExpertGroups { groups, nodes }), ..every(1, 1) };
        let refused = BuildError::Groups { groups, nodes, experts: 8, ranks: 4 };
        assert_eq!(Eplb::new(&topology, params).err(), Some(refused));
    }
    let stopped = topology.with_speeds(&[1024, 0, 1024, 1024]).unwrap();
    assert_eq!(Eplb::new(&stopped, every(1, 1)).err(), Some(BuildError::ZeroSpeed { policy: "eplb" }));
}
