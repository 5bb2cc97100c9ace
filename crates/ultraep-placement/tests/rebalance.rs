//! Rebalancing: the published example copy for copy, and a search that keeps every limit and is never worse.

use proptest::prelude::*;
use ultraep_placement::{MapShape, Method, PlacementMap, RebalanceError, RebalanceSpec, Region, Sharing, rebalance};

const HEURISTIC: RebalanceSpec =
    RebalanceSpec { physical: 16, groups: 4, nodes: 2, ranks: 8, method: Method::Heuristic };

/// Largest rank load under even sharing, in parts of a token.
fn fullest(map: &PlacementMap, row: usize, loads: &[u64]) -> u64 {
    Sharing::of_loads(map, row, loads).unwrap().rank_loads.into_iter().max().unwrap()
}

/// The example of the EPLB release: 2 layers of 12 experts in 4 groups, 2 nodes, 8 GPUs, 16 physical experts.
#[test]
fn the_heuristic_gives_the_published_map() {
    let weights =
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86, 20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27];
    let map = rebalance(&weights, 12, &HEURISTIC).unwrap();
    assert_eq!(map.row(0), [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1]);
    assert_eq!(map.row(1), [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]);
    let (physical, width) = map.logical_to_physical();
    assert_eq!((width, &physical[..2], &physical[10..12]), (2, &[12, -1][..], &[0, 2][..]));
    let ours = rebalance(&weights, 12, &RebalanceSpec { method: Method::Search, ..HEURISTIC }).unwrap();
    for row in 0..2 {
        let loads = &weights[row * 12..row * 12 + 12];
        assert!(fullest(&ours, row, loads) <= fullest(&map, row, loads));
    }
}

#[test]
fn without_whole_groups_a_node_all_ranks_are_one_node() {
    let weights: Vec<u64> = (0..12).map(|e| 10 + e * e).collect();
    let three = RebalanceSpec { groups: 3, ..HEURISTIC };
    let one = RebalanceSpec { groups: 1, nodes: 1, ..HEURISTIC };
    assert_eq!(rebalance(&weights, 12, &three).unwrap(), rebalance(&weights, 12, &one).unwrap());
}

#[test]
fn the_search_takes_two_copies_off_one_rank() {
    // The heuristic puts two of expert 0's three copies on one rank.
    let weights = [90, 0, 0, 0];
    let spec = RebalanceSpec { physical: 6, groups: 1, nodes: 1, ranks: 3, method: Method::Heuristic };
    assert_eq!(rebalance(&weights, 4, &spec).unwrap().findings().twice, []);
    let two = RebalanceSpec { ranks: 2, ..spec };
    let heuristic = rebalance(&[90, 1, 1, 1], 4, &two).unwrap();
    assert!(!heuristic.findings().twice.is_empty(), "{heuristic:?}");
    let ours = rebalance(&[90, 1, 1, 1], 4, &RebalanceSpec { method: Method::Search, ..two }).unwrap();
    assert!(fullest(&ours, 0, &[90, 1, 1, 1]) <= fullest(&heuristic, 0, &[90, 1, 1, 1]));
    assert_eq!(ours.findings().twice, [], "{ours:?}");
}

/// Where the heuristic stops short: sizes that pack badly greedily, and swaps mend.
#[test]
fn the_search_is_better_where_greedy_packing_is_not() {
    let weights = [8, 7, 6, 5, 4, 3];
    let spec = RebalanceSpec { physical: 6, groups: 1, nodes: 1, ranks: 2, method: Method::Heuristic };
    let loads = |method| fullest(&rebalance(&weights, 6, &RebalanceSpec { method, ..spec }).unwrap(), 0, &weights);
    assert_eq!(loads(Method::Heuristic), 17 * Sharing::UNIT);
    assert_eq!(loads(Method::Search), 17 * Sharing::UNIT, "33 tokens on two ranks");
    let weights = [3, 3, 2, 2, 2, 0];
    let loads = |method| fullest(&rebalance(&weights, 6, &RebalanceSpec { method, ..spec }).unwrap(), 0, &weights);
    assert_eq!((loads(Method::Heuristic), loads(Method::Search)), (7 * Sharing::UNIT, 6 * Sharing::UNIT));
}

