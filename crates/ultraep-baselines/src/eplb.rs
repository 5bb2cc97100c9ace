//! Policy `eplb`: DeepSeek's expert-parallel load balancer, as serving and training systems use it.
//!
//! Source: the EPLB release of DeepSeek-V3. Historical: a placement is computed every `interval` microbatches from the
//! loads of the `window` just past, and judged on the microbatches that follow.
//!
//! ```text
//! replicate: for every slot, one more copy of the expert with the largest load / copies (ties: lowest)
//! pack:      copies by decreasing load / copies, each to the lightest rank that is not full (ties: lowest)
//! hierarchical: first pack expert groups to nodes the same way, then do both inside each node
//! ```
//!
//! All experts may move, masters too; two copies of one expert may land on one rank, where they are merged into one
//! instance that takes both shares (the waste is [`Plan::wasted_copies`]). Copies share tokens round-robin.
//!
//! Deviations: fractions are compared as integers; ranks may have different numbers of physical experts; without groups
//! each domain is packed on its own, since replicas do not leave their domain. `O(P log P)` for `P` physical experts.

use ultraep_plan::{Domain, Expert, Plan, PlanRules, Policy, Problem, Rank, SlotRule, SolveError, Topology};

use crate::draft::{Amounts, Bound, Draft, total_slots};
use crate::heuristic::{Packer, Replicator, weight};
use crate::history::{History, HistoryParams};
use crate::kind::BuildError;

/// Expert groups and nodes of the hierarchical variant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertGroups {
    /// Groups of consecutive experts of equal size; must divide the experts.
    pub groups: usize,
    /// Nodes of consecutive ranks of equal size; must divide the ranks and the groups.
    pub nodes: usize,
}

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
    packing: Packing,
}

/// Workspace of a placement.
#[derive(Clone, Debug, Default)]
struct Packing {
    replicator: Replicator,
    packer: Packer,
    /// Experts of the region being placed.
    experts: Vec<Expert>,
    /// Per expert of the region.
    copies: Vec<u32>,
    /// Index into `experts` of every physical expert.
    items: Vec<u32>,
    weights: Vec<u64>,
    pack_of: Vec<u32>,
    node_of_group: Vec<u32>,
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
            packing: Packing::default(),
        })
    }

    /// Physical experts and their ranks as last placed; empty before the first placement (masters only).
    pub fn placement(&self) -> &[(Expert, Rank)] {
        &self.placement
    }

    fn place(&mut self) {
        self.placement.clear();
        match self.groups {
            None => {
                for domain in (0..self.topology.domains()).map(Domain::new) {
                    self.packing.experts.clear();
                    self.packing.experts.extend(self.topology.domain_experts(domain).map(Expert::new));
                    self.place_region(self.topology.domain_range(domain));
                }
            }
            Some(groups) => self.place_hierarchically(groups),
        }
    }

    fn place_hierarchically(&mut self, ExpertGroups { groups, nodes }: ExpertGroups) {
        let group_size = self.topology.experts() / groups;
        let node_ranks = self.topology.ranks() / nodes;
        let Packing { packer, weights, node_of_group, .. } = &mut self.packing;
        weights.clear();
        weights.extend(self.history.loads().chunks(group_size).map(|g| weight(g.iter().sum(), 1)));
        packer.run(weights, std::iter::repeat_n(groups / nodes, nodes), node_of_group);
        for node in 0..nodes {
            let Packing { experts, node_of_group, .. } = &mut self.packing;
            experts.clear();
            let of_node = (0..groups).filter(|&g| node_of_group[g] as usize == node);
            experts.extend(of_node.flat_map(|g| g * group_size..(g + 1) * group_size).map(Expert::new));
            self.place_region(node * node_ranks..(node + 1) * node_ranks);
        }
    }

    /// Replicates `packing.experts` to fill the physical experts of `ranks`, and packs them.
    fn place_region(&mut self, ranks: std::ops::Range<usize>) {
        let Packing { replicator, packer, experts, copies, items, weights, pack_of, .. } = &mut self.packing;
        let load = |expert: &Expert| self.history.loads()[expert.index()];
        let room = |rank: usize| self.topology.physical_experts(Rank::new(rank));
        let extra = ranks.clone().map(room).sum::<usize>() - experts.len();
        copies.clear();
        copies.resize(experts.len(), 1);
        items.clear();
        items.extend(0..experts.len() as u32);
        replicator.run(
            experts.iter().map(load),
            extra,
            |_, _| true,
            |index| {
                copies[index] += 1;
                items.push(index as u32);
            },
        );
        weights.clear();
        weights.extend(items.iter().map(|&i| weight(load(&experts[i as usize]), copies[i as usize])));
        packer.run(weights, ranks.clone().map(room), pack_of);
        let placed = items.iter().zip(pack_of.iter());
        self.placement
            .extend(placed.map(|(&item, &pack)| (experts[item as usize], Rank::new(ranks.start + pack as usize))));
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
