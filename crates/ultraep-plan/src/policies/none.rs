//! Policy `none`: masters only, whatever the load.

use alloc::vec;
use alloc::vec::Vec;

use crate::draft::{Emitter, rank_loads};
use crate::{
    Domain, DomainOutcome, Plan, PlanRules, Policy, Problem, SlotRule, SolveError, SplitRule, StopReason, Topology,
};

/// Policy `none`: every expert is processed by its master.
#[derive(Clone, Debug)]
pub struct Unbalanced {
    topology: Topology,
    loads: Vec<u32>,
    rank_loads: Vec<u32>,
    emitter: Emitter,
}

impl Unbalanced {
    /// The policy for one group.
    pub fn new(topology: &Topology) -> Self {
        Self {
            topology: topology.clone(),
            loads: vec![0; topology.experts()],
            rank_loads: vec![0; topology.ranks()],
            emitter: Emitter::new(topology),
        }
    }
}

impl Policy for Unbalanced {
    fn name(&self) -> &'static str {
        "none"
    }

    fn rules(&self) -> PlanRules {
        PlanRules { slots: SlotRule::Replicas, min_quota: 1, empty_replicas: false, within_domain: true, speeds: false }
    }

    fn solve(&mut self, problem: &Problem<'_>, plan: &mut Plan) -> Result<(), SolveError> {
        SolveError::check_topology(&self.topology, problem)?;
        let topology = &self.topology;
        problem.expert_loads(&mut self.loads);
        plan.begin(SplitRule::LocalFirstExact);
        for domain in (0..topology.domains()).map(Domain::new) {
            rank_loads(topology, domain, &self.loads, &mut self.rank_loads);
            self.emitter.emit(topology, domain, &self.loads, &[], plan);
            let ranks = topology.domain_range(domain);
            let loads = &self.rank_loads[ranks.clone()];
            let total: u64 = loads.iter().map(|&l| u64::from(l)).sum();
            let mean = total.div_ceil(ranks.len() as u64) as u32;
            let threshold = loads.iter().copied().max().unwrap_or(0);
            plan.push_domain(DomainOutcome { threshold, lower_bound: mean, stop: StopReason::NotASearch });
        }
        Ok(())
    }
}
