//! Time of plan and own split: `cargo bench -p ultraep-plan --bench speed [-- ROUNDS [SHAPE]]`.
//!
//! For each shape: p50 and p99 in ns over `ROUNDS` solves (64 different microbatches in turn) of reading the counts
//! (the physical floor), `ultraep-v1`, and `ultraep`, all with the own split and from raw counts, interleaved in the same
//! run so that their ratios are fair on a busy machine; and a digest of all plans.

#[path = "../tests/common/mod.rs"]
mod common;

use common::{Rng, Skew, skewed, topology};
use std::hint::black_box;
use std::time::Instant;
use ultraep_plan::{
    Plan, Policy, Problem, Rank, SplitWorkspace, Tally, Topology, Ultraep, UltraepParams, UltraepV1, UltraepV1Params,
    digest_plan, split_source,
};

struct Bench<'a> {
    topology: &'a Topology,
    tally: Tally,
    workspace: SplitWorkspace,
    plan: Plan,
    shares: Vec<u32>,
    own: Rank,
}

impl Bench<'_> {
    fn plan_and_split(&mut self, policy: &mut dyn Policy, counts: &[u32]) -> u64 {
        let start = Instant::now();
        let problem = Problem::tallied(self.topology, counts, self.own, &mut self.tally).expect("valid");
        policy.solve(&problem, &mut self.plan).expect("a plan");
        self.shares.resize(self.plan.instances().len(), 0);
        split_source(&problem, &self.plan, self.own, &mut self.workspace, &mut self.shares).expect("a split");
        black_box(&self.shares);
        start.elapsed().as_nanos() as u64
    }

    fn floor(&mut self, counts: &[u32]) -> u64 {
        let start = Instant::now();
        black_box(Problem::tallied(self.topology, counts, self.own, &mut self.tally).expect("valid").total());
        start.elapsed().as_nanos() as u64
    }
}

fn quantiles(ns: &mut [u64]) -> (u64, u64) {
    ns.sort_unstable();
    (ns[ns.len() / 2], ns[ns.len() * 99 / 100])
}

fn main() {
    let arguments: Vec<usize> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    let rounds = arguments.first().copied().unwrap_or(3000);
    let only = arguments.get(1).copied();
    let shapes = [
        (256, 64, 2, 2.0),
        (256, 64, 2, 4.0),
        (128, 64, 1, 8.0),
        (128, 64, 2, 2.0),
        (160, 40, 4, 3.0),
        (4096, 1024, 2, 3.0),
        (4096, 1024, 8, 8.0),
    ];
    let chosen = shapes.into_iter().enumerate().filter(|&(i, _)| only.is_none_or(|only| only == i));
    for (experts, ranks, slots, ratio) in chosen.map(|(_, shape)| shape) {
        let topology = topology(ranks, experts, ranks, slots);
        let large = ranks > 256;
        let batches: Vec<Vec<u32>> = (0..if large { 2 } else { 64 })
            .map(|seed| skewed(&mut Rng(seed), &topology, Skew::Power, ratio, 4096 * 8))
            .collect();
        let mut bench = Bench {
            topology: &topology,
            tally: Tally::new(&topology),
            workspace: SplitWorkspace::new(&topology),
            plan: Plan::for_slots(&topology),
            shares: Vec::new(),
            own: Rank::new(ranks / 2),
        };
        let v1_params = UltraepV1Params { min_tokens: 1, ..UltraepV1Params::default() };
        let mut v1 = UltraepV1::new(&topology, v1_params);
        let mut ultraep = Ultraep::new(&topology, UltraepParams { min_quota: 1, ..UltraepParams::default() });
        let mut ns: [Vec<u64>; 3] = Default::default();
        let mut digest = 0u64;
        for round in 0..if large { rounds / 30 } else { rounds } {
            // A batch's matrix is in cache, as after an all-gather.
            let counts = &batches[round % batches.len()];
            bench.floor(counts);
            ns[0].push(bench.floor(counts));
            ns[1].push(bench.plan_and_split(&mut v1, counts));
            ns[2].push(bench.plan_and_split(&mut ultraep, counts));
            if round < batches.len() {
                digest = digest.rotate_left(1) ^ digest_plan(&bench.plan);
            }
        }
        let [floor, v1, own] = ns.each_mut().map(|ns| quantiles(ns));
        println!(
            "experts {experts:>4} ranks {ranks:>4} slots {slots} ratio {ratio}: ns p50/p99: counts {}/{}, v1 {}/{}, ultraep {}/{} \
             ({:.2} of v1, {:.2} of counts), digest {digest:016x}",
            floor.0,
            floor.1,
            v1.0,
            v1.1,
            own.0,
            own.1,
            own.0 as f64 / v1.0 as f64,
            own.0 as f64 / floor.0 as f64
        );
    }
}
