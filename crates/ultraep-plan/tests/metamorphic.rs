//! Relations between runs that must hold whatever the plan is: of policies under relabelling, scaling and empty rows, of
//! the split against the definition written down plainly.

mod common;

use common::{Rng, Skew, random_problem, run, skewed, topology};
use proptest::prelude::*;
use ultraep_plan::{
    Expert, FULL_SPEED, Greedy, GreedyParams, HardwareModel, Plan, Policy, Problem, Rank, Ratio, Topology,
    TopologySpec, Ultraep, UltraepParams, UltraepV1, UltraepV1Params, Unbalanced, digest_plan,
};

const PARAMS: UltraepParams = UltraepParams { beta: Ratio::BETA, min_quota: 1 };

fn ultraep(topology: &Topology, counts: &[u32]) -> (Plan, usize, u32) {
    let (plan, report, _) = run(&mut Ultraep::new(topology, PARAMS), topology, counts);
    let (replicas, threshold) = (report.replicas, plan.domains()[0].threshold);
    (plan, replicas, threshold)
}

#[test]
fn only_column_sums_matter() {
    for seed in 0..200 {
        let mut rng = Rng(seed);
        let (topology, counts) = random_problem(&mut rng);
        let (ranks, experts) = (topology.ranks(), topology.experts());
        // The same columns, all from one source; every other source is empty.
        let source = rng.below(ranks);
        let mut gathered = vec![0; counts.len()];
        for row in counts.chunks_exact(experts) {
            for (e, &count) in row.iter().enumerate() {
                gathered[source * experts + e] += count;
            }
        }
        let (a, b) = (ultraep(&topology, &counts).0, ultraep(&topology, &gathered).0);
        assert_eq!(digest_plan(&a), digest_plan(&b), "seed {seed}");
    }
}

#[test]
fn relabelling_changes_neither_threshold_nor_replicas() {
    for seed in 0..60 {
        let mut rng = Rng(seed);
        let (ranks, masters) = (2 + rng.below(40), 1 + rng.below(6));
        let experts = ranks * masters;
        let topology = topology(ranks, experts, ranks, 1 + rng.below(2));
        let skew = [Skew::Power, Skew::HotRank][rng.below(2)];
        let counts = skewed(&mut rng, &topology, skew, 1.0 + 0.1 * ranks as f64, 100_003);
        let (_, replicas, threshold) = ultraep(&topology, &counts);
        // Experts within their rank, then ranks with their experts: new[to] = old[from].
        let mut within: Vec<usize> = (0..masters).collect();
        rng.shuffle(&mut within);
        let mut places: Vec<usize> = (0..ranks).collect();
        rng.shuffle(&mut places);
        let from = |e: usize| places[e / masters] * masters + within[e % masters];
        let relabelled: Vec<u32> =
            counts.chunks_exact(experts).flat_map(|row| (0..experts).map(move |e| row[from(e)])).collect();
        let (_, again, threshold_again) = ultraep(&topology, &relabelled);
        assert_eq!((threshold, replicas), (threshold_again, again), "seed {seed}");
    }
}

#[test]
fn bounds_scale_with_the_load() {
    for seed in 0..100 {
        let mut rng = Rng(seed);
        let (topology, counts) = random_problem(&mut rng);
        // Slow ranks' capacities are whole tokens: rounding does not scale.
        let topology = topology.clone().with_speeds(&vec![FULL_SPEED; topology.ranks()]).expect("valid");
        let scale = 2 + rng.below(30) as u32;
        let counts: Vec<u32> = counts.iter().map(|c| c % 10_000).collect();
        let scaled: Vec<u32> = counts.iter().map(|c| c * scale).collect();
        let (small, ..) = ultraep(&topology, &counts);
        let (large, ..) = ultraep(&topology, &scaled);
        for (small, large) in small.domains().iter().zip(large.domains()) {
            let (up, down) = (small.lower_bound * scale, small.lower_bound.saturating_sub(1) * scale);
            assert!((down..=up).contains(&large.lower_bound), "seed {seed}: {small:?} {large:?} scale {scale}");
        }
    }
}

