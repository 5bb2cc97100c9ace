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
//! The table is written out: for every expert the physical id of its first token, of its second, and so on, and a mark
//! behind the last. So a token costs one look-up and one increment, and the mark is the check.
//!
//! Cost: `O(E + instances + tokens)` to prepare, nearly all of it filling; `O(1)` for each token and choice.

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

/// What follows an expert's last token in a table.
const EXHAUSTED: i32 = NOWHERE;

/// One expert's part of a table.
#[derive(Clone, Copy, Debug, Default)]
struct Route {
    /// Tokens of this source.
    tokens: u32,
    /// Where its physical ids begin.
    first: u32,
}

/// Routes of one source rank: for every expert the physical ids of its tokens in the order of the batch.
#[derive(Clone, Debug)]
pub struct RouteTable {
    physical_per_rank: usize,
    ranks: usize,
    routes: Vec<Route>,
    /// Physical ids, `rank * physical_per_rank + physical index`: one for each token of an expert, then [`EXHAUSTED`].
    targets: Vec<i32>,
    /// Physical ids of one expert by position: each instance as often as its share.
    line: Vec<i32>,
}

/// How far each expert's tokens of a source have been assigned: where the next one's physical id stands, `[E]`.
#[derive(Clone, Debug, Default)]
pub struct Cursor {
    at: Vec<u32>,
}

impl Cursor {
    /// Room for the experts of `topology`. No token can be assigned before the cursor is started.
    pub fn new(topology: &Topology) -> Self {
        Self { at: vec![u32::MAX; topology.experts()] }
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
            line: Vec::new(),
        }
    }

    /// Takes the memory that batches of up to `tokens` routed tokens (tokens times top-k) need.
    pub fn reserve(&mut self, tokens: usize) {
        self.targets.clear();
        self.targets.reserve(self.routes.len() + tokens);
        self.line.clear();
        self.line.reserve(tokens);
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
            self.line.clear();
            for (instance, &share) in instances.iter().zip(shares) {
                let (rank, physical) = (instance.rank, instance.physical);
                if physical.index() >= self.physical_per_rank || rank.index() >= self.ranks {
                    let expected = self.physical_per_rank;
                    return Err(AssignError::Physical { expert, rank, physical, expected });
                }
                let target = (rank.index() * self.physical_per_rank + physical.index()) as i32;
                // Without replicas the order is all the same.
                let positions = if instances.len() == 1 { &mut self.targets } else { &mut self.line };
                positions.resize(positions.len() + share as usize, target);
            }
            if !self.line.is_empty() {
                self.targets.resize(first as usize + self.line.len(), EXHAUSTED);
                permute(&self.line, expert.index(), &mut self.targets[first as usize..]);
            }
            self.targets.push(EXHAUSTED);
            self.routes[expert.index()] = Route { tokens, first };
        }
        Ok(())
    }

    /// Sets `cursor` to the beginning of the batch.
    pub fn start(&self, cursor: &mut Cursor) {
        cursor.at.clear();
        cursor.at.extend(self.routes.iter().map(|route| route.first));
    }

    /// Sets `cursor` behind `before[e]` tokens of every expert, `[E]`: where a later token range of the batch begins.
    pub fn start_after(&self, cursor: &mut Cursor, before: &[u32]) -> Result<(), AssignError> {
        length("tokens before", before.len(), self.routes.len())?;
        cursor.at.clear();
        cursor.at.extend(self.routes.iter().zip(before).map(|(route, &j)| route.first + j.min(route.tokens)));
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
        let cursor = &mut cursor.at[..];
        let (eights, rest) = ids.as_chunks::<8>();
        let (eights_out, rest_out) = physical.as_chunks_mut::<8>();
        for (chunk, (ids, out)) in eights.iter().zip(eights_out).enumerate() {
            for ((i, &id), out) in ids.iter().enumerate().zip(out) {
                *out = match place(&self.targets, cursor, id) {
                    Some(target) => target,
                    None => self.unplaced(8 * chunk + i, id)?,
                };
            }
        }
        for ((i, &id), out) in rest.iter().enumerate().zip(rest_out) {
            *out = match place(&self.targets, cursor, id) {
                Some(target) => target,
                None => self.unplaced(8 * eights.len() + i, id)?,
            };
        }
        Ok(())
    }

    /// Padding, or why the id at `at` has no physical expert.
    #[cold]
    fn unplaced(&self, at: usize, id: i32) -> Result<i32, AssignError> {
        match id as u32 as usize {
            _ if id == NOWHERE => Ok(NOWHERE),
            expert if expert < self.routes.len() => Err(self.more_than_counted(at, expert)),
            _ => Err(AssignError::NoSuchExpert { at, got: id, experts: self.routes.len() }),
        }
    }

    /// Physical id of the next token of `expert`; `None` when all counted tokens are assigned.
    #[inline]
    pub(crate) fn next(&self, cursor: &mut Cursor, expert: usize) -> Option<i32> {
        place(&self.targets, &mut cursor.at, expert as i32)
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

/// Physical id of the next token of `expert`; `None` for padding, other ids that are no expert, and tokens beyond those
/// counted.
#[inline(always)]
fn place(targets: &[i32], cursor: &mut [u32], expert: i32) -> Option<i32> {
    let next = cursor.get_mut(expert as u32 as usize)?; // negative ids become huge
    let target = *targets.get(*next as usize)?;
    if target == EXHAUSTED {
        return None;
    }
    *next += 1;
    Some(target)
}

/// `out[j] = line[(expert + j * stride) mod n]` for all `n` positions.
///
/// The stride is near `n / 2`, so every other token is a short step on: even and odd tokens each walk along the line, and
/// are written in turn up to where one of the two begins anew.
fn permute(line: &[i32], expert: usize, out: &mut [i32]) {
    let n = line.len();
    let stride = permutation_stride(n as u32) as usize;
    let step = (2 * stride % n).max(1); // 0 for one token and two, which make a single turn
    let (mut even, mut odd) = (expert % n, (expert + stride) % n);
    let (mut pairs, last) = out.as_chunks_mut::<2>();
    while !pairs.is_empty() {
        let turns = (n - even.max(odd)).div_ceil(step).min(pairs.len());
        let (now, later) = pairs.split_at_mut(turns);
        let (from_even, from_odd) = (line[even..].iter(), line[odd..].iter());
        match step {
            1 => in_turn(now, from_even, from_odd),
            2 => in_turn(now, from_even.step_by(2), from_odd.step_by(2)),
            4 => in_turn(now, from_even.step_by(4), from_odd.step_by(4)),
            _ => in_turn(now, from_even.step_by(step), from_odd.step_by(step)),
        }
        (even, odd) = ((even + turns * step) % n, (odd + turns * step) % n);
        pairs = later;
    }
    if let [last] = last {
        *last = line[even];
    }
}

#[inline(always)]
fn in_turn<'a>(out: &mut [[i32; 2]], even: impl Iterator<Item = &'a i32>, odd: impl Iterator<Item = &'a i32>) {
    for (pair, (&even, &odd)) in out.iter_mut().zip(even.zip(odd)) {
        *pair = [even, odd];
    }
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
