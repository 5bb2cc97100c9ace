//! Column sums of the count matrix, in one pass over it.
//!
//! Everything that planning and the own split need from all `N * E` counts is: the load `lambda[e]` of every expert, the
//! tokens of sources *before* the own rank (the split's starting point), and the proof that nothing overflows. One pass
//! yields all three; this matters because at 1024 ranks and 4096 experts reading the matrix once is most of the time.

use alloc::vec;
use alloc::vec::Vec;

use crate::{MAX_TOKENS, Rank, Topology};

/// Column sums of one problem; memory for a topology, reused from problem to problem.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    pub(crate) source: usize,
    pub(crate) loads: Vec<u32>,
    pub(crate) before: Vec<u32>,
}

impl Tally {
    /// Room for the experts of `topology`.
    pub fn new(topology: &Topology) -> Self {
        Self { source: 0, loads: vec![0; topology.experts()], before: vec![0; topology.experts()] }
    }

    /// `lambda[e]`, tokens of every expert over all sources, `[E]`.
    pub fn loads(&self) -> &[u32] {
        &self.loads
    }

    /// Tokens of every expert from sources of lower rank than [`Tally::source`], `[E]`.
    pub fn before(&self) -> &[u32] {
        &self.before
    }

    /// The source rank that [`Tally::before`] stands for.
    pub fn source(&self) -> Rank {
        Rank::new(self.source)
    }

    /// Sums `counts` (`[N, E]`, the shape already checked). Returns the total, or `None` when it exceeds [`MAX_TOKENS`].
    pub(crate) fn fill(&mut self, topology: &Topology, counts: &[u32], source: Rank) -> Option<u32> {
        let experts = topology.experts();
        self.source = source.index();
        self.loads.clear();
        self.loads.resize(experts, 0);
        self.before.clear();
        let (below, rest) = counts.split_at(source.index() * experts);
        let mut high = add_rows(&mut self.loads, below);
        self.before.extend_from_slice(&self.loads);
        high |= add_rows(&mut self.loads, rest);
        (high <= MAX_TOKENS).then(|| total(&self.loads)).flatten()
    }
}

/// Adds rows of `acc.len()` counts onto `acc`. The result has its top bit set exactly when some count or some partial sum
/// reached 2^31: sums of two numbers below 2^31 do not wrap, so the first offender is always seen.
///
/// With the feature `std` the widest vectors of the processor are used, chosen at run time; sums are the same.
pub(crate) fn add_rows(acc: &mut [u32], rows: &[u32]) -> u32 {
    #[cfg(feature = "std")]
    return pulp::Arch::new().dispatch(AddRows { acc, rows });
    #[cfg(not(feature = "std"))]
    add_rows_plain(acc, rows)
}

#[cfg(feature = "std")]
struct AddRows<'a> {
    acc: &'a mut [u32],
    rows: &'a [u32],
}

#[cfg(feature = "std")]
impl pulp::NullaryFnOnce for AddRows<'_> {
    type Output = u32;

    #[inline(always)]
    fn call(self) -> u32 {
        add_rows_plain(self.acc, self.rows)
    }
}

/// Four rows at a time, in the order of memory; the sums stay in the first-level cache.
#[inline(always)]
fn add_rows_plain(acc: &mut [u32], rows: &[u32]) -> u32 {
    let width = acc.len();
    let mut high = 0;
    let mut fours = rows.chunks_exact(4 * width);
    for four in &mut fours {
        let (ab, cd) = four.split_at(2 * width);
        let ((a, b), (c, d)) = (ab.split_at(width), cd.split_at(width));
        for ((((sum, &a), &b), &c), &d) in acc.iter_mut().zip(a).zip(b).zip(c).zip(d) {
            let (ab, cd) = (a.wrapping_add(b), c.wrapping_add(d));
            let four = ab.wrapping_add(cd);
            *sum = sum.wrapping_add(four);
            high |= (a | b) | (c | d) | (ab | cd) | (four | *sum);
        }
    }
    for row in fours.remainder().chunks_exact(width) {
        high |= add_row(acc, row);
    }
    high
}

#[inline(always)]
fn add_row(acc: &mut [u32], row: &[u32]) -> u32 {
    acc.iter_mut().zip(row).fold(0, |high, (sum, &count)| {
        *sum = sum.wrapping_add(count);
        high | *sum | count
    })
}

/// Sum of `loads`, unless it exceeds [`MAX_TOKENS`].
pub(crate) fn total(loads: &[u32]) -> Option<u32> {
    let total: u64 = loads.iter().map(|&l| u64::from(l)).sum();
    u32::try_from(total).ok().filter(|&t| t <= MAX_TOKENS)
}

/// Column sums of `counts` into `loads` (`[E]`), for counts that a `Problem` has already checked.
pub(crate) fn column_sums(loads: &mut [u32], counts: &[u32]) {
    loads.fill(0);
    add_rows(loads, counts);
}
