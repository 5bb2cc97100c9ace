//! Token assignment: shares met to the token, ranges of a batch independent of each other, dense equal to sparse, backward
//! the inverse of forward.

mod common;

use common::{Rng, random_problem, skewed, topology};
use ultraep_plan::{
    AssignError, Cursor, Greedy, GreedyParams, NOWHERE, Plan, Policy, Problem, Rank, RouteTable, SplitWorkspace,
    Topology, split_source,
};

/// Table, plan and shares of one source of a random problem, and a batch of ids that has the source's counts.
fn prepare(rng: &mut Rng, topology: &Topology, counts: &[u32], source: Rank) -> (RouteTable, Plan, Vec<u32>, Vec<i32>) {
    let problem = Problem::new(topology, counts).expect("valid");
    let mut plan = Plan::for_slots(topology);
    let params = GreedyParams { min_quota: 1, ..GreedyParams::default() };
    Greedy::new(topology, params).solve(&problem, &mut plan).expect("a plan");
    let mut shares = vec![0; plan.instances().len()];
    split_source(&problem, &plan, source, &mut SplitWorkspace::new(topology), &mut shares).expect("a split");
    let physical = (0..topology.ranks()).map(|r| topology.physical_experts(Rank::new(r))).max().unwrap();
    let mut table = RouteTable::new(topology, physical);
    table.prepare(&plan, &shares).expect("a table");
    let row = problem.row(source.index()).iter().enumerate();
    let mut ids: Vec<i32> = row.flat_map(|(e, &c)| std::iter::repeat_n(e as i32, c as usize)).collect();
    ids.extend([NOWHERE; 5]);
    rng.shuffle(&mut ids);
    (table, plan, shares, ids)
}

#[test]
fn every_instance_gets_its_share_and_ranges_agree() {
    for seed in 0..400 {
        let mut rng = Rng(seed);
        let (topology, mut counts) = random_problem(&mut rng);
        counts.iter_mut().for_each(|c| *c %= 700);
        let source = Rank::new(rng.below(topology.ranks()));
        let (table, plan, shares, ids) = prepare(&mut rng, &topology, &counts, source);
        let mut cursor = Cursor::new(&topology);
        let mut whole = vec![0; ids.len()];
        table.start(&mut cursor);
        table.assign(&mut cursor, &ids, &mut whole).expect("assigned");

        let mut got = vec![0; shares.len()];
        for (&id, &physical) in ids.iter().zip(&whole) {
            let Some(place) = table.locate(physical) else {
                assert_eq!(id, NOWHERE);
                continue;
            };
            let range = plan.range(ultraep_plan::Expert::new(id as usize));
            let of = &plan.instances()[range.clone()];
            got[range.start + of.iter().position(|i| (i.rank, i.physical) == place).expect("an instance")] += 1;
        }
        assert_eq!(got, shares, "seed {seed}");

        let cut = rng.below(ids.len() + 1);
        let mut before = vec![0; topology.experts()];
        ids[..cut].iter().filter(|&&id| id != NOWHERE).for_each(|&id| before[id as usize] += 1);
        let mut part = vec![0; ids.len() - cut];
        table.start_after(&mut cursor, &before).expect("a cursor");
        table.assign(&mut cursor, &ids[cut..], &mut part).expect("assigned");
        assert_eq!(part, whole[cut..], "seed {seed}");
    }
}

