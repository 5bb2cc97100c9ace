//! The force-balanced bound is really balanced, and not everybody knocks at the same door.

use ultraep_baselines::ideal::{balanced_choice, balanced_counts};
use ultraep_plan::measure::{imbalance_at_speeds, master_loads};
use ultraep_plan::{Rank, Topology, TopologySpec};

fn group(ranks: usize, experts: usize) -> Topology {
    Topology::new(TopologySpec { ranks, experts, domain_ranks: ranks, slots_per_rank: 0 }).unwrap()
}

/// No policy can be below it, so it must be below all: where experts do not divide by ranks, and where ranks' speeds differ.
#[test]
fn it_is_the_bound_whatever_the_experts_and_the_speeds() {
    for (ranks, experts) in [(8, 60), (6, 128), (3, 4), (4, 8)] {
        for speeds in [None, Some([1024, 512, 700, 0, 1024, 300, 1024, 1024])] {
            let mut topology = group(ranks, experts);
            if let Some(speeds) = speeds {
                topology = topology.with_speeds(&speeds[..ranks]).unwrap();
            }
            for sums in [vec![4096; ranks], (0..ranks as u32).map(|r| 5000 + 77 * r * r).collect()] {
                let counts = balanced_counts(&topology, &sums);
                for (row, &sum) in counts.chunks(experts).zip(&sums) {
                    assert_eq!(row.iter().sum::<u32>(), sum);
                }
                let (num, den) = imbalance_at_speeds(&topology, &master_loads(&topology, &counts));
                let imbalance = num as f64 / den as f64;
                assert!(imbalance < 1.002, "{ranks} ranks, {experts} experts, {speeds:?}: {imbalance}");
            }
        }
    }
}

fn spread(values: impl Iterator<Item = u64>) -> u64 {
    let values: Vec<u64> = values.collect();
    values.iter().max().unwrap() - values.iter().min().unwrap()
}

fn expert_loads(counts: &[u32], topology: &Topology) -> Vec<u64> {
    let column = |e: usize| counts.iter().skip(e).step_by(topology.experts()).map(|&c| u64::from(c)).sum();
    (0..topology.experts()).map(column).collect()
}

fn rank_loads(counts: &[u32], topology: &Topology) -> Vec<u64> {
    let experts = expert_loads(counts, topology);
    (0..topology.ranks()).map(|r| topology.masters(Rank::new(r)).map(|e| experts[e]).sum()).collect()
}

#[test]
fn choices_are_distinct_even_and_the_same_as_the_counts() {
    for (ranks, experts, top_k) in [(1, 1, 1), (1, 5, 2), (2, 8, 2), (4, 8, 3), (4, 10, 3), (8, 16, 8), (16, 64, 6)] {
        let topology = group(ranks, experts);
        for tokens in [0, 1, 3, 7, 32, 45] {
            let mut counts = vec![0_u32; ranks * experts];
            for rank in 0..ranks {
                for token in 0..tokens {
                    let mut chosen: Vec<_> =
                        (0..top_k).map(|k| balanced_choice(rank, token, k, &topology, top_k).index()).collect();
                    for &expert in &chosen {
                        counts[rank * experts + expert] += 1;
                    }
                    chosen.sort_unstable();
                    chosen.dedup();
                    assert_eq!(chosen.len(), top_k, "rank {rank} token {token} chose an expert twice");
                }
            }
            let at = format!("{ranks} ranks, {experts} experts, top-{top_k}, {tokens} tokens");
            assert_eq!(counts, balanced_counts(&topology, &vec![(tokens * top_k) as u32; ranks]), "{at}");
            assert_eq!(spread(rank_loads(&counts, &topology).into_iter()), 0, "{at}: ranks");
            if experts % ranks == 0 {
                assert!(spread(expert_loads(&counts, &topology).into_iter()) <= 1, "{at}: experts");
            }
        }
    }
}

#[test]
fn at_any_time_the_sources_send_to_different_ranks() {
    let topology = group(16, 64);
    for token in 0..40 {
        let mut homes: Vec<_> =
            (0..16).map(|rank| topology.home(balanced_choice(rank, token, 0, &topology, 6))).collect();
        homes.sort_unstable();
        homes.dedup();
        assert_eq!(homes.len(), 16, "incast at token {token}");
    }
}

#[test]
fn ragged_sources_keep_their_row_sums_and_balance() {
    for (ranks, experts) in [(4, 8), (4, 10), (6, 30)] {
        let topology = group(ranks, experts);
        let sums: Vec<u32> = (0..ranks as u32).map(|r| (r * r * 37 + 5 * r) % 301).collect();
        let counts = balanced_counts(&topology, &sums);
        for (row, &sum) in counts.chunks(experts).zip(&sums) {
            assert_eq!(row.iter().sum::<u32>(), sum);
        }
        assert!(spread(rank_loads(&counts, &topology).into_iter()) <= 1);
        if experts % ranks == 0 {
            assert!(spread(expert_loads(&counts, &topology).into_iter()) <= 1);
        }
    }
}
