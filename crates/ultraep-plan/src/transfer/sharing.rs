//! The least that the busiest rank must send, however copies are shared among those who hold an expert.
//!
//! An expert with `k` replicas and `C` chunks needs `k C` sends of chunks. `C` of them are its home's (each chunk leaves
//! home once); the others can be anyone's who holds the expert, its home or a replica. Whether all ranks get by with `B`
//! sends each is a question of flow:
//!
//! ```text
//! expert e, (k - 1) C sends  ->  every holder of e  ->  B - C (experts of the holder that have replicas)
//! ```
//!
//! The least `B` is a bound on any forest with any stripes (trees and the order of chunks only add conditions). It is what
//! remains when experts with few replicas sit on ranks that are busy themselves. Found by bisection over `B`, each flow by
//! shortest augmenting paths: O(log(k C) (E + edges)^2) at worst, for reports, not for the critical path.

use alloc::vec::Vec;

use super::Transfers;

/// Not reached.
const UNSEEN: u32 = u32::MAX;

/// Memory for the flow.
#[derive(Clone, Debug)]
pub(super) struct Sharing {
    /// Sends of each expert that anyone may do: in all, and not yet placed.
    supply: Vec<u64>,
    rest: Vec<u64>,
    /// Edges of expert `f` are `first[f]..first[f + 1]`: the holder and the sends placed there.
    first: Vec<u32>,
    holder: Vec<u32>,
    placed: Vec<u64>,
    /// Experts of each edge.
    expert: Vec<u32>,
    /// Sends that only the rank itself can do, and room for others, `[N]`.
    own: Vec<u64>,
    room: Vec<u64>,
    /// Edge by which an expert and a rank were reached.
    by_expert: Vec<u32>,
    by_rank: Vec<u32>,
    queue: Vec<u32>,
}

impl Sharing {
    /// For lists of up to `transfers` copies of `experts` experts between `ranks` ranks.
    pub(super) fn new(ranks: usize, experts: usize, transfers: usize) -> Self {
        let experts = experts.min(transfers);
        let edges = transfers + experts;
        Self {
            supply: Vec::with_capacity(experts),
            rest: Vec::with_capacity(experts),
            first: Vec::with_capacity(experts + 1),
            holder: Vec::with_capacity(edges),
            placed: Vec::with_capacity(edges),
            expert: Vec::with_capacity(edges),
            own: Vec::with_capacity(ranks),
            room: Vec::with_capacity(ranks),
            by_expert: Vec::with_capacity(experts),
            by_rank: Vec::with_capacity(ranks),
            queue: Vec::with_capacity(experts),
        }
    }

    /// The least largest number of chunks that a rank sends, over a fabric without conditions but those above.
    pub(super) fn least_sends(&mut self, transfers: &Transfers, chunks: u64) -> u64 {
        self.enter(transfers, chunks);
        let most = transfers.sends().iter().map(|&s| u64::from(s) * chunks).max().unwrap_or(0);
        let (mut low, mut high) = (self.own.iter().copied().max().unwrap_or(0), most);
        while low < high {
            let middle = low + (high - low) / 2;
            if self.fits(middle) { high = middle } else { low = middle + 1 }
        }
        high
    }

    fn enter(&mut self, transfers: &Transfers, chunks: u64) {
        let ranks = transfers.sends().len();
        self.own.clear();
        self.own.resize(ranks, 0);
        self.supply.clear();
        self.first.clear();
        self.holder.clear();
        self.expert.clear();
        for family in transfers.all().chunk_by(|a, b| a.expert == b.expert) {
            self.own[family[0].from.index()] += chunks;
            if family.len() == 1 {
                continue;
            }
            self.first.push(self.holder.len() as u32);
            let holders = core::iter::once(family[0].from).chain(family.iter().map(|t| t.to));
            self.holder.extend(holders.map(|rank| rank.index() as u32));
            self.expert.resize(self.holder.len(), self.supply.len() as u32);
            self.supply.push((family.len() as u64 - 1) * chunks);
        }
        self.first.push(self.holder.len() as u32);
    }

    /// Whether no rank has to send more than `most` chunks.
    fn fits(&mut self, most: u64) -> bool {
        self.rest.clone_from(&self.supply);
        self.placed.clear();
        self.placed.resize(self.holder.len(), 0);
        self.room.clear();
        self.room.extend(self.own.iter().map(|&own| most.saturating_sub(own)));
        while self.rest.iter().any(|&rest| rest > 0) {
            let Some(end) = self.path() else { return false };
            self.augment(end);
        }
        true
    }

    /// Reaches a rank with room from the experts with sends left.
    fn path(&mut self) -> Option<u32> {
        self.by_expert.clear();
        self.by_expert.resize(self.supply.len(), UNSEEN);
        self.by_rank.clear();
        self.by_rank.resize(self.room.len(), UNSEEN);
        self.queue.clear();
        self.queue.extend((0..self.rest.len() as u32).filter(|&f| self.rest[f as usize] > 0));
        let mut next = 0;
        while let Some(&expert) = self.queue.get(next) {
            next += 1;
            for edge in self.first[expert as usize]..self.first[expert as usize + 1] {
                let rank = self.holder[edge as usize];
                if self.by_rank[rank as usize] != UNSEEN {
                    continue;
                }
                self.by_rank[rank as usize] = edge;
                if self.room[rank as usize] > 0 {
                    return Some(rank);
                }
                // Whoever placed sends here may place them elsewhere.
                for back in (0..self.holder.len()).filter(|&e| self.holder[e] == rank && self.placed[e] > 0) {
                    let other = self.expert[back] as usize;
                    if self.by_expert[other] == UNSEEN && self.rest[other] == 0 {
                        self.by_expert[other] = back as u32;
                        self.queue.push(other as u32);
                    }
                }
            }
        }
        None
    }

    /// Moves as much as the path to `end` carries.
    fn augment(&mut self, end: u32) {
        let (mut amount, mut rank) = (self.room[end as usize], end);
        let source = loop {
            let expert = self.expert[self.by_rank[rank as usize] as usize] as usize;
            match self.by_expert[expert] {
                UNSEEN => break expert,
                back => {
                    amount = amount.min(self.placed[back as usize]);
                    rank = self.holder[back as usize];
                }
            }
        };
        amount = amount.min(self.rest[source]);
        self.rest[source] -= amount;
        self.room[end as usize] -= amount;
        let mut rank = end;
        loop {
            let edge = self.by_rank[rank as usize] as usize;
            self.placed[edge] += amount;
            match self.by_expert[self.expert[edge] as usize] {
                UNSEEN => return,
                back => {
                    self.placed[back as usize] -= amount;
                    rank = self.holder[back as usize];
                }
            }
        }
    }
}
