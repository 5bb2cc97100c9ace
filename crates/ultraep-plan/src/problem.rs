//! One layer's exact load in one microbatch, checked before anything is planned.

use crate::tally::{Tally, column_sums};
use crate::{MAX_TOKENS, Rank, Topology};

/// Counts `lambda[r,e]` of a group: tokens of source rank `r` for logical expert `e`, `[N, E]` row-major.
#[derive(Clone, Copy, Debug)]
pub struct Problem<'a> {
    topology: &'a Topology,
    counts: &'a [u32],
    total: u32,
    tally: Option<&'a Tally>,
}

/// Why counts were refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProblemError {
    /// The matrix is not `[N, E]`.
    #[error("{got} counts: a group of {ranks} ranks and {experts} experts has {}", ranks * experts)]
    Shape {
        /// Length of the slice.
        got: usize,
        /// `N`.
        ranks: usize,
        /// `E`.
        experts: usize,
    },
    /// More tokens than [`MAX_TOKENS`].
    #[error("{0} tokens in one problem: allowed are up to {MAX_TOKENS}")]
    TooManyTokens(u64),
    /// A row does not have the number of tokens its source said it routed.
    #[error("source rank {rank} counts {got} tokens; it routed {expected}")]
    RowSum {
        /// The source rank.
        rank: usize,
        /// Sum of its row.
        got: u64,
        /// What was expected.
        expected: u64,
    },
}

impl<'a> Problem<'a> {
    /// Checks shape and total of `counts`, `[N, E]` row-major.
    pub fn new(topology: &'a Topology, counts: &'a [u32]) -> Result<Self, ProblemError> {
        let (ranks, experts) = (topology.ranks(), topology.experts());
        if counts.len() != ranks * experts {
            return Err(ProblemError::Shape { got: counts.len(), ranks, experts });
        }
        let total: u64 = counts.iter().map(|&c| u64::from(c)).sum();
        match u32::try_from(total) {
            Ok(total) if total <= MAX_TOKENS => Ok(Self { topology, counts, total, tally: None }),
            _ => Err(ProblemError::TooManyTokens(total)),
        }
    }

    /// As [`Problem::new`], in one pass that also leaves the column sums in `tally`, where solvers and the split of
    /// `source` (the caller's own rank) find them. The fastest way to plan; the plan is the same.
    ///
    /// # Panics
    /// When `source` is no rank of the group.
    pub fn tallied(
        topology: &'a Topology,
        counts: &'a [u32],
        source: Rank,
        tally: &'a mut Tally,
    ) -> Result<Self, ProblemError> {
        let (ranks, experts) = (topology.ranks(), topology.experts());
        if counts.len() != ranks * experts {
            return Err(ProblemError::Shape { got: counts.len(), ranks, experts });
        }
        assert!(source.index() < ranks, "source {source} of a group of {ranks} ranks");
        match tally.fill(topology, counts, source) {
            Some(total) => Ok(Self { topology, counts, total, tally: Some(tally) }),
            None => Err(ProblemError::TooManyTokens(counts.iter().map(|&c| u64::from(c)).sum())),
        }
    }

    /// As [`Problem::new`], and checks each row against the tokens that its source routed (tokens times top-k).
    pub fn with_row_sums(
        topology: &'a Topology,
        counts: &'a [u32],
        row_sums: impl IntoIterator<Item = u64>,
    ) -> Result<Self, ProblemError> {
        let problem = Self::new(topology, counts)?;
        for (rank, expected) in row_sums.into_iter().enumerate().take(topology.ranks()) {
            let got = problem.row(rank).iter().map(|&c| u64::from(c)).sum();
            if got != expected {
                return Err(ProblemError::RowSum { rank, got, expected });
            }
        }
        Ok(problem)
    }

    /// The group.
    #[inline]
    pub fn topology(&self) -> &'a Topology {
        self.topology
    }

    /// `lambda`, `[N, E]` row-major.
    #[inline]
    pub fn counts(&self) -> &'a [u32] {
        self.counts
    }

    /// Counts of one source rank, `[E]`.
    #[inline]
    pub fn row(&self, source: usize) -> &'a [u32] {
        let experts = self.topology.experts();
        &self.counts[source * experts..(source + 1) * experts]
    }

    /// Tokens in all.
    #[inline]
    pub fn total(&self) -> u32 {
        self.total
    }

    /// `lambda[e]` of every expert into `loads`, `[E]`.
    ///
    /// # Panics
    /// When `loads` does not hold one number for each expert.
    pub fn expert_loads(&self, loads: &mut [u32]) {
        assert_eq!(loads.len(), self.topology.experts(), "one load for each expert");
        match self.tally {
            Some(tally) => loads.copy_from_slice(tally.loads()),
            None => column_sums(loads, self.counts),
        }
    }

    /// Tokens of every expert from sources of lower rank than `source` into `before`, `[E]`.
    ///
    /// # Panics
    /// When `before` does not hold one number for each expert, or `source` is no rank of the group.
    pub fn tokens_before(&self, source: Rank, before: &mut [u32]) {
        assert_eq!(before.len(), self.topology.experts(), "one number for each expert");
        match self.tally {
            Some(tally) if tally.source() == source => before.copy_from_slice(tally.before()),
            _ => column_sums(before, &self.counts[..source.index() * self.topology.experts()]),
        }
    }
}
