//! A better map for ranks that share tokens evenly: local search from a map that is there already.
//!
//! ```text
//! while the fullest rank h can be relieved:
//!     swap     a copy on h with a lighter one elsewhere
//!     recopy   give a slot of an expert with several copies to an expert on h, whose copies then get less each, or give
//!              such a slot on h to an expert from elsewhere
//!     of all such moves take the one whose touched ranks end lowest; all must end below h
//! then take every second copy of an expert off its rank by a swap that raises no rank above the fullest
//! ```
//!
//! Every step lowers the loads of the ranks in lexicographic order, largest first, so that it ends, and the fullest rank is
//! never fuller than at the start. Ties go to the move found first, ranks and slots in ascending order. A step costs
//! `O(P * slots * copies)`; steps are bounded by [`MAX_STEPS`] a slot. Loads are integers, in the heuristic's unit.

use ultraep_baselines::load_a_copy;

/// Most steps for each slot of the region. Searches on real loads end after less than one.
const MAX_STEPS: usize = 4;

/// Ranks of a region and the experts that they hold.
struct Region<'a> {
    loads: &'a [u64],
    on: &'a mut [Vec<usize>],
    /// Copies of every expert.
    copies: Vec<u32>,
    rank_loads: Vec<u64>,
    /// Ranks of every expert, one for each copy, ascending.
    holders: Vec<Vec<usize>>,
}

/// A change of one or two slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Move {
    /// Slot `slot` of the fullest rank against slot `other` of rank `rank`.
    Swap { slot: usize, rank: usize, other: usize },
    /// Slot `slot` of rank `rank` now holds `expert`.
    Recopy { rank: usize, slot: usize, expert: usize },
}

/// Improves where the experts of `on` lie, the slots of each rank; `loads` are those of all experts.
pub(crate) fn improve(loads: &[u64], on: &mut [Vec<usize>]) {
    let mut copies = vec![0; loads.len()];
    on.iter().flatten().for_each(|&expert| copies[expert] += 1);
    let holders = vec![Vec::new(); loads.len()];
    let mut region = Region { loads, rank_loads: vec![0; on.len()], on, copies, holders };
    region.sum();
    let slots: usize = region.on.iter().map(Vec::len).sum();
    for _ in 0..MAX_STEPS * slots {
        let Some(better) = region.best() else { break };
        region.apply(better);
    }
    region.separate();
    for here in region.on.iter_mut() {
        here.sort_by_key(|&expert| std::cmp::Reverse(load_a_copy(loads[expert], region.copies[expert])));
    }
}