#[test]
fn what_cannot_be_is_refused() {
    let with = |change: &dyn Fn(&mut RebalanceSpec)| {
        let mut spec = HEURISTIC;
        change(&mut spec);
        rebalance(&[1; 12], 12, &spec).unwrap_err().to_string()
    };
    assert_eq!(with(&|s| s.groups = 5), "expert groups 5: it must divide experts 12");
    assert_eq!(with(&|s| s.nodes = 3), "nodes 3: it must divide ranks 8");
    assert_eq!(with(&|s| s.physical = 20), "ranks 8: it must divide physical experts 20");
    assert_eq!(with(&|s| s.physical = 8), "8 physical experts for 12 experts: each needs one at least");
    assert_eq!(with(&|s| s.ranks = 0), "ranks 0: allowed are 1 to 1024");
    assert_eq!(with(&|s| s.nodes = 0), "nodes 0: allowed are 1 to 1024");
    assert!(matches!(rebalance(&[1; 13], 12, &HEURISTIC), Err(RebalanceError::Weights { got: 13, experts: 12 })));
    assert!(matches!(rebalance(&[], 12, &HEURISTIC), Err(RebalanceError::Weights { .. })));
}

#[test]
fn regions_keep_their_experts() {
    let shape = MapShape { layers: 1, ranks: 4, slots_per_rank: 3, experts: 8 };
    let region = |experts: std::ops::Range<usize>, ranks| Region {
        experts: experts.map(ultraep_plan::Expert::new).collect(),
        ranks,
    };
    let regions = [region(0..4, 0..2), region(4..8, 2..4)];
    let weights = [100, 1, 1, 1, 1, 1, 1, 1];
    let map = ultraep_placement::rebalance_regions(&weights, shape, &regions, Method::Search).unwrap();
    assert!((0..2).all(|rank| map.on(0, rank).iter().all(|&e| e < 4)), "{map:?}");
    assert!((2..4).all(|rank| map.on(0, rank).iter().all(|&e| e >= 4)), "{map:?}");
    assert!(map.findings().is_valid());
}

#[test]
fn huge_loads_do_not_overflow() {
    let weights = [u64::MAX, u64::MAX / 2, 1, 0];
    for method in [Method::Heuristic, Method::Search] {
        let spec = RebalanceSpec { physical: 8, groups: 1, nodes: 1, ranks: 4, method };
        assert!(rebalance(&weights, 4, &spec).unwrap().findings().is_valid());
    }
}

proptest! {
    #[test]
    fn the_search_is_never_worse_and_keeps_groups_in_their_node(
        (nodes, ranks_a_node, groups_a_node, experts_a_group, spare, seed) in
            (1_usize..4, 1_usize..5, 1_usize..3, 1_usize..6, 0_usize..4, any::<u64>()),
    ) {
        let (ranks, groups) = (nodes * ranks_a_node, nodes * groups_a_node);
        let experts = groups * experts_a_group;
        let slots = (groups_a_node * experts_a_group).div_ceil(ranks_a_node) + spare;
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) % 1000 * ((state >> 50) % 3)
        };
        let weights: Vec<u64> = (0..2 * experts).map(|_| next()).collect();
        let spec = |method| RebalanceSpec { physical: ranks * slots, groups, nodes, ranks, method };
        let heuristic = rebalance(&weights, experts, &spec(Method::Heuristic)).unwrap();
        let ours = rebalance(&weights, experts, &spec(Method::Search)).unwrap();
        for row in 0..2 {
            let loads = &weights[row * experts..(row + 1) * experts];
            prop_assert!(fullest(&ours, row, loads) <= fullest(&heuristic, row, loads));
            for group in 0..groups {
                let members = group * experts_a_group..(group + 1) * experts_a_group;
                let mut nodes_of: Vec<usize> = (0..ranks)
                    .filter(|&rank| ours.on(row, rank).iter().any(|&e| members.contains(&(e as usize))))
                    .map(|rank| rank / ranks_a_node)
                    .collect();
                nodes_of.dedup();
                prop_assert_eq!(nodes_of.len(), 1, "group {} is in one node", group);
            }
        }
        let findings = ours.findings();
        prop_assert!(findings.is_valid() && findings.empty_slots == 0 && findings.unequal_rows == 0);
        prop_assert!(findings.twice.len() <= heuristic.findings().twice.len() || slots > experts / nodes);
        let again = rebalance(&weights, experts, &spec(Method::Search)).unwrap();
        prop_assert_eq!(again, ours);
    }
}
