//! Generators and runners that the integration tests share.
#![allow(dead_code)] // each test binary uses a part of it

use ultraep_plan::{
    Plan, PlanReport, Policy, Problem, SplitReport, SplitWorkspace, Topology, TopologySpec, check_plan, check_split,
    split_all,
};

/// SplitMix64: small, seeded, the same everywhere.
#[derive(Clone, Debug)]
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub(crate) fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

pub(crate) fn topology(ranks: usize, experts: usize, domain_ranks: usize, slots_per_rank: usize) -> Topology {
    Topology::new(TopologySpec { ranks, experts, domain_ranks, slots_per_rank }).expect("valid")
}

/// What kind of skew a generated matrix has.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Skew {
    /// Experts follow a power law, homes shuffled.
    Power,
    /// One rank's experts are hot, the rest follow a mild Zipf law.
    HotRank,
}

/// Counts `[N, E]` whose initial imbalance is close to `ratio`; every source routes `tokens` tokens (times top-k).
pub(crate) fn skewed(rng: &mut Rng, topology: &Topology, skew: Skew, ratio: f64, tokens: usize) -> Vec<u32> {
    let (ranks, experts) = (topology.ranks(), topology.experts());
    let mut order: Vec<usize> = (0..experts).collect();
    rng.shuffle(&mut order);
    let noise: Vec<f64> = (0..experts).map(|_| 0.7 + 0.6 * rng.unit()).collect();
    let hot = rng.below(ranks);
    let hot_masters = topology.masters(ultraep_plan::Rank::new(hot));
    let weights = |s: f64| -> Vec<f64> {
        let mut weights = vec![0.0; experts];
        for (position, &expert) in order.iter().enumerate() {
            weights[expert] = match skew {
                Skew::Power => ((position + 1) as f64).powf(-s) * noise[expert],
                Skew::HotRank if hot_masters.contains(&expert) => s * noise[expert],
                Skew::HotRank => ((position + 8) as f64).powf(-0.5) * noise[expert],
            };
        }
        weights
    };
    let imbalance = |weights: &[f64]| {
        let loads = (0..ranks).map(|r| weights[topology.masters(ultraep_plan::Rank::new(r))].iter().sum::<f64>());
        loads.fold(0.0, f64::max) * ranks as f64 / weights.iter().sum::<f64>()
    };
    let (mut low, mut high) = (0.0, if matches!(skew, Skew::Power) { 6.0 } else { 1e3 });
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        if imbalance(&weights(middle)) < ratio { low = middle } else { high = middle }
    }
    let weights = weights(high);
    let total: f64 = weights.iter().sum();
    let mut counts = vec![0; ranks * experts];
    for row in counts.chunks_exact_mut(experts) {
        let mut left = tokens;
        for (count, &weight) in row.iter_mut().zip(&weights) {
            let exact = weight / total * tokens as f64 * (0.8 + 0.4 * rng.unit());
            *count = (exact as usize).min(left) as u32;
            left -= *count as usize;
        }
        // What jitter left over follows the weights too.
        while left > 0 {
            let mut x = rng.unit() * total;
            let at = weights.iter().position(|&w| {
                x -= w;
                x < 0.0
            });
            let take = left.min(1 + tokens / 4096);
            row[at.unwrap_or(experts - 1)] += take as u32;
            left -= take;
        }
    }
    counts
}

/// A random problem of any shape that the types allow, small, with empty rows, empty columns and extremes.
pub(crate) fn random_problem(rng: &mut Rng) -> (Topology, Vec<u32>) {
    let domain_ranks = 1 + rng.below(9);
    let ranks = domain_ranks * (1 + rng.below(3));
    let experts = ranks + rng.below(3 * ranks + 1);
    let mut topology = topology(ranks, experts, domain_ranks, rng.below(4));
    if rng.below(4) == 0 {
        let slots: Vec<usize> = (0..ranks).map(|_| rng.below(4)).collect();
        topology = topology.with_slots(&slots).expect("valid");
    }
    if rng.below(4) == 0 {
        let speeds: Vec<u32> =
            (0..ranks).map(|r| if r % domain_ranks == 0 { 1024 } else { rng.below(1025) as u32 }).collect();
        topology = topology.with_speeds(&speeds).expect("valid");
    }
    let scale = [1, 3, 20, 300, 5000, 200_000][rng.below(6)];
    let style = rng.below(5);
    let hot = rng.below(experts);
    let mut counts = vec![0; ranks * experts];
    for (r, row) in counts.chunks_exact_mut(experts).enumerate() {
        if style != 0 && rng.below(6) == 0 {
            continue; // a source without tokens
        }
        for (e, count) in row.iter_mut().enumerate() {
            *count = match style {
                0 => scale as u32,
                1 => rng.below(scale + 1) as u32,
                2 if e == hot => (scale * experts) as u32,
                2 => rng.below(2) as u32,
                3 if e % 3 == r % 3 => rng.below(scale * 4 + 1) as u32,
                3 => 0,
                _ => (scale / (1 + (e * 7 + 3) % experts)) as u32,
            };
        }
    }
    (topology, counts)
}

/// Solves, checks the plan and its split, and returns both reports.
pub(crate) fn run(policy: &mut dyn Policy, topology: &Topology, counts: &[u32]) -> (Plan, PlanReport, SplitReport) {
    let problem = Problem::new(topology, counts).expect("valid counts");
    let mut plan = Plan::for_slots(topology);
    policy.solve(&problem, &mut plan).expect("a plan");
    let report = check_plan(&problem, &plan, &policy.rules())
        .unwrap_or_else(|violation| panic!("{}: {violation}\n{topology:?}\n{counts:?}\n{plan:?}", policy.name()));
    let mut split = vec![0; topology.ranks() * plan.instances().len()];
    split_all(&problem, &plan, &mut SplitWorkspace::new(topology), &mut split).expect("a split");
    let split_report = check_split(&problem, &plan, &split)
        .unwrap_or_else(|violation| panic!("{}: {violation}\n{topology:?}\n{counts:?}", policy.name()));
    assert_eq!(report.remote_tokens, split_report.remote_tokens);
    (plan, report, split_report)
}
