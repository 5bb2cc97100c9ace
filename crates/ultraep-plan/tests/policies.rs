//! All policies of the crate on random problems: plans and splits keep every rule; `greedy` equals a naive transcription.

mod common;

use common::{Rng, random_problem, run, topology};
use ultraep_plan::{
    Domain, FULL_SPEED, Greedy, GreedyParams, Plan, PlanRules, Policy, Problem, Rank, Ratio, SolveError,
    SplitWorkspace, StopReason, Tally, Topology, Ultraep, UltraepParams, UltraepV1, UltraepV1Params, Unbalanced,
    digest_plan, split_source,
};

fn policies(topology: &Topology, min_quota: u32) -> Vec<Box<dyn Policy>> {
    let v1 = UltraepV1Params { min_tokens: min_quota, ..UltraepV1Params::default() };
    vec![
        Box::new(Unbalanced::new(topology)),
        Box::new(Greedy::new(topology, GreedyParams { min_quota, ..GreedyParams::default() })),
        Box::new(UltraepV1::new(topology, v1)),
        Box::new(Ultraep::new(topology, UltraepParams { min_quota, ..UltraepParams::default() })),
    ]
}

/// Largest rank load, at the ranks' speeds where the policy knows them.
fn largest(rules: &PlanRules, topology: &Topology, loads: &[u32]) -> u64 {
    let weighed = loads.iter().zip(topology.speeds()).map(|(&load, &speed)| match speed {
        speed if rules.speeds && speed > 0 => (u64::from(load) * u64::from(FULL_SPEED)).div_ceil(u64::from(speed)),
        _ => u64::from(load),
    });
    weighed.max().unwrap_or(0)
}

#[test]
fn random_problems_keep_every_rule() {
    for seed in 0..1500 {
        let mut rng = Rng(seed);
        let (topology, counts) = random_problem(&mut rng);
        let min_quota = [1, 1, 7, 1024][rng.below(4)];
        for mut policy in policies(&topology, min_quota) {
            let (plan, report, _) = run(policy.as_mut(), &topology, &counts);
            let (before, after) = (
                largest(&policy.rules(), &topology, &report.rank_load_before),
                largest(&policy.rules(), &topology, &report.rank_load_after),
            );
            assert!(after <= before, "seed {seed}: {} made it worse", policy.name());
            let again = run(policy.as_mut(), &topology, &counts).0;
            assert_eq!(digest_plan(&plan), digest_plan(&again), "seed {seed}: a used workspace changes the plan");
        }
    }
}

/// Above its goal, `ultraep` ends at most where the published planners do, whatever slots and speeds.
#[test]
fn never_worse_than_the_published_planners() {
    for seed in 0..3000 {
        let mut rng = Rng(seed);
        let (mut topology, counts) = random_problem(&mut rng);
        if rng.below(2) == 0 {
            let slots: Vec<usize> = (0..topology.ranks()).map(|_| rng.below(2) * rng.below(5)).collect();
            topology = topology.with_slots(&slots).expect("valid");
        }
        let min_quota = [1, 1, 7, 64][rng.below(4)];
        let params = UltraepParams { min_quota, ..UltraepParams::default() };
        let (plan, ..) = run(&mut Ultraep::new(&topology, params), &topology, &counts);
        for mut other in [policies(&topology, min_quota).remove(1), policies(&topology, min_quota).remove(2)] {
            let (theirs, report, _) = run(other.as_mut(), &topology, &counts);
            let small = |d: Domain| {
                let mut experts = topology.domain_experts(d).map(ultraep_plan::Expert::new);
                experts.any(|e| theirs.of(e)[1..].iter().any(|i| i.quota < min_quota))
            };
            for (domain, ours) in (0..topology.domains()).map(Domain::new).zip(plan.domains()) {
                let reached = weighed(&topology, domain, &report.rank_load_after);
                let goal = u64::from(params.beta.scale_ceil(ours.lower_bound));
                let worse = u64::from(ours.threshold) > reached.max(goal);
                assert!(!worse || small(domain), "seed {seed}: {ours:?}, {} {reached}", other.name());
            }
        }
    }
}

/// Largest rank load of a domain at the ranks' speeds; a rank of weight 0 counts at full speed.
fn weighed(topology: &Topology, domain: Domain, loads: &[u32]) -> u64 {
    let of = |r: usize| {
        let speed = topology.speed(Rank::new(r));
        let speed = u64::from(if speed == 0 { FULL_SPEED } else { speed });
        (u64::from(loads[r]) * u64::from(FULL_SPEED)).div_ceil(speed)
    };
    topology.domain_range(domain).map(of).max().unwrap_or(0)
}

