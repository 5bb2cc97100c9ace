//! The cost-aware objective: the candidate with the least predicted time, masters only among them.
//!
//! ```text
//! start from masters only
//! for thresholds from the goal to the largest rank load, dense near the goal, then twice more between the best's neighbours:
//!   build in every plain way (in every tight way where none fits); keep what is predicted to be fastest
//! ties: fewer replicas, then fewer sends of a rank, then the earlier candidate
//! ```
//!
//! Every candidate is a plan within its threshold; the prediction (module `cost`) decides what the threshold is worth.
//! Each domain is priced alone. Cost: about `POINTS * PASSES` times a plain solve.

use alloc::vec;
use alloc::vec::Vec;

use crate::draft::Move;
use crate::policies::ultraep::field::Field;
use crate::{Domain, HardwareModel, Problem, Rank, Topology};

/// Thresholds of one pass.
const POINTS: usize = 6;
/// Passes, each between the neighbours of the best threshold of the one before.
pub(crate) const PASSES: usize = 3;

/// Memory of the cost-aware objective.
#[derive(Clone, Debug)]
pub(crate) struct Pricer {
    pub(crate) model: HardwareModel,
    /// Most tokens that a source rank of the domain sends.
    sent_tokens: u32,
    /// What is left on masters, `[E]` of the domain.
    left: Vec<u32>,
    /// Work at full speed, tokens, copies sent and received, `[G]`.
    work_ps: Vec<u64>,
    tokens: Vec<u32>,
    sends: Vec<u32>,
    receives: Vec<u32>,
}

impl Pricer {
    pub(crate) fn new(topology: &Topology, model: HardwareModel) -> Self {
        let ranks = topology.domain_ranks();
        Self {
            model,
            sent_tokens: 0,
            left: Vec::with_capacity(topology.experts()),
            work_ps: vec![0; ranks],
            tokens: vec![0; ranks],
            sends: vec![0; ranks],
            receives: vec![0; ranks],
        }
    }

    /// Takes what the sources of a domain send.
    pub(crate) fn enter(&mut self, problem: &Problem<'_>, domain: Domain) {
        let ranks = problem.topology().domain_range(domain);
        self.sent_tokens = ranks.map(|r| problem.row(r).iter().sum()).max().unwrap_or(0);
    }

    /// Predicted time with these replicas, and the most copies that a rank sends.
    pub(crate) fn price(&mut self, topology: &Topology, field: &Field, moves: &[Move]) -> (u64, u32) {
        self.left.clear();
        self.left.extend_from_slice(&field.experts);
        self.work_ps.fill(0);
        self.tokens.copy_from_slice(&field.load);
        self.sends.fill(0);
        self.receives.fill(0);
        for m in moves {
            let (expert, to) = (m.expert as usize - field.first_expert, m.rank as usize - field.first_rank);
            let home = topology.homes()[m.expert as usize].index() - field.first_rank;
            self.left[expert] -= m.quota;
            self.tokens[home] -= m.quota;
            self.tokens[to] += m.quota;
            self.sends[home] += 1;
            self.receives[to] += 1;
            self.work_ps[to] = self.work_ps[to].saturating_add(self.model.instance_ps(m.quota));
        }
        let (mut experts_ps, mut tokens, mut copies) = (0, self.sent_tokens, 0);
        for r in 0..field.ranks() {
            let masters = self.left[field.experts_of(r)].iter().map(|&l| self.model.instance_ps(l));
            let work = masters.fold(self.work_ps[r], u64::saturating_add);
            experts_ps = experts_ps.max(self.model.at_speed_ps(work, topology.speed(Rank::new(field.first_rank + r))));
            tokens = tokens.max(self.tokens[r]);
            copies = copies.max(self.sends[r]).max(self.receives[r]);
        }
        let sync = self.model.reroute_ps.max(self.model.weight_sync_ps(copies));
        let total = self.model.plan_ps.saturating_add(sync);
        let total = total.saturating_add(self.model.all_to_all_ps(tokens)).saturating_add(experts_ps);
        (total, self.sends.iter().copied().max().unwrap_or(0))
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
