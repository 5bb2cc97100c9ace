//! Policy `eplb-exact` ("EPLB+" in the paper): the EPLB heuristic on the exact counts, with masters fixed.
//!
//! ```text
//! for every slot of the domain: one more copy of the expert with the largest load / copies (ties: lowest)
//! replicas by decreasing load / copies (ties: lower expert), each to the least loaded rank (ties: lowest)
//!     that has a free slot and no copy; a replica that finds none is dropped
//! copies share tokens round-robin
//! ```
//!
//! Ranks are compared by the sum of load / copies over what they hold, in 65,536ths of a token, rounded down per copy. An
//! expert gets no more copies than it has tokens, nor than its domain has ranks to hold them; slots that nothing can use
//! stay empty. `O(S (log E + G))` for `S` slots.

use std::cmp::Reverse;

use ultraep_plan::{Domain, Expert, Plan, PlanRules, Policy, Problem, Rank, SlotRule, SolveError, Topology};

use crate::draft::{Amounts, Bound, Draft, total_slots};
use crate::heuristic::{Replicator, load_a_copy};

/// The policy. Stateless between microbatches.
#[derive(Clone, Debug)]
pub struct EplbExact {
    topology: Topology,
    draft: Draft,
    totals: Vec<u32>,
    copies: Vec<u32>,
    replicator: Replicator,
    /// Experts of the replicas to place, one entry a copy.
    replicas: Vec<Expert>,
    rank_weights: Vec<u64>,
    free_slots: Vec<usize>,
    /// Per rank: the last expert that was given a replica here.
    holds: Vec<Option<Expert>>,
}

impl EplbExact {
    /// For `topology`. Ranks with speed weight 0 get no replica.
    pub fn new(topology: &Topology) -> Self {
        Self {
            topology: topology.clone(),
            draft: Draft::with_capacity(topology, topology.experts() + total_slots(topology)),
            totals: vec![0; topology.experts()],
            copies: Vec::with_capacity(topology.experts()),
            replicator: Replicator::with_capacity(topology.experts()),
            replicas: Vec::with_capacity(total_slots(topology)),
            rank_weights: Vec::with_capacity(topology.ranks()),
            free_slots: Vec::with_capacity(topology.ranks()),
            holds: Vec::with_capacity(topology.ranks()),
        }
    }

    /// Chooses which experts of the domain get how many copies.
    fn replicate(&mut self, domain: Domain) {
        let Self { topology, totals, copies, replicator, replicas, free_slots, .. } = self;
        let ranks = topology.domain_range(domain);
        let experts = topology.domain_experts(domain);
        let slots: usize = free_slots[ranks.clone()].iter().sum();
        let hosts = ranks.filter(|&r| free_slots[r] > 0).count() as u32;
        let loads = totals[experts.clone()].iter().map(|&l| u64::from(l));
        let may_grow = |index: usize, copies: u32| {
            let expert = Expert::new(experts.start + index);
            let at_home = u32::from(free_slots[topology.home(expert).index()] > 0);
            totals[expert.index()] > copies && copies <= hosts - at_home
        };
        replicas.clear();
        replicator.run(loads, slots, may_grow, |index| {
            copies[experts.start + index] += 1;
            replicas.push(Expert::new(experts.start + index));
        });
    }

    /// Gives the replicas to ranks of the domain.
    fn place(&mut self, domain: Domain) {
        let Self { topology, draft, totals, copies, replicas, rank_weights, free_slots, holds, .. } = self;
        let weight_of = |expert: Expert| load_a_copy(u64::from(totals[expert.index()]), copies[expert.index()]);
        let ranks = topology.domain_range(domain);
        for expert in topology.domain_experts(domain).map(Expert::new) {
            rank_weights[topology.home(expert).index()] += weight_of(expert);
            draft.push(topology, expert, topology.home(expert), 1);
        }
        replicas.sort_unstable_by_key(|&e| (Reverse(weight_of(e)), e));
        for &expert in replicas.iter() {
            let fits =
                |r: &usize| free_slots[*r] > 0 && holds[*r] != Some(expert) && topology.home(expert).index() != *r;
            if let Some(rank) = ranks.clone().filter(fits).min_by_key(|&r| (rank_weights[r], r)) {
                rank_weights[rank] += weight_of(expert);
                free_slots[rank] -= 1;
                holds[rank] = Some(expert);
                draft.push(topology, expert, Rank::new(rank), 1);
            }
        }
    }
}

impl Policy for EplbExact {
    fn name(&self) -> &'static str {
        "eplb-exact"
    }

    fn rules(&self) -> PlanRules {
        PlanRules { slots: SlotRule::Replicas, min_quota: 1, empty_replicas: true, within_domain: true, speeds: false }
    }

    fn solve(&mut self, problem: &Problem<'_>, plan: &mut Plan) -> Result<(), SolveError> {
        SolveError::check_topology(&self.topology, problem)?;
        let (topology, ranks) = (&self.topology, self.topology.ranks());
        problem.expert_loads(&mut self.totals);
        let slots = |r: usize| if topology.speed(Rank::new(r)) == 0 { 0 } else { topology.slots(Rank::new(r)) };
        self.free_slots.clear();
        self.free_slots.extend((0..ranks).map(slots));
        self.copies.clear();
        self.copies.resize(topology.experts(), 1);
        self.rank_weights.clear();
        self.rank_weights.resize(ranks, 0);
        self.holds.clear();
        self.holds.resize(ranks, None);
        self.draft.clear();
        for domain in (0..self.topology.domains()).map(Domain::new) {
            self.replicate(domain);
            self.place(domain);
        }
        self.draft.finish(problem, Amounts::Copies, Bound::DomainMean, plan);
        Ok(())
    }
}
