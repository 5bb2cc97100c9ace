//! Synthetic workloads, from a seed.
//!
//! Every workload is a weight for each (source, expert), in integers. A source's tokens are shared over the experts in
//! proportion to its weights, so that its row sum is exactly tokens times top-k and no cell exceeds its tokens (the
//! experts of one token are distinct). Workloads with a target ratio mix an even load with a skewed one and bisect the
//! mixture until the largest rank load over the mean meets the target within 1%.

mod rows;
mod shapes;
mod workload;

use ultraep_plan::{MAX_TOKENS, Ratio, Topology};

use crate::matrix::{LoadMatrix, MatrixError};
use rows::Sources;
use shapes::{MAX_SHARPNESS, Shape, random};
pub use workload::{ParseWorkloadError, Workload};

/// What a workload is made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadParams {
    /// Tokens of a source rank (the mean where sources are ragged).
    pub tokens_per_rank: u32,
    /// Experts that each token chooses; at most the group's experts.
    pub top_k: u32,
    /// Largest rank load over the mean before balancing, for workloads that take a target.
    pub ratio: Ratio,
    /// Equal seeds give equal loads on every machine.
    pub seed: u64,
    /// Microbatch, for workloads that move with time.
    pub microbatch: u32,
}

/// Why no load was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GenerateError {
    /// A token cannot choose that many distinct experts.
    #[error("top-{top_k}: allowed are 1 to {experts}, the experts")]
    TopK {
        /// Asked for.
        top_k: u32,
        /// `E`.
        experts: usize,
    },
    /// More tokens than a problem may hold.
    #[error("{0} tokens in all: allowed are up to {MAX_TOKENS}")]
    Tokens(u64),
    /// The workload cannot be so skewed (a token's experts are distinct), or so even (tokens are few).
    #[error("ratio {target}: this workload reaches {least_permille} to {most_permille} thousandths here")]
    Ratio {
        /// Asked for.
        target: Ratio,
        /// Least ratio within reach, in thousandths, rounded down.
        least_permille: u64,
        /// Largest ratio within reach, in thousandths, rounded down.
        most_permille: u64,
    },
    /// The group is larger than a matrix may be.
    #[error(transparent)]
    Matrix(#[from] MatrixError),
}

/// Parts of the mixture between even (0) and skewed.
const FULL_SKEW: u32 = 1 << 16;

/// The load of `workload` in microbatch `params.microbatch`.
pub fn generate(workload: Workload, topology: &Topology, params: &LoadParams) -> Result<LoadMatrix, GenerateError> {
    if params.top_k == 0 || params.top_k as usize > topology.experts() {
        return Err(GenerateError::TopK { top_k: params.top_k, experts: topology.experts() });
    }
    let choices = u64::from(params.tokens_per_rank) * u64::from(params.top_k);
    let total = choices.saturating_mul(topology.ranks() as u64);
    // Ragged sources have up to 7/4 of the mean.
    if total.saturating_mul(7) / 4 > u64::from(MAX_TOKENS) {
        return Err(GenerateError::Tokens(total));
    }
    let sources = Sources::new(workload, topology, params);
    if !workload.takes_ratio(params.microbatch) {
        let shape = Shape::of(workload, topology, params, 1);
        return matrix(topology, sources.counts(&shape, FULL_SKEW, 0));
    }
    let mut least = u64::MAX;
    let mut most = 0;
    for sharpness in 1..=MAX_SHARPNESS {
        let shape = Shape::of(workload, topology, params, sharpness);
        // Sources that differ less reach ratios closer to even.
        for noise in [256, 64, 16, 0] {
            let made = |skew| matrix(topology, sources.counts(&shape, skew, noise));
            let permille = |m: &LoadMatrix| imbalance_permille(m, topology);
            let (even, skewed) = (made(0)?, made(FULL_SKEW)?);
            (least, most) = (least.min(permille(&even)), most.max(permille(&skewed)));
            if meets(&skewed, topology, params.ratio) {
                return Ok(skewed);
            }
            if over(&skewed, topology, params.ratio) && !over(&even, topology, params.ratio) {
                let found = bisect(made, |m| over(m, topology, params.ratio))?;
                if let Some(found) = found.into_iter().find(|m| meets(m, topology, params.ratio)) {
                    return Ok(found);
                }
            }
        }
    }
    Err(GenerateError::Ratio { target: params.ratio, least_permille: least, most_permille: most })
}

/// The two loads at neighbouring mixtures of which the first is not over the target and the second is.
fn bisect(
    made: impl Fn(u32) -> Result<LoadMatrix, GenerateError>,
    over: impl Fn(&LoadMatrix) -> bool,
) -> Result<[LoadMatrix; 2], GenerateError> {
    let (mut low, mut high) = (0, FULL_SKEW);
    while high - low > 1 {
        let middle = low.midpoint(high);
        if over(&made(middle)?) {
            high = middle;
        } else {
            low = middle;
        }
    }
    Ok([made(low)?, made(high)?])
}

fn matrix(topology: &Topology, counts: Vec<u32>) -> Result<LoadMatrix, GenerateError> {
    Ok(LoadMatrix::new(topology.ranks(), topology.experts(), counts)?)
}

/// The imbalance as a quotient, to be multiplied out.
fn imbalance(matrix: &LoadMatrix, topology: &Topology) -> (u128, u128) {
    let (largest, total) = ultraep_plan::measure::imbalance(matrix.rank_loads(topology));
    (largest.into(), total.into())
}

fn imbalance_permille(matrix: &LoadMatrix, topology: &Topology) -> u64 {
    let (largest, total) = imbalance(matrix, topology);
    (largest * 1000 / total) as u64
}

fn over(matrix: &LoadMatrix, topology: &Topology, target: Ratio) -> bool {
    let (largest, total) = imbalance(matrix, topology);
    largest * u128::from(target.den()) > total * u128::from(target.num())
}

/// Whether the imbalance is the target within 1%.
fn meets(matrix: &LoadMatrix, topology: &Topology, target: Ratio) -> bool {
    let (largest, total) = imbalance(matrix, topology);
    let (got, wanted) = (largest * u128::from(target.den()), total * u128::from(target.num()));
    got.abs_diff(wanted) * 100 <= wanted
}
