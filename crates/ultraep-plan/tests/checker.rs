//! The checker refuses every kind of broken plan and split, and says what is broken.

mod common;

use common::topology;
use ultraep_plan::{
    DomainOutcome, Instance, PhysicalIndex, Plan, PlanRules, PlanViolation, Problem, Rank, SlotRule, SplitRule,
    SplitWorkspace, StopReason, Topology, check_plan, check_split, split_all,
};

const RULES: PlanRules =
    PlanRules { slots: SlotRule::Replicas, min_quota: 10, empty_replicas: false, within_domain: true, speeds: true };

/// A plan as data: per expert its instances `(rank, physical, quota)`, and per domain `(threshold, bound)`.
#[derive(Clone)]
struct Draft {
    experts: Vec<Vec<(usize, usize, u32)>>,
    domains: Vec<(u32, u32)>,
    rule: SplitRule,
}

impl Draft {
    fn plan(&self, topology: &Topology) -> Plan {
        let mut plan = Plan::with_capacity(topology, 8);
        plan.begin(self.rule);
        for instances in &self.experts {
            for &(rank, physical, quota) in instances {
                plan.push_instance(Instance { rank: Rank::new(rank), physical: PhysicalIndex::new(physical), quota });
            }
            plan.end_expert();
        }
        for &(threshold, lower_bound) in &self.domains {
            plan.push_domain(DomainOutcome { threshold, lower_bound, stop: StopReason::TargetReached });
        }
        plan
    }
}

/// Two domains of two ranks, one master and one slot a rank. Expert 0 has 100 tokens, the others 20, 20 and 40.
fn good() -> (Topology, Vec<u32>, Draft) {
    let topology = topology(4, 4, 2, 1);
    let counts = vec![70, 0, 5, 10, 10, 20, 5, 10, 10, 0, 5, 10, 10, 0, 5, 10];
    let experts = vec![vec![(0, 0, 60), (1, 1, 40)], vec![(1, 0, 20)], vec![(2, 0, 20)], vec![(3, 0, 30), (2, 1, 10)]];
    (topology, counts, Draft { experts, domains: vec![(60, 60), (30, 30)], rule: SplitRule::LocalFirstExact })
}

#[test]
fn a_good_plan_passes_and_is_reported() {
    let (topology, counts, draft) = good();
    let problem = Problem::new(&topology, &counts).expect("valid");
    let report = check_plan(&problem, &draft.plan(&topology), &RULES).expect("a good plan");
    assert_eq!(report.rank_load_before, [100, 20, 20, 40]);
    assert_eq!(report.rank_load_after, [60, 60, 30, 30]);
    assert_eq!((report.replicas, report.max_fanout, report.max_sends, report.max_copies), (2, 1, 1, 1));
    assert_eq!((report.imbalance_before(), report.imbalance_after()), ((400, 180), (240, 180)));
    // At home: 60 and 10 of expert 0, 20 of expert 1, 5 of expert 2, 10 and 10 of expert 3.
    assert_eq!((report.remote_tokens, report.total_tokens), (180 - 115, 180));
}

/// One change to the good plan.
type Change = fn(&mut Draft, &mut PlanRules);
/// Whether a violation is the expected one.
type Expected = fn(&PlanViolation) -> bool;

