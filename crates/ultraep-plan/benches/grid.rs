//! Quality over the grid of load shapes: `cargo bench -p ultraep-plan --bench grid [-- SEEDS [MIN_QUOTA]]`.
//!
//! One line a cell: imbalance (mean, worst), replicas, sends, remote tokens and median solve time of `greedy`,
//! `ultraep-v1` and `ultraep`, and a verdict on the goals at the end.

#[path = "../tests/common/mod.rs"]
mod common;

use common::{Rng, Skew, run, skewed, topology};
use std::time::Instant;
use ultraep_plan::{
    Greedy, GreedyParams, Plan, Policy, Problem, Topology, Ultraep, UltraepParams, UltraepV1, UltraepV1Params,
};

const SHAPES: [(usize, usize, usize); 5] = [(128, 64, 2), (256, 64, 2), (128, 64, 1), (160, 40, 4), (256, 32, 2)];
const RATIOS: [f64; 6] = [1.5, 2.0, 3.0, 4.0, 6.0, 8.0];

#[derive(Clone, Copy, Default)]
struct Score {
    imbalance: f64,
    replicas: usize,
    sends: usize,
    remote: f64,
    bound: f64,
    ns: u64,
}

fn score(policy: &mut dyn Policy, topology: &Topology, counts: &[u32]) -> Score {
    let (plan, report, _) = run(policy, topology, counts);
    let problem = Problem::new(topology, counts).expect("valid");
    let mut again = Plan::for_slots(topology);
    let mut ns: Vec<u64> = (0..9)
        .map(|_| {
            let start = Instant::now();
            policy.solve(&problem, &mut again).expect("a plan");
            start.elapsed().as_nanos() as u64
        })
        .collect();
    ns.sort_unstable();
    let (max, total) = report.imbalance_after();
    Score {
        imbalance: max as f64 / total as f64,
        replicas: report.replicas,
        sends: report.max_sends,
        remote: report.remote_tokens as f64 / report.total_tokens as f64,
        bound: f64::from(plan.domains()[0].lower_bound) * topology.ranks() as f64 / total as f64,
        ns: ns[4],
    }
}

fn main() {
    let arguments: Vec<usize> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    let seeds = arguments.first().copied().unwrap_or(20);
    let min_quota = arguments.get(1).copied().unwrap_or(1) as u32;
    let mut ratios = Vec::new();
    let (mut missed, mut worse, mut cells_over) = (0, 0, 0);
    println!("{:>22} {:>7} | imbalance mean/worst: greedy, v1, ours | replicas | max sends | remote | us", "cell", "");
    for (experts, ranks, slots) in SHAPES {
        let topology = topology(ranks, experts, ranks, slots);
        let mut policies: [Box<dyn Policy>; 3] = [
            Box::new(Greedy::new(&topology, GreedyParams { min_quota, ..GreedyParams::default() })),
            Box::new(UltraepV1::new(
                &topology,
                UltraepV1Params { min_tokens: min_quota, ..UltraepV1Params::default() },
            )),
            Box::new(Ultraep::new(&topology, UltraepParams { min_quota, ..UltraepParams::default() })),
        ];
        for skew in [Skew::Power, Skew::HotRank] {
            for ratio in RATIOS {
                let mut all: [Vec<Score>; 3] = Default::default();
                for seed in 0..seeds {
                    let mut rng = Rng(seed as u64 * 7919 + (ratio * 10.0) as u64);
                    let counts = skewed(&mut rng, &topology, skew, ratio, 4096 * 8);
                    for (policy, scores) in policies.iter_mut().zip(&mut all) {
                        scores.push(score(policy.as_mut(), &topology, &counts));
                    }
                }
                let mean = |s: &[Score], f: fn(&Score) -> f64| s.iter().map(f).sum::<f64>() / s.len() as f64;
                let worst = |s: &[Score]| s.iter().map(|s| s.imbalance).fold(0.0, f64::max);
                let (mut ours, mut theirs) = (0, 0);
                let [of_greedy, of_v1, of_own] = &all;
                for ((greedy, v1), own) in of_greedy.iter().zip(of_v1).zip(of_own) {
                    missed += usize::from(own.imbalance > 1.011);
                    worse += usize::from(
                        own.imbalance > greedy.imbalance.max(1.011) || own.imbalance > v1.imbalance.max(1.011),
                    );
                    if v1.imbalance <= 1.011 && own.imbalance <= 1.011 {
                        ours += own.replicas;
                        theirs += v1.replicas;
                    }
                }
                let share = if theirs > 0 { ours as f64 / theirs as f64 } else { f64::NAN };
                if theirs > 0 {
                    ratios.push(share);
                    cells_over += usize::from(share > 1.0);
                }
                print!("({experts:>3},{ranks:>2},{slots}) {:>8} {ratio:>4} |", format!("{skew:?}"));
                for s in &all {
                    print!(" {:.3}/{:.3}", mean(s, |s| s.imbalance), worst(s));
                }
                print!(" lb {:.3} |", mean(&all[2], |s| s.bound));
                for s in &all {
                    print!(" {:>5.1}", mean(s, |s| s.replicas as f64));
                }
                print!(" ({share:.3}) |");
                for s in &all {
                    print!(" {:>4.1}", mean(s, |s| s.sends as f64));
                }
                print!(" |");
                for s in &all {
                    print!(" {:.3}", mean(s, |s| s.remote));
                }
                print!(" |");
                for s in &all {
                    print!(" {:>5.1}", mean(s, |s| s.ns as f64) / 1e3);
                }
                println!();
            }
        }
    }
    let mean = ratios.iter().sum::<f64>() / ratios.len() as f64;
    println!(
        "over 1.011: {missed}; worse than greedy or v1: {worse}; replicas to v1's: {mean:.4}; cells over v1: {cells_over}"
    );
}
