//! The published planners as two more constructions, for goals that no way of module `construct` meets.
//!
//! Each runs its own search, so that `ultraep` ends at most where it does; what counts is the largest weighed rank load of
//! its plan. A plan with a quota below `u_min` (the released fast probe makes some) does not count.
//! Order: the lower load, then `greedy` before `ultraep-v1`. Cost: that of the two policies.

use alloc::vec;
use alloc::vec::Vec;

use super::UltraepParams;
use crate::draft::Move;
use crate::policies::ultraep::field::Field;
use crate::{Domain, Greedy, GreedyParams, Topology, UltraepV1, UltraepV1Params};

/// The planners to fall back on.
#[derive(Clone, Debug)]
pub(crate) struct Published {
    greedy: Greedy,
    v1: UltraepV1,
    /// Rank loads after balancing, `[G]`.
    after: Vec<u32>,
    /// Replicas of the better plan.
    pub(crate) moves: Vec<Move>,
}

impl Published {
    pub(crate) fn new(topology: &Topology, params: UltraepParams) -> Self {
        let UltraepParams { beta, min_quota } = params;
        Self {
            greedy: Greedy::new(topology, GreedyParams { beta, min_quota }),
            v1: UltraepV1::new(topology, UltraepV1Params { min_tokens: min_quota, ..UltraepV1Params::default() }),
            after: vec![0; topology.domain_ranks()],
            moves: Vec::with_capacity(crate::draft::total_slots(topology)),
        }
    }

    /// Plans a domain in both ways for the loads of all experts, `[E]`; the better plan is in `self.moves`. Returns its
    /// largest weighed rank load.
    pub(crate) fn solve(&mut self, topology: &Topology, field: &Field, domain: Domain, loads: &[u32]) -> u32 {
        self.moves.clear();
        let mut best = field.largest();
        for moves in [self.greedy.moves(domain, loads), self.v1.moves(domain, loads)] {
            if moves.iter().any(|m| m.quota < field.min_quota) {
                continue;
            }
            self.after.copy_from_slice(&field.load);
            for m in moves {
                let home = topology.homes()[m.expert as usize].index() - field.first_rank;
                self.after[home] -= m.quota;
                self.after[m.rank as usize - field.first_rank] += m.quota;
            }
            let largest = self.after.iter().enumerate().map(|(r, &load)| field.weigh(r, load)).max().unwrap_or(0);
            if largest < best {
                best = largest;
                self.moves.clear();
                self.moves.extend_from_slice(moves);
            }
        }
        best
    }
}
