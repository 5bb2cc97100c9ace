//! What no plan of transfers can beat under a [`TransferModel`], whatever its trees and orders.
//!
//! ```text
//! receiver  a rank that receives k experts:         hop + max(k C receive, send)
//! links     a domain sends T experts in all:        its ranks' links, from when each can have something to send
//! sharing   the busiest rank sends B chunks at least: hop + B send         (sharing.rs: by flow)
//! chain     the j-th largest fan-out k of one home: (j C - 1) send + spread(k)
//! spread(k) the least time from the start of sending one chunk until k ranks have it: everyone who has it sends it on
//!           (postal model: the i-th arrival follows from merging the nodes' sends, send apart, delay after each)
//! ```
//!
//! Links: `F` is the finish, `d` the delay of one chunk. The `H` ranks that are home of a replicated expert start no send
//! later than `F - d`, so each makes at most `(F - d) / send + 1` sends; a rank that only receives cannot start before `d`.
//! Chain: of the home's first `j` experts it must send each of `j C` chunks once; the last of them starts no earlier than
//! `(j C - 1) send` and has still to reach all replicas of its expert, `k` at least.
//! Each part is a valid bound of its own; C is the number of chunks.

use alloc::vec::Vec;
use core::cmp::Reverse;

use super::sharing::Sharing;
use super::{TransferModel, TransferModelError, Transfers};
use crate::draft::total_slots;
use crate::{Rank, Topology};

/// Lower bounds on the time of a plan, in nanoseconds; the largest of them holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TransferBound {
    /// Bytes of the busiest receiver.
    pub receiver_ns: u64,
    /// Bytes of all over the links of the ranks that can send.
    pub links_ns: u64,
    /// What the busiest of those who hold the experts must send, however they share it.
    pub sharing_ns: u64,
    /// A home rank's own stream, and the longest chain of latency behind it.
    pub chain_ns: u64,
}

impl TransferBound {
    /// The strongest of them.
    pub fn ns(&self) -> u64 {
        self.receiver_ns.max(self.links_ns).max(self.sharing_ns).max(self.chain_ns)
    }
}

/// Computes bounds. All memory is taken by [`BoundTables::new`], for lists within the slots of the topology.
#[derive(Clone, Debug)]
pub struct BoundTables {
    model: TransferModel,
    topology: Topology,
    /// `spread(k)`, `[N]`.
    spread: Vec<u64>,
    /// Home and replicas of every replicated expert.
    fanouts: Vec<(Rank, Reverse<u32>)>,
    sharing: Sharing,
}

impl BoundTables {
    /// For lists of `topology`.
    pub fn new(topology: &Topology, model: TransferModel) -> Result<Self, TransferModelError> {
        model.check()?;
        let spread = spread(topology.domain_ranks(), &model);
        let sharing = Sharing::new(topology.ranks(), topology.experts(), total_slots(topology));
        let fanouts = Vec::with_capacity(total_slots(topology).min(topology.experts()));
        Ok(Self { model, topology: topology.clone(), spread, fanouts, sharing })
    }

    /// The bound for a list of transfers.
    pub fn bound(&mut self, transfers: &Transfers) -> TransferBound {
        TransferBound {
            receiver_ns: self.receiver_ns(transfers),
            links_ns: self.links_ns(transfers),
            sharing_ns: self.sharing_ns(transfers),
            chain_ns: self.chain_ns(transfers),
        }
    }

    fn receiver_ns(&self, transfers: &Transfers) -> u64 {
        let most = transfers.receives().iter().copied().max().unwrap_or(0);
        let taking = u64::from(most) * self.model.chunks() * self.model.receive_ns;
        if most == 0 { 0 } else { self.model.hop_ns + taking.max(self.model.send_ns) }
    }

    fn links_ns(&self, transfers: &Transfers) -> u64 {
        let (ranks, size) = (transfers.sends().len(), self.topology.domain_ranks());
        let domains = (0..ranks).step_by(size).map(|first| first..ranks.min(first + size));
        domains.map(|domain| self.domain_links_ns(transfers, domain)).max().unwrap_or(0)
    }

    fn domain_links_ns(&self, transfers: &Transfers, domain: core::ops::Range<usize>) -> u64 {
        let (sends, receives) = (&transfers.sends()[domain.clone()], &transfers.receives()[domain]);
        let copies: u64 = sends.iter().map(|&s| u64::from(s)).sum();
        if copies == 0 {
            return 0;
        }
        let homes = sends.iter().filter(|&&s| s > 0).count() as u64;
        let others = sends.iter().zip(receives).filter(|&(&s, &r)| s == 0 && r > 0).count() as u64;
        let (gap, delay) = (self.model.send_ns, self.model.delay_ns());
        let busy = copies * self.model.chunks() * gap;
        // Until the others can have finished a first send, at 2 delay, only the homes count.
        let of_homes = busy.div_ceil(homes) - gap + delay;
        let all_from = 2 * delay - gap;
        if of_homes < all_from {
            return of_homes;
        }
        let of_all = (busy + (homes + 2 * others) * delay).div_ceil(homes + others).saturating_sub(gap);
        of_all.max(all_from).min(of_homes)
    }

    fn sharing_ns(&mut self, transfers: &Transfers) -> u64 {
        let sends = self.sharing.least_sends(transfers, self.model.chunks());
        if sends == 0 { 0 } else { (sends - 1) * self.model.send_ns + self.model.delay_ns() }
    }

    fn chain_ns(&mut self, transfers: &Transfers) -> u64 {
        self.fanouts.clear();
        let families = transfers.all().chunk_by(|a, b| a.expert == b.expert);
        self.fanouts.extend(families.map(|family| (family[0].from, Reverse(family.len() as u32))));
        self.fanouts.sort_unstable();
        let mut longest = 0;
        for of_home in self.fanouts.chunk_by(|a, b| a.0 == b.0) {
            for (earlier, &(_, Reverse(replicas))) in of_home.iter().enumerate() {
                let last_start = ((earlier as u64 + 1) * self.model.chunks() - 1) * self.model.send_ns;
                let spread = self.spread.get(replicas as usize).or(self.spread.last()).copied().unwrap_or(0);
                longest = longest.max(last_start + spread);
            }
        }
        longest
    }
}

/// `spread(k)` for `k` below `ranks`.
fn spread(ranks: usize, model: &TransferModel) -> Vec<u64> {
    let mut arrivals = Vec::with_capacity(ranks);
    // The node itself, and when each node's next send would arrive.
    let mut next = Vec::with_capacity(ranks);
    arrivals.push(0);
    next.push(model.delay_ns());
    while arrivals.len() < ranks {
        let Some(sender) = (0..next.len()).min_by_key(|&node| next[node]) else { break };
        let arrival = next[sender];
        next[sender] += model.send_ns;
        next.push(arrival + model.delay_ns());
        arrivals.push(arrival);
    }
    arrivals
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_chunk_spreads_as_a_growing_tree() {
        let model = |send_ns, hop_ns| TransferModel { send_ns, receive_ns: 1, hop_ns, ..TransferModel::default() };
        // Without latency the informed double in each step.
        assert_eq!(spread(9, &model(1, 0)), [0, 1, 2, 2, 3, 3, 3, 3, 4]);
        // With a latency of one step they grow as the Fibonacci numbers do.
        assert_eq!(spread(9, &model(1, 1)), [0, 2, 3, 4, 4, 5, 5, 5, 6]);
        assert_eq!(spread(1, &model(1, 1)), [0]);
    }
}
