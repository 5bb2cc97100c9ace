//! Generated loads are what they promise: exact rows, possible cells, the target ratio, the same on every machine.

use ultraep_load::{GenerateError, LoadMatrix, LoadParams, Workload, generate};
use ultraep_plan::{Ratio, Topology, TopologySpec};

fn group(ranks: usize, experts: usize) -> Topology {
    Topology::new(TopologySpec { ranks, experts, domain_ranks: ranks, slots_per_rank: 2 }).unwrap()
}

fn params(ratio: u32) -> LoadParams {
    let ratio = Ratio::new(ratio, 10).unwrap();
    LoadParams { tokens_per_rank: 4096, top_k: 8, ratio, seed: 1, microbatch: 7 }
}

fn imbalance(matrix: &LoadMatrix, topology: &Topology) -> f64 {
    let largest = *matrix.rank_loads(topology).iter().max().unwrap();
    f64::from(largest) * topology.ranks() as f64 / f64::from(matrix.total())
}

#[test]
fn rows_are_exact_and_cells_possible() {
    for (ranks, experts) in [(1, 8), (3, 10), (16, 64)] {
        let topology = group(ranks, experts);
        for workload in Workload::ALL {
            let ratio = if ranks == 1 { 10 } else { 15 };
            let params = LoadParams { top_k: 3, ..params(ratio) };
            let matrix = generate(workload, &topology, &params).unwrap_or_else(|e| panic!("{workload}: {e}"));
            for source in 0..ranks {
                let row = matrix.row(source);
                let sum: u32 = row.iter().sum();
                let tokens = sum / 3;
                assert_eq!(sum % 3, 0, "{workload}: a row is tokens times top-k");
                assert!(row.iter().all(|&c| c <= tokens), "{workload}: a token's experts are distinct");
                match workload {
                    Workload::RaggedSources => assert!((1024..=7168).contains(&tokens), "{workload}: {tokens}"),
                    Workload::SilentRank if ranks > 1 => assert!(tokens == 0 || tokens == 4096),
                    _ => assert_eq!(tokens, 4096, "{workload}"),
                }
            }
        }
    }
}

#[test]
fn target_ratios_are_met_within_one_percent() {
    for (ranks, experts) in [(8, 64), (32, 256), (64, 128), (40, 160)] {
        let topology = group(ranks, experts);
        for workload in Workload::ALL.into_iter().filter(|w| w.takes_ratio(7)) {
            for ratio in [15, 20, 30, 40] {
                let matrix = generate(workload, &topology, &params(ratio));
                let matrix = matrix.unwrap_or_else(|e| panic!("{workload} {ratio} at {ranks}x{experts}: {e}"));
                let (got, wanted) = (imbalance(&matrix, &topology), f64::from(ratio) / 10.0);
                assert!((got / wanted - 1.0).abs() <= 0.01, "{workload} at {ranks}x{experts}: {got} for {wanted}");
            }
        }
    }
}

/// The grid on which planners are compared asks both generators for ratios up to 8.
#[test]
fn the_grid_is_within_reach() {
    for (experts, ranks) in [(128, 64), (256, 64), (160, 40), (256, 32)] {
        let topology = group(ranks, experts);
        for workload in [Workload::HotRankZipf, Workload::PowerLaw] {
            let made = generate(workload, &topology, &params(80));
            assert!(made.is_ok(), "{workload} at {ranks}x{experts}: {made:?}");
        }
    }
}

#[test]
fn each_workload_has_its_mark() {
    let topology = group(16, 64);
    let at = |workload, microbatch| generate(workload, &topology, &LoadParams { microbatch, ..params(30) }).unwrap();
    let hottest = |m: &LoadMatrix| {
        let loads = m.rank_loads(&topology);
        (0..16).max_by_key(|&r| loads[r]).unwrap()
    };
    let even = |m: &LoadMatrix| imbalance(m, &topology) < 1.01;

    assert!(even(&at(Workload::Balanced, 0)));
    let one = at(Workload::OneExpert, 0);
    assert_eq!(one.expert_loads().iter().max(), Some(&(16 * 4096)), "every token chooses it");
    let idle = at(Workload::IdleRank, 0);
    assert_eq!(idle.rank_loads(&topology).iter().filter(|&&l| l == 0).count(), 1);
    let spread = at(Workload::SpreadHot, 0);
    let loads = spread.expert_loads();
    assert!(even(&spread) && *loads.iter().max().unwrap() > 4 * loads.iter().min().unwrap());
    let silent = at(Workload::SilentRank, 0);
    assert_eq!((0..16).filter(|&r| silent.row(r).iter().all(|&c| c == 0)).count(), 1);
    assert!(even(&at(Workload::Burst, 6)) && !even(&at(Workload::Burst, 7)));
    let (first, second) = (at(Workload::RotatingHotspot, 3), at(Workload::RotatingHotspot, 4));
    assert_eq!((hottest(&first) + 1) % 16, hottest(&second));
    let distance = |a: &LoadMatrix, b: &LoadMatrix| -> u64 {
        a.expert_loads().iter().zip(b.expert_loads()).map(|(&x, y)| u64::from(x.abs_diff(y))).sum()
    };
    let (start, next, far) = (at(Workload::Drift, 0), at(Workload::Drift, 1), at(Workload::Drift, 12));
    assert!(distance(&start, &next) * 3 < distance(&start, &far), "drift is gradual");
}

#[test]
fn the_same_seed_gives_the_same_load_everywhere() {
    // FNV-1a over all workloads' counts, recorded on the first machine that ran this.
    let topology = group(8, 64);
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for workload in Workload::ALL {
        let matrix = generate(workload, &topology, &params(20)).unwrap();
        for byte in matrix.counts().iter().flat_map(|c| c.to_le_bytes()) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        }
    }
    assert_eq!(hash, 0x2c71_713d_add7_fa35, "{hash:#x}");
    let other = generate(Workload::PowerLaw, &topology, &LoadParams { seed: 2, ..params(20) }).unwrap();
    assert_ne!(other, generate(Workload::PowerLaw, &topology, &params(20)).unwrap());
}

#[test]
fn what_cannot_be_is_refused() {
    let topology = group(4, 8);
    let made = |p: LoadParams| generate(Workload::PowerLaw, &topology, &p).unwrap_err();
    assert_eq!(made(LoadParams { top_k: 9, ..params(20) }), GenerateError::TopK { top_k: 9, experts: 8 });
    assert_eq!(made(LoadParams { top_k: 0, ..params(20) }), GenerateError::TopK { top_k: 0, experts: 8 });
    assert!(matches!(made(LoadParams { tokens_per_rank: u32::MAX, top_k: 2, ..params(20) }), GenerateError::Tokens(_)));
    let GenerateError::Ratio { most_permille, .. } = made(LoadParams { top_k: 4, ..params(30) }) else { panic!() };
    assert!(most_permille <= 2000, "two experts a rank, top-4: at most half of all tokens on one of four ranks");
}
