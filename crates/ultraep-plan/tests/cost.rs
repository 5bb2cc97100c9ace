//! The cost-aware objective: its predictions are those of the model, it never loses to doing nothing or to full balance, and
//! it balances exactly where that pays.

mod common;

use common::{Rng, Skew, random_problem, run, skewed, topology};
use ultraep_plan::measure::Measure;
use ultraep_plan::{
    Charge, HardwareModel, Plan, Policy, Prediction, Predictor, Problem, SplitWorkspace, StopReason, Topology,
    TransferModelError, Ultraep, UltraepParams, Unbalanced, split_all,
};

/// As if all had planned: what planning takes must not decide between plans.
fn predict(policy: &mut dyn Policy, model: &HardwareModel, topology: &Topology, counts: &[u32]) -> (Prediction, Plan) {
    let (plan, ..) = run(policy, topology, counts);
    let problem = Problem::new(topology, counts).expect("valid");
    let mut predictor = Predictor::new(topology, *model).expect("a model");
    predictor.take_plan(&problem, &plan).expect("fits");
    (predictor.predict(&plan, Charge::Planned), plan)
}

fn cost_aware(topology: &Topology, params: UltraepParams, model: HardwareModel) -> Ultraep {
    Ultraep::cost_aware(topology, params, model).expect("a model")
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
        let (cost, plan) = predict(&mut cost_aware(&topology, PARAMS, model), &model, &topology, &counts);
        assert!(cost.total_ps() <= none.total_ps(), "seed {seed}: {cost:?}, doing nothing: {none:?}");
        let full_fits = full_plan.domains()[0].stop == StopReason::TargetReached;
        // Candidates are priced by an estimate of their transfers, within 5% of the clock's time.
        let full_ps = full.total_ps() + full.weight_sync_ps / 20;
        assert!(!full_fits || cost.total_ps() <= full_ps, "seed {seed}: {cost:?}, balancing fully: {full:?}");
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
        run(&mut cost_aware(&topology, params, HardwareModel::default()), &topology, &counts);
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
        let (_, plan) = predict(&mut cost_aware(&topology, PARAMS, model), &model, &topology, &counts);
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
        link_bytes_per_s: 1_000_000_000,
        row_ps: 7,
        gemm_ps: 11,
        tile_rows: 64,
        replica_ps: 5000,
        plan_ps: Some(3),
        reroute_ps: 2,
    };
    let problem = Problem::new(&topology, &counts).expect("valid");
    let mut plan = Plan::for_slots(&topology);
    let mut predictor = Predictor::new(&topology, model).expect("a model");
    Unbalanced::new(&topology).solve(&problem, &mut plan).expect("a plan");
    predictor.take_plan(&problem, &plan).expect("fits");
    let got = predictor.predict(&plan, Charge::Planned);
    // 800 tokens for expert 0 are 13 tiles of 64 rows; rank 1 sends 500 of them, 100 come back: a token takes 10 ns.
    let expected = Prediction {
        plan_ps: 3,
        reroute_ps: 2,
        weight_sync_ps: 0,
        all_to_all_ps: 500 * 10_000,
        experts_ps: 11 + 13 * 64 * 7,
    };
    assert_eq!(got, expected);
    assert_eq!(got.total_ps(), 3 + 2 + 500 * 10_000 + 11 + 13 * 64 * 7);
    let nothing = predictor.predict(&plan, Charge::Nothing);
    assert_eq!(nothing, Prediction { plan_ps: 0, reroute_ps: 0, ..expected }, "masters only needs no plan");

    Ultraep::new(&topology, PARAMS).solve(&problem, &mut plan).expect("a plan");
    predictor.take_plan(&problem, &plan).expect("fits");
    let got = predictor.predict(&plan, Charge::Planned);
    assert_eq!(plan.replicas(), 1);
    // One chunk (it counts as a full one of 256 KiB) and a hop of 5 ns.
    assert_eq!(got.weight_sync_ps, (262_144 + 5) * 1000);
    // The replica on rank 1 takes its own rank's tokens: what is left of them crosses.
    let quota = u64::from(plan.instances()[1].quota);
    assert_eq!(got.all_to_all_ps, (500 - quota).max(100) * 10_000);
}

/// Relays count: of one expert on 31 other ranks home alone would send 31 copies, one after the other.
#[test]
fn weight_sync_is_that_of_the_planned_transfers() {
    let topology = topology(32, 32, 32, 1);
    let mut counts = vec![0; 32 * 32];
    counts.iter_mut().step_by(32).for_each(|count| *count = 4096);
    let model = HardwareModel::default();
    let (got, plan) = predict(&mut Ultraep::new(&topology, PARAMS), &model, &topology, &counts);
    assert_eq!(plan.replicas(), 31);
    let copy_ps = 144 * 292_000;
    assert!((copy_ps..4 * copy_ps).contains(&got.weight_sync_ps), "{} us", got.weight_sync_ps / 1_000_000);
    // And the cost-aware objective knows: it pays, where 31 copies from home would take 1.3 ms.
    let (cost, plan) = predict(&mut cost_aware(&topology, PARAMS, model), &model, &topology, &counts);
    assert!(plan.replicas() > 20 && cost.total_ps() <= got.total_ps(), "{cost:?}");
}

/// What follows from the plan alone is what follows from its split, under every rule.
#[test]
fn measures_of_plans_are_those_of_their_splits() {
    for seed in 0..200 {
        let mut rng = Rng(seed);
        let (topology, counts) = random_problem(&mut rng);
        let problem = Problem::new(&topology, &counts).expect("valid");
        let (plan, ..) = run(&mut Ultraep::new(&topology, PARAMS), &topology, &counts);
        let mut workspace = SplitWorkspace::new(&topology);
        let mut split = vec![0; topology.ranks() * plan.instances().len()];
        split_all(&problem, &plan, &mut workspace, &mut split).expect("fits");
        let of_split = Measure::of_split(topology.ranks(), plan.instances(), &split);
        let mut of_plan = Measure::default();
        of_plan.take_plan(&problem, &plan, &mut workspace).expect("fits");
        assert_eq!(of_plan, of_split, "seed {seed}");
        let total: u64 = counts.iter().map(|&c| u64::from(c)).sum();
        assert_eq!(of_plan.total_tokens(), total);
        assert_eq!(of_plan.remote_tokens(), of_plan.received().iter().sum::<u64>());
    }
}

#[test]
fn experts_without_a_size_are_refused() {
    let model = HardwareModel { expert_bytes: 0, ..HardwareModel::default() };
    let refused = Ultraep::cost_aware(&topology(2, 2, 2, 1), PARAMS, model).map(|_| ());
    assert!(matches!(refused, Err(TransferModelError::Chunks { expert_bytes: 0, .. })), "{refused:?}");
}

/// The planner's time by its model, where it was measured.
#[test]
fn planning_takes_what_was_measured() {
    let model = HardwareModel::default();
    let us = |ranks, experts, replicas| model.plan_ps_of(&topology(ranks, experts, ranks, 2), replicas) / 1_000_000;
    assert_eq!((us(64, 256, 0), us(1024, 4096, 0)), (6, 580));
    assert_eq!(us(64, 128, 110), 36);
}
