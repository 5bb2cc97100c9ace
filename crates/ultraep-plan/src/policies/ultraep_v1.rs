//! Policy `ultraep-v1`: the released v1.0.0 solver, to the integer, for one domain after the other.
//!
//! ```text
//! lo = ceil(total / G * max(threshold, 1))          32-bit floats, in this order
//! hi = max(largest rank load, lo)
//! fast:     t = ceil(lo * (1 + eps)), up to 3 greedy tests with the dynamic floor, t += max(1, (hi + 99) / 100)
//! precheck: lo = least t in [lo, hi] with total excess <= total slack; greedy test there with the fixed floor
//! bisect:   four probes a round over [lo + 1, hi], then one last test at the answer
//! ```
//!
//! Floats appear here only, because the published bounds are defined by them. They are single IEEE operations on
//! non-negative numbers, so every machine rounds alike.

use alloc::vec;
use alloc::vec::Vec;

use crate::draft::{Emitter, Move};
use crate::policies::probe::{Floor, Prober};
use crate::{
    Domain, DomainOutcome, Plan, PlanRules, Policy, Problem, Rank, SlotRule, SolveError, SplitRule, StopReason,
    Topology,
};

/// Parameters of policy `ultraep-v1`, named as released.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct UltraepV1Params {
    /// Balance threshold: a factor on the mean rank load; below 1 counts as 1.
    pub balance_threshold: f32,
    /// Least quota of a replica outside the fast probe.
    pub min_tokens: u32,
    /// Whether a master may be left without tokens (otherwise it keeps one).
    pub zero_masters: bool,
    /// The fast probe starts this much above the bound.
    pub epsilon: f32,
    /// Whether the split is local first.
    pub locality: bool,
}

impl Default for UltraepV1Params {
    fn default() -> Self {
        Self { balance_threshold: 1.0, min_tokens: 1024, zero_masters: false, epsilon: 0.01, locality: true }
    }
}

/// Which stage of the released solver gave a domain's plan.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum V1Path {
    /// Nothing to plan with: no slots, or one rank.
    #[default]
    None,
    /// One of the first three probes.
    Fast,
    /// The probe at the capacity bound.
    Precheck,
    /// The four-way bisection.
    Bisect,
}

/// The released solver.
#[derive(Clone, Debug)]
pub struct UltraepV1 {
    topology: Topology,
    params: UltraepV1Params,
    prober: Prober,
    emitter: Emitter,
    paths: Vec<V1Path>,
}

impl UltraepV1 {
    /// The policy for one group.
    pub fn new(topology: &Topology, params: UltraepV1Params) -> Self {
        let keep = u32::from(!params.zero_masters);
        Self {
            topology: topology.clone(),
            params,
            prober: Prober::new(topology, keep),
            emitter: Emitter::new(topology),
            paths: vec![V1Path::None; topology.domains()],
        }
    }

    /// The stage that gave each domain's plan in the last solve.
    pub fn paths(&self) -> &[V1Path] {
        &self.paths
    }

    /// Replicas for one domain, by the loads of all experts (`[E]`), in order of creation.
    pub(crate) fn moves(&mut self, domain: Domain, loads: &[u32]) -> &[Move] {
        self.prober.loads.copy_from_slice(loads);
        self.solve_domain(domain);
        &self.prober.moves
    }

    fn solve_domain(&mut self, domain: Domain) -> (u32, V1Path) {
        let topology = &self.topology;
        self.prober.enter(topology, domain);
        let (total, max) = self.prober.total_and_max(topology, domain);
        let slots = topology.domain_range(domain).any(|r| topology.slots(Rank::new(r)) > 0);
        if !slots || topology.domain_ranks() == 1 {
            return (max, V1Path::None);
        }
        let bound = ceil(total as f32 / topology.domain_ranks() as f32 * self.params.balance_threshold.max(1.0));
        let (low, high) = (bound, max.max(bound));
        if let Some(tau) = self.fast(domain, low, high) {
            return (tau, V1Path::Fast);
        }
        self.bisect(domain, low, high)
    }

    fn fast(&mut self, domain: Domain, low: u32, high: u32) -> Option<u32> {
        let mut tau = ceil(low as f32 * (1.0 + self.params.epsilon)).max(low);
        let step = u64::from(high).div_ceil(100).max(1) as u32;
        for _ in 0..3 {
            if self.prober.test(&self.topology, domain, tau, Floor::Dynamic) {
                return Some(tau);
            }
            tau = high.min(tau.saturating_add(step));
        }
        None
    }

    fn bisect(&mut self, domain: Domain, low: u32, high: u32) -> (u32, V1Path) {
        let (prober, topology) = (&mut self.prober, &self.topology);
        let floor = Floor::Fixed(self.params.min_tokens);
        let (mut low, mut high) = (low, high);
        let mut capacity = high;
        while low < capacity {
            let middle = low + (capacity - low) / 2;
            let (excess, slack) = prober.excess_and_slack(topology, domain, middle);
            if excess <= slack { capacity = middle } else { low = middle + 1 }
        }
        if prober.test(topology, domain, low, floor) {
            return (low, V1Path::Precheck);
        }
        low = (low + 1).min(high);
        while low < high {
            let range = high - low;
            if range <= 4 {
                low = (low..high).find(|&tau| prober.test(topology, domain, tau, floor)).unwrap_or(high);
                break;
            }
            let points: [u32; 4] = core::array::from_fn(|w| low + (u64::from(range) * (w as u64 + 1) / 5) as u32);
            match points.iter().position(|&tau| prober.test(topology, domain, tau, floor)) {
                Some(first) => {
                    high = points[first];
                    low = if first > 0 { points[first - 1] + 1 } else { low };
                }
                None => low = points[3] + 1,
            }
        }
        let passed = prober.test(topology, domain, low, floor);
        debug_assert!(passed || self.params.min_tokens > 1, "the least threshold that passed passes again");
        (low, V1Path::Bisect)
    }
}

impl Policy for UltraepV1 {
    fn name(&self) -> &'static str {
        "ultraep-v1"
    }

    fn rules(&self) -> PlanRules {
        // The fast probe's floor is below min_tokens, so the least quota that all its plans keep is one token.
        PlanRules { slots: SlotRule::Replicas, min_quota: 1, empty_replicas: false, within_domain: true, speeds: false }
    }

    fn solve(&mut self, problem: &Problem<'_>, plan: &mut Plan) -> Result<(), SolveError> {
        SolveError::check_topology(&self.topology, problem)?;
        problem.expert_loads(&mut self.prober.loads);
        plan.begin(SplitRule::SourceRounded { locality: self.params.locality });
        for domain in (0..self.topology.domains()).map(Domain::new) {
            let (threshold, path) = self.solve_domain(domain);
            self.paths[domain.index()] = path;
            let Self { topology, prober, emitter, .. } = self;
            emitter.emit(topology, domain, &prober.loads, &prober.moves, plan);
            let (total, _) = prober.total_and_max(topology, domain);
            let mean = total.div_ceil(topology.domain_ranks() as u32);
            plan.push_domain(DomainOutcome { threshold, lower_bound: mean, stop: StopReason::NotASearch });
        }
        Ok(())
    }
}

/// The least integer not below `x`, for `x >= 0`; over `u32::MAX` it saturates.
fn ceil(x: f32) -> u32 {
    let floor = x as u32;
    if (floor as f32) < x { floor.saturating_add(1) } else { floor }
}
