//! Golden digests: plans and splits of fixed, integer-made problems. They must be the same in every build: debug and release,
//! with and without the feature `std` (and its vector instructions), on every machine. A change of a policy's plans
//! changes them, and belongs into the changelog.

mod common;

use common::{Rng, random_problem, topology};
use ultraep_plan::{
    Greedy, GreedyParams, HardwareModel, Plan, Policy, Problem, SplitWorkspace, Topology, Ultraep, UltraepParams,
    UltraepV1, UltraepV1Params, Unbalanced, digest_counts, digest_plan, digest_problem, split_all,
};

const MIN_QUOTA: u32 = 48;

/// Of `none`, `greedy`, `ultraep-v1`, `ultraep`, `ultraep-cost`.
const GOLDEN: [u64; 5] =
    [0x9a1c_f6fe_c5c1_7ed4, 0x5af6_9031_ab4e_44ac, 0xb123_8ac7_c7c7_5940, 0x9781_60d6_f1bb_78f8, 0x1466_73e6_c334_27e4];

fn policies(topology: &Topology) -> [Box<dyn Policy>; 5] {
    let params = UltraepParams { min_quota: MIN_QUOTA, ..UltraepParams::default() };
    [
        Box::new(Unbalanced::new(topology)),
        Box::new(Greedy::new(topology, GreedyParams { min_quota: MIN_QUOTA, ..GreedyParams::default() })),
        Box::new(UltraepV1::new(topology, UltraepV1Params { min_tokens: MIN_QUOTA, ..UltraepV1Params::default() })),
        Box::new(Ultraep::new(topology, params)),
        Box::new(Ultraep::cost_aware(topology, params, HardwareModel::default())),
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

#[test]
fn digests_are_golden() {
    let mut got = [0u64; 5];
    let mut inputs = 0u64;
    let shapes = [(64, 256, 64, 2), (64, 128, 64, 1), (40, 160, 40, 4), (32, 256, 16, 2), (24, 60, 8, 3)];
    let mut problems: Vec<(Topology, Vec<u32>)> = (0..120).map(|seed| random_problem(&mut Rng(seed))).collect();
    for (seed, (ranks, experts, domain, slots)) in shapes.into_iter().cycle().take(40).enumerate() {
        let topology = topology(ranks, experts, domain, slots);
        let counts = power_law(&mut Rng(1000 + seed as u64), &topology);
        problems.push((topology, counts));
    }
    for (topology, counts) in &problems {
        let problem = Problem::new(topology, counts).expect("valid");
        inputs = inputs.rotate_left(1) ^ digest_problem(&problem);
        for (policy, digest) in policies(topology).iter_mut().zip(&mut got) {
            let mut plan = Plan::for_slots(topology);
            policy.solve(&problem, &mut plan).expect("a plan");
            let mut split = vec![0; topology.ranks() * plan.instances().len()];
            split_all(&problem, &plan, &mut SplitWorkspace::new(topology), &mut split).expect("a split");
            *digest = digest.rotate_left(1) ^ digest_plan(&plan) ^ digest_counts(&split).rotate_left(32);
        }
    }
    assert_eq!(inputs, 0x326e_c7d9_f3ec_7fac, "the problems themselves changed");
    let names = policies(&problems[0].0).map(|p| p.name());
    for ((name, got), expected) in names.into_iter().zip(got).zip(GOLDEN) {
        assert_eq!(got, expected, "{name}: got {got:#018x}");
    }
}
