//! Every policy, on any problem: the plan keeps all rules, is the same twice, and `ultraep` is never worse than the
//! published planners.

#![no_main]

use libfuzzer_sys::fuzz_target;
use ultraep_baselines::{PolicyKind, PolicyParams, build, plan_for};
use ultraep_fuzz::Case;
use ultraep_plan::{Problem, check_plan};

fuzz_target!(|input: (Case, u16, bool)| {
    let (case, min_quota, hold_back) = input;
    let Ok(problem) = Problem::new(&case.topology, &case.counts) else { panic!("the case is valid") };
    let params = PolicyParams { min_quota: u32::from(min_quota), ..PolicyParams::default() };
    let mut thresholds = Vec::new();
    for kind in PolicyKind::ALL {
        let Ok(mut policy) = build(kind, &case.topology, &params) else { continue };
        if !hold_back {
            (0..3).for_each(|_| policy.observe(&problem));
        }
        let mut plan = plan_for(kind, &case.topology);
        policy.solve(&problem, &mut plan).expect("a plan for the group it was built for");
        check_plan(&problem, &plan, &policy.rules()).unwrap_or_else(|error| panic!("{kind}: {error}"));
        let first = plan.clone();
        policy.solve(&problem, &mut plan).expect("the same plan again");
        assert_eq!(first, plan, "{kind}");
        thresholds.push((kind, plan.domains().to_vec()));
    }
    let of = |kind| thresholds.iter().find(|(k, _)| *k == kind).map(|(_, d)| d).expect("always built");
    // `greedy` knows nothing of speeds. Where slots differ between ranks it can be better: two donors on one receiver.
    let slots = |r: usize| case.topology.slots(ultraep_plan::Rank::new(r));
    let equal = (1..case.topology.ranks()).all(|r| slots(r) == slots(0));
    if equal && case.topology.speeds().iter().all(|&s| s == ultraep_plan::FULL_SPEED) {
        for (ours, greedy) in of(PolicyKind::Ultraep).iter().zip(of(PolicyKind::Greedy)) {
            let target = params.beta.scale_ceil(ours.lower_bound);
            assert!(ours.threshold <= greedy.threshold.max(target), "worse than greedy: {ours:?}, {greedy:?}");
        }
    }
});