/// Two donors for three receivers, one of them with four slots: those with one slot must be filled, the one with four
/// must take both remainders.
#[test]
fn receivers_with_one_slot_are_filled_first() {
    let topology = topology(8, 8, 8, 0).with_slots(&[0, 0, 0, 1, 0, 4, 1, 0]).expect("valid");
    let mut counts = vec![0; 64];
    (counts[0], counts[1]) = (91, 81);
    let params = UltraepParams { min_quota: 1, ..UltraepParams::default() };
    let (plan, ..) = run(&mut Ultraep::new(&topology, params), &topology, &counts);
    let outcome = plan.domains()[0];
    assert_eq!((outcome.threshold, outcome.lower_bound, plan.replicas()), (35, 35, 4), "{outcome:?}");
}

#[test]
fn a_tally_changes_nothing() {
    for seed in 0..300 {
        let mut rng = Rng(seed);
        let (topology, counts) = random_problem(&mut rng);
        let source = Rank::new(rng.below(topology.ranks()));
        let mut tally = Tally::new(&topology);
        let plain = Problem::new(&topology, &counts).expect("valid");
        let tallied = Problem::tallied(&topology, &counts, source, &mut tally).expect("valid");
        assert_eq!(plain.total(), tallied.total());
        let mut policy = Greedy::new(&topology, GreedyParams { min_quota: 1, ..GreedyParams::default() });
        let (mut a, mut b) = (Plan::for_slots(&topology), Plan::for_slots(&topology));
        policy.solve(&plain, &mut a).expect("a plan");
        policy.solve(&tallied, &mut b).expect("a plan");
        assert_eq!(a, b);
        let mut workspace = SplitWorkspace::new(&topology);
        let (mut x, mut y) = (vec![0; a.instances().len()], vec![0; a.instances().len()]);
        split_source(&plain, &a, source, &mut workspace, &mut x).expect("a split");
        split_source(&tallied, &a, source, &mut workspace, &mut y).expect("a split");
        assert_eq!(x, y);
    }
}

/// Algorithm 1 written down plainly: `(threshold, [(expert, rank, quota)] in order of creation)`.
fn naive_greedy(
    topology: &Topology,
    domain: Domain,
    loads: &[u32],
    params: GreedyParams,
) -> (u32, Vec<(usize, usize, u32)>) {
    let ranks: Vec<usize> = topology.domain_range(domain).collect();
    let load = |r: usize| loads[topology.masters(Rank::new(r))].iter().sum::<u32>();
    let attempt = |tau: u32| -> Option<Vec<(usize, usize, u32)>> {
        let mut moves: Vec<(usize, usize, u32)> = Vec::new();
        let mut sources: Vec<usize> = ranks.iter().copied().filter(|&r| load(r) > tau).collect();
        sources.sort_by_key(|&r| (std::cmp::Reverse(load(r)), r));
        for source in sources {
            let mut excess = load(source) - tau;
            let mut experts: Vec<usize> = topology.masters(Rank::new(source)).collect();
            experts.sort_by_key(|&e| (std::cmp::Reverse(loads[e]), e));
            for e in experts {
                let mut rest = loads[e];
                while excess > 0 && rest > 0 {
                    let received = |r: usize| moves.iter().filter(|m| m.1 == r).map(|m| m.2).sum::<u32>();
                    let slack = |r: usize| tau.saturating_sub(load(r) + received(r));
                    let fits = |r: usize| {
                        slack(r) > 0
                            && moves.iter().filter(|m| m.1 == r).count() < topology.replica_slots(Rank::new(r))
                            && !moves.iter().any(|m| m.0 == e && m.1 == r)
                    };
                    let target =
                        ranks.iter().copied().filter(|&r| fits(r)).min_by_key(|&r| (std::cmp::Reverse(slack(r)), r));
                    let Some(target) = target else { break };
                    let delta = excess.min(slack(target)).min(rest);
                    if delta < params.min_quota {
                        break;
                    }
                    moves.push((e, target, delta));
                    (excess, rest) = (excess - delta, rest - delta);
                }
            }
            if excess > 0 {
                return None;
            }
        }
        Some(moves)
    };
    let total: u32 = ranks.iter().map(|&r| load(r)).sum();
    let max = ranks.iter().map(|&r| load(r)).max().unwrap();
    let mean = total.div_ceil(ranks.len() as u32);
    let (mut low, mut high) = (params.beta.scale_ceil(mean).max(mean).min(max), max);
    while low < high {
        let middle = low + (high - low) / 2;
        if attempt(middle).is_some() { high = middle } else { low = middle + 1 }
    }
    (high, attempt(high).unwrap())
}

