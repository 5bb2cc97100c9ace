//! Policy `lplb`: DeepSeek's linear-programming load balancer.
//!
//! Source: the LPLB release. Which experts have a replica, and where, is fixed ahead from history; every expert has at
//! most one. Per microbatch a linear program splits each replicated expert between its two instances:
//!
//! ```text
//! placement (every `interval` microbatches, per domain): experts by decreasing past load (ties: lower expert), each to
//!     the rank with least past load that has a free slot and is not its home, half of its load moving along
//! minimise T   subject to   for every rank t:  base[t] - sum(x of experts at home on t) + sum(x of replicas on t) <= T
//!                           0 <= x[e] <= lambda[e]
//! ```
//!
//! `x` is rounded to the nearest integer, so a rank can exceed the optimum by half a token for each instance it shares.
//! [`LplbLinks::Torus`] places as the release's README has it, "dynamically reorders experts based on workload statistics,
//! constructs replicas considering static topology": EPLB's packing without replication puts every expert somewhere (masters
//! move), then each rank's heaviest expert has a replica on the next rank of its node and its second on the same rank of the
//! next node, whatever they hold.
//!
//! Where the program is larger than the limit, or the solver gives up, experts are split 50/50 (as upstream does when its
//! interior point does not converge) and the domain's outcome says [`StopReason::SearchExhausted`].
//!
//! Determinism: the solver runs the same IEEE operations in the same order on every rank; it is given no time limit,
//! which ranks could hit at different points, but a limit on the size. It allocates.

use microlp::{ComparisonOp, OptimizationDirection};
use std::cmp::Reverse;
use std::ops::Range;
use ultraep_plan::{
    Domain, Expert, Plan, PlanRules, Policy, Problem, Rank, SlotRule, SolveError, SplitRule, StopReason, Topology,
};

use crate::draft::{Amounts, Bound, Draft, Shape};
use crate::heuristic::{Packer, load_a_copy};
use crate::history::{History, HistoryParams};

/// Which ranks share an expert.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LplbLinks {
    /// Masters stay; each replica goes to the rank with least past load.
    #[default]
    LeastLoaded,
    /// Experts are placed anew; replicas go round two rings, of at most two slots a rank.
    Torus {
        /// Consecutive ranks of a node. Where they do not divide a domain, the domain is one node.
        node_ranks: usize,
    },
}

/// Parameters of [`Lplb`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LplbParams {
    /// What the placement is made from, and how often.
    pub history: HistoryParams,
    /// Most replicas in a domain (variables of its linear program) that are given to the solver.
    pub max_variables: usize,
    /// Which ranks share an expert.
    pub links: LplbLinks,
}

impl Default for LplbParams {
    fn default() -> Self {
        Self { history: HistoryParams::default(), max_variables: 512, links: LplbLinks::default() }
    }
}

/// The policy. One instance serves one layer, since layers have histories of their own.
#[derive(Clone, Debug)]
pub struct Lplb {
    topology: Topology,
    max_variables: usize,
    links: LplbLinks,
    history: History,
    /// Where each expert's first instance is, `[E]`: its home unless experts were placed anew.
    places: Vec<Rank>,
    packer: Packer,
    /// Replicated experts and the rank of the replica, by domain.
    replicas: Vec<(Expert, Rank)>,
    /// Where each domain's replicas lie in `replicas`.
    ranges: Vec<Range<usize>>,
    draft: Draft,
    totals: Vec<u32>,
}

impl Lplb {
    /// For one layer of `topology`. Ranks with speed weight 0 get no replica.
    pub fn new(topology: &Topology, params: LplbParams) -> Self {
        Self {
            topology: topology.clone(),
            max_variables: params.max_variables,
            links: params.links,
            places: topology.homes().to_vec(),
            packer: Packer::default(),
            history: History::new(topology.experts(), params.history),
            replicas: Vec::new(),
            ranges: vec![0..0; topology.domains()],
            draft: Draft::with_capacity(topology, 2 * topology.experts()),
            totals: vec![0; topology.experts()],
        }
    }

