//! Statistics of the time to the first token.

use serde::{Deserialize, Serialize};

/// Time to the first token (TTFT) over requests, with what they amounted to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TtftSummary {
    /// Requests with a first token.
    pub served: usize,
    /// Mean, in nanoseconds.
    pub mean_ns: u64,
    /// Median, in nanoseconds.
    pub p50_ns: u64,
    /// 95th percentile, in nanoseconds.
    pub p95_ns: u64,
    /// 99th percentile, in nanoseconds.
    pub p99_ns: u64,
    /// Largest, in nanoseconds.
    pub max_ns: u64,
}

impl TtftSummary {
    /// Of these times, in any order; zeros when there are none.
    pub fn of(mut ttft_ns: Vec<u64>) -> Self {
        ttft_ns.sort_unstable();
        let count = ttft_ns.len();
        let sum: u128 = ttft_ns.iter().map(|&ns| u128::from(ns)).sum();
        Self {
            served: count,
            // A mean of 64-bit numbers has 64 bits.
            mean_ns: (sum / count.max(1) as u128) as u64,
            p50_ns: percentile(&ttft_ns, 50),
            p95_ns: percentile(&ttft_ns, 95),
            p99_ns: percentile(&ttft_ns, 99),
            max_ns: percentile(&ttft_ns, 100),
        }
    }
}

/// The least element of `sorted` that `percent` percent of all are not above (nearest rank); 0 of nothing.
pub fn percentile(sorted: &[u64], percent: usize) -> u64 {
    let rank = (sorted.len() * percent.min(100)).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_ranks() {
        let sorted: Vec<u64> = (1..=20).collect();
        assert_eq!([50, 95, 99, 100, 0].map(|p| percentile(&sorted, p)), [10, 19, 20, 20, 1]);
        assert_eq!(percentile(&[], 50), 0);
        let summary = TtftSummary::of(vec![30, 10, 20]);
        assert_eq!((summary.served, summary.mean_ns, summary.p50_ns, summary.max_ns), (3, 20, 20, 30));
        assert_eq!(TtftSummary::of(Vec::new()), TtftSummary::default());
    }
}
