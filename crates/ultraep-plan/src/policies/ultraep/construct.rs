//! Construction of replicas at one threshold.
//!
//! # Problem
//!
//! Ranks over their capacity (donors) must hand their excess to ranks under it (receivers), each receiver taking at most as
//! many pieces as it has slots, each piece coming from one expert; fewest pieces wanted. Every donor needs at least as many
//! pieces as the largest receivers that cover its excess; waste (slack that a used slot leaves behind) is what makes others
//! need more. That is a covering problem with few exact solutions, so several simple ways are tried (module `ultraep`).
//!
//! # One way
//!
//! Donors one after the other, in the way's order ([`Order`]; ties: lower rank). A donor gives from its expert with most
//! left (ties: lower), until its excess is gone:
//!
//! ```text
//! excess fits one receiver:   the one with least sufficient slack (best fit)
//! excess fits two:            the pair with least sufficient sum
//! otherwise:                  fill the receiver with most slack, go on
//! ```
//!
//! A receiver with slack and slots left stays a receiver. Further means, by way:
//!
//! * [`Waste::Hand`]: the last piece fills a receiver whose slots are used up; the donor falls below its capacity and
//!   becomes a receiver itself, so no slack is lost. This reaches exact balance with a single slot a rank.
//! * [`Order::Fill`]: large experts go whole to the emptiest rank, for receivers whose few slots must each bring much.
//! * [`Order::Merge`], [`Order::Chain`]: donors pass their excess to other donors while receivers have too few slots for
//!   all of them.
//! * [`Small::Ring`]: a transfer below `u_min` is the difference of two replicas above it, and a chain of such transfers
//!   closes to a ring: every link carries at least `u_min`, every rank on it keeps what it has room for.
//!
//! # Invariants
//!
//! No slot is used twice, no expert gets two instances on a rank, every quota is at least `u_min` and comes out of what the
//! master has left. A donor gives an expert to a receiver twice never: a piece either ends the need, fills the receiver
//! (which then is none), or takes all that the expert had.
//!
//! # Cost
//!
//! `O(pieces * (G + M))` with small constants: a look-up is a binary search, an update moves part of a sorted list.

use alloc::vec;
use alloc::vec::Vec;

use crate::draft::{Move, total_slots};
use crate::policies::ultraep::field::Field;
use crate::{Rank, Topology};

/// What becomes of slack that a receiver without free slots has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waste {
    /// It stays unused.
    Leave,
    /// It goes to the donor, which receives in its stead.
    Hand,
}

/// What is done with needs and slacks below the least quota `u_min`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Small {
    /// A need is rounded up to `u_min`; a slack is not used.
    Round,
    /// Tokens go round a ring of ranks, at least `u_min` on every link, so that any amount can move on balance.
    Ring,
}

/// Which donor is served next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// The one with most excess, to the end.
    Largest,
    /// The one with least excess, to the end.
    Smallest,
    /// The one with most excess first of all, then as `Smallest`.
    HottestThenSmallest,
    /// The one with most excess left, until it no longer is.
    Alternate,
    /// As `Smallest`, but while receivers have fewer slots than there are donors, a donor hands its excess to another.
    Merge,
    /// As `Merge`, but whoever took the excess over is served next, so that it grows along a chain; where it is below
    /// `u_min`, that much more goes over and comes back, so that nobody falls below its capacity.
    Chain,
    /// The one with the largest expert: it fills the receiver with most slack, and may fall below its capacity.
    Fill,
}

/// One way to construct.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Style {
    pub(crate) order: Order,
    pub(crate) waste: Waste,
    pub(crate) small: Small,
}

/// Memory of the construction.
#[derive(Clone, Debug)]
pub(crate) struct Builder {
    /// Ranks with excess (by [`key`], no slots), as served: last first.
    donors: Vec<u64>,
    donors_at_first: Vec<u64>,
    /// Ranks with slack and free slots (by [`key`]), most slack last.
    receivers: Vec<u64>,
    receivers_at_first: Vec<u64>,
    free: Vec<u16>,
    /// Free slots of all receivers.
    open: usize,
    /// What is left of each expert on its master.
    left: Vec<u32>,
    /// Replicas on each rank so far: those of rank `r` from `r * stride` on, `[G, stride]`.
    placed: Vec<u16>,
    /// Most slots of a rank.
    stride: usize,
    /// Most that each rank has left of one expert, `[G]`; filled by the first merge of a construction, empty before.
    peaks: Vec<u32>,
    /// Receivers of a ring and what they keep.
    path: Vec<(usize, u32)>,
    pub(crate) moves: Vec<Move>,
}