    /// Replicated experts and where their replicas are; empty before the first placement (masters only).
    pub fn replicas(&self) -> &[(Expert, Rank)] {
        &self.replicas
    }

    /// Where each expert's first instance is, `[E]`: its home unless experts were placed anew.
    pub fn places(&self) -> &[Rank] {
        &self.places
    }

    fn place(&mut self) {
        match self.links {
            LplbLinks::LeastLoaded => self.place_least_loaded(),
            LplbLinks::Torus { node_ranks } => self.place_on_torus(node_ranks),
        }
    }

    fn place_on_torus(&mut self, node_ranks: usize) {
        let (topology, past) = (&self.topology, self.history.loads());
        let (mut weights, mut pack_of) = (Vec::new(), Vec::new());
        self.replicas.clear();
        for domain in (0..topology.domains()).map(Domain::new) {
            let (ranks, experts) = (topology.domain_range(domain), topology.domain_experts(domain));
            weights.clear();
            weights.extend(past[experts.clone()].iter().map(|&load| load_a_copy(load, 1)));
            let room = ranks.clone().map(|rank| topology.masters(Rank::new(rank)).len());
            self.packer.run(&weights, room, &mut pack_of);
            for (expert, &pack) in experts.clone().zip(&pack_of) {
                self.places[expert] = Rank::new(ranks.start + pack as usize);
            }
            let size = if ranks.len().is_multiple_of(node_ranks.max(1)) { node_ranks.max(1) } else { ranks.len() };
            let start = self.replicas.len();
            for rank in 0..ranks.len() {
                let (node, index) = (rank / size, rank % size);
                let next = [node * size + (index + 1) % size, (rank + size) % ranks.len()];
                let mut own: Vec<usize> =
                    experts.clone().filter(|&e| self.places[e].index() == ranks.start + rank).collect();
                own.sort_unstable_by_key(|&e| (Reverse(past[e]), e));
                for (slot, (&expert, to)) in own.iter().zip(next).enumerate() {
                    let to_rank = Rank::new(ranks.start + to);
                    if to != rank && slot < topology.slots(to_rank) && topology.speed(to_rank) > 0 {
                        self.replicas.push((Expert::new(expert), to_rank));
                    }
                }
            }
            self.ranges[domain.index()] = start..self.replicas.len();
        }
    }

    fn place_least_loaded(&mut self) {
        let (topology, past) = (&self.topology, self.history.loads());
        self.replicas.clear();
        for domain in (0..topology.domains()).map(Domain::new) {
            let ranks = topology.domain_range(domain);
            let start = self.replicas.len();
            let rank_of = |i: usize| Rank::new(ranks.start + i);
            let home_load = |r: Rank| topology.masters(r).map(|e| load_a_copy(past[e], 1)).sum::<u64>();
            let mut loads: Vec<u64> = (0..ranks.len()).map(|i| home_load(rank_of(i))).collect();
            let slots = |r: Rank| if topology.speed(r) == 0 { 0 } else { topology.slots(r) };
            let mut free: Vec<usize> = (0..ranks.len()).map(|i| slots(rank_of(i))).collect();
            let mut order: Vec<usize> = topology.domain_experts(domain).filter(|&e| past[e] > 0).collect();
            order.sort_unstable_by_key(|&e| (Reverse(past[e]), e));
            for expert in order.into_iter().map(Expert::new) {
                let home = topology.home(expert).index() - ranks.start;
                let open = (0..ranks.len()).filter(|&i| i != home && free[i] > 0);
                if let Some(host) = open.min_by_key(|&i| (loads[i], i)) {
                    let half = load_a_copy(past[expert.index()], 2);
                    loads[home] -= half;
                    loads[host] += half;
                    free[host] -= 1;
                    self.replicas.push((expert, rank_of(host)));
                }
            }
            self.ranges[domain.index()] = start..self.replicas.len();
        }
    }

