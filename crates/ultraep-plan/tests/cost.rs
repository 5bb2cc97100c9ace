//! The cost-aware objective: its predictions are those of the model, it never loses to doing nothing or to full balance, and
//! it balances exactly where that pays.

mod common;

use common::{Rng, Skew, random_problem, run, skewed, topology};
use ultraep_plan::{
    HardwareModel, Plan, Policy, Prediction, Problem, Rank, StopReason, Topology, Ultraep, UltraepParams, Unbalanced,
};

fn predict(policy: &mut dyn Policy, model: &HardwareModel, topology: &Topology, counts: &[u32]) -> (Prediction, Plan) {
    let (plan, ..) = run(policy, topology, counts);
    (model.predict(&Problem::new(topology, counts).expect("valid"), &plan), plan)
}

const PARAMS: UltraepParams = UltraepParams { beta: ultraep_plan::Ratio::BETA, min_quota: 1 };

#[test]
fn never_worse_than_doing_nothing_or_balancing_fully() {
    let mut between = 0;
    for seed in 0..300 {
        let mut rng = Rng(seed);
        let (ranks, slots) = (2 + rng.below(30), rng.below(3));
        let topology = topology(ranks, ranks * (1 + rng.below(4)), ranks, slots);
        let skew = [Skew::Power, Skew::HotRank][rng.below(2)];
        let (ratio, tokens) = (1.2 + 3.0 * rng.unit(), 64 << rng.below(8));
        let counts = skewed(&mut rng, &topology, skew, ratio, tokens);
        let model = HardwareModel::default();
        let (none, _) = predict(&mut Unbalanced::new(&topology), &model, &topology, &counts);
        let (full, full_plan) = predict(&mut Ultraep::new(&topology, PARAMS), &model, &topology, &counts);
        let (cost, plan) = predict(&mut Ultraep::cost_aware(&topology, PARAMS, model), &model, &topology, &counts);
        assert!(cost.total_ps() <= none.total_ps(), "seed {seed}: {cost:?}, doing nothing: {none:?}");
        let full_fits = full_plan.domains()[0].stop == StopReason::TargetReached;
        assert!(!full_fits || cost.total_ps() <= full.total_ps(), "seed {seed}: {cost:?}, balancing fully: {full:?}");
        between += usize::from(plan.replicas() > 0 && cost.total_ps() < full.total_ps());
    }
    assert!(between > 20, "only {between} plans beat both extremes");
}

#[test]
fn keeps_every_rule_on_random_problems() {
    for seed in 0..500 {
        let mut rng = Rng(seed);
        let (topology, counts) = random_problem(&mut rng);
        let params = UltraepParams { min_quota: [1, 7, 1024][rng.below(3)], ..PARAMS };
        run(&mut Ultraep::cost_aware(&topology, params, HardwareModel::default()), &topology, &counts);
    }
}

/// Small batches are left alone, large ones balanced, and once it pays it goes on paying: the break-even batch size.
#[test]
fn a_break_even_size_separates_doing_nothing_from_balancing() {
    let topology = topology(32, 128, 32, 2);
    let model = HardwareModel::default();
    let mut paid = Vec::new();
    for log_tokens in 3..16 {
        let counts = skewed(&mut Rng(5), &topology, Skew::Power, 2.0, 8 << log_tokens);
        let (_, plan) = predict(&mut Ultraep::cost_aware(&topology, PARAMS, model), &model, &topology, &counts);
        paid.push(plan.replicas() > 0);
    }
    assert!(!paid[0] && paid[paid.len() - 1], "{paid:?}");
    assert!(paid.is_sorted(), "{paid:?}");
}

/// The prediction, computed by hand.
#[test]
fn the_prediction_follows_the_formula() {
    let topology = topology(2, 2, 2, 1);
    let counts = [300, 100, 500, 100];
    let model = HardwareModel {
        expert_bytes: 1000,
        token_bytes: 10,
        link_bytes_per_s: 1_000_000_000_000,
        row_ps: 7,
        gemm_ps: 11,
        tile_rows: 64,
        replica_ps: 5,
        plan_ps: 3,
        reroute_ps: 2,
    };
    let problem = Problem::new(&topology, &counts).expect("valid");
    let mut plan = Plan::for_slots(&topology);
    Unbalanced::new(&topology).solve(&problem, &mut plan).expect("a plan");
    let got = model.predict(&problem, &plan);
    // 800 tokens for expert 0 are 13 tiles of 64 rows; nobody sends more than 600 or processes more than 800 tokens.
    let expected = Prediction {
        plan_ps: 3,
        reroute_ps: 2,
        weight_sync_ps: 0,
        all_to_all_ps: 800 * 10,
        experts_ps: 11 + 13 * 64 * 7,
    };
    assert_eq!(got, expected);
    assert_eq!(got.total_ps(), 3 + 2 + 8000 + 11 + 13 * 64 * 7);

    Ultraep::new(&topology, PARAMS).solve(&problem, &mut plan).expect("a plan");
    let got = model.predict(&problem, &plan);
    assert_eq!(plan.replicas(), 1);
    assert_eq!(got.weight_sync_ps, 1005);
    let balanced = *[0, 1]
        .map(|r| plan.instances().iter().filter(|i| i.rank == Rank::new(r)).map(|i| i.quota).sum::<u32>())
        .iter()
        .max()
        .expect("ranks");
    assert_eq!(got.all_to_all_ps, u64::from(balanced.max(600)) * 10);
}
