//! Time of token assignment: `cargo bench -p ultraep-plan --bench reroute [-- ROUNDS]`.
//!
//! One source's batch (4096 tokens, top-8, 256 experts, 64 ranks, 2 slots, ratio 3): p50 in ns of the sparse reroute, of
//! the dense one and of its backward, each beside a plain copy of its inputs and outputs, in the same run. The sparse one
//! also beside counting the ids once, its true floor: a token's instance depends on how many of its expert came before, so
//! each id takes a read and a write at an address that the data decide.

#[path = "../tests/common/mod.rs"]
mod common;

use common::{Rng, Skew, skewed, topology};
use std::hint::black_box;
use std::time::Instant;
use ultraep_plan::{
    Cursor, Plan, Policy, Problem, Rank, RouteTable, SplitWorkspace, Ultraep, UltraepParams, split_source,
};

const TOKENS: usize = 4096;
const TOP_K: usize = 8;

fn p50(rounds: usize, mut work: impl FnMut()) -> u64 {
    let mut ns: Vec<u64> = (0..rounds)
        .map(|_| {
            let start = Instant::now();
            work();
            start.elapsed().as_nanos() as u64
        })
        .collect();
    ns.sort_unstable();
    ns[ns.len() / 2]
}

fn main() {
    let rounds = std::env::args().skip(1).find_map(|a| a.parse().ok()).unwrap_or(301);
    let topology = topology(64, 256, 64, 2);
    let mut rng = Rng(3);
    let mut counts = skewed(&mut rng, &topology, Skew::Power, 3.0, TOKENS * TOP_K);
    let own = Rank::new(9);
    // Tokens with distinct choices that follow the own row's counts.
    let row: Vec<f64> = counts[own.index() * 256..][..256].iter().map(|&c| f64::from(c)).collect();
    let mut ids = Vec::new();
    for _ in 0..TOKENS {
        let mut chosen: Vec<(f64, i32)> =
            row.iter().enumerate().map(|(e, &w)| (rng.unit().ln() / w.max(1e-9), e as i32)).collect();
        chosen.sort_by(|a, b| b.0.total_cmp(&a.0));
        ids.extend(chosen[..TOP_K].iter().map(|c| c.1));
    }
    counts[own.index() * 256..][..256].fill(0);
    ids.iter().for_each(|&e| counts[own.index() * 256 + e as usize] += 1);

    let problem = Problem::new(&topology, &counts).expect("valid");
    let mut plan = Plan::for_slots(&topology);
    Ultraep::new(&topology, UltraepParams::default()).solve(&problem, &mut plan).expect("a plan");
    let mut shares = vec![0; plan.instances().len()];
    split_source(&problem, &plan, own, &mut SplitWorkspace::new(&topology), &mut shares).expect("a split");
    let mut table = RouteTable::new(&topology, 6);
    let mut cursor = Cursor::new(&topology);
    let prepare = p50(rounds, || {
        table.prepare(&plan, &shares).expect("a table");
        table.start(&mut cursor);
    });
    println!("prepare: {prepare} ns, {} replicas", plan.replicas());

    let (mut physical, mut copies) = (vec![0; ids.len()], [vec![0; ids.len()], vec![0; ids.len()]]);
    let sparse = p50(rounds, || {
        table.start(&mut cursor);
        table.assign(&mut cursor, black_box(&ids), &mut physical).expect("assigned");
        black_box(&physical);
    });
    let [into, from] = &mut copies;
    let copy = p50(rounds, || {
        into.copy_from_slice(black_box(&ids));
        from.copy_from_slice(black_box(into));
        black_box(&from);
    });
    report("sparse", sparse, copy);
    let mut counted = vec![0u32; 256];
    let counting = p50(rounds, || {
        counted.fill(0);
        black_box(&ids).iter().for_each(|&id| counted[id as usize & 255] += 1);
        black_box(&counted);
    });
    let ratio = |ns: u64| ns as f64 / counting as f64;
    println!("counting the ids once: {counting} ns; sparse {:.2} of it, prepare {:.2}", ratio(sparse), ratio(prepare));

    let width = table.physical_experts();
    let (mut mask, mut values) = (vec![0u8; TOKENS * 256], vec![0f32; TOKENS * 256]);
    for (at, &id) in ids.iter().enumerate() {
        mask[at / TOP_K * 256 + id as usize] = 1;
        values[at / TOP_K * 256 + id as usize] = 0.125;
    }
    let (mut to_mask, mut to_values) = (vec![0u8; TOKENS * width], vec![0f32; TOKENS * width]);
    let dense = p50(rounds / 10 + 1, || {
        table.start(&mut cursor);
        table.reroute_dense(&mut cursor, black_box(&mask), &values, &mut to_mask, &mut to_values).expect("rerouted");
    });
    let mut gradient = vec![0f32; mask.len()];
    let backward = p50(rounds / 10 + 1, || {
        table.start(&mut cursor);
        table.reroute_dense_backward(&mut cursor, black_box(&mask), &to_values, &mut gradient).expect("gathered");
    });
    // The copy: every input and every output once from one buffer to another.
    let copied = |bytes: usize| {
        let (a, mut b) = (vec![1u8; bytes], vec![0u8; bytes]);
        p50(rounds / 10 + 1, || b.copy_from_slice(black_box(&a)))
    };
    let forward_copy = copied(5 * (mask.len() + to_mask.len()));
    report("dense forward", dense, forward_copy);
    let backward_copy = copied(mask.len() + 4 * (to_values.len() + gradient.len()));
    report("dense backward", backward, backward_copy);
}

fn report(what: &str, ns: u64, copy: u64) {
    println!("{what}: {ns} ns, copy {copy} ns: {:.0}% of its speed", 100.0 * copy as f64 / ns as f64);
}