#[test]
fn greedy_is_algorithm_1() {
    for seed in 0..600 {
        let mut rng = Rng(seed);
        let (topology, counts) = random_problem(&mut rng);
        let params = GreedyParams { beta: Ratio::BETA, min_quota: [1, 5, 1024][rng.below(3)] };
        let (plan, ..) = run(&mut Greedy::new(&topology, params), &topology, &counts);
        let loads: Vec<u32> =
            (0..topology.experts()).map(|e| counts.iter().skip(e).step_by(topology.experts()).sum()).collect();
        for domain in (0..topology.domains()).map(Domain::new) {
            let (threshold, moves) = naive_greedy(&topology, domain, &loads, params);
            assert_eq!(plan.domains()[domain.index()].threshold, threshold, "seed {seed}");
            for e in topology.domain_experts(domain) {
                let expected: Vec<_> = moves.iter().filter(|m| m.0 == e).map(|m| (m.1, m.2)).collect();
                let got: Vec<_> =
                    plan.of(ultraep_plan::Expert::new(e))[1..].iter().map(|i| (i.rank.index(), i.quota)).collect();
                assert_eq!(got, expected, "seed {seed}, expert {e}");
            }
        }
    }
}

#[test]
fn a_problem_for_another_group_is_refused() {
    let (a, b) = (topology(4, 8, 4, 1), topology(4, 8, 2, 1));
    let counts = vec![1; 32];
    let problem = Problem::new(&b, &counts).expect("valid");
    for mut policy in policies(&a, 1) {
        let refused = policy.solve(&problem, &mut Plan::for_slots(&a));
        assert!(matches!(refused, Err(SolveError::Topology { .. })), "{}", policy.name());
    }
}

#[test]
fn edges_of_the_input() {
    // No slots; one master a rank; one rank; nothing to do; one expert takes all.
    let shapes = [topology(4, 8, 4, 0), topology(4, 4, 4, 2), topology(1, 5, 1, 3), topology(6, 6, 3, 1)];
    for topology in &shapes {
        let cells = topology.ranks() * topology.experts();
        let one_takes_all: Vec<u32> = (0..cells).map(|i| 3000 * u32::from(i % topology.experts() == 0)).collect();
        for counts in [vec![0; cells], vec![17; cells], one_takes_all] {
            for mut policy in policies(topology, 1) {
                let (plan, report, _) = run(policy.as_mut(), topology, &counts);
                if report.total_tokens == 0 {
                    assert_eq!(plan.replicas(), 0, "{}", policy.name());
                }
                assert!(
                    plan.domains().iter().all(|d| d.lower_bound <= d.threshold || d.stop == StopReason::NotASearch)
                );
            }
        }
    }
}

#[test]
fn slow_ranks_get_less_and_ranks_without_weight_no_replica() {
    let mut speeds = vec![FULL_SPEED; 8];
    (speeds[2], speeds[5]) = (FULL_SPEED / 2, 0);
    let topology = topology(8, 16, 8, 2).with_speeds(&speeds).expect("valid");
    for seed in 0..50 {
        let mut rng = Rng(seed);
        let counts: Vec<u32> = (0..8 * 16).map(|_| 500 + rng.below(1000) as u32).collect();
        let params = UltraepParams { min_quota: 1, ..UltraepParams::default() };
        let (plan, report, _) = run(&mut Ultraep::new(&topology, params), &topology, &counts);
        // 7.5 ranks' worth of speed: the mean is total / 7.5 at full speed and half of it on rank 2.
        let mean = report.total_tokens as f64 / 7.5;
        let outcome = plan.domains()[0];
        if outcome.stop == StopReason::TargetReached {
            assert!(f64::from(outcome.threshold) <= 1.01 * mean);
            assert!(f64::from(report.rank_load_after[2]) <= 1.01 * mean / 2.0);
        }
        assert!(outcome.stop == StopReason::TargetReached || outcome.lower_bound as f64 > 0.99 * mean, "{outcome:?}");
        assert!(report.rank_load_after[5] <= report.rank_load_before[5]);
    }
}

/// Many ranks a little over the target and one idle rank with few slots: the excess must be passed on from rank to rank.
#[test]
fn a_rank_of_idle_experts_is_used_as_far_as_its_slots_allow() {
    for (ranks, experts, slots) in [(64, 128, 1), (64, 256, 2), (32, 256, 2), (16, 64, 2), (8, 32, 1)] {
        let topology = topology(ranks, experts, ranks, slots);
        let row: Vec<u32> =
            (0..experts).map(|e| if e < experts / ranks { 0 } else { 32_768 / experts as u32 }).collect();
        let counts = row.repeat(ranks);
        for min_quota in [1, 1024] {
            let params = UltraepParams { min_quota, ..UltraepParams::default() };
            let (plan, ..) = run(&mut Ultraep::new(&topology, params), &topology, &counts);
            let outcome = plan.domains()[0];
            assert!(
                matches!(outcome.stop, StopReason::TargetReached | StopReason::LowerBound),
                "{ranks} ranks, least quota {min_quota}: {outcome:?}"
            );
        }
    }
}