/// Most pairs of receivers looked at for one donor.
const PAIRS: usize = 32;

const LOW: u64 = 0xffff;

/// Sorts ranks by amount; of equal ones the rank with most free slots comes first, then the higher rank. So a piece that
/// leaves slack goes where another slot can use it, and a piece that fills its receiver wastes few slots.
fn key(amount: u32, slots: u16, rank: usize) -> u64 {
    u64::from(amount) << 32 | (LOW - u64::from(slots)) << 16 | (LOW - rank as u64)
}

fn amount(key: u64) -> u32 {
    (key >> 32) as u32
}

fn rank(key: u64) -> usize {
    (LOW - (key & LOW)) as usize
}

impl Builder {
    pub(crate) fn new(topology: &Topology) -> Self {
        let ranks = topology.domain_ranks();
        let stride = (0..topology.ranks()).map(|r| topology.slots(Rank::new(r))).max().unwrap_or(0);
        Self {
            donors: Vec::with_capacity(ranks),
            donors_at_first: Vec::with_capacity(ranks),
            receivers: Vec::with_capacity(ranks),
            receivers_at_first: Vec::with_capacity(ranks),
            free: vec![0; ranks],
            open: 0,
            left: Vec::with_capacity(topology.experts()),
            placed: vec![0; ranks * stride],
            stride,
            peaks: Vec::with_capacity(ranks),
            path: Vec::with_capacity(ranks),
            moves: Vec::with_capacity(total_slots(topology)),
        }
    }

    /// Sorts the ranks into donors and receivers at `tau`, for the constructions that follow.
    pub(crate) fn prepare(&mut self, field: &Field, tau: u32) {
        self.donors_at_first.clear();
        self.receivers_at_first.clear();
        for (r, (&load, &slots)) in field.load.iter().zip(&field.slots).enumerate() {
            let capacity = field.capacity(r, tau);
            if load > capacity {
                self.donors_at_first.push(key(load - capacity, 0, r));
            } else if load < capacity && slots > 0 {
                self.receivers_at_first.push(key(capacity - load, slots, r));
            }
        }
        self.donors_at_first.sort_unstable();
        self.receivers_at_first.sort_unstable();
    }

    /// Builds replicas that bring every rank within its capacity at the `tau` that was prepared; `self.moves` holds
    /// them. `false` when some excess is left.
    pub(crate) fn build(&mut self, field: &Field, style: Style) -> bool {
        self.moves.clear();
        self.donors.clear();
        self.receivers.clear();
        self.left.clear();
        self.donors.extend_from_slice(&self.donors_at_first);
        self.receivers.extend_from_slice(&self.receivers_at_first);
        self.free.copy_from_slice(&field.slots);
        self.open = self.receivers.iter().map(|&k| usize::from(self.free[rank(k)])).sum();
        self.left.extend_from_slice(&field.experts);
        self.peaks.clear();
        match style.order {
            Order::Smallest | Order::Merge | Order::Chain => self.donors.reverse(),
            Order::HottestThenSmallest => {
                let rest = self.donors.len().saturating_sub(1);
                self.donors[..rest].reverse();
            }
            Order::Largest | Order::Alternate | Order::Fill => {}
        }
        if style.order == Order::Fill {
            return self.fill(field);
        }
        while let Some(donor) = self.donors.pop() {
            let merges = matches!(style.order, Order::Merge | Order::Chain) && self.scarce();
            if merges && self.merge(field, rank(donor), amount(donor), style.order) {
                continue;
            }
            match self.relieve(field, rank(donor), amount(donor), style) {
                Some(0) => {}
                Some(need) => {
                    let donor = key(need, 0, rank(donor));
                    let at = self.donors.partition_point(|&k| k < donor);
                    self.donors.insert(at, donor);
                }
                None => return false,
            }
        }
        true
    }

    /// Whether the receivers have fewer free slots than there are donors, the one just taken included.
    fn scarce(&self) -> bool {
        self.open < self.donors.len() + 1
    }