#[test]
fn each_broken_rule_is_named() {
    use PlanViolation as V;
    let cases: [(&str, Change, Expected); 18] = [
        ("no expert", |d, _| d.experts.truncate(3), |v| matches!(v, V::Experts { got: 3, expected: 4 })),
        ("no outcome", |d, _| d.domains.truncate(1), |v| matches!(v, V::Domains { got: 1, expected: 2 })),
        ("no master", |d, _| d.experts[1].clear(), |v| matches!(v, V::MasterFirst { .. })),
        ("master elsewhere", |d, _| d.experts[1][0].0 = 0, |v| matches!(v, V::MasterFirst { .. })),
        ("master's index", |d, _| d.experts[1][0].1 = 1, |v| matches!(v, V::MasterFirst { .. })),
        ("replica first", |d, _| d.experts[0].reverse(), |v| matches!(v, V::MasterFirst { .. })),
        ("rank 9", |d, _| d.experts[0][1].0 = 9, |v| matches!(v, V::NoSuchRank { ranks: 4, .. })),
        ("twice", |d, _| d.experts[0][1] = (0, 1, 40), |v| matches!(v, V::Twice { .. })),
        ("other domain", |d, _| d.experts[0][1].0 = 3, |v| matches!(v, V::Domain { .. })),
        ("a master's place", |d, _| d.experts[0][1].1 = 0, |v| matches!(v, V::Physical { physical: 0, .. })),
        ("beyond the slots", |d, _| d.experts[0][1].1 = 2, |v| matches!(v, V::Physical { physical: 2, .. })),
        (
            "a place taken",
            |d, r| {
                d.experts[2] = vec![(2, 0, 0), (1, 1, 20)];
                r.within_domain = false;
            },
            |v| matches!(v, V::Physical { physical: 1, .. }),
        ),
        ("below u_min", |_, r| r.min_quota = 41, |v| matches!(v, V::MinQuota { got: 40, expected: 41, .. })),
        (
            "an empty replica",
            |d, _| d.experts[0] = vec![(0, 0, 100), (1, 1, 0)],
            |v| matches!(v, V::MinQuota { got: 0, .. }),
        ),
        ("a token lost", |d, _| d.experts[0][0].2 = 59, |v| matches!(v, V::Quotas { got: 99, expected: 100, .. })),
        ("over the threshold", |d, _| d.domains[0].0 = 59, |v| matches!(v, V::Threshold { got: 60, expected: 59, .. })),
        ("below the bound", |d, _| d.domains[1].1 = 31, |v| matches!(v, V::Bound { got: 30, bound: 31, .. })),
        (
            "no room",
            |d, r| {
                d.experts[2] = vec![(2, 0, 10), (1, 2, 10)];
                d.experts[1] = vec![(1, 0, 10), (0, 1, 10)];
                (r.within_domain, r.slots) = (false, SlotRule::Physical);
            },
            |v| matches!(v, V::Room { got: 3, expected: 2, .. }),
        ),
    ];
    let (topology, counts, good) = good();
    let problem = Problem::new(&topology, &counts).expect("valid");
    for (name, change, expected) in cases {
        let (mut draft, mut rules) = (good.clone(), RULES);
        change(&mut draft, &mut rules);
        let violation = check_plan(&problem, &draft.plan(&topology), &rules).expect_err(name);
        assert!(expected(&violation), "{name}: {violation:?}");
    }
}

#[test]
fn slots_of_a_rank_without_weight_are_no_room() {
    let (topology, counts, draft) = good();
    let topology = topology.with_speeds(&[1024, 0, 1024, 1024]).expect("valid");
    let problem = Problem::new(&topology, &counts).expect("valid");
    let violation = check_plan(&problem, &draft.plan(&topology), &RULES);
    assert!(matches!(violation, Err(PlanViolation::Room { got: 1, expected: 0, .. })), "{violation:?}");
}

#[test]
fn each_broken_split_is_named() {
    use PlanViolation as V;
    let (topology, counts, mut draft) = good();
    let problem = Problem::new(&topology, &counts).expect("valid");
    let plan = draft.plan(&topology);
    let width = plan.instances().len();
    let mut split = vec![0; 4 * width];
    split_all(&problem, &plan, &mut SplitWorkspace::new(&topology), &mut split).expect("a split");
    let report = check_split(&problem, &plan, &split).expect("a good split");
    assert_eq!((report.largest_miss, report.remote_tokens), (0, 65));

    assert!(matches!(check_split(&problem, &plan, &split[1..]), Err(V::Split(_))));
    let mut bad = split.clone();
    bad[0] -= 1;
    assert!(matches!(check_split(&problem, &plan, &bad), Err(V::SourceSum { got: 69, expected: 70, .. })));
    // A token of source 1 for expert 0 leaves its own instance, one of source 0 comes back.
    let mut bad = split.clone();
    (bad[width], bad[width + 1]) = (bad[width] + 1, bad[width + 1] - 1);
    assert!(matches!(check_split(&problem, &plan, &bad), Err(V::LocalFirst { got: 9, expected: 10, .. })));
    // One token of source 2 changes sides: the source is content, the instances are not.
    let mut bad = split.clone();
    let (from, to) = if bad[2 * width] > 0 { (0, 1) } else { (1, 0) };
    (bad[2 * width + from], bad[2 * width + to]) = (bad[2 * width + from] - 1, bad[2 * width + to] + 1);
    assert!(matches!(check_split(&problem, &plan, &bad), Err(V::InstanceSum { .. })));
    // Under a rule that is not exact the same split only misses.
    draft.rule = SplitRule::SourceRounded { locality: true };
    assert_eq!(check_split(&problem, &draft.plan(&topology), &bad).map(|r| r.largest_miss), Ok(1));
}
