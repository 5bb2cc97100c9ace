//! Policy `greedy`: the paper's planner, Algorithm 1.
//!
//! Binary search for the least `tau` in `[beta * ceil(mean), largest rank load]` at which the greedy test passes
//! (a test of the shared module `probe`, with `u_min` as the floor and nothing kept on masters). The test is not monotone in `tau`, so the
//! search finds *a* threshold, as published. At the largest rank load there is no excess, so a plan always exists.
//! Rounding: `beta * ceil(mean)` rounds up. Cost: `O(log(largest load) * pieces * G)`.

use crate::draft::{Emitter, Move};
use crate::policies::probe::{Floor, Prober};
use crate::{
    Domain, DomainOutcome, Plan, PlanRules, Policy, Problem, Ratio, SlotRule, SolveError, SplitRule, StopReason,
    Topology,
};

/// Parameters of policy `greedy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GreedyParams {
    /// Tolerated imbalance, at least 1.
    pub beta: Ratio,
    /// `u_min`, least quota of a replica; 0 counts as 1.
    pub min_quota: u32,
}

impl Default for GreedyParams {
    fn default() -> Self {
        Self { beta: Ratio::BETA, min_quota: 1024 }
    }
}

/// The paper's planner.
#[derive(Clone, Debug)]
pub struct Greedy {
    topology: Topology,
    params: GreedyParams,
    prober: Prober,
    emitter: Emitter,
}

impl Greedy {
    /// The policy for one group.
    pub fn new(topology: &Topology, params: GreedyParams) -> Self {
        Self {
            topology: topology.clone(),
            params: GreedyParams { min_quota: params.min_quota.max(1), ..params },
            prober: Prober::new(topology, 0),
            emitter: Emitter::new(topology),
        }
    }

    /// Replicas for one domain, by the loads of all experts (`[E]`), in order of creation.
    pub(crate) fn moves(&mut self, domain: Domain, loads: &[u32]) -> &[Move] {
        self.prober.loads.copy_from_slice(loads);
        self.solve_domain(domain);
        &self.prober.moves
    }

    fn solve_domain(&mut self, domain: Domain) -> DomainOutcome {
        let topology = &self.topology;
        self.prober.enter(topology, domain);
        let (total, max) = self.prober.total_and_max(topology, domain);
        let mean = total.div_ceil(topology.domain_ranks() as u32);
        let floor = Floor::Fixed(self.params.min_quota);
        let target = self.params.beta.scale_ceil(mean).max(mean);
        let (mut low, mut high) = (target.min(max), max);
        while low < high {
            let middle = low + (high - low) / 2;
            if self.prober.test(topology, domain, middle, floor) {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        let passed = self.prober.test(topology, domain, high, floor);
        debug_assert!(passed, "the last probe that passed passes again");
        let stop = match high {
            _ if max <= target => StopReason::AlreadyBalanced,
            tau if tau <= target => StopReason::TargetReached,
            _ => StopReason::SearchExhausted,
        };
        DomainOutcome { threshold: high, lower_bound: mean, stop }
    }
}

impl Policy for Greedy {
    fn name(&self) -> &'static str {
        "greedy"
    }

    fn rules(&self) -> PlanRules {
        PlanRules {
            slots: SlotRule::Replicas,
            min_quota: self.params.min_quota,
            empty_replicas: false,
            within_domain: true,
            speeds: false,
        }
    }

    fn solve(&mut self, problem: &Problem<'_>, plan: &mut Plan) -> Result<(), SolveError> {
        SolveError::check_topology(&self.topology, problem)?;
        problem.expert_loads(&mut self.prober.loads);
        plan.begin(SplitRule::LocalFirstExact);
        for domain in (0..self.topology.domains()).map(Domain::new) {
            let outcome = self.solve_domain(domain);
            let Self { topology, prober, emitter, .. } = self;
            emitter.emit(topology, domain, &prober.loads, &prober.moves, plan);
            plan.push_domain(outcome);
        }
        Ok(())
    }
}
