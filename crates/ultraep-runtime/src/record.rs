//! What one MoE layer did in one microbatch, for run folders and reports.

use ultraep_balancer::Planned;
use ultraep_plan::measure::{self, Measure, master_loads};
use ultraep_plan::{DomainOutcome, Instance, Plan, Topology};

use crate::VirtualLayer;

/// Load before and after balancing, with the source axis.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerRecord {
    /// Layer and microbatch.
    pub at: VirtualLayer,
    /// The policy that planned.
    pub policy: &'static str,
    /// `lambda[r,e]`, `[N, E]`.
    pub counts: Vec<u32>,
    /// First instance of every expert in `instances`, `[E + 1]`.
    pub offsets: Vec<u32>,
    /// Instances by expert, master first.
    pub instances: Vec<Instance>,
    /// Tokens of each source for each instance, realised, `[N, instances]`.
    pub split: Vec<u32>,
    /// Outcome of planning by domain.
    pub domains: Vec<DomainOutcome>,
    /// Digest of the plan.
    pub digest: u64,
    /// Load of each rank if every token went to its master.
    pub rank_load_before: Vec<u64>,
    /// Load of each rank as it was.
    pub rank_load_after: Vec<u64>,
}

impl LayerRecord {
    pub(crate) fn new(at: VirtualLayer, policy: &'static str, planned: &Planned, topology: &Topology) -> Self {
        let (plan, split) = (planned.plan(), planned.split());
        let after = Measure::of_split(topology.ranks(), plan.instances(), split);
        Self {
            at,
            policy,
            counts: planned.counts().to_vec(),
            offsets: offsets(plan),
            instances: plan.instances().to_vec(),
            split: split.to_vec(),
            domains: plan.domains().to_vec(),
            digest: ultraep_plan::digest_plan(plan),
            rank_load_before: master_loads(topology, planned.counts()),
            rank_load_after: after.processed().to_vec(),
        }
    }

    /// Largest over mean rank load before balancing.
    pub fn imbalance_before(&self) -> f64 {
        imbalance(&self.rank_load_before)
    }

    /// Largest over mean rank load after balancing.
    pub fn imbalance_after(&self) -> f64 {
        imbalance(&self.rank_load_after)
    }

    /// Proven lower bound of [`LayerRecord::imbalance_after`] for plans that keep replicas inside domains: the largest domain's
    /// bound over the mean rank load; 1 when there is none.
    pub fn imbalance_bound(&self) -> f64 {
        let largest = self.domains.iter().map(|d| d.lower_bound).max().unwrap_or(0);
        let mean = self.total_tokens() as f64 / self.rank_load_after.len() as f64;
        if mean > 0.0 { (f64::from(largest) / mean).max(1.0) } else { 1.0 }
    }

    /// Replicas in use.
    pub fn replicas(&self) -> usize {
        self.instances.len() + 1 - self.offsets.len()
    }

    /// Tokens that went to another rank than their source's.
    pub fn crossed_tokens(&self) -> u64 {
        Measure::of_split(self.rank_load_after.len(), &self.instances, &self.split).remote_tokens()
    }

    /// Tokens in all.
    pub fn total_tokens(&self) -> u64 {
        self.rank_load_before.iter().sum()
    }

    /// Tokens on the busiest rank after balancing: the activation peak.
    pub fn peak_tokens(&self) -> u64 {
        self.rank_load_after.iter().copied().max().unwrap_or(0)
    }
}

fn offsets(plan: &Plan) -> Vec<u32> {
    let ends = (0..plan.experts()).map(|e| plan.range(ultraep_plan::Expert::new(e)).end as u32);
    std::iter::once(0).chain(ends).collect()
}

/// Largest over mean; 1 when there is no load.
fn imbalance(loads: &[u64]) -> f64 {
    let (num, den) = measure::imbalance(loads.iter().copied());
    num as f64 / den as f64
}
