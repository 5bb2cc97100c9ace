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
    /// Every expert's master, without its quota, `[E]`.
    masters: Vec<Instance>,
    /// Place of each expert's master, and of its instance placed last, `[E]`.
    places: Vec<(u32, u32)>,
    /// Next physical index on each rank, `[N]`.
    physical: Vec<u16>,
}

impl Emitter {
    pub(crate) fn new(topology: &Topology) -> Self {
        let of_rank = |rank| {
            let physical = (0..topology.masters(rank).len()).map(PhysicalIndex::new);
            physical.map(move |physical| Instance { rank, physical, quota: 0 })
        };
        Self {
            masters: (0..topology.ranks()).map(Rank::new).flat_map(of_rank).collect(),
            places: vec![(0, 0); topology.experts()],
            physical: vec![0; topology.ranks()],
        }
    }

    /// Appends the instances of one domain's experts to `plan`: masters with what is not exported, then replicas in the
    /// order of `moves`. Slots are taken on each rank in that order too. `loads` are the loads of all experts, `[E]`.
    pub(crate) fn emit(&mut self, topology: &Topology, domain: Domain, loads: &[u32], moves: &[Move], plan: &mut Plan) {
        let (experts, ranks) = (topology.domain_experts(domain), topology.domain_range(domain));
        let places = &mut self.places[experts.clone()];
        places.fill((0, 0));
        moves.iter().for_each(|m| places[m.expert as usize - experts.start].1 += 1);
        let (first, ends, instances) = plan.append(experts.len(), experts.len() + moves.len());
        let masters = self.masters[experts.clone()].iter().zip(&loads[experts.clone()]);
        let mut at = 0;
        for ((place, end), (master, &quota)) in places.iter_mut().zip(ends).zip(masters) {
            let replicas = place.1;
            instances[at as usize] = Instance { quota, ..*master };
            *place = (at, at);
            at += 1 + replicas;
            *end = first as u32 + at;
        }
        for rank in ranks {
            self.physical[rank] = topology.masters(Rank::new(rank)).len() as u16;
        }
        for m in moves {
            let (rank, (master, last)) = (m.rank as usize, &mut places[m.expert as usize - experts.start]);
            *last += 1;
            let physical = PhysicalIndex::new(self.physical[rank] as usize);
            self.physical[rank] += 1;
            instances[*master as usize].quota -= m.quota;
            instances[*last as usize] = Instance { rank: Rank::new(rank), physical, quota: m.quota };
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
