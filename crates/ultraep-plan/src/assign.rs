//! Token assignment: which instance processes each token of a source, from the source's split alone.
//!
//! Source: paper, section on reroute; the permutation is the released one (policy page "Token permutation"). With `n`
//! tokens of (source, expert), token `j` of them, in the order of the batch, looks up position
//! `(j * stride + expert mod n) mod n` in the cumulative shares of the instances and goes to the first whose cumulative share is greater.
//! `stride` is near `n / 2` and coprime to `n`, so neighbouring tokens spread over the instances and every position is
//! taken once: each instance gets exactly its share.
//!
//! A [`RouteTable`] is prepared once for a source and then only read; a [`Cursor`] says how many tokens of each expert
//! came before. So a batch can be cut into token ranges that threads work on alone: each range starts its cursor after
//! the counts of the ranges before it.
//!
//! The table is written out: for every expert with replicas, the physical id at each position. So a token costs one look-up
//! and one addition, with no branch that depends on the data.
//!
//! Cost: `O(E + instances + tokens)` to prepare, nearly all of it filling runs; `O(1)` for each token and choice.

use alloc::vec;
use alloc::vec::Vec;

use crate::{Expert, PhysicalIndex, Plan, Rank, Topology};

/// The sentinel for padding, in logical ids and in physical ids.
pub const NOWHERE: i32 = -1;

/// Why tokens were not assigned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AssignError {
    /// A buffer has the wrong length.
    #[error("{what}: {got} values, expected {expected}")]
    Length {
        /// Which buffer.
        what: &'static str,
        /// Its length.
        got: usize,
        /// The length it must have.
        expected: usize,
    },
    /// A physical index beyond what a rank was said to hold.
    #[error("expert {expert}: physical index {physical} on rank {rank}; the table was built for {expected} a rank")]
    Physical {
        /// The expert.
        expert: Expert,
        /// The rank.
        rank: Rank,
        /// The physical index.
        physical: PhysicalIndex,
        /// Physical experts a rank.
        expected: usize,
    },
    /// A logical id that is neither an expert nor padding.
    #[error("value {at}: logical expert {got}; allowed are {NOWHERE} (padding) and 0 to {}", experts - 1)]
    NoSuchExpert {
        /// Position in the ids.
        at: usize,
        /// The id.
        got: i32,
        /// `E`.
        experts: usize,
    },
    /// More tokens of an expert than the source counted.
    #[error("value {at}: more tokens of expert {expert} than the {counted} that were counted")]
    MoreThanCounted {
        /// Position in the ids.
        at: usize,
        /// The expert.
        expert: Expert,
        /// Tokens counted.
        counted: u32,
    },
}

/// One expert's part of a table.
#[derive(Clone, Copy, Debug, Default)]
struct Route {
    /// Tokens of this source.
    tokens: u32,
    /// Step from one token's position to the next one's.
    stride: u32,
    /// Position of the first token.
    start: u32,
    /// Where its physical ids begin.
    first: u32,
}

impl Route {
    /// The track behind `j` tokens.
    fn track(&self, j: u32) -> Track {
        let steps = u64::from(j) * u64::from(self.stride) + u64::from(self.start);
        let position = steps.checked_rem(u64::from(self.tokens)).unwrap_or(0) as u32;
        // Without replicas all tokens share one id: the track stands still on it.
        let (position, span) = if self.stride == 0 { (0, u32::MAX - self.first) } else { (position, self.tokens) };
        Track {
            next: self.first + position,
            end: self.first + span,
            stride: self.stride,
            tokens: self.tokens,
            left: self.tokens.saturating_sub(j),
        }
    }
}

/// Routes of one source rank: for every expert the physical id of each of its tokens' positions.
#[derive(Clone, Debug)]
pub struct RouteTable {
    physical_per_rank: usize,
    ranks: usize,
    routes: Vec<Route>,
    /// Physical ids, `rank * physical_per_rank + physical index`: one for an expert without replicas, one for each
    /// position for the others.
    targets: Vec<i32>,
}

/// How far each expert's tokens of a source have been assigned.
#[derive(Clone, Debug, Default)]
pub struct Cursor {
    at: Vec<Track>,
}

/// One expert's tokens still to come: all that assigning one of them reads and writes, side by side.
#[derive(Clone, Copy, Debug, Default)]
struct Track {
    /// Index of the next token's physical id in the table.
    next: u32,
    /// End of the expert's physical ids.
    end: u32,
    stride: u32,
    tokens: u32,
    /// Tokens left.
    left: u32,
}

impl Cursor {
    /// Room for the experts of `topology`.
    pub fn new(topology: &Topology) -> Self {
        Self { at: vec![Track::default(); topology.experts()] }
    }
}

impl RouteTable {
    /// Room for a source of `topology`. Physical ids are `rank * physical_per_rank + physical index`;
    /// `physical_per_rank` must cover the indices that the policy uses: for all policies that keep to the slots, the largest
    /// [`Topology::physical_experts`].
    ///
    /// The first batch allocates room for its tokens, and a larger one for more; [`RouteTable::reserve`] does so ahead.
    pub fn new(topology: &Topology, physical_per_rank: usize) -> Self {
        Self {
            physical_per_rank,
            ranks: topology.ranks(),
            routes: vec![Route::default(); topology.experts()],
            targets: Vec::new(),
        }
    }

