//! One layer's exact load in one microbatch, checked before anything is planned.

use crate::{MAX_TOKENS, Topology};

/// Counts `lambda[r,e]` of a group: tokens of source rank `r` for logical expert `e`, `[N, E]` row-major.
#[derive(Clone, Copy, Debug)]
pub struct Problem<'a> {
    topology: &'a Topology,
    counts: &'a [u32],
    total: u32,
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
            Ok(total) if total <= MAX_TOKENS => Ok(Self { topology, counts, total }),
            _ => Err(ProblemError::TooManyTokens(total)),
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
}
