//! One table of cases and one runner for all policies of the project: every plan passes the checker, its split is exact
//! where the rule says so, equal inputs give equal plans, and a dirty workspace changes nothing.

use ultraep_baselines::{PolicyKind, PolicyParams, build, ideal, physical_per_rank, plan_for};
use ultraep_load::{LoadParams, Workload, generate};
use ultraep_plan::{
    PlanReport, Problem, Ratio, SplitRule, SplitWorkspace, Topology, TopologySpec, check_plan, check_split,
    digest_plan, split_all,
};

/// A group and the microbatches that a policy sees one after another.
struct Case {
    name: String,
    topology: Topology,
    microbatches: Vec<Vec<u32>>,
}

fn group(ranks: usize, experts: usize, domain_ranks: usize, slots_per_rank: usize) -> Topology {
    Topology::new(TopologySpec { ranks, experts, domain_ranks, slots_per_rank }).unwrap()
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let shapes =
        [(1, 4, 1, 2), (2, 2, 2, 1), (4, 12, 4, 0), (8, 8, 8, 1), (8, 32, 4, 2), (12, 40, 6, 2), (16, 64, 16, 3)];
    for (ranks, experts, domain_ranks, slots) in shapes {
        for workload in Workload::ALL {
            let topology = group(ranks, experts, domain_ranks, slots);
            let ratio = Ratio::new(if ranks <= 2 { 11 } else { 18 }, 10).unwrap();
            let of = |microbatch| {
                let params = LoadParams { tokens_per_rank: 2048, top_k: 2, ratio, seed: 3, microbatch };
                generate(workload, &topology, &params).map(|m| m.counts().to_vec())
            };
            // Some shapes are too small for the ratio.
            let Ok(microbatches) = (4..9).map(of).collect::<Result<Vec<_>, _>>() else { continue };
            let name = format!("{workload} on {ranks} ranks, {experts} experts, domain {domain_ranks}, {slots} slots");
            cases.push(Case { name, topology, microbatches });
        }
    }
    let hand = |name: &str, topology: Topology, counts: Vec<u32>| Case {
        name: name.to_owned(),
        topology,
        microbatches: vec![counts; 4],
    };
    cases.push(hand("no tokens", group(4, 8, 2, 1), vec![0; 32]));
    cases.push(hand("one token", group(4, 8, 4, 1), (0..32).map(|i| u32::from(i == 5)).collect()));
    cases.push(hand("most tokens", group(2, 2, 2, 1), vec![i32::MAX as u32, 0, 0, 0]));
    let uneven = group(4, 8, 4, 2).with_slots(&[0, 3, 1, 2]).unwrap();
    cases.push(hand("slots differ", uneven, (0..32).map(|i| i * i).collect()));
    let slow = group(4, 8, 4, 2).with_speeds(&[1024, 512, 0, 1024]).unwrap();
    cases.push(hand("speeds differ", slow, (0..32).map(|i| 4000 / (i % 8 + 1)).collect()));
    cases
}

fn params() -> PolicyParams {
    PolicyParams { min_quota: 16, ..PolicyParams::default() }
}

/// The counts that the policy is to serve: its own where it forces routing.
fn counts_for(kind: PolicyKind, topology: &Topology, counts: &[u32]) -> Vec<u32> {
    if !kind.forces_routing() {
        return counts.to_vec();
    }
    let sums: Vec<u32> = counts.chunks(topology.experts()).map(|row| row.iter().sum()).collect();
    ideal::balanced_counts(topology, &sums)
}

/// Runs a policy over a case's microbatches and checks every plan. `None` when it says that it cannot serve the group.
fn run(kind: PolicyKind, case: &Case) -> Option<Vec<PlanReport>> {
    let mut policy = match build(kind, &case.topology, &params()) {
        Ok(policy) => policy,
        Err(error) => {
            println!("SKIP {kind}: {}: {error}", case.name);
            return None;
        }
    };
    let mut reports = Vec::new();
    let mut plan = plan_for(kind, &case.topology);
    for (at, counts) in case.microbatches.iter().enumerate() {
        let at = format!("{kind}: {} microbatch {at}", case.name);
        let counts = counts_for(kind, &case.topology, counts);
        let problem = Problem::new(&case.topology, &counts).unwrap();
        policy.solve(&problem, &mut plan).unwrap_or_else(|e| panic!("{at}: {e}"));
        let report = check_plan(&problem, &plan, &policy.rules()).unwrap_or_else(|e| panic!("{at}: {e}"));
        let mut split = vec![0; case.topology.ranks() * plan.instances().len()];
        split_all(&problem, &plan, &mut SplitWorkspace::new(&case.topology), &mut split).unwrap();
        let of_split = check_split(&problem, &plan, &split).unwrap_or_else(|e| panic!("{at}: {e}"));
        if !matches!(plan.split_rule(), SplitRule::SourceRounded { .. }) {
            assert_eq!(of_split.largest_miss, 0, "{at}: quotas and split agree");
        }
        assert_eq!(of_split.remote_tokens, report.remote_tokens, "{at}");
        let room = physical_per_rank(kind, &case.topology);
        assert!(plan.instances().iter().all(|i| i.physical.index() < room), "{at}: room for {room}");
        let again = plan.clone();
        policy.solve(&problem, &mut plan).unwrap();
        assert_eq!((digest_plan(&plan), &plan), (digest_plan(&again), &again), "{at}: solving again");
        reports.push(report);
        policy.observe(&problem);
    }
    Some(reports)
}

