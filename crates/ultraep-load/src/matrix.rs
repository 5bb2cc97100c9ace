//! The count matrix with its shape.

use ultraep_plan::{MAX_EXPERTS, MAX_RANKS, MAX_TOKENS, Rank, Topology};

/// Counts `lambda[r,e]`, `[N, E]` row-major: tokens of source rank `r` for logical expert `e`. Shape and total are within
/// the planner's limits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadMatrix {
    ranks: usize,
    experts: usize,
    counts: Vec<u32>,
}

/// Why counts are no [`LoadMatrix`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MatrixError {
    /// Rows outside `1..=MAX_RANKS`.
    #[error("{0} rows (source ranks): allowed are 1 to {MAX_RANKS}")]
    Rows(usize),
    /// Columns outside `1..=MAX_EXPERTS`.
    #[error("{0} columns (experts): allowed are 1 to {MAX_EXPERTS}")]
    Columns(usize),
    /// Rows times columns is not the number of counts.
    #[error("{got} counts for {rows} rows and {columns} columns")]
    Length {
        /// Counts given.
        got: usize,
        /// Rows.
        rows: usize,
        /// Columns.
        columns: usize,
    },
    /// More tokens than the planner serves.
    #[error("{0} tokens in all: allowed are up to {MAX_TOKENS}")]
    Total(u64),
}

impl LoadMatrix {
    /// Checks shape and total.
    pub fn new(ranks: usize, experts: usize, counts: Vec<u32>) -> Result<Self, MatrixError> {
        check_shape(ranks, experts)?;
        if counts.len() != ranks * experts {
            return Err(MatrixError::Length { got: counts.len(), rows: ranks, columns: experts });
        }
        let total = counts.iter().map(|&c| u64::from(c)).sum();
        if total > u64::from(MAX_TOKENS) { Err(MatrixError::Total(total)) } else { Ok(Self { ranks, experts, counts }) }
    }

    /// `N`, source ranks.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// `E`, logical experts.
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// All counts, `[N, E]` row-major.
    pub fn counts(&self) -> &[u32] {
        &self.counts
    }

    /// Counts of one source rank, `[E]`.
    pub fn row(&self, source: usize) -> &[u32] {
        &self.counts[source * self.experts..(source + 1) * self.experts]
    }

    /// Tokens in all.
    pub fn total(&self) -> u32 {
        self.counts.iter().sum()
    }

    /// Load of every expert over all sources, `[E]`.
    pub fn expert_loads(&self) -> Vec<u32> {
        let mut loads = vec![0; self.experts];
        for row in self.counts.chunks(self.experts) {
            loads.iter_mut().zip(row).for_each(|(load, &count)| *load += count);
        }
        loads
    }

    /// Load of every rank before balancing, `[N]`, with the homes of `topology` (of the same shape).
    pub fn rank_loads(&self, topology: &Topology) -> Vec<u32> {
        let experts = self.expert_loads();
        (0..self.ranks).map(|r| topology.masters(Rank::new(r)).map(|e| experts[e]).sum()).collect()
    }
}

fn check_shape(ranks: usize, experts: usize) -> Result<(), MatrixError> {
    if !(1..=MAX_RANKS).contains(&ranks) {
        return Err(MatrixError::Rows(ranks));
    }
    if !(1..=MAX_EXPERTS).contains(&experts) {
        return Err(MatrixError::Columns(experts));
    }
    Ok(())
}