    /// Hands all `need` of `donor` to the donor still waiting that has a free slot and the largest expert to pass on
    /// (ties: lower rank). `false` when there is none, or no expert for it.
    fn merge(&mut self, field: &Field, donor: usize, need: u32, order: Order) -> bool {
        if self.peaks.is_empty() {
            for r in 0..field.ranks() {
                self.peaks.push(self.most_left(field, r));
            }
        }
        let expert = self.largest_of(field, donor);
        let returns = order == Order::Chain && need < field.min_quota;
        let piece = if returns { need + field.min_quota } else { need.max(field.min_quota) };
        let waiting = (0..self.donors.len()).filter(|&d| self.free[rank(self.donors[d])] > 0);
        let size = |d: usize| key(self.peaks[rank(self.donors[d])], 0, rank(self.donors[d]));
        let Some(at) = waiting.max_by_key(|&d| size(d)).filter(|_| self.left[expert] >= piece) else { return false };
        let to = rank(self.donors[at]);
        let returned = self.absent_expert(field, to, donor, field.min_quota).filter(|_| self.free[donor] > 0);
        if returns && returned.is_none() {
            return false;
        }
        let other = key(amount(self.donors.remove(at)) + if returns { need } else { piece }, 0, to);
        self.free[to] -= 1;
        self.push(field, expert, to, piece);
        if let Some(expert) = returned.filter(|_| returns) {
            self.free[donor] -= 1;
            self.push(field, expert, donor, field.min_quota);
        } else if piece > need && self.free[donor] > 0 {
            self.insert(piece - need, donor);
        }
        // The least waits last; the end of a chain does.
        let at = if order == Order::Chain { self.donors.len() } else { self.donors.partition_point(|&k| k > other) };
        self.donors.insert(at, other);
        true
    }

    /// Moves `need` tokens away from `donor`; returns what is left to move, `None` when nothing can.
    fn relieve(&mut self, field: &Field, donor: usize, mut need: u32, style: Style) -> Option<u32> {
        while need > 0 {
            let most = *self.receivers.last()?;
            let expert = self.largest_of(field, donor);
            let largest = self.left[expert];
            let last_waste = if self.free[donor] > 0 { style.waste } else { Waste::Leave };
            let whole = need.max(field.min_quota);
            let piece = whole.min(largest);
            if piece < field.min_quota {
                return None;
            }
            if amount(most) < piece && amount(most).min(need) < field.min_quota {
                if style.small == Small::Round {
                    return None;
                }
                need -= self.ring(field, donor, need)?;
            } else if amount(most) >= piece {
                // Best fit: the piece finishes the donor, or its largest expert.
                let at = self.receivers.partition_point(|&k| amount(k) < piece);
                let waste = if piece == whole { last_waste } else { Waste::Leave };
                need = self.settle(donor, need, |b| b.give(field, expert, at, piece, waste), waste);
            } else if style.order == Order::Alternate {
                let at = self.receivers.len() - 1;
                return Some(need - self.give(field, expert, at, amount(most), Waste::Leave));
            } else if let Some((low, high)) = self.pair(need, largest, field.min_quota) {
                let full = amount(self.receivers[high]);
                need -= self.give(field, expert, high, full, Waste::Leave);
                let last = need.max(field.min_quota);
                need = self.settle(donor, need, |b| b.give(field, expert, low, last, last_waste), last_waste);
            } else {
                let at = self.receivers.len() - 1;
                need -= self.give(field, expert, at, amount(most), Waste::Leave);
            }
        }
        Some(0)
    }

    /// Makes the donor's last piece by `give`, which returns the tokens moved; returns what is left to move. A donor
    /// that ends below its capacity becomes a receiver where waste is handed on.
    #[inline]
    fn settle(&mut self, donor: usize, need: u32, give: impl FnOnce(&mut Self) -> u32, waste: Waste) -> u32 {
        let moved = give(self);
        if moved > need && waste == Waste::Hand {
            self.insert(moved - need, donor);
        }
        need.saturating_sub(moved)
    }

