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

const NONE: u32 = u32::MAX;

/// Memory to turn moves into instances: a list for each expert, in order of creation.
#[derive(Clone, Debug)]
pub(crate) struct Emitter {
    head: Vec<u32>,
    tail: Vec<u32>,
    exported: Vec<u32>,
    next: Vec<u32>,
    physical: Vec<u16>,
    used: Vec<u16>,
}

impl Emitter {
    pub(crate) fn new(topology: &Topology) -> Self {
        let moves = total_slots(topology);
        Self {
            head: vec![NONE; topology.experts()],
            tail: vec![NONE; topology.experts()],
            exported: vec![0; topology.experts()],
            next: vec![NONE; moves],
            physical: vec![0; moves],
            used: vec![0; topology.ranks()],
        }
    }

    /// Appends the instances of one domain's experts to `plan`: masters with what is not exported, then replicas in the
    /// order of `moves`. Slots are taken on each rank in that order too. `loads` are the loads of all experts, `[E]`.
    pub(crate) fn emit(&mut self, topology: &Topology, domain: Domain, loads: &[u32], moves: &[Move], plan: &mut Plan) {
        let experts = topology.domain_experts(domain);
        self.head[experts.clone()].fill(NONE);
        self.exported[experts.clone()].fill(0);
        self.used[topology.domain_range(domain)].fill(0);
        for (i, m) in moves.iter().enumerate() {
            let (expert, rank) = (m.expert as usize, m.rank as usize);
            self.physical[i] = topology.masters(Rank::new(rank)).len() as u16 + self.used[rank];
            self.used[rank] += 1;
            self.exported[expert] += m.quota;
            self.next[i] = NONE;
            if self.head[expert] == NONE {
                self.head[expert] = i as u32;
            } else {
                self.next[self.tail[expert] as usize] = i as u32;
            }
            self.tail[expert] = i as u32;
        }
        for rank in topology.domain_range(domain) {
            for (index, expert) in topology.masters(Rank::new(rank)).enumerate() {
                let quota = loads[expert] - self.exported[expert];
                plan.push_instance(Instance { rank: Rank::new(rank), physical: PhysicalIndex::new(index), quota });
                let mut at = self.head[expert];
                while at != NONE {
                    let m = moves[at as usize];
                    plan.push_instance(Instance {
                        rank: Rank::new(m.rank as usize),
                        physical: PhysicalIndex::new(self.physical[at as usize] as usize),
                        quota: m.quota,
                    });
                    at = self.next[at as usize];
                }
                plan.end_expert();
            }
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
