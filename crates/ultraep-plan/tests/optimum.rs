//! Policy `ultraep` against proven optima on small random instances: never below, within 0.5% above.
//!
//! The optimum is a mixed-integer program over real-valued quotas (so at most the true one), solved by `microlp` unless the
//! plan already meets its own lower bound closely; for those the bound itself is checked on a sample.

mod common;

use common::{Rng, Skew, run, skewed, topology};
use microlp::{ComparisonOp, OptimizationDirection, Variable};
use ultraep_plan::{Expert, Rank, Ratio, Topology, Ultraep, UltraepParams};

/// What the program minimises.
enum Goal {
    /// The threshold `tau`.
    Threshold,
    /// The replicas, at this threshold.
    Replicas(u32),
}

/// The optimum over quotas `u[e,t]` and replicas `z[e,t]` of any plan.
fn optimum(topology: &Topology, loads: &[u32], min_quota: u32, goal: &Goal) -> f64 {
    let ranks = topology.ranks();
    let scale = f64::from(loads.iter().sum::<u32>().max(1)) / ranks as f64;
    let mut program = microlp::Problem::new(OptimizationDirection::Minimize);
    let (tau_price, replica_price, most) = match *goal {
        Goal::Threshold => (1.0, 0.0, ranks as f64),
        Goal::Replicas(tau) => (0.0, 1.0, f64::from(tau) / scale),
    };
    let tau = program.add_var(tau_price, (0.0, most));
    let mut rank_load: Vec<Vec<(Variable, f64)>> = vec![vec![(tau, -1.0)]; ranks];
    let mut slots: Vec<Vec<(Variable, f64)>> = vec![Vec::new(); ranks];
    let mut masters = vec![0.0; ranks];
    for (e, &tokens) in loads.iter().enumerate() {
        let home = topology.home(Expert::new(e)).index();
        let load = f64::from(tokens) / scale;
        masters[home] += load;
        let mut exported = Vec::new();
        for r in (0..ranks).filter(|&r| r != home && tokens >= min_quota) {
            let (u, z) = (program.add_var(0.0, (0.0, load)), program.add_binary_var(replica_price));
            program.add_constraint([(u, 1.0), (z, -load)], ComparisonOp::Le, 0.0);
            program.add_constraint([(u, 1.0), (z, -f64::from(min_quota) / scale)], ComparisonOp::Ge, 0.0);
            rank_load[r].push((u, 1.0));
            rank_load[home].push((u, -1.0));
            slots[r].push((z, 1.0));
            exported.push((u, 1.0));
        }
        program.add_constraint(&exported, ComparisonOp::Le, load);
    }
    for r in 0..ranks {
        program.add_constraint(&slots[r], ComparisonOp::Le, topology.slots(Rank::new(r)) as f64);
        program.add_constraint(&rank_load[r], ComparisonOp::Le, -masters[r]);
    }
    let outcome = program.solve().expect("there is a plan");
    assert!(outcome.is_optimal(), "{:?}", outcome.termination_reason());
    let objective = outcome.into_solution().expect("a solution").objective();
    if matches!(goal, Goal::Threshold) { objective * scale } else { objective }
}

fn expert_loads(counts: &[u32], experts: usize) -> Vec<u32> {
    (0..experts).map(|e| counts.iter().skip(e).step_by(experts).sum()).collect()
}

/// Solves `instances` instances at `beta` 1; returns how many exceed the optimum by over 0.5%.
fn run_instances(instances: u64, tokens: usize, min_quota: impl Fn(&mut Rng) -> u32) -> usize {
    let mut over = 0;
    let mut worst = (1.0, 0);
    for seed in 0..instances {
        let mut rng = Rng(seed);
        let ranks = 2 + rng.below(7);
        let experts = ranks * (1 + rng.below((32 / ranks).min(4)));
        let slots = 1 + rng.below(2);
        let topology = topology(ranks, experts, ranks, slots);
        let ratio = 1.1 + rng.unit() * (ranks as f64 * 0.6 - 0.5).max(0.3);
        let skew = [Skew::Power, Skew::HotRank][rng.below(2)];
        let counts = skewed(&mut rng, &topology, skew, ratio, tokens);
        let params = UltraepParams { beta: Ratio::ONE, min_quota: min_quota(&mut rng) };
        let (plan, report, _) = run(&mut Ultraep::new(&topology, params), &topology, &counts);
        let outcome = plan.domains()[0];
        let reached = f64::from(*report.rank_load_after.iter().max().expect("ranks"));
        let close = reached <= 1.002 * f64::from(outcome.lower_bound);
        if close && seed % 8 != 0 {
            continue;
        }
        let best = optimum(&topology, &expert_loads(&counts, experts), params.min_quota, &Goal::Threshold);
        // Real-valued quotas and the solver's tolerance leave less than one token.
        assert!(reached > best - 1.0, "seed {seed}: {reached} is below the optimum {best}");
        assert!(f64::from(outcome.lower_bound) < best + 1.0, "seed {seed}: {outcome:?}, optimum {best}");
        if reached / best > worst.0 {
            worst = (reached / best, seed);
        }
        over += usize::from(reached > 1.005 * best);
    }
    println!("{instances} instances: {over} over 0.5%; worst {:.4} (seed {})", worst.0, worst.1);
    over
}

#[test]
fn within_half_a_percent_of_the_optimum() {
    assert_eq!(run_instances(200, 4096, |_| 1), 0);
}

#[test]
fn with_the_default_least_quota_too() {
    assert_eq!(run_instances(200, 32_768, |_| 1024), 0);
}

/// `u_min` up to a quarter of the mean rank load: whether a threshold can be met is a puzzle of its own, and the planner
/// does not always solve it. This records how often it comes within 0.5% all the same.
#[test]
fn with_a_huge_least_quota_mostly() {
    let over = run_instances(120, 4096, |rng| [64, 256, 1024][rng.below(3)]);
    assert!(over <= 5, "{over} of 120");
}

/// At the default target, no plan of these instances has fewer replicas.
#[test]
fn replicas_are_as_few_as_can_be() {
    for seed in 0..60 {
        let mut rng = Rng(seed);
        let ranks = 3 + rng.below(4);
        let experts = ranks * (1 + rng.below(2));
        let topology = topology(ranks, experts, ranks, 1 + rng.below(2));
        let (ratio, skew) = (1.2 + rng.unit() * 1.8, [Skew::Power, Skew::HotRank][rng.below(2)]);
        let counts = skewed(&mut rng, &topology, skew, ratio, 32_768);
        let params = UltraepParams { min_quota: 1, ..UltraepParams::default() };
        let (plan, ..) = run(&mut Ultraep::new(&topology, params), &topology, &counts);
        let target = params.beta.of_mean_floor(32_768 * ranks as u64, ranks as u64);
        if plan.domains()[0].threshold <= target {
            let best = optimum(&topology, &expert_loads(&counts, experts), 1, &Goal::Replicas(target));
            assert_eq!(plan.replicas() as f64, best.round(), "seed {seed}: {topology:?}");
        }
    }
}
