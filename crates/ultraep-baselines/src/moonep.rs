//! Policy `moonep`: every rank gets exactly its share; each receiver has one donor.
//!
//! Source: the MoonEP description. Per domain:
//!
//! ```text
//! balance[r] = home load - share                      share: the mean; what does not divide goes to the lowest ranks
//! loop: donor = largest balance, receiver = smallest (ties: lowest rank); stop when the donor's is not above 0
//!       move = -balance[receiver]: the receiver is full; the donor may go negative, and then becomes a receiver
//! per donor, while receivers wait: the largest remaining move (ties: lowest receiver) takes from the donor's expert
//!       with most left (ties: lowest expert)
//! ```
//!
//! Invariants: a donor keeps `share + balance >= 0` tokens of its own masters at any time, so its moves never exceed its
//! home load; a receiver is filled once, so it holds at most its donor's `M` experts beside its own. No locality: tokens
//! of every source go to the instances in proportion to the quotas. `O(G^2 + G M)`.
//!
//! Deviation: the original needs equal tokens in every source, which makes the mean an integer; shares that differ by one
//! token serve any counts.

use ultraep_plan::{Domain, Expert, Plan, PlanRules, Policy, Problem, Rank, SlotRule, SolveError, SplitRule, Topology};

use crate::draft::{Amounts, Bound, Draft};
use crate::kind::BuildError;

/// A receiver waiting for tokens of its donor.
#[derive(Clone, Copy, Debug)]
struct Move {
    donor: usize,
    receiver: usize,
    left: u32,
}

/// The policy. Stateless between microbatches.
#[derive(Clone, Debug)]
pub struct MoonEp {
    topology: Topology,
    draft: Draft,
    /// Load of every expert; what is left at home while moves take from it.
    totals: Vec<u32>,
    balance: Vec<i64>,
    moves: Vec<Move>,
}

impl MoonEp {
    /// For `topology`; refused when a rank has speed weight 0, since every rank gets its share.
    pub fn new(topology: &Topology) -> Result<Self, BuildError> {
        if topology.speeds().contains(&0) {
            return Err(BuildError::ZeroSpeed { policy: "moonep" });
        }
        Ok(Self {
            topology: topology.clone(),
            draft: Draft::with_capacity(topology, 2 * topology.experts() + topology.ranks()),
            totals: vec![0; topology.experts()],
            balance: Vec::with_capacity(topology.ranks()),
            moves: Vec::with_capacity(topology.ranks()),
        })
    }

    /// Pairs donors with receivers.
    fn pair(&mut self, domain: Domain) {
        let ranks = self.topology.domain_range(domain);
        let home_load = |r: usize| self.topology.masters(Rank::new(r)).map(|e| i64::from(self.totals[e])).sum::<i64>();
        let total: i64 = ranks.clone().map(home_load).sum();
        let (share, extra) = (total / ranks.len() as i64, (total % ranks.len() as i64) as usize);
        self.balance.clear();
        self.balance.extend(ranks.clone().enumerate().map(|(i, r)| home_load(r) - share - i64::from(i < extra)));
        loop {
            let by_balance = |i: &usize| self.balance[*i];
            // `max_by_key` returns the last of equals, so the lowest rank is asked for in reverse.
            let Some(donor) = (0..ranks.len()).rev().max_by_key(by_balance) else { return };
            let Some(receiver) = (0..ranks.len()).min_by_key(by_balance) else { return };
            if self.balance[donor] <= 0 {
                return;
            }
            let tokens = -self.balance[receiver];
            self.balance[receiver] = 0;
            self.balance[donor] -= tokens;
            let (donor, receiver) = (ranks.start + donor, ranks.start + receiver);
            self.moves.push(Move { donor, receiver, left: tokens as u32 });
        }
    }

    /// Takes the moves' tokens from the donors' experts.
    fn take(&mut self) {
        let waiting = |m: &Move| m.left > 0;
        while let Some(first) = self.moves.iter().find(|m| waiting(m)) {
            let donor = first.donor;
            let of_donor = self.moves.iter_mut().filter(|m| m.donor == donor && waiting(m));
            let Some(next) = of_donor.min_by_key(|m| (std::cmp::Reverse(m.left), m.receiver)) else { return };
            let masters = self.topology.masters(Rank::new(donor));
            let Some(expert) = masters.min_by_key(|&e| (std::cmp::Reverse(self.totals[e]), e)) else { return };
            let piece = next.left.min(self.totals[expert]);
            debug_assert!(piece > 0, "a donor gives no more than it has");
            next.left -= piece;
            self.totals[expert] -= piece;
            self.draft.push(&self.topology, Expert::new(expert), Rank::new(next.receiver), piece);
        }
    }
}

impl Policy for MoonEp {
    fn name(&self) -> &'static str {
        "moonep"
    }

    fn rules(&self) -> PlanRules {
        PlanRules {
            slots: SlotRule::Unlimited,
            min_quota: 1,
            empty_replicas: false,
            within_domain: true,
            speeds: false,
        }
    }

    fn solve(&mut self, problem: &Problem<'_>, plan: &mut Plan) -> Result<(), SolveError> {
        SolveError::check_topology(&self.topology, problem)?;
        problem.expert_loads(&mut self.totals);
        self.draft.clear();
        self.moves.clear();
        for domain in (0..self.topology.domains()).map(Domain::new) {
            self.pair(domain);
        }
        self.take();
        self.draft.push_masters(&self.topology, &self.totals);
        self.draft.finish(problem, Amounts::Quotas(SplitRule::ProportionalExact), Bound::DomainMean, plan);
        Ok(())
    }
}
