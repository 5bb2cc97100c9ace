//! Every policy, on any problem: the plan keeps all rules, is the same twice, and `ultraep` is never worse than the
//! published planners.

#![no_main]

use libfuzzer_sys::fuzz_target;
use ultraep_baselines::{PolicyKind, PolicyParams, build, plan_for};
use ultraep_fuzz::Case;
use ultraep_plan::{Domain, Expert, FULL_SPEED, Problem, Rank, Topology, check_plan};

fuzz_target!(|input: (Case, u16, bool)| {
    let (case, min_quota, hold_back) = input;
    let Ok(problem) = Problem::new(&case.topology, &case.counts) else { panic!("the case is valid") };
    let params = PolicyParams { min_quota: u32::from(min_quota), ..PolicyParams::default() };
    let mut outcomes = Vec::new();
    for kind in PolicyKind::ALL {
        let Ok(mut policy) = build(kind, &case.topology, &params) else { continue };
        if !hold_back {
            (0..3).for_each(|_| policy.observe(&problem));
        }
        let mut plan = plan_for(kind, &case.topology);
        policy.solve(&problem, &mut plan).expect("a plan for the group it was built for");
        let report = check_plan(&problem, &plan, &policy.rules()).unwrap_or_else(|error| panic!("{kind}: {error}"));
        let first = plan.clone();
        policy.solve(&problem, &mut plan).expect("the same plan again");
        assert_eq!(first, plan, "{kind}");
        outcomes.push((kind, plan, report.rank_load_after));
    }
    let of = |kind| outcomes.iter().find(|(k, ..)| *k == kind).expect("always built");
    let (_, ours, _) = of(PolicyKind::Ultraep);
    for (domain, outcome) in (0..case.topology.domains()).map(Domain::new).zip(ours.domains()) {
        let goal = u64::from(params.beta.scale_ceil(outcome.lower_bound));
        for kind in [PolicyKind::Greedy, PolicyKind::UltraepV1] {
            let (_, plan, loads) = of(kind);
            // The released fast probe makes replicas below the least quota, which `ultraep` may not.
            let mut experts = case.topology.domain_experts(domain).map(Expert::new);
            let small = experts.any(|e| plan.of(e)[1..].iter().any(|i| i.quota < params.min_quota));
            let reached = weighed(&case.topology, domain, loads);
            assert!(small || u64::from(outcome.threshold) <= reached.max(goal), "{kind}: {outcome:?}, {reached}");
        }
    }
});

/// Largest rank load of a domain at the ranks' speeds; a rank of weight 0 counts at full speed.
fn weighed(topology: &Topology, domain: Domain, loads: &[u32]) -> u64 {
    let of = |r: usize| {
        let speed = topology.speed(Rank::new(r));
        let speed = u64::from(if speed == 0 { FULL_SPEED } else { speed });
        (u64::from(loads[r]) * u64::from(FULL_SPEED)).div_ceil(speed)
    };
    topology.domain_range(domain).map(of).max().unwrap_or(0)
}
