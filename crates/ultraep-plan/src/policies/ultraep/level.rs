//! Levels the copies that ranks send, replicas and threshold unchanged.
//!
//! The rank that sends most copies bounds weight sync. Of its pieces two are rewritten in one of two ways, whichever fits
//! first:
//!
//! ```text
//! pass on:   busiest H: (e, j1, q1), (e, j2, q2)    ->    H: (e, j1, q1 + q2)      j1: (g, j2, q2)
//!            needs a master g of j1 with q2 left, not on j2; j1 then sends one copy more
//! exchange:  busiest H: (e, j1, q1), (e, j2, q2)    ->    H: (e, j3, q1 + q2)
//!            other   D: (f, j3, q3)                       D: (f, j1, x), (f, j2, q3 - x)
//!            needs q1 + q2 <= q3 + slack[j3],  x <= q1 + slack[j1],  q3 - x <= q2 + slack[j2],  both parts >= u_min,
//!            and no second instance of e on j3, of f on j1 or j2; D then sends one copy more
//! ```
//!
//! Passing on needs no relay in the fabric: every replica still gets its weights from its master; what moves is work of the
//! first receiver's own experts.
//!
//! Order: H is the busiest rank (ties: lower); the piece `q2` (in an exchange, both) is among its [`SMALLEST`] smallest
//! (ties: earlier), in that order; `q1` the largest that will do, D's pieces in the order of the moves, `g` the master with most left (ties:
//! lower). Whoever takes a copy over must end below what H had. At most [`REWRITES`] times.
//! Cost: `O(REWRITES * SMALLEST^2 * replicas)`.

use alloc::vec;
use alloc::vec::Vec;

use crate::Topology;
use crate::draft::Move;
use crate::policies::ultraep::field::Field;

/// Most rewrites of one plan.
const REWRITES: usize = 64;
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
    /// What is left of each expert on its master.
    left: Vec<u32>,
    /// Moves of the busiest rank, smallest quota first (ties: earlier).
    pieces: Vec<u32>,
}

impl Leveller {
    pub(crate) fn new(topology: &Topology) -> Self {
        let ranks = topology.domain_ranks();
        Self {
            slack: vec![0; ranks],
            sends: vec![0; ranks],
            homes: Vec::with_capacity(crate::draft::total_slots(topology)),
            left: Vec::with_capacity(topology.experts()),
            pieces: Vec::with_capacity(crate::draft::total_slots(topology)),
        }
    }

    /// Levels `moves`, which keep every rank within its capacity at `tau`.
    pub(crate) fn level(&mut self, topology: &Topology, field: &Field, tau: u32, moves: &mut [Move]) {
        self.enter(topology, field, tau, moves);
        for _ in 0..REWRITES {
            let busiest = (0..self.sends.len()).max_by_key(|&r| (self.sends[r], usize::MAX - r)).unwrap_or(0);
            if self.sends[busiest] < 2 {
                break;
            }
            self.collect(busiest, moves);
            if !self.pass_on(field, busiest, moves) && !self.exchange(field, busiest, moves) {
                break;
            }
        }
    }

    /// Takes moves; returns the most copies that a rank sends.
    pub(crate) fn enter(&mut self, topology: &Topology, field: &Field, tau: u32, moves: &[Move]) -> u16 {
        self.sends.fill(0);
        self.homes.clear();
        self.left.clear();
        self.left.extend_from_slice(&field.experts);
        for (r, slack) in self.slack.iter_mut().enumerate() {
            // Below zero for ranks that are relieved; wraps back when their pieces are added.
            *slack = field.capacity(r, tau).wrapping_sub(field.load[r]);
        }
        for m in moves {
            let home = topology.homes()[m.expert as usize].index() - field.first_rank;
            let to = m.rank as usize - field.first_rank;
            self.homes.push(home as u16);
            self.left[m.expert as usize - field.first_expert] -= m.quota;
            self.sends[home] += 1;
            self.slack[home] = self.slack[home].wrapping_add(m.quota);
            self.slack[to] = self.slack[to].wrapping_sub(m.quota);
        }
        self.sends.iter().copied().max().unwrap_or(0)
    }

    /// Lets one of the receivers of `busiest` pass on another's piece; `false` when none can.
    fn pass_on(&mut self, field: &Field, busiest: usize, moves: &mut [Move]) -> bool {
        for &b in self.pieces.iter().take(SMALLEST) {
            let second = moves[b as usize];
            for &a in self.pieces.iter().rev().filter(|&&a| a != b) {
                let first = moves[a as usize];
                let through = first.rank as usize - field.first_rank;
                if first.expert != second.expert || self.sends[through] + 2 > self.sends[busiest] {
                    continue;
                }
                let Some(own) = self.own_expert(field, through, second, moves) else { continue };
                moves[a as usize].quota += second.quota;
                moves[b as usize].expert = (field.first_expert + own) as u16;
                self.left[own] -= second.quota;
                self.homes[b as usize] = through as u16;
                self.sends[busiest] -= 1;
                self.sends[through] += 1;
                return true;
            }
        }
        false
    }

    /// The master of rank `r` with most left, if it can take over `piece` where that is.
    fn own_expert(&self, field: &Field, r: usize, piece: Move, moves: &[Move]) -> Option<usize> {
        let own = field.experts_of(r).min_by_key(|&e| (u32::MAX - self.left[e], e))?;
        let expert = (field.first_expert + own) as u16;
        let fits = self.left[own] >= piece.quota
            && r + field.first_rank != piece.rank as usize
            && !moves.iter().any(|m| m.expert == expert && m.rank == piece.rank);
        fits.then_some(own)
    }

    /// One exchange that lets `busiest` send one copy less; `false` when none fits.
    fn exchange(&mut self, field: &Field, busiest: usize, moves: &mut [Move]) -> bool {
        let found = self.pieces.len().min(SMALLEST);
        for (at, b) in (0..found).map(|at| (at, self.pieces[at] as usize)) {
            for a in (0..at).map(|at| self.pieces[at] as usize) {
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

    /// Lists the pieces of `busiest`.
    fn collect(&mut self, busiest: usize, moves: &[Move]) {
        self.pieces.clear();
        let of_busiest = (0..moves.len() as u32).filter(|&m| self.homes[m as usize] as usize == busiest);
        self.pieces.extend(of_busiest);
        self.pieces.sort_unstable_by_key(|&m| (moves[m as usize].quota, m));
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