    /// Takes the memory that batches of up to `tokens` routed tokens (tokens times top-k) need.
    pub fn reserve(&mut self, tokens: usize) {
        self.targets.clear();
        self.targets.reserve(self.routes.len() + tokens);
    }

    /// Physical experts in all, `N * physical_per_rank`: the width of dense physical rows.
    pub fn physical_experts(&self) -> usize {
        self.ranks * self.physical_per_rank
    }

    /// Rank and physical index of a physical id, `None` for padding.
    pub fn locate(&self, physical: i32) -> Option<(Rank, PhysicalIndex)> {
        let id = usize::try_from(physical).ok()?;
        Some((Rank::new(id / self.physical_per_rank), PhysicalIndex::new(id % self.physical_per_rank)))
    }

    /// Takes a source's shares (`[instances]`, from `split_source`) of `plan`.
    pub fn prepare(&mut self, plan: &Plan, shares: &[u32]) -> Result<(), AssignError> {
        length("shares", shares.len(), plan.instances().len())?;
        length("experts of the plan", plan.experts(), self.routes.len())?;
        self.targets.clear();
        for expert in (0..plan.experts()).map(Expert::new) {
            let (instances, shares) = (plan.of(expert), &shares[plan.range(expert)]);
            let first = self.targets.len() as u32;
            let tokens = shares.iter().sum();
            let single = instances.len() == 1;
            for (instance, &share) in instances.iter().zip(shares) {
                let (rank, physical) = (instance.rank, instance.physical);
                if physical.index() >= self.physical_per_rank || rank.index() >= self.ranks {
                    let expected = self.physical_per_rank;
                    return Err(AssignError::Physical { expert, rank, physical, expected });
                }
                let target = (rank.index() * self.physical_per_rank + physical.index()) as i32;
                let positions = if single { 1 } else { share as usize };
                self.targets.resize(self.targets.len() + positions, target);
            }
            let stride = if single { 0 } else { permutation_stride(tokens) };
            let start = if single { 0 } else { (expert.index() as u32).checked_rem(tokens).unwrap_or(0) };
            self.routes[expert.index()] = Route { tokens, stride, start, first };
        }
        Ok(())
    }

    /// Sets `cursor` to the beginning of the batch.
    pub fn start(&self, cursor: &mut Cursor) {
        cursor.at.clear();
        cursor.at.extend(self.routes.iter().map(|route| route.track(0)));
    }

    /// Sets `cursor` behind `before[e]` tokens of every expert, `[E]`: where a later token range of the batch begins.
    pub fn start_after(&self, cursor: &mut Cursor, before: &[u32]) -> Result<(), AssignError> {
        length("tokens before", before.len(), self.routes.len())?;
        cursor.at.clear();
        cursor.at.extend(self.routes.iter().zip(before).map(|(route, &j)| route.track(j)));
        Ok(())
    }

    /// Physical expert of every (token, choice): the sparse reroute.
    ///
    /// `ids` are logical experts, `[tokens, k]` row-major, [`NOWHERE`] for padding; `physical` is as long. Reads in order
    /// and moves `cursor` on, so one batch may come in pieces. The probabilities stay where they are (`[tokens, k]`), so
    /// the backward of the sparse form has nothing to gather.
    pub fn assign(&self, cursor: &mut Cursor, ids: &[i32], physical: &mut [i32]) -> Result<(), AssignError> {
        length("physical ids", physical.len(), ids.len())?;
        length("cursor", cursor.at.len(), self.routes.len())?;
        for (at, (&id, out)) in ids.iter().zip(physical).enumerate() {
            let expert = id as u32 as usize; // padding and other negative ids become huge
            *out = if expert < self.routes.len() {
                self.next(cursor, expert).ok_or_else(|| self.more_than_counted(at, expert))?
            } else if id == NOWHERE {
                NOWHERE
            } else {
                return Err(AssignError::NoSuchExpert { at, got: id, experts: self.routes.len() });
            };
        }
        Ok(())
    }

    /// Physical id of the next token of `expert`; `None` when all counted tokens are assigned.
    #[inline]
    pub(crate) fn next(&self, cursor: &mut Cursor, expert: usize) -> Option<i32> {
        let track = &mut cursor.at[expert];
        track.left = track.left.checked_sub(1)?;
        let target = self.targets[track.next as usize];
        let next = track.next + track.stride;
        track.next = if next >= track.end { next - track.tokens } else { next };
        Some(target)
    }

    pub(crate) fn more_than_counted(&self, at: usize, expert: usize) -> AssignError {
        AssignError::MoreThanCounted { at, expert: Expert::new(expert), counted: self.routes[expert].tokens }
    }

    pub(crate) fn experts(&self) -> usize {
        self.routes.len()
    }
}

pub(crate) fn length(what: &'static str, got: usize, expected: usize) -> Result<(), AssignError> {
    if got == expected { Ok(()) } else { Err(AssignError::Length { what, got, expected }) }
}

/// A stride coprime to `n`, near `n / 2`; 1 for `n <= 1`.
fn permutation_stride(n: u32) -> u32 {
    if n <= 1 {
        return 1;
    }
    let mut stride = if n / 2 + 1 >= n { n - 1 } else { n / 2 + 1 }.max(1);
    while gcd(stride, n) != 1 {
        stride += 1;
        if stride >= n {
            stride = 1;
        }
    }
    stride
}

fn gcd(mut a: u32, mut b: u32) -> u32 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}