impl Region<'_> {
    fn each(&self, expert: usize) -> u64 {
        load_a_copy(self.loads[expert], self.copies[expert])
    }

    fn sum(&mut self) {
        self.holders.iter_mut().for_each(Vec::clear);
        for rank in 0..self.on.len() {
            self.rank_loads[rank] = self.on[rank].iter().map(|&expert| self.each(expert)).sum();
            self.on[rank].iter().for_each(|&expert| self.holders[expert].push(rank));
        }
    }

    /// The fullest rank, the lowest of equals.
    fn fullest(&self) -> usize {
        let by_load = |&rank: &usize| (self.rank_loads[rank], std::cmp::Reverse(rank));
        (0..self.on.len()).max_by_key(by_load).unwrap_or(0)
    }

    /// The move that relieves the fullest rank and leaves what it touches lowest.
    fn best(&self) -> Option<Move> {
        let hot = self.fullest();
        let mut best: Option<(u64, Move)> = None;
        let mut offer = |highest: u64, found: Move| {
            if highest < self.rank_loads[hot] && best.is_none_or(|(so_far, _)| highest < so_far) {
                best = Some((highest, found));
            }
        };
        for (slot, &expert) in self.on[hot].iter().enumerate() {
            self.swaps(hot, slot, &mut offer);
            if !self.on[hot][..slot].contains(&expert) {
                self.recopies(expert, &mut offer);
                self.gifts(hot, slot, &mut offer);
            }
        }
        best.map(|(_, found)| found)
    }

    fn swaps(&self, hot: usize, slot: usize, offer: &mut impl FnMut(u64, Move)) {
        let expert = self.on[hot][slot];
        let weight = self.each(expert);
        for (rank, slots) in self.on.iter().enumerate() {
            if rank == hot || slots.contains(&expert) {
                continue;
            }
            for (other, &lighter) in slots.iter().enumerate() {
                let less = self.each(lighter);
                if less < weight && !self.on[hot].contains(&lighter) {
                    let difference = weight - less;
                    let highest = (self.rank_loads[hot] - difference).max(self.rank_loads[rank] + difference);
                    offer(highest, Move::Swap { slot, rank, other });
                }
            }
        }
    }

    /// Slots elsewhere for one more copy of `expert`, which lies on the fullest rank.
    fn recopies(&self, expert: usize, offer: &mut impl FnMut(u64, Move)) {
        for (rank, slots) in self.on.iter().enumerate() {
            if slots.contains(&expert) {
                continue;
            }
            for (slot, &donor) in slots.iter().enumerate() {
                if self.copies[donor] >= 2 {
                    offer(self.after_recopy(rank, donor, expert), Move::Recopy { rank, slot, expert });
                }
            }
        }
    }

    /// Experts from elsewhere for a slot of the fullest rank whose own expert has other copies.
    fn gifts(&self, hot: usize, slot: usize, offer: &mut impl FnMut(u64, Move)) {
        let donor = self.on[hot][slot];
        if self.copies[donor] < 2 {
            return;
        }
        for (expert, holders) in self.holders.iter().enumerate() {
            if !holders.is_empty() && !self.on[hot].contains(&expert) {
                offer(self.after_recopy(hot, donor, expert), Move::Recopy { rank: hot, slot, expert });
            }
        }
    }

    /// Load of the fullest touched rank when a slot of `donor` on `rank` holds `expert` instead.
    fn after_recopy(&self, rank: usize, donor: usize, expert: usize) -> u64 {
        let donor_now = self.each(donor);
        let donor_then = load_a_copy(self.loads[donor], self.copies[donor] - 1);
        let expert_now = self.each(expert);
        let expert_then = load_a_copy(self.loads[expert], self.copies[expert] + 1);
        let after = |&touched: &usize| {
            let of = |wanted: usize| self.on[touched].iter().filter(|&&held| held == wanted).count() as u64;
            let (of_donor, of_expert) = (of(donor), of(expert));
            let rest = self.rank_loads[touched] - of_donor * donor_now - of_expert * expert_now;
            let moved = u64::from(touched == rank);
            rest + (of_donor - moved) * donor_then + (of_expert + moved) * expert_then
        };
        self.holders[donor].iter().chain(&self.holders[expert]).map(after).max().unwrap_or(0)
    }

    fn apply(&mut self, change: Move) {
        match change {
            Move::Swap { slot, rank, other } => {
                let hot = self.fullest();
                let expert = self.on[hot][slot];
                self.on[hot][slot] = std::mem::replace(&mut self.on[rank][other], expert);
            }
            Move::Recopy { rank, slot, expert } => {
                let donor = std::mem::replace(&mut self.on[rank][slot], expert);
                self.copies[donor] -= 1;
                self.copies[expert] += 1;
            }
        }
        self.sum();
    }

    /// Takes second copies of an expert off its rank, where a swap does it without a rank fuller than the fullest.
    fn separate(&mut self) {
        let most = self.rank_loads.iter().copied().max().unwrap_or(0);
        for rank in 0..self.on.len() {
            for slot in 0..self.on[rank].len() {
                let expert = self.on[rank][slot];
                if !self.on[rank][..slot].contains(&expert) {
                    continue;
                }
                if let Some((other_rank, other)) = self.partner(rank, expert, most) {
                    self.on[rank][slot] = std::mem::replace(&mut self.on[other_rank][other], expert);
                    self.sum();
                }
            }
        }
    }

    /// A slot whose expert can change places with a copy of `expert` on `rank`: the one that leaves both lowest.
    fn partner(&self, rank: usize, expert: usize, most: u64) -> Option<(usize, usize)> {
        let weight = self.each(expert);
        let mut best: Option<(u64, (usize, usize))> = None;
        for (other_rank, slots) in self.on.iter().enumerate() {
            if slots.contains(&expert) {
                continue;
            }
            for (other, &held) in slots.iter().enumerate() {
                let here = self.rank_loads[rank] - weight + self.each(held);
                let there = self.rank_loads[other_rank] - self.each(held) + weight;
                let highest = here.max(there);
                let is_better = highest <= most && best.is_none_or(|(so_far, _)| highest < so_far);
                if is_better && !self.on[rank].contains(&held) {
                    best = Some((highest, (other_rank, other)));
                }
            }
        }
        best.map(|(_, place)| place)
    }
}
