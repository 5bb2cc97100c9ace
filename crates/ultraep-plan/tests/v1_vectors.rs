//! Policy `ultraep-v1` against the published vectors, to the integer, and its largest differences from the exact split.

use serde::Deserialize;
use std::collections::BTreeMap;
use ultraep_plan::{
    Expert, Plan, Policy, Problem, Rank, SplitWorkspace, Topology, TopologySpec, UltraepV1, UltraepV1Params, V1Path,
    check_plan, split_source,
};

#[derive(Deserialize)]
struct Vector {
    name: String,
    ranks: usize,
    experts: usize,
    domain: usize,
    slots: usize,
    params: Params,
    loads: Vec<Vec<u32>>,
    expected: Expected,
}

#[derive(Deserialize)]
struct Params {
    bt: f32,
    min_tokens: u32,
    allow_zero: bool,
    eps: f32,
    locality: bool,
}

#[derive(Deserialize)]
struct Expected {
    domains: Vec<(u32, String, usize)>,
    instances: Vec<Vec<(usize, usize, u32)>>,
    split: BTreeMap<usize, Vec<Vec<u32>>>,
}

#[test]
fn every_vector_to_the_integer() {
    let text = include_str!("data/plan_v1.jsonl");
    let mut seen = [0; 4];
    for line in text.lines() {
        let vector: Vector = serde_json::from_str(line).expect("a vector");
        for path in check(&vector) {
            seen[path as usize] += 1;
        }
    }
    assert!(text.lines().count() >= 100);
    // The published vectors hold no domain that ends at the precheck; the other stages must all occur.
    assert!(seen[V1Path::None as usize] > 0 && seen[V1Path::Fast as usize] > 0 && seen[V1Path::Bisect as usize] > 0);
}

fn check(vector: &Vector) -> Vec<V1Path> {
    let name = &vector.name;
    let topology = Topology::new(TopologySpec {
        ranks: vector.ranks,
        experts: vector.experts,
        domain_ranks: vector.domain,
        slots_per_rank: vector.slots,
    })
    .expect("valid");
    let counts = vector.loads.concat();
    let problem = Problem::new(&topology, &counts).expect("valid");
    let Params { bt, min_tokens, allow_zero, eps, locality } = vector.params;
    let params =
        UltraepV1Params { balance_threshold: bt, min_tokens, zero_masters: allow_zero, epsilon: eps, locality };
    let mut policy = UltraepV1::new(&topology, params);
    let mut plan = Plan::for_slots(&topology);
    policy.solve(&problem, &mut plan).expect("a plan");
    check_plan(&problem, &plan, &policy.rules()).unwrap_or_else(|v| panic!("{name}: {v}"));

    for (domain, (threshold, path, _)) in vector.expected.domains.iter().enumerate() {
        assert_eq!(plan.domains()[domain].threshold, *threshold, "{name}: threshold of domain {domain}");
        let got = match policy.paths()[domain] {
            V1Path::None => "none",
            V1Path::Fast => "fast",
            V1Path::Precheck => "precheck",
            V1Path::Bisect => "bisect",
            _ => "unknown",
        };
        assert_eq!(got, path, "{name}: path of domain {domain}");
    }
    assert_eq!(plan.replicas(), vector.expected.domains.iter().map(|d| d.2).sum::<usize>(), "{name}: replicas");
    for (expert, expected) in vector.expected.instances.iter().enumerate() {
        let got: Vec<_> =
            plan.of(Expert::new(expert)).iter().map(|i| (i.rank.index(), i.physical.index(), i.quota)).collect();
        assert_eq!(&got, expected, "{name}: instances of expert {expert}");
    }
    let mut shares = vec![0; plan.instances().len()];
    for (&source, expected) in &vector.expected.split {
        split_source(&problem, &plan, Rank::new(source), &mut SplitWorkspace::new(&topology), &mut shares)
            .expect("split");
        for (expert, expected) in expected.iter().enumerate() {
            assert_eq!(
                &shares[plan.range(Expert::new(expert))],
                expected,
                "{name}: split of {source}, expert {expert}"
            );
        }
    }
    policy.paths().to_vec()
}
