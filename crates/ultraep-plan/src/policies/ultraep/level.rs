//! Levels the copies that ranks send, replicas and threshold unchanged.
//!
//! The rank that sends most copies bounds weight sync. Two of its small pieces are exchanged for one larger piece of a rank
//! that sends at least two copies less, when slack allows:
//!
//! ```text
//! busiest H: (e, j1, q1), (e, j2, q2)        H: (e, j3, q1 + q2)
//! other   D: (f, j3, q3)               ->    D: (f, j1, x), (f, j2, q3 - x)
//! needs q1 + q2 <= q3 + slack[j3],  x <= q1 + slack[j1],  q3 - x <= q2 + slack[j2],  both parts >= u_min,
//!       and no second instance of e on j3, of f on j1 or j2
//! ```
//!
//! Order: H is the busiest rank (ties: lower); its pieces are its [`SMALLEST`] smallest (ties: earlier), pairs of them in
//! that order, and for each pair D's pieces in their order; the first that fits is taken, up to [`EXCHANGES`] times.
//! Cost: `O(EXCHANGES * SMALLEST^2 * replicas)`.

use alloc::vec;
use alloc::vec::Vec;

use crate::Topology;
use crate::draft::Move;
use crate::policies::ultraep::field::Field;

/// Most exchanges for one plan.
const EXCHANGES: usize = 12;
/// Pieces of the busiest rank that are looked at.
const SMALLEST: usize = 4;

/// Memory for levelling.
#[derive(Clone, Debug)]
pub(crate) struct Leveller {
    /// Slack of each rank under the moves, `[G]`.
    slack: Vec<u32>,
    /// Copies sent, `[G]`.
    sends: Vec<u16>,
    /// Home of each move's expert, within the domain.
    homes: Vec<u16>,
}

impl Leveller {
    pub(crate) fn new(topology: &Topology) -> Self {
        let ranks = topology.domain_ranks();
        Self {
            slack: vec![0; ranks],
            sends: vec![0; ranks],
            homes: Vec::with_capacity(crate::draft::total_slots(topology)),
        }
    }

    /// Levels `moves`, which keep every rank within its capacity at `tau`.
    pub(crate) fn level(&mut self, topology: &Topology, field: &Field, tau: u32, moves: &mut [Move]) {
        self.enter(topology, field, tau, moves);
        for _ in 0..EXCHANGES {
            let busiest = (0..self.sends.len()).max_by_key(|&r| (self.sends[r], usize::MAX - r)).unwrap_or(0);
            if self.sends[busiest] < 3 || !self.exchange(field, busiest, moves) {
                break;
            }
        }
    }

    /// Takes moves; returns the most copies that a rank sends.
    pub(crate) fn enter(&mut self, topology: &Topology, field: &Field, tau: u32, moves: &[Move]) -> u16 {
        self.sends.fill(0);
        self.homes.clear();
        for (r, slack) in self.slack.iter_mut().enumerate() {
            // Below zero for ranks that are relieved; wraps back when their pieces are added.
            *slack = field.capacity(r, tau).wrapping_sub(field.load[r]);
        }
        for m in moves {
            let home = topology.homes()[m.expert as usize].index() - field.first_rank;
            let to = m.rank as usize - field.first_rank;
            self.homes.push(home as u16);
            self.sends[home] += 1;
            self.slack[home] = self.slack[home].wrapping_add(m.quota);
            self.slack[to] = self.slack[to].wrapping_sub(m.quota);
        }
        self.sends.iter().copied().max().unwrap_or(0)
    }

    /// One exchange that lets `busiest` send one copy less; `false` when none fits.
    fn exchange(&mut self, field: &Field, busiest: usize, moves: &mut [Move]) -> bool {
        let (smallest, found) = self.smallest(busiest, moves);
        for b in 1..found {
            for a in 0..b {
                let (a, b) = (smallest[a], smallest[b]);
                if moves[a].expert != moves[b].expert {
                    continue;
                }
                for c in 0..moves.len() {
                    let other = self.homes[c] as usize;
                    if other == busiest || self.sends[other] + 2 > self.sends[busiest] {
                        continue;
                    }
                    if let Some(part) = self.part(field, moves, [a, b, c]) {
                        self.apply(field, moves, [a, b, c], part);
                        return true;
                    }
                }
            }
        }
        false
    }

    /// The smallest pieces of `busiest`, smallest first, and how many there are.
    fn smallest(&self, busiest: usize, moves: &[Move]) -> ([usize; SMALLEST], usize) {
        let (mut smallest, mut found) = ([0; SMALLEST], 0);
        for m in (0..moves.len()).filter(|&m| self.homes[m] as usize == busiest) {
            let at = smallest[..found].iter().position(|&s: &usize| moves[m].quota < moves[s].quota).unwrap_or(found);
            if at < SMALLEST {
                found = (found + 1).min(SMALLEST);
                smallest.copy_within(at..found - 1, at + 1);
                smallest[at] = m;
            }
        }
        (smallest, found)
    }

    /// How much of piece `c` goes to the place of `a` if it may be exchanged for `a` and `b`.
    fn part(&self, field: &Field, moves: &[Move], [a, b, c]: [usize; 3]) -> Option<u32> {
        let slack = |m: usize| self.slack[moves[m].rank as usize - field.first_rank];
        let (first, second, large) = (moves[a], moves[b], moves[c]);
        let least = field.min_quota;
        if first.quota + second.quota > large.quota + slack(c) || large.quota < 2 * least {
            return None;
        }
        let part = (first.quota + slack(a)).min(large.quota - least);
        let rest = large.quota - part;
        if part < least || rest > second.quota + slack(b) {
            return None;
        }
        let home = |m: usize| self.homes[m] as usize + field.first_rank;
        let absent = |expert: u16, home: usize, rank: u16| {
            home != rank as usize && !moves.iter().any(|m| m.expert == expert && m.rank == rank)
        };
        let free = absent(first.expert, home(a), large.rank)
            && absent(large.expert, home(c), first.rank)
            && absent(large.expert, home(c), second.rank);
        free.then_some(part)
    }

    fn apply(&mut self, field: &Field, moves: &mut [Move], [a, b, c]: [usize; 3], part: u32) {
        let (first, second, large) = (moves[a], moves[b], moves[c]);
        let slack = |m: Move| m.rank as usize - field.first_rank;
        self.slack[slack(large)] += large.quota;
        self.slack[slack(large)] -= first.quota + second.quota;
        self.slack[slack(first)] += first.quota;
        self.slack[slack(first)] -= part;
        self.slack[slack(second)] += second.quota;
        self.slack[slack(second)] -= large.quota - part;
        self.sends[self.homes[a] as usize] -= 1;
        self.sends[self.homes[c] as usize] += 1;
        moves[a] = Move { rank: large.rank, quota: first.quota + second.quota, ..first };
        moves[b] = Move { rank: second.rank, quota: large.quota - part, ..large };
        moves[c] = Move { rank: first.rank, quota: part, ..large };
        self.homes[b] = self.homes[c];
    }
}