    /// Moves up to `need` tokens along a ring from the donor through receivers and back: each hands on what it does not
    /// keep, at least `u_min` on every link, and `u_min` returns. `k` receivers with little slack cost `k + 1` replicas.
    /// Returns the tokens moved on balance.
    fn ring(&mut self, field: &Field, donor: usize, need: u32) -> Option<u32> {
        let most = self.left[self.largest_of(field, donor)].checked_sub(field.min_quota)?;
        let (mut from, mut rest) = (donor, need.min(most));
        let (mut moved, mut leftover) = (rest, 0);
        self.path.clear();
        while rest > 0 && self.free[donor] > 0 {
            let Some((at, reach)) = self.link(field, donor, from, rest) else { break };
            let receiver = self.receivers.remove(at);
            self.open -= usize::from(self.free[rank(receiver)]);
            let kept = amount(receiver).min(reach);
            leftover = amount(receiver) - kept;
            // Less can be handed on than was hoped: less is sent from the start.
            moved -= rest - reach;
            rest = reach - kept;
            from = rank(receiver);
            self.path.push((from, kept));
        }
        moved -= rest;
        if self.path.is_empty() {
            return None;
        }
        let (mut from, mut carried) = (donor, moved + field.min_quota);
        for link in 0..self.path.len() {
            let (to, kept) = self.path[link];
            self.hand_on(field, from, to, carried);
            (from, carried) = (to, carried - kept);
        }
        self.hand_on(field, from, donor, carried);
        if leftover > 0 && self.free[from] > 0 {
            self.insert(leftover, from);
        }
        Some(moved)
    }

    fn hand_on(&mut self, field: &Field, from: usize, to: usize, tokens: u32) {
        let expert = self.absent_expert(field, from, to, tokens).expect("checked when it was linked");
        self.free[to] -= 1;
        self.push(field, expert, to, tokens);
    }

    /// The receiver that a ring from `donor` goes on to from `from` with `rest` tokens to place, and how many of them it can
    /// keep and hand on: the one with least sufficient slack, else the first, by decreasing slack, with the longest reach.
    fn link(&self, field: &Field, donor: usize, from: usize, rest: u32) -> Option<(usize, u32)> {
        let enough = self.receivers.partition_point(|&k| amount(k) < rest);
        let mut best: Option<(usize, u32)> = None;
        for at in (enough..self.receivers.len()).chain((0..enough).rev()) {
            let (to, slack) = (rank(self.receivers[at]), amount(self.receivers[at]));
            let passed = self.left[self.largest_of(field, to)].saturating_sub(field.min_quota);
            let reach = rest.min(slack.saturating_add(passed));
            if best.is_some_and(|(_, longest)| reach <= longest) {
                continue;
            }
            let there = self.absent_expert(field, from, to, rest + field.min_quota);
            let back = self.absent_expert(field, to, donor, field.min_quota);
            if there.is_some() && back.is_some() {
                best = Some((at, reach));
                if reach == rest {
                    break;
                }
            }
        }
        best
    }

    /// The expert of `from` with most left (ties: lower) that has `piece` left and no instance on `to`.
    fn absent_expert(&self, field: &Field, from: usize, to: usize, piece: u32) -> Option<usize> {
        let used = usize::from(field.slots[to] - self.free[to]);
        let placed = &self.placed[to * self.stride..][..used];
        let absent = |e: usize| !placed.contains(&(e as u16));
        let enough = field.experts_of(from).filter(|&e| self.left[e] >= piece && absent(e));
        enough.min_by_key(|&e| (u32::MAX - self.left[e], e))
    }

    /// Fills the receiver with most slack from the largest expert of any donor, until no donor is left. For receivers
    /// whose few slots must each bring much.
    fn fill(&mut self, field: &Field) -> bool {
        while !self.donors.is_empty() {
            let Some(&most) = self.receivers.last() else { return false };
            let largest = |k: u64| self.left[self.largest_of(field, rank(k))];
            let at = (0..self.donors.len()).max_by_key(|&d| (largest(self.donors[d]), self.donors[d]));
            let donor = self.donors.remove(at.expect("there is a donor"));
            let (from, need) = (rank(donor), amount(donor));
            let expert = self.largest_of(field, from);
            let piece = self.left[expert].min(amount(most));
            if piece < field.min_quota {
                return false;
            }
            let moved = self.give(field, expert, self.receivers.len() - 1, piece, Waste::Leave);
            if moved < need {
                let donor = key(need - moved, 0, from);
                let at = self.donors.partition_point(|&k| k < donor);
                self.donors.insert(at, donor);
            } else if moved > need && self.free[from] > 0 {
                self.insert(moved - need, from);
            }
        }
        true
    }

