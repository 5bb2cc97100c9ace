//! DeepSeek's EPLB heuristic as a function: loads of experts in, every physical expert and its rank out.
//!
//! Source: the EPLB release of DeepSeek-V3 (`rebalance_experts`).
//!
//! ```text
//! replicate: for every slot, one more copy of the expert with the largest load / copies (ties: lowest)
//! pack:      copies by decreasing load / copies, each to the lightest rank that is not full (ties: lowest)
//! hierarchical: first pack expert groups to nodes the same way, then do both inside each node
//! ```
//!
//! All experts may move; two copies of one expert may land on one rank. Fractions are compared as integers. `O(P log P)` for
//! `P` physical experts.

use std::ops::Range;

use ultraep_plan::{Expert, Rank};

use crate::heuristic::{Packer, Replicator, load_a_copy};

/// Expert groups and nodes of the hierarchical variant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertGroups {
    /// Groups of consecutive experts of equal size; must divide the experts.
    pub groups: usize,
    /// Nodes of consecutive ranks of equal size; must divide the ranks and the groups.
    pub nodes: usize,
}

/// Experts that are placed on ranks without regard to any others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// The experts, in the order in which ties are broken.
    pub experts: Vec<Expert>,
    /// The ranks.
    pub ranks: Range<usize>,
}

/// The heuristic with its workspace, to be used again and again.
#[derive(Clone, Debug, Default)]
pub struct EplbPlacer {
    replicator: Replicator,
    packer: Packer,
    /// Per expert of the region.
    copies: Vec<u32>,
    /// Index into the region's experts of every physical expert.
    items: Vec<u32>,
    weights: Vec<u64>,
    pack_of: Vec<u32>,
}

impl EplbPlacer {
    /// Which experts the nodes of the hierarchical variant get: groups by decreasing load, each to the lightest node that is
    /// not full. `loads` are `[E]`; groups and nodes must divide what [`ExpertGroups`] says.
    pub fn nodes(&mut self, loads: &[u64], ranks: usize, ExpertGroups { groups, nodes }: ExpertGroups) -> Vec<Region> {
        let (group_size, node_ranks) = (loads.len() / groups, ranks / nodes);
        self.weights.clear();
        self.weights.extend(loads.chunks(group_size).map(|group| load_a_copy(group.iter().sum(), 1)));
        self.packer.run(&self.weights, std::iter::repeat_n(groups / nodes, nodes), &mut self.pack_of);
        let region = |node: usize| {
            let of_node = self.packer.order().iter().filter(|&&group| self.pack_of[group as usize] as usize == node);
            let experts = of_node.flat_map(|&group| {
                let first = group as usize * group_size;
                (first..first + group_size).map(Expert::new)
            });
            Region { experts: experts.collect(), ranks: node * node_ranks..(node + 1) * node_ranks }
        };
        (0..nodes).map(region).collect()
    }

    /// Replicates the region's experts until all physical experts of its ranks are in use, and packs them: appends each with
    /// its rank to `placement`, on every rank in the order of packing. `loads` are those of all experts, `[E]`;
    /// `room(rank)` is how many physical experts a rank holds, at least as many as there are experts in all.
    pub fn place(
        &mut self,
        loads: &[u64],
        room: impl Fn(usize) -> usize,
        region: &Region,
        placement: &mut Vec<(Expert, Rank)>,
    ) {
        let Region { experts, ranks } = region;
        let Self { replicator, packer, copies, items, weights, pack_of } = self;
        let load = |expert: &Expert| loads[expert.index()];
        let extra = ranks.clone().map(&room).sum::<usize>().saturating_sub(experts.len());
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
        weights.extend(items.iter().map(|&i| load_a_copy(load(&experts[i as usize]), copies[i as usize])));
        packer.run(weights, ranks.clone().map(&room), pack_of);
        placement.extend(packer.order().iter().map(|&item| {
            let (expert, pack) = (experts[items[item as usize] as usize], pack_of[item as usize]);
            (expert, Rank::new(ranks.start + pack as usize))
        }));
    }
}
