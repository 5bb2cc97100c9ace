//! Golden digests: plans, splits and assignments of fixed, integer-made problems. They must be the same in every build, debug
//! and release, with and without the feature `std` (and its vector instructions), on one thread and on two, on every machine:
//! `cargo xtask digests` runs this test in all builds. A change of a policy's plans
//! changes them, and belongs into the changelog.

mod common;

use common::{Rng, random_problem, topology};
use ultraep_plan::{
    Cursor, Greedy, GreedyParams, HardwareModel, Plan, Policy, Problem, Rank, RouteTable, SplitWorkspace, Topology,
    Ultraep, UltraepParams, UltraepV1, UltraepV1Params, Unbalanced, digest_counts, digest_plan, digest_problem,
    split_all, split_source,
};

const MIN_QUOTA: u32 = 48;

/// Of `none`, `greedy`, `ultraep-v1`, `ultraep`, `ultraep-cost`, and of assignments.
const GOLDEN: [u64; 6] = [
    0x9a1c_f6fe_c5c1_7ed4,
    0x5af6_9031_ab4e_44ac,
    0xb123_8ac7_c7c7_5940,
    0x0018_3b20_72fd_d25a,
    0x23fe_0f1f_8d5a_364d,
    0x0deb_c87e_db74_d41b,
];

fn policies(topology: &Topology) -> [Box<dyn Policy>; 5] {
    let params = UltraepParams { min_quota: MIN_QUOTA, ..UltraepParams::default() };
    [
        Box::new(Unbalanced::new(topology)),
        Box::new(Greedy::new(topology, GreedyParams { min_quota: MIN_QUOTA, ..GreedyParams::default() })),
        Box::new(UltraepV1::new(topology, UltraepV1Params { min_tokens: MIN_QUOTA, ..UltraepV1Params::default() })),
        Box::new(Ultraep::new(topology, params)),
        Box::new(Ultraep::cost_aware(topology, params, HardwareModel::default()).expect("a model")),
    ]
}

/// A power law over shuffled experts with some noise, in integers.
fn power_law(rng: &mut Rng, topology: &Topology) -> Vec<u32> {
    let experts = topology.experts();
    let mut places: Vec<u32> = (0..experts as u32).collect();
    rng.shuffle(&mut places);
    let steep = 1 + rng.below(20) as u32;
    (0..topology.ranks())
        .flat_map(|_| places.iter().map(|&p| 40_000 / (p + steep) + rng.below(30) as u32).collect::<Vec<_>>())
        .collect()
}

/// Digests of one problem: of the problem, and of each policy's plan and split; last, of the assignment of one source's
/// tokens under `ultraep`'s plan.
fn digests(topology: &Topology, counts: &[u32]) -> (u64, [u64; 6]) {
    let problem = Problem::new(topology, counts).expect("valid");
    let mut of = [0; 6];
    for (policy, digest) in policies(topology).iter_mut().zip(&mut of) {
        let mut plan = Plan::for_slots(topology);
        policy.solve(&problem, &mut plan).expect("a plan");
        let mut split = vec![0; topology.ranks() * plan.instances().len()];
        split_all(&problem, &plan, &mut SplitWorkspace::new(topology), &mut split).expect("a split");
        *digest = digest_plan(&plan) ^ digest_counts(&split).rotate_left(32);
    }
    of[5] = assignment(topology, &problem);
    (digest_problem(&problem), of)
}

/// Digest of the physical ids of the last source's tokens, experts in turn; 0 for a very large batch.
fn assignment(topology: &Topology, problem: &Problem<'_>) -> u64 {
    let source = topology.ranks() - 1;
    if problem.row(source).iter().map(|&c| u64::from(c)).sum::<u64>() > 100_000 {
        return 0;
    }
    let mut plan = Plan::for_slots(topology);
    policies(topology)[3].solve(problem, &mut plan).expect("a plan");
    let mut shares = vec![0; plan.instances().len()];
    split_source(problem, &plan, Rank::new(source), &mut SplitWorkspace::new(topology), &mut shares).expect("a split");
    let physical = (0..topology.ranks()).map(|r| topology.physical_experts(Rank::new(r))).max();
    let mut table = RouteTable::new(topology, physical.expect("there is a rank"));
    table.prepare(&plan, &shares).expect("a table");
    let mut left = problem.row(source).to_vec();
    let mut ids = Vec::new();
    while left.iter().any(|&l| l > 0) {
        for (e, left) in left.iter_mut().enumerate().filter(|(_, left)| **left > 0) {
            *left -= 1;
            ids.push(e as i32);
        }
    }
    let (mut cursor, mut assigned) = (Cursor::new(topology), vec![0; ids.len()]);
    table.start(&mut cursor);
    table.assign(&mut cursor, &ids, &mut assigned).expect("assigned");
    digest_counts(&assigned.iter().map(|&p| p as u32).collect::<Vec<_>>())
}

fn problems() -> Vec<(Topology, Vec<u32>)> {
    let shapes = [(64, 256, 64, 2), (64, 128, 64, 1), (40, 160, 40, 4), (32, 256, 16, 2), (24, 60, 8, 3)];
    let mut problems: Vec<(Topology, Vec<u32>)> = (0..120).map(|seed| random_problem(&mut Rng(seed))).collect();
    for (seed, (ranks, experts, domain, slots)) in shapes.into_iter().cycle().take(40).enumerate() {
        let topology = topology(ranks, experts, domain, slots);
        let counts = power_law(&mut Rng(1000 + seed as u64), &topology);
        problems.push((topology, counts));
    }
    problems
}

#[test]
fn digests_are_golden() {
    let problems = problems();
    let one_thread: Vec<_> = problems.iter().map(|(topology, counts)| digests(topology, counts)).collect();
    let (mut inputs, mut got) = (0u64, [0u64; 6]);
    for (of_input, of) in &one_thread {
        inputs = inputs.rotate_left(1) ^ of_input;
        got.iter_mut().zip(of).for_each(|(got, of)| *got = got.rotate_left(1) ^ of);
    }
    assert_eq!(inputs, 0x326e_c7d9_f3ec_7fac, "the problems themselves changed");
    let names = policies(&problems[0].0).map(|p| p.name()).into_iter().chain(["assignment"]);
    let wrong: Vec<_> = names.zip(got).zip(GOLDEN).filter(|((_, got), expected)| got != expected).collect();
    assert!(wrong.is_empty(), "((name, got), expected): {wrong:#x?}");

    // Two threads at once, each on every other problem.
    let half = |first: usize| problems.iter().skip(first).step_by(2).map(|(t, c)| digests(t, c)).collect::<Vec<_>>();
    let (even, odd) = std::thread::scope(|scope| {
        let (even, odd) = (scope.spawn(|| half(0)), scope.spawn(|| half(1)));
        (even.join().expect("no panic"), odd.join().expect("no panic"))
    });
    let two_threads: Vec<_> = even.into_iter().zip(odd).flat_map(|(a, b)| [a, b]).collect();
    assert!(one_thread == two_threads, "two threads give other digests than one");
}
