//! Policy `llep`: least-loaded expert parallelism, a greedy spill on the exact counts with no slot limit.
//!
//! Source: the LLEP paper's assignment algorithm. Per domain:
//!
//! ```text
//! if largest rank load / mean < trigger: masters only
//! cap = max(1, floor(alpha * total / G))
//! experts by decreasing load (ties: lower expert):
//!     home keeps what fits: cap - assigned - home load not yet handled
//!     while tokens are left: other ranks by increasing effective load = assigned + home load not yet handled (ties:
//!         lower rank); the first rank where a piece goes takes min(left, cap - effective load);
//!         a piece under min_piece goes only where it finishes the expert; no rank takes one: all to the first
//! ```
//!
//! Pieces of one expert on one rank become one instance. No limit on copies: the report says how many the fullest rank
//! needs. A piece ends an expert or fills a rank, and a full rank gets room again only when one of its masters spills, so
//! there are at most `2 E + N` pieces away from home. `O(E G log G)` and one sort for each further piece. Ranks with speed weight 0 take no spill.

use std::cmp::Reverse;

use ultraep_plan::{
    Domain, Expert, Plan, PlanRules, Policy, Problem, Rank, Ratio, SlotRule, SolveError, SplitRule, Topology,
};

use crate::draft::{Amounts, Bound, Draft};

/// Parameters of [`Llep`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LlepParams {
    /// Cap of a rank over the mean rank load.
    pub alpha: Ratio,
    /// Least piece worth sending, in tokens, unless it finishes an expert.
    pub min_piece: u32,
    /// Balances only when the largest rank load over the mean is at least this.
    pub trigger: Ratio,
}

impl Default for LlepParams {
    /// As published: 1.1, 1024 tokens, 1.3.
    fn default() -> Self {
        let ratio = |num| Ratio::new(num, 10).unwrap_or(Ratio::ONE);
        Self { alpha: ratio(11), min_piece: 1024, trigger: ratio(13) }
    }
}

/// The policy. Stateless between microbatches.
#[derive(Clone, Debug)]
pub struct Llep {
    topology: Topology,
    params: LlepParams,
    draft: Draft,
    totals: Vec<u32>,
    order: Vec<Expert>,
    others: Vec<u32>,
    /// Tokens given to each rank so far.
    assigned: Vec<u64>,
    /// Home load of each rank that is not handled yet.
    pending: Vec<u64>,
}

impl Llep {
    /// For `topology`.
    pub fn new(topology: &Topology, params: LlepParams) -> Self {
        Self {
            topology: topology.clone(),
            params,
            draft: Draft::with_capacity(topology, 3 * topology.experts() + topology.ranks()),
            totals: vec![0; topology.experts()],
            order: Vec::with_capacity(topology.experts()),
            others: Vec::with_capacity(topology.ranks()),
            assigned: Vec::with_capacity(topology.ranks()),
            pending: Vec::with_capacity(topology.ranks()),
        }
    }

    fn solve_domain(&mut self, domain: Domain) {
        let ranks = self.topology.domain_range(domain);
        let experts = self.topology.domain_experts(domain);
        let total: u64 = self.pending[ranks.clone()].iter().sum();
        let most = self.pending[ranks.clone()].iter().copied().max().unwrap_or(0);
        let LlepParams { alpha, trigger, .. } = self.params;
        let scaled = |value: u64, by: u32| u128::from(value) * u128::from(by);
        let mean_at_trigger = scaled(total, trigger.num());
        if total == 0 || scaled(most, trigger.den()) * (ranks.len() as u128) < mean_at_trigger {
            for expert in experts.map(Expert::new) {
                self.draft.push(&self.topology, expert, self.topology.home(expert), self.totals[expert.index()]);
            }
            return;
        }
        let cap = u64::from(alpha.of_mean_floor(total, ranks.len() as u64)).max(1);
        self.order.clear();
        self.order.extend(experts.map(Expert::new));
        self.order.sort_unstable_by_key(|&e| (Reverse(self.totals[e.index()]), e));
        for i in 0..self.order.len() {
            let expert = self.order[i];
            let (home, load) = (self.topology.home(expert), u64::from(self.totals[expert.index()]));
            self.pending[home.index()] -= load;
            let room = cap.saturating_sub(self.effective(home.index()));
            let keep = load.min(room);
            self.give(expert, home.index(), keep);
            self.spill(expert, load - keep, cap, ranks.clone());
        }
    }

    fn effective(&self, rank: usize) -> u64 {
        self.assigned[rank] + self.pending[rank]
    }

    fn give(&mut self, expert: Expert, rank: usize, tokens: u64) {
        if tokens > 0 {
            self.assigned[rank] += tokens;
            self.draft.push(&self.topology, expert, Rank::new(rank), tokens as u32);
        }
    }

    /// Sends `left` tokens of `expert` to other ranks of the domain.
    fn spill(&mut self, expert: Expert, mut left: u64, cap: u64, ranks: std::ops::Range<usize>) {
        if left == 0 {
            return;
        }
        let home = self.topology.home(expert).index();
        let takes = |r: &usize| *r != home && self.topology.speed(Rank::new(*r)) > 0;
        let mut others = std::mem::take(&mut self.others);
        others.clear();
        others.extend(ranks.filter(takes).map(|r| r as u32));
        if others.is_empty() {
            self.give(expert, home, left);
            left = 0;
        }
        while left > 0 {
            others.sort_unstable_by_key(|&r| (self.effective(r as usize), r));
            let piece_at = |r: u32| left.min(cap.saturating_sub(self.effective(r as usize)));
            let goes = |piece: u64| piece > 0 && (piece == left || piece >= u64::from(self.params.min_piece));
            let taker = others.iter().map(|&r| (r, piece_at(r))).find(|&(_, piece)| goes(piece));
            let (rank, piece) = taker.unwrap_or((others[0], left));
            self.give(expert, rank as usize, piece);
            left -= piece;
        }
        self.others = others;
    }
}

impl Policy for Llep {
    fn name(&self) -> &'static str {
        "llep"
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
        self.assigned.clear();
        self.assigned.resize(self.topology.ranks(), 0);
        self.pending.clear();
        let home_load = |r: usize| self.topology.masters(Rank::new(r)).map(|e| u64::from(self.totals[e])).sum::<u64>();
        self.pending.extend((0..self.topology.ranks()).map(home_load));
        for domain in (0..self.topology.domains()).map(Domain::new) {
            self.solve_domain(domain);
        }
        self.draft.finish(problem, Amounts::Quotas(SplitRule::LocalFirstExact), Bound::DomainMean, plan);
        Ok(())
    }
}