    /// Positions of two receivers whose slack adds up to least, but at least `need` (ties: the most different two), among
    /// the first [`PAIRS`] on the way from the most different to the most equal; none when no two reach it, or one
    /// expert could not serve both. `need` exceeds the slack of each.
    fn pair(&self, need: u32, largest: u32, min_quota: u32) -> Option<(usize, usize)> {
        if largest < need {
            return None;
        }
        let need = u64::from(need);
        let most = u64::from(amount(*self.receivers.last()?));
        // Too small for the largest partner; too large to leave the partner a replica's least quota.
        let mut low = self.receivers.partition_point(|&k| u64::from(amount(k)) + most < need);
        let mut high = match min_quota {
            1 => self.receivers.len(),
            least => self.receivers.partition_point(|&k| u64::from(amount(k)) + u64::from(least) <= need),
        };
        let mut best = u64::MAX;
        for _ in 0..PAIRS {
            if low + 1 >= high {
                break;
            }
            let sum = u64::from(amount(self.receivers[low])) + u64::from(amount(self.receivers[high - 1]));
            let enough = sum >= need;
            // Sum, then positions, in one number.
            let candidate = sum << 32 | (low as u64) << 16 | (high - 1) as u64;
            best = if enough { best.min(candidate) } else { best };
            high -= usize::from(enough);
            low += usize::from(!enough);
        }
        (best != u64::MAX).then_some(((best >> 16 & LOW) as usize, (best & LOW) as usize))
    }

    /// Makes a replica with `piece` tokens of `expert` on the receiver at `at`. Returns the tokens moved: more than
    /// `piece` where slack that would be lost is handed to its home, the donor.
    fn give(&mut self, field: &Field, expert: usize, at: usize, piece: u32, waste: Waste) -> u32 {
        let receiver = self.receivers[at];
        let (to, slack) = (rank(receiver), amount(receiver));
        self.free[to] -= 1;
        self.open -= 1;
        let rest = slack - piece;
        let mut moved = piece;
        if rest > 0 && self.free[to] > 0 {
            // It stays a receiver, further down.
            let smaller = key(rest, self.free[to], to);
            let place = self.receivers[..at].partition_point(|&k| k < smaller);
            self.receivers.copy_within(place..at, place + 1);
            self.receivers[place] = smaller;
        } else {
            self.receivers.remove(at);
            self.open -= usize::from(self.free[to]);
            if waste == Waste::Hand {
                moved += rest.min(self.left[expert] - piece);
            }
        }
        self.push(field, expert, to, moved);
        moved
    }

    /// Records a replica of `expert` on `to`, in the slot just taken.
    fn push(&mut self, field: &Field, expert: usize, to: usize, quota: u32) {
        self.left[expert] -= quota;
        self.placed[to * self.stride + usize::from(field.slots[to] - self.free[to]) - 1] = expert as u16;
        if !self.peaks.is_empty() {
            let home = usize::from(field.homes[expert]);
            self.peaks[home] = self.most_left(field, home);
        }
        let (expert, rank) = (field.first_expert + expert, field.first_rank + to);
        self.moves.push(Move { expert: expert as u16, rank: rank as u16, quota });
    }

    /// Makes `rank` a receiver with `slack`.
    fn insert(&mut self, slack: u32, rank: usize) {
        let receiver = key(slack, self.free[rank], rank);
        self.open += usize::from(self.free[rank]);
        let at = self.receivers.partition_point(|&k| k < receiver);
        self.receivers.insert(at, receiver);
    }

    /// Most that `rank` has left of one expert.
    fn most_left(&self, field: &Field, rank: usize) -> u32 {
        self.left[field.experts_of(rank)].iter().max().copied().unwrap_or(0)
    }

    /// The expert of `donor` with most left on its master (ties: lower expert).
    fn largest_of(&self, field: &Field, donor: usize) -> usize {
        let experts = field.experts_of(donor);
        let (mut best, mut most) = (experts.start, self.left[experts.start]);
        for (expert, &left) in experts.clone().zip(&self.left[experts]).skip(1) {
            if left > most {
                (best, most) = (expert, left);
            }
        }
        best
    }
}
