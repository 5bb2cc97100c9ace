//! Replicas as a solver makes them, in order of creation, and their translation into a [`Plan`].

use alloc::vec;
use alloc::vec::Vec;

use crate::{Domain, Instance, PhysicalIndex, Plan, Rank, Topology};

/// One replica decided on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Move {
    pub(crate) expert: u16,
    pub(crate) rank: u16,
    pub(crate) quota: u32,
}

/// Memory to turn moves into instances.
#[derive(Clone, Debug)]
pub(crate) struct Emitter {
    /// Place of each expert's master, and of its instance placed last, `[E]`.
    masters: Vec<u32>,
    next: Vec<u32>,
    /// Next physical index on each rank, `[N]`.
    physical: Vec<u16>,
}

impl Emitter {
    pub(crate) fn new(topology: &Topology) -> Self {
        let experts = topology.experts();
        Self { masters: vec![0; experts], next: vec![0; experts], physical: vec![0; topology.ranks()] }
    }

    /// Appends the instances of one domain's experts to `plan`: masters with what is not exported, then replicas in the
    /// order of `moves`. Slots are taken on each rank in that order too. `loads` are the loads of all experts, `[E]`.
    pub(crate) fn emit(&mut self, topology: &Topology, domain: Domain, loads: &[u32], moves: &[Move], plan: &mut Plan) {
        let (experts, ranks) = (topology.domain_experts(domain), topology.domain_range(domain));
        let next = &mut self.next[experts.clone()];
        next.fill(1);
        moves.iter().for_each(|m| next[m.expert as usize - experts.start] += 1);
        let (first, ends, instances) = plan.append(experts.len(), experts.len() + moves.len());
        let mut at = 0;
        for ((next, master), end) in next.iter_mut().zip(&mut self.masters).zip(ends) {
            let count = *next;
            (*next, *master) = (at, at);
            at += count;
            *end = first as u32 + at;
        }
        for (rank, masters) in ranks.clone().map(|r| (r, topology.masters(Rank::new(r)))) {
            self.physical[rank] = masters.len() as u16;
            let local = masters.start - experts.start..masters.end - experts.start;
            for (index, (next, &quota)) in next[local].iter().zip(&loads[masters]).enumerate() {
                let (rank, physical) = (Rank::new(rank), PhysicalIndex::new(index));
                instances[*next as usize] = Instance { rank, physical, quota };
            }
        }
        // From here an expert's cursor counts the replicas placed behind its master.
        for m in moves {
            let (expert, rank) = (m.expert as usize - experts.start, m.rank as usize);
            let (master, cursor) = (self.masters[expert] as usize, &mut next[expert]);
            *cursor += 1;
            let physical = PhysicalIndex::new(self.physical[rank] as usize);
            self.physical[rank] += 1;
            instances[master].quota -= m.quota;
            instances[*cursor as usize] = Instance { rank: Rank::new(rank), physical, quota: m.quota };
        }
    }
}

/// Replicas that all slots of the group can hold.
pub(crate) fn total_slots(topology: &Topology) -> usize {
    (0..topology.ranks()).map(|r| topology.slots(Rank::new(r))).sum()
}

/// Adds up the loads of each rank's masters, for the ranks of a domain, into `rank_loads` (`[N]`).
pub(crate) fn rank_loads(topology: &Topology, domain: Domain, loads: &[u32], rank_loads: &mut [u32]) {
    for rank in topology.domain_range(domain) {
        rank_loads[rank] = loads[topology.masters(Rank::new(rank))].iter().sum();
    }
}