    /// Tokens for each replica of the domain; `None` over the limit or when the solver gives up.
    fn split(&self, domain: Domain) -> Option<Vec<u32>> {
        let (topology, ranks) = (&self.topology, self.topology.domain_range(domain));
        let replicas = &self.replicas[self.ranges[domain.index()].clone()];
        if replicas.len() > self.max_variables {
            return None;
        }
        let mut lp = microlp::Problem::new(OptimizationDirection::Minimize);
        let largest = lp.add_var(1.0, (0.0, f64::INFINITY));
        let load = |e: &Expert| self.totals[e.index()];
        let shares: Vec<_> = replicas.iter().map(|(e, _)| lp.add_var(0.0, (0.0, f64::from(load(e))))).collect();
        let mut rows = vec![vec![(largest, -1.0)]; ranks.len()];
        for (&share, (expert, host)) in shares.iter().zip(replicas) {
            rows[self.places[expert.index()].index() - ranks.start].push((share, -1.0));
            rows[host.index() - ranks.start].push((share, 1.0));
        }
        let mut bases = vec![0.0; ranks.len()];
        for expert in topology.domain_experts(domain) {
            bases[self.places[expert].index() - ranks.start] += f64::from(self.totals[expert]);
        }
        for (row, base) in rows.iter().zip(bases) {
            lp.add_constraint(row, ComparisonOp::Le, -base);
        }
        let solution = lp.solve().ok()?.into_solution().ok()?;
        let rounded = |(&share, (expert, _)): (_, &(Expert, Rank))| {
            let tokens: f64 = solution.var_value(share);
            // Saturating: a value outside the bounds by the solver's tolerance is brought back.
            (tokens.round() as u32).min(load(expert))
        };
        Some(shares.iter().zip(replicas).map(rounded).collect())
    }
}

impl Policy for Lplb {
    fn name(&self) -> &'static str {
        "lplb"
    }

    fn rules(&self) -> PlanRules {
        let slots = match self.links {
            LplbLinks::LeastLoaded => SlotRule::Replicas,
            LplbLinks::Torus { .. } => SlotRule::Physical,
        };
        PlanRules { slots, min_quota: 1, empty_replicas: true, within_domain: true, speeds: false }
    }

    fn observe(&mut self, problem: &Problem<'_>) {
        if SolveError::check_topology(&self.topology, problem).is_ok() && self.history.observe(problem) {
            self.place();
        }
    }

    fn solve(&mut self, problem: &Problem<'_>, plan: &mut Plan) -> Result<(), SolveError> {
        SolveError::check_topology(&self.topology, problem)?;
        problem.expert_loads(&mut self.totals);
        self.draft.clear();
        let mut gave_up = vec![false; self.topology.domains()];
        for domain in (0..self.topology.domains()).map(Domain::new) {
            let range = self.ranges[domain.index()].clone();
            let shares = if range.is_empty() { Some(Vec::new()) } else { self.split(domain) };
            gave_up[domain.index()] = shares.is_none();
            for (i, &(expert, rank)) in self.replicas[range].iter().enumerate() {
                let left = &mut self.totals[expert.index()];
                let share = shares.as_ref().map_or(*left / 2, |s| s[i]);
                *left -= share;
                self.draft.push(&self.topology, expert, rank, share);
            }
        }
        for (expert, (&rank, &left)) in self.places.iter().zip(&self.totals).enumerate() {
            self.draft.push(&self.topology, Expert::new(expert), rank, left);
        }
        let reason = |domain: Domain| match gave_up[domain.index()] {
            true => StopReason::SearchExhausted,
            false => StopReason::NotASearch,
        };
        let shape = Shape { amounts: Amounts::Quotas(SplitRule::LocalFirstExact), bound: Bound::DomainMean };
        self.draft.finish_with(problem, shape, reason, plan);
        Ok(())
    }
}
