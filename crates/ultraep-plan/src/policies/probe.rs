//! The greedy test that `greedy` and `ultraep-v1` share: can all excess over a threshold be moved, most slack first?
//!
//! Paper, Algorithm 1 (inner procedure), and the released solver's version of it.
//!
//! ```text
//! for each rank by decreasing load (ties: lower rank) with excess > 0:
//!   for each of its masters by decreasing load (ties: lower expert), while excess > 0:
//!     while excess > 0 and something of the expert is left:
//!       candidates: ranks with slack > 0, a free slot, no instance of the expert
//!       q(t) = min(excess, slack[t], what is left); t must give q(t) >= floor
//!       take the candidate with most slack (ties: lower rank), else next master
//! passes when no excess is left
//! ```
//!
//! Cost: `O(pieces * G)` for one test.

use alloc::vec;
use alloc::vec::Vec;

use crate::draft::{Move, rank_loads, total_slots};
use crate::{Domain, Rank, Topology};

/// Least quota of a replica during one test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Floor {
    /// The same for every replica.
    Fixed(u32),
    /// What is needed, shared evenly by all candidates (released solver's fast probe).
    Dynamic,
}

/// One domain's loads and orders, and the replicas of the last test.
#[derive(Clone, Debug)]
pub(crate) struct Prober {
    /// Loads of all experts, `[E]`.
    pub(crate) loads: Vec<u32>,
    /// Loads of all ranks before balancing, `[N]`.
    pub(crate) rank_loads: Vec<u32>,
    pub(crate) moves: Vec<Move>,
    /// Tokens that every expert with load keeps on its master.
    pub(crate) keep: u32,
    rank_order: Vec<u16>,
    expert_order: Vec<u16>,
    slack: Vec<u32>,
    free: Vec<u16>,
    marks: Vec<u16>,
}

const UNMARKED: u16 = u16::MAX;

impl Prober {
    pub(crate) fn new(topology: &Topology, keep: u32) -> Self {
        Self {
            loads: vec![0; topology.experts()],
            rank_loads: vec![0; topology.ranks()],
            moves: Vec::with_capacity(total_slots(topology)),
            keep,
            rank_order: Vec::with_capacity(topology.domain_ranks()),
            expert_order: vec![0; topology.experts()],
            slack: vec![0; topology.ranks()],
            free: vec![0; topology.ranks()],
            marks: vec![UNMARKED; topology.ranks()],
        }
    }

    /// Rank loads and orders of a domain; `self.loads` are set.
    pub(crate) fn enter(&mut self, topology: &Topology, domain: Domain) {
        rank_loads(topology, domain, &self.loads, &mut self.rank_loads);
        self.rank_order.clear();
        self.rank_order.extend(topology.domain_range(domain).map(|r| r as u16));
        let rank_loads = &self.rank_loads;
        self.rank_order.sort_unstable_by_key(|&r| (core::cmp::Reverse(rank_loads[r as usize]), r));
        for rank in topology.domain_range(domain) {
            let masters = topology.masters(Rank::new(rank));
            let order = &mut self.expert_order[masters.clone()];
            order.iter_mut().zip(masters).for_each(|(o, e)| *o = e as u16);
            order.sort_unstable_by_key(|&e| (core::cmp::Reverse(self.loads[e as usize]), e));
        }
        self.moves.clear();
    }

    /// Total load and largest rank load of a domain.
    pub(crate) fn total_and_max(&self, topology: &Topology, domain: Domain) -> (u32, u32) {
        let loads = &self.rank_loads[topology.domain_range(domain)];
        (loads.iter().sum(), loads.iter().copied().max().unwrap_or(0))
    }

    /// Total excess and slack at `tau`.
    pub(crate) fn excess_and_slack(&self, topology: &Topology, domain: Domain, tau: u32) -> (u64, u64) {
        self.rank_loads[topology.domain_range(domain)].iter().fold((0, 0), |(excess, slack), &load| {
            (excess + u64::from(load.saturating_sub(tau)), slack + u64::from(tau.saturating_sub(load)))
        })
    }

    /// The greedy test at `tau`; on success `self.moves` are the replicas.
    pub(crate) fn test(&mut self, topology: &Topology, domain: Domain, tau: u32, floor: Floor) -> bool {
        self.moves.clear();
        let (mut excess, mut slack) = self.excess_and_slack(topology, domain, tau);
        if excess == 0 {
            return true;
        }
        if excess > slack {
            return false;
        }
        for rank in topology.domain_range(domain) {
            self.slack[rank] = tau.saturating_sub(self.rank_loads[rank]);
            self.free[rank] = topology.replica_slots(Rank::new(rank)) as u16;
            self.marks[rank] = UNMARKED;
        }
        for at in 0..self.rank_order.len() {
            let source = self.rank_order[at] as usize;
            let need = self.rank_loads[source].saturating_sub(tau);
            if need == 0 {
                continue;
            }
            if u64::from(need) > slack {
                return false;
            }
            let moved = self.relieve(topology, domain, source, need, floor);
            if moved < need {
                return false;
            }
            excess -= u64::from(moved);
            slack -= u64::from(moved);
            if excess > slack {
                return false;
            }
        }
        true
    }

    /// Moves up to `need` tokens away from `source`; returns how many it moved.
    fn relieve(&mut self, topology: &Topology, domain: Domain, source: usize, need: u32, floor: Floor) -> u32 {
        let mut left = need;
        for at in topology.masters(Rank::new(source)) {
            let expert = self.expert_order[at];
            let mut available = self.loads[expert as usize].saturating_sub(self.keep);
            while left > 0 && available > 0 {
                let Some((target, quota)) = self.target(topology, domain, expert, left.min(available), left, floor)
                else {
                    break;
                };
                self.moves.push(Move { expert, rank: target as u16, quota });
                self.slack[target] -= quota;
                self.free[target] -= 1;
                self.marks[target] = expert;
                left -= quota;
                available -= quota;
            }
            if left == 0 {
                break;
            }
        }
        need - left
    }

    /// The candidate with most slack (ties: lower rank) that can take at least the floor, and how much it takes.
    fn target(
        &self,
        topology: &Topology,
        domain: Domain,
        expert: u16,
        most: u32,
        need: u32,
        floor: Floor,
    ) -> Option<(usize, u32)> {
        let ranks = topology.domain_range(domain);
        let mut best: Option<(usize, u32)> = None;
        let mut candidates = 0;
        for rank in ranks {
            if self.slack[rank] > 0 && self.free[rank] > 0 && self.marks[rank] != expert {
                candidates += 1;
                if best.is_none_or(|(_, slack)| self.slack[rank] > slack) {
                    best = Some((rank, self.slack[rank]));
                }
            }
        }
        let (rank, slack) = best?;
        let least = match floor {
            Floor::Fixed(least) => least,
            Floor::Dynamic => need.div_ceil(candidates).max(1),
        };
        // The candidate with most slack also takes most: if it falls short of the floor, all do.
        let quota = most.min(slack);
        (quota >= least).then_some((rank, quota))
    }
}
