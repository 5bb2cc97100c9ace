//! The cost-aware objective: the candidate with the least predicted time, masters only among them.
//!
//! ```text
//! start from masters only
//! for thresholds from the goal to the largest rank load, dense near the goal, then twice more between the best's neighbours:
//!   build in every plain way (in every tight way where none fits); keep what is predicted to be fastest
//! ties: fewer replicas, then fewer sends of a rank, then the earlier candidate
//! ```
//!
//! Every candidate is a plan within its threshold; the prediction (module `cost`) decides what the threshold is worth: tokens
//! as the exact split leaves them, weight sync by the transfer planner's estimate with its relays (within 5% of the clock's
//! time). Each domain is priced alone. Cost: about `POINTS * PASSES` times a plain solve and an estimate of its transfers.

use alloc::vec;
use alloc::vec::Vec;

use crate::draft::Move;
use crate::policies::ultraep::field::Field;
use crate::time::at_speed_ps;
use crate::{
    Domain, HardwareModel, Prediction, Problem, Rank, Topology, TransferModelError, TransferParams, TransferPlanner,
    Transfers,
};

/// Thresholds of one pass.
const POINTS: usize = 6;
/// Passes, each between the neighbours of the best threshold of the one before.
pub(crate) const PASSES: usize = 3;

/// Memory of the cost-aware objective.
#[derive(Clone, Debug)]
pub(crate) struct Pricer {
    pub(crate) model: HardwareModel,
    planner: TransferPlanner,
    transfers: Transfers,
    /// Experts of the domain.
    width: usize,
    /// Counts of the domain's ranks for the domain's experts, `[G, E of the domain]`.
    counts: Vec<u32>,
    /// Tokens of each source of the domain, `[G]`.
    sources: Vec<u64>,
    /// What is left on masters, `[E]` of the domain.
    left: Vec<u32>,
    /// Work at full speed, tokens, tokens that stay on their source's rank, copies sent, `[G]`.
    work_ps: Vec<u64>,
    tokens: Vec<u64>,
    local: Vec<u64>,
    sends: Vec<u32>,
    receives: Vec<u32>,
}

impl Pricer {
    pub(crate) fn new(topology: &Topology, model: HardwareModel) -> Result<Self, TransferModelError> {
        let ranks = topology.domain_ranks();
        let experts = |d| topology.domain_experts(Domain::new(d)).len();
        let width = (0..topology.domains()).map(experts).max().unwrap_or(0);
        Ok(Self {
            model,
            planner: TransferPlanner::new(topology, model.transfer_model(), TransferParams::default())?,
            transfers: Transfers::new(topology),
            width: 0,
            counts: Vec::with_capacity(ranks * width),
            sources: vec![0; ranks],
            left: Vec::with_capacity(topology.experts()),
            work_ps: vec![0; ranks],
            tokens: vec![0; ranks],
            local: vec![0; ranks],
            sends: vec![0; ranks],
            receives: vec![0; ranks],
        })
    }

    /// Takes what the sources of a domain send.
    pub(crate) fn enter(&mut self, problem: &Problem<'_>, domain: Domain) {
        let topology = problem.topology();
        let experts = topology.domain_experts(domain);
        self.width = experts.len();
        self.counts.clear();
        for (rank, source) in topology.domain_range(domain).zip(&mut self.sources) {
            let row = problem.row(rank);
            *source = row.iter().map(|&count| u64::from(count)).sum();
            self.counts.extend_from_slice(&row[experts.clone()]);
        }
    }

    /// Predicted time with these replicas, and the most copies that a rank sends. A candidate that is slower than `limit_ps`
    /// before its transfers are looked at costs `u64::MAX`.
    pub(crate) fn price(&mut self, topology: &Topology, field: &Field, moves: &[Move], limit_ps: u64) -> (u64, u32) {
        self.left.clear();
        self.left.extend_from_slice(&field.experts);
        self.work_ps.fill(0);
        self.local.fill(0);
        self.tokens.iter_mut().zip(&field.load).for_each(|(tokens, &load)| *tokens = u64::from(load));
        self.sends.fill(0);
        self.receives.fill(0);
        for m in moves {
            let (expert, to) = (m.expert as usize - field.first_expert, m.rank as usize - field.first_rank);
            let home = topology.homes()[m.expert as usize].index() - field.first_rank;
            self.left[expert] -= m.quota;
            self.tokens[home] -= u64::from(m.quota);
            self.tokens[to] += u64::from(m.quota);
            self.local[to] += u64::from(m.quota.min(self.counts[to * self.width + expert]));
            self.sends[home] += 1;
            self.receives[to] += 1;
            self.work_ps[to] = self.work_ps[to].saturating_add(self.model.instance_ps(m.quota.into()));
        }
        let (mut experts_ps, mut busiest) = (0, 0);
        for r in 0..field.ranks() {
            let mut work = self.work_ps[r];
            for expert in field.experts_of(r) {
                work = work.saturating_add(self.model.instance_ps(self.left[expert].into()));
                self.local[r] += u64::from(self.left[expert].min(self.counts[r * self.width + expert]));
            }
            experts_ps = experts_ps.max(at_speed_ps(work, topology.speed(Rank::new(field.first_rank + r))));
            busiest = busiest.max(self.sources[r] - self.local[r]).max(self.tokens[r] - self.local[r]);
        }
        let sends = self.sends.iter().copied().max().unwrap_or(0);
        let overhead = self.model.overhead(topology, moves.len(), self.least_sync_ns());
        let mut prediction = Prediction {
            plan_ps: overhead.plan_ps,
            reroute_ps: overhead.reroute_ps,
            weight_sync_ps: overhead.sync_ns.saturating_mul(1000),
            all_to_all_ps: self.model.all_to_all_ps(busiest),
            experts_ps,
        };
        if prediction.total_ps() > limit_ps {
            return (u64::MAX, sends);
        }
        self.transfers.list_moves(topology, moves);
        prediction.weight_sync_ps = self.planner.estimate_ns(&self.transfers).saturating_mul(1000);
        (prediction.total_ps(), sends)
    }

    /// What the busiest receiver takes at least.
    fn least_sync_ns(&self) -> u64 {
        let most = self.receives.iter().copied().max().unwrap_or(0);
        let model = self.planner.model();
        u64::from(most) * model.chunks() * model.receive_ns
    }
}

/// Thresholds between `low` and `high`, neither of them passed: squares of equal steps from `low` on (dense near the goal).
pub(crate) fn squares(low: u32, high: u32) -> [u32; POINTS] {
    let span = u64::from(high.saturating_sub(low));
    core::array::from_fn(|k| low + (span * (k * k) as u64 / (POINTS * POINTS) as u64) as u32)
}

/// Thresholds strictly between `low` and `high`, where there is room, at equal steps.
pub(crate) fn evenly(low: u32, high: u32) -> [u32; POINTS] {
    let span = u64::from(high.saturating_sub(low));
    core::array::from_fn(|k| low + (span * (k as u64 + 1) / (POINTS as u64 + 1)) as u32)
}
