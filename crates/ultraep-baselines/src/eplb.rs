//! Policy `eplb`: DeepSeek's expert-parallel load balancer, as serving and training systems use it.
//!
//! Source: the EPLB release of DeepSeek-V3. Historical: a placement is computed every `interval` microbatches from the
//! loads of the `window` just past, and judged on the microbatches that follow.
//!
//! The heuristic is [`EplbPlacer`]. Two copies of one expert on one rank are merged into one instance that takes both shares
//! (the waste is [`Plan::wasted_copies`]). Copies share tokens round-robin.
//!
//! Deviations: ranks may have different numbers of physical experts; without groups each domain is packed on its own, since
//! replicas do not leave their domain.

use ultraep_plan::{Domain, Expert, Plan, PlanRules, Policy, Problem, Rank, SlotRule, SolveError, Topology};

use crate::draft::{Amounts, Bound, Draft, total_slots};
use crate::history::{History, HistoryParams};
use crate::kind::BuildError;
use crate::placer::{EplbPlacer, ExpertGroups, Region};

/// Parameters of [`Eplb`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EplbParams {
    /// What it remembers and how often it moves experts.
    pub history: HistoryParams,
    /// Hierarchical when given; copies may then leave their home's domain.
    pub groups: Option<ExpertGroups>,
}

/// The policy. One instance serves one layer, since layers have histories of their own.
#[derive(Clone, Debug)]
pub struct Eplb {
    topology: Topology,
    groups: Option<ExpertGroups>,
    history: History,
    /// Every physical expert and its rank; empty before the first placement.
    placement: Vec<(Expert, Rank)>,
    draft: Draft,
    placer: EplbPlacer,
    region: Region,
}

impl Eplb {
    /// For one layer of `topology`.
    pub fn new(topology: &Topology, params: EplbParams) -> Result<Self, BuildError> {
        if topology.speeds().contains(&0) {
            return Err(BuildError::ZeroSpeed { policy: "eplb" });
        }
        if let Some(groups) = params.groups {
            check_groups(topology, groups)?;
        }
        Ok(Self {
            topology: topology.clone(),
            groups: params.groups,
            history: History::new(topology.experts(), params.history),
            placement: Vec::with_capacity(topology.experts() + total_slots(topology)),
            draft: Draft::with_capacity(topology, topology.experts() + total_slots(topology)),
            placer: EplbPlacer::default(),
            region: Region::default(),
        })
    }

    /// Physical experts and their ranks as last placed; empty before the first placement (masters only).
    pub fn placement(&self) -> &[(Expert, Rank)] {
        &self.placement
    }

    fn place(&mut self) {
        let Self { topology, groups, history, placement, placer, region, .. } = self;
        let room = |rank: usize| topology.physical_experts(Rank::new(rank));
        placement.clear();
        match *groups {
            None => {
                for domain in (0..topology.domains()).map(Domain::new) {
                    region.experts.clear();
                    region.experts.extend(topology.domain_experts(domain).map(Expert::new));
                    region.ranks = topology.domain_range(domain);
                    placer.place(history.loads(), room, region, placement);
                }
            }
            Some(groups) => {
                for region in placer.nodes(history.loads(), topology.ranks(), groups) {
                    placer.place(history.loads(), room, &region, placement);
                }
            }
        }
    }

    fn crosses_domains(&self) -> bool {
        self.groups.is_some() && self.topology.domains() > 1
    }
}

impl Policy for Eplb {
    fn name(&self) -> &'static str {
        "eplb"
    }

    fn rules(&self) -> PlanRules {
        PlanRules {
            slots: SlotRule::Physical,
            min_quota: 1,
            empty_replicas: true,
            within_domain: !self.crosses_domains(),
            speeds: false,
        }
    }

    fn observe(&mut self, problem: &Problem<'_>) {
        if SolveError::check_topology(&self.topology, problem).is_ok() && self.history.observe(problem) {
            self.place();
        }
    }

    fn solve(&mut self, problem: &Problem<'_>, plan: &mut Plan) -> Result<(), SolveError> {
        SolveError::check_topology(&self.topology, problem)?;
        self.draft.clear();
        for &(expert, rank) in &self.placement {
            self.draft.push(&self.topology, expert, rank, 1);
        }
        let bound = if self.crosses_domains() { Bound::None } else { Bound::DomainMean };
        self.draft.finish(problem, Amounts::Copies, bound, plan);
        Ok(())
    }
}

fn check_groups(topology: &Topology, groups: ExpertGroups) -> Result<(), BuildError> {
    let ExpertGroups { groups: g, nodes } = groups;
    let (experts, ranks) = (topology.experts(), topology.ranks());
    let divides = |a: usize, b: usize| a != 0 && b.is_multiple_of(a);
    let node_fits = |node: usize| {
        let of_node = node * (ranks / nodes)..(node + 1) * (ranks / nodes);
        of_node.map(|r| topology.physical_experts(Rank::new(r))).sum::<usize>() >= experts / nodes
    };
    if divides(g, experts) && divides(nodes, g) && divides(nodes, ranks) && (0..nodes).all(node_fits) {
        return Ok(());
    }
    Err(BuildError::Groups { groups: g, nodes, experts, ranks })
}
