//! Any valid quotas, and every policy's: the split meets its sums, each source computes its own row alone, and token
//! assignment meets the shares.

#![no_main]

use arbitrary::{Arbitrary, Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use ultraep_baselines::{PolicyKind, PolicyParams, build, plan_for};
use ultraep_fuzz::Case;
use ultraep_plan::{
    Cursor, DomainOutcome, Expert, Instance, PhysicalIndex, Plan, Problem, Rank, RouteTable, SplitRule, SplitWorkspace,
    check_split, split_all, split_source,
};

/// A problem and a plan that no policy needs to have made.
#[derive(Debug)]
struct Input {
    case: Case,
    plan: Plan,
}

impl<'a> Arbitrary<'a> for Input {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let case: Case = u.arbitrary()?;
        let problem = Problem::new(&case.topology, &case.counts).expect("the case is valid");
        let mut plan = Plan::default();
        let kind = u.int_in_range(0..=PolicyKind::ALL.len())?;
        match PolicyKind::ALL.get(kind) {
            Some(&kind) => {
                let params = PolicyParams { min_quota: u.int_in_range(1..=64)?, ..PolicyParams::default() };
                if let Ok(mut policy) = build(kind, &case.topology, &params) {
                    (0..3).for_each(|_| policy.observe(&problem));
                    plan = plan_for(kind, &case.topology);
                    policy.solve(&problem, &mut plan).expect("a plan");
                    return Ok(Self { case, plan });
                }
                Err(arbitrary::Error::IncorrectFormat)
            }
            None => {
                invent(u, &case, &mut plan)?;
                Ok(Self { case, plan })
            }
        }
    }
}

/// Instances on any ranks with any quotas that add up.
fn invent(u: &mut Unstructured<'_>, case: &Case, plan: &mut Plan) -> Result<()> {
    let topology = &case.topology;
    plan.begin(if u.arbitrary()? { SplitRule::LocalFirstExact } else { SplitRule::ProportionalExact });
    for expert in (0..topology.experts()).map(Expert::new) {
        let column = |r: usize| case.counts[r * topology.experts() + expert.index()];
        let mut left: u32 = (0..topology.ranks()).map(column).sum();
        let home = topology.home(expert);
        let mut replicas = Vec::new();
        for rank in (0..topology.ranks()).map(Rank::new).filter(|&r| r != home) {
            if u.ratio(1, 4)? {
                let quota = u.int_in_range(0..=left)?;
                left -= quota;
                replicas.push(Instance { rank, physical: PhysicalIndex::new(100 + expert.index()), quota });
            }
        }
        let physical = PhysicalIndex::new(expert.index() - topology.masters(home).start);
        plan.push_instance(Instance { rank: home, physical, quota: left });
        replicas.into_iter().for_each(|replica| plan.push_instance(replica));
        plan.end_expert();
    }
    (0..topology.domains()).for_each(|_| plan.push_domain(DomainOutcome::default()));
    Ok(())
}

fuzz_target!(|input: Input| {
    let Input { case, plan } = input;
    let topology = &case.topology;
    let problem = Problem::new(topology, &case.counts).expect("the case is valid");
    let width = plan.instances().len();
    let mut workspace = SplitWorkspace::new(topology);
    let (mut all, mut own) = (vec![0; width * topology.ranks()], vec![0; width]);
    split_all(&problem, &plan, &mut workspace, &mut all).expect("a split");
    let report = check_split(&problem, &plan, &all).unwrap_or_else(|error| panic!("{error}"));
    if !matches!(plan.split_rule(), SplitRule::SourceRounded { .. }) {
        assert_eq!(report.largest_miss, 0);
    }
    for source in (0..topology.ranks()).map(Rank::new) {
        split_source(&problem, &plan, source, &mut workspace, &mut own).expect("a split");
        assert_eq!(own, all[source.index() * width..(source.index() + 1) * width]);
        assign(&case, &plan, source, &own);
    }
});

/// Assigns the source's tokens (where they are few) and counts where they went.
fn assign(case: &Case, plan: &Plan, source: Rank, shares: &[u32]) {
    let experts = case.topology.experts();
    let row = &case.counts[source.index() * experts..(source.index() + 1) * experts];
    if row.iter().map(|&c| u64::from(c)).sum::<u64>() > 1 << 14 {
        return;
    }
    let per_rank = plan.instances().iter().map(|i| i.physical.index() + 1).max().unwrap_or(1);
    let mut table = RouteTable::new(&case.topology, per_rank);
    table.prepare(plan, shares).expect("a table");
    let mut ids: Vec<i32> =
        row.iter().enumerate().flat_map(|(e, &c)| std::iter::repeat_n(e as i32, c as usize)).collect();
    ids.push(-1);
    let mut physical = vec![0; ids.len()];
    let mut cursor = Cursor::new(&case.topology);
    table.start(&mut cursor);
    table.assign(&mut cursor, &ids, &mut physical).expect("as many tokens as counted");
    let mut went = vec![0; shares.len()];
    for (&id, &place) in ids.iter().zip(&physical) {
        let Some(place) = table.locate(place) else {
            assert_eq!(id, -1);
            continue;
        };
        let range = plan.range(Expert::new(id as usize));
        let of = &plan.instances()[range.clone()];
        went[range.start + of.iter().position(|i| (i.rank, i.physical) == place).expect("an instance")] += 1;
    }
    assert_eq!(went, shares);
}