/// The split rule by its definition: every residual token's place, one by one.
fn naive_split(problem: &Problem<'_>, plan: &Plan) -> Vec<u32> {
    let (ranks, width) = (problem.topology().ranks(), plan.instances().len());
    let mut split = vec![0; ranks * width];
    for expert in (0..plan.experts()).map(Expert::new) {
        let instances = plan.of(expert);
        let count = |r: usize| problem.row(r)[expert.index()];
        let home = |t: usize| count(instances[t].rank.index()).min(instances[t].quota);
        let left: Vec<u64> = (0..instances.len()).map(|t| u64::from(instances[t].quota - home(t))).collect();
        let mut x = 0;
        for r in 0..ranks {
            let mut residual = count(r);
            for t in (0..instances.len()).filter(|&t| instances[t].rank == Rank::new(r)) {
                split[r * width + plan.range(expert).start + t] += home(t);
                residual -= home(t);
            }
            let place = |x: u64, t: usize| {
                // y[t](x), from the last instance down.
                let mut y = x;
                for s in (t + 1..instances.len()).rev() {
                    let (below, through): (u64, u64) = (left[..s].iter().sum(), left[..=s].iter().sum());
                    y = (y * below).checked_div(through).unwrap_or(0);
                }
                y
            };
            for _ in 0..residual {
                // The instance whose cumulative place moves with this token, and the one before does not.
                let moved = (0..instances.len()).find(|&t| place(x + 1, t) > place(x, t));
                split[r * width + plan.range(expert).start + moved.expect("the last place moves")] += 1;
                x += 1;
            }
        }
    }
    split
}

#[test]
fn the_split_is_nested_rounding() {
    for seed in 0..150 {
        let mut rng = Rng(seed);
        let (topology, counts) = random_problem(&mut rng);
        let counts: Vec<u32> = counts.iter().map(|c| c % 90).collect();
        let problem = Problem::new(&topology, &counts).expect("valid");
        let (plan, ..) = ultraep(&topology, &counts);
        let mut split = vec![0; topology.ranks() * plan.instances().len()];
        let mut workspace = ultraep_plan::SplitWorkspace::new(&topology);
        ultraep_plan::split_all(&problem, &plan, &mut workspace, &mut split).expect("a split");
        assert_eq!(split, naive_split(&problem, &plan), "seed {seed}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, ..ProptestConfig::default() })]

    /// Any group, any counts, any parameters: every policy's plan passes the checker, and `ultraep` never ends above its
    /// goal without having to.
    #[test]
    fn any_problem_has_a_plan_that_keeps_every_rule(
        (spec, counts, slots) in (1usize..7, 1usize..4, 0usize..4).prop_flat_map(|(domain_ranks, domains, slots_per_rank)| {
            let ranks = domain_ranks * domains;
            (ranks..4 * ranks + 1).prop_flat_map(move |experts| {
                let spec = TopologySpec { ranks, experts, domain_ranks, slots_per_rank };
                let count = prop_oneof![4 => 0u32..50, 2 => 0u32..5000, 1 => 0u32..2_000_000, 1 => Just(0)];
                (
                    Just(spec),
                    proptest::collection::vec(count, ranks * experts),
                    proptest::collection::vec(0usize..4, ranks),
                )
            })
        }),
        (num, den) in (100u32..130, 90u32..101),
        min_quota in prop_oneof![Just(0u32), Just(1), 2u32..3000],
        uneven in any::<bool>(),
    ) {
        let mut topology = Topology::new(spec).expect("valid");
        if uneven {
            topology = topology.with_slots(&slots).expect("valid");
        }
        let beta = Ratio::new(num, den).expect("positive");
        let params = UltraepParams { beta, min_quota };
        let v1 = UltraepV1Params { min_tokens: min_quota.max(1), ..UltraepV1Params::default() };
        let mut policies: [Box<dyn Policy>; 5] = [
            Box::new(Unbalanced::new(&topology)),
            Box::new(Greedy::new(&topology, GreedyParams { beta, min_quota })),
            Box::new(UltraepV1::new(&topology, v1)),
            Box::new(Ultraep::new(&topology, params)),
            Box::new(Ultraep::cost_aware(&topology, params, HardwareModel::default()).expect("a model")),
        ];
        for policy in &mut policies {
            run(policy.as_mut(), &topology, &counts);
        }
    }
}