/// The published permutation, written down token by token.
#[test]
fn the_permutation_is_the_published_one() {
    let mut rng = Rng(7);
    let topology = topology(8, 16, 8, 2);
    let counts = skewed(&mut rng, &topology, common::Skew::Power, 3.0, 3001);
    let (table, plan, shares, ids) = prepare(&mut rng, &topology, &counts, Rank::new(3));
    let mut cursor = Cursor::new(&topology);
    let mut whole = vec![0; ids.len()];
    table.start(&mut cursor);
    table.assign(&mut cursor, &ids, &mut whole).expect("assigned");
    let gcd = |mut a: u64, mut b: u64| {
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    let mut seen = [0u64; 16];
    for (&id, &physical) in ids.iter().zip(&whole).filter(|&(&id, _)| id != NOWHERE) {
        let range = plan.range(ultraep_plan::Expert::new(id as usize));
        let n: u64 = shares[range.clone()].iter().map(|&s| u64::from(s)).sum();
        let mut stride = if n / 2 + 1 >= n { n - 1 } else { n / 2 + 1 }.max(1);
        while n > 1 && gcd(stride, n) != 1 {
            stride = if stride + 1 == n { 1 } else { stride + 1 };
        }
        let position = if n > 1 { (seen[id as usize] * stride + id as u64 % n) % n } else { 0 };
        seen[id as usize] += 1;
        let mut end = 0;
        let instance = range.clone().find(|&i| {
            end += u64::from(shares[i]);
            end > position
        });
        let expected = plan.instances()[instance.expect("within the shares")];
        assert_eq!(table.locate(physical), Some((expected.rank, expected.physical)));
    }
    assert!(plan.replicas() > 0);
}

#[test]
fn dense_is_sparse_and_backward_is_its_inverse() {
    for seed in 0..200 {
        let mut rng = Rng(seed);
        let topology = topology(4, 4 + rng.below(13), 4, 2);
        let experts = topology.experts();
        let tokens = 1 + rng.below(40);
        let mask: Vec<u8> = (0..tokens * experts).map(|_| u8::from(rng.below(3) == 0)).collect();
        let source = Rank::new(rng.below(4));
        let mut counts: Vec<u32> =
            (0..4 * experts).map(|i| if i % experts == 0 { 90 } else { rng.below(9) as u32 }).collect();
        for e in 0..experts {
            counts[source.index() * experts + e] = (0..tokens).map(|t| u32::from(mask[t * experts + e])).sum();
        }
        let (table, ..) = prepare(&mut rng, &topology, &counts, source);
        let width = table.physical_experts();
        let values: Vec<f32> = (0..mask.len()).map(|i| if mask[i] == 1 { 1.0 + i as f32 } else { 0.0 }).collect();
        let (mut physical_mask, mut physical_values) = (vec![7; tokens * width], vec![7.0; tokens * width]);
        let mut cursor = Cursor::new(&topology);
        table.start(&mut cursor);
        table.reroute_dense(&mut cursor, &mask, &values, &mut physical_mask, &mut physical_values).expect("rerouted");

        let ids: Vec<i32> = (0..mask.len()).filter(|&i| mask[i] == 1).map(|i| (i % experts) as i32).collect();
        let mut physical = vec![0; ids.len()];
        table.start(&mut cursor);
        table.assign(&mut cursor, &ids, &mut physical).expect("assigned");
        let mut expected = vec![0.0; tokens * width];
        for (at, &p) in (0..mask.len()).filter(|&i| mask[i] == 1).zip(&physical) {
            expected[at / experts * width + p as usize] = values[at];
        }
        assert_eq!(physical_values, expected);
        assert!(physical_mask.iter().zip(&expected).all(|(&m, &v)| (m == 1) == (v > 0.0)));

        let mut gradient = vec![9.0; mask.len()];
        table.start(&mut cursor);
        table.reroute_dense_backward(&mut cursor, &mask, &physical_values, &mut gradient).expect("gathered");
        assert_eq!(gradient, values);
    }
}

#[test]
fn bad_ids_are_errors() {
    let mut rng = Rng(1);
    let topology = topology(2, 4, 2, 1);
    let counts = vec![3; 8];
    let (table, ..) = prepare(&mut rng, &topology, &counts, Rank::new(0));
    let mut cursor = Cursor::new(&topology);
    table.start(&mut cursor);
    let mut out = [0; 4];
    let refused = table.assign(&mut cursor, &[0, 4, 1, 1], &mut out);
    assert_eq!(refused, Err(AssignError::NoSuchExpert { at: 1, got: 4, experts: 4 }));
    let refused = table.assign(&mut cursor, &[-2, 0, 1, 1], &mut out);
    assert_eq!(refused, Err(AssignError::NoSuchExpert { at: 0, got: -2, experts: 4 }));
    table.start(&mut cursor);
    let refused = table.assign(&mut cursor, &[2, 2, 2, 2], &mut out);
    let expert = ultraep_plan::Expert::new(2);
    assert_eq!(refused, Err(AssignError::MoreThanCounted { at: 3, expert, counted: 3 }));
    assert!(matches!(table.assign(&mut cursor, &[1], &mut out), Err(AssignError::Length { got: 4, expected: 1, .. })));
}