#[test]
fn every_policy_serves_every_case() {
    let cases = cases();
    assert!(cases.len() > 80, "{} cases", cases.len());
    for kind in PolicyKind::ALL {
        let skipped: Vec<_> = cases.iter().filter(|case| run(kind, case).is_none()).map(|c| &c.name).collect();
        println!("{kind}: {} of {} cases skipped", skipped.len(), cases.len());
        let expected: &[&str] =
            if matches!(kind, PolicyKind::Eplb | PolicyKind::MoonEp) { &["speeds differ"] } else { &[] };
        assert_eq!(skipped, expected, "{kind}");
    }
}

/// From the very first microbatch on; `lplb`'s linear program is the one exception.
#[test]
fn solving_allocates_nothing() {
    for kind in PolicyKind::ALL.into_iter().filter(|&kind| kind != PolicyKind::Lplb) {
        for case in cases() {
            let Ok(mut policy) = build(kind, &case.topology, &params()) else { continue };
            let mut plan = plan_for(kind, &case.topology);
            for counts in &case.microbatches {
                let problem = Problem::new(&case.topology, counts).unwrap();
                let mut result = Ok(());
                let used = allocation_counter::measure(|| result = policy.solve(&problem, &mut plan));
                result.unwrap();
                assert_eq!(used.count_total, 0, "{kind}: {}", case.name);
                policy.observe(&problem);
            }
        }
    }
}

fn imbalance(report: &PlanReport) -> f64 {
    let (num, den) = report.imbalance_after();
    num as f64 / den as f64
}

/// What each policy promises, on a load that it can serve.
#[test]
fn policies_balance_as_they_promise() {
    let topology = group(16, 64, 16, 2);
    let of = |microbatch| {
        let ratio = Ratio::new(3, 1).unwrap();
        let params = LoadParams { tokens_per_rank: 4096, top_k: 8, ratio, seed: 5, microbatch };
        generate(Workload::HotRankZipf, &topology, &params).unwrap().counts().to_vec()
    };
    let case = Case { name: "hot ranks".into(), topology: topology.clone(), microbatches: (0..6).map(of).collect() };
    let last = |kind| run(kind, &case).unwrap().pop().unwrap();
    let none = last(PolicyKind::None);
    assert!((imbalance(&none) - 3.0).abs() < 0.03 && none.replicas == 0);
    // The load hardly moves, so history serves well here.
    for (kind, most) in [
        (PolicyKind::Eplb, 1.3),
        (PolicyKind::EplbExact, 1.4),
        (PolicyKind::Lplb, 1.6),
        (PolicyKind::Llep, 1.11),
        (PolicyKind::MoonEp, 1.0001),
        (PolicyKind::Greedy, 1.02),
        (PolicyKind::UltraepV1, 1.02),
        (PolicyKind::Ultraep, 1.0101),
        (PolicyKind::UltraepCost, 3.0),
        (PolicyKind::Ideal, 1.0001),
    ] {
        let report = last(kind);
        println!("{kind}: {:.3}, {} replicas", imbalance(&report), report.replicas);
        assert!(imbalance(&report) <= most, "{kind}: {}", imbalance(&report));
    }
}

#[test]
fn names_are_read_back() {
    for kind in PolicyKind::ALL {
        assert_eq!(kind.to_string().parse(), Ok(kind));
        let policy = build(kind, &group(4, 8, 4, 1), &params()).unwrap();
        assert_eq!(policy.name(), kind.name());
    }
    let unknown = "eplb+".parse::<PolicyKind>().unwrap_err().to_string();
    assert!(unknown.starts_with("no policy \"eplb+\": allowed are none, eplb, "), "{unknown}");
}
