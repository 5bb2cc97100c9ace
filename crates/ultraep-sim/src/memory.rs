//! Activation memory of the experts: rows on the fullest rank, against the mean.

use crate::balancer::LayerLoad;

/// Peaks over ranks, in rows (a token through one expert).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ActivationPeaks {
    /// Most rows that one rank keeps when all layers of a microbatch are kept for backward.
    pub kept_rows: u64,
    /// The mean over ranks of the same.
    pub kept_mean_rows: u64,
    /// Most rows that one rank holds in any one layer (prefill; training that recomputes).
    pub layer_rows: u64,
    /// The mean over ranks, in that layer.
    pub layer_mean_rows: u64,
}

/// Peaks of one microbatch over the layers of a rank.
pub fn activation_peaks<'a>(layers: impl IntoIterator<Item = &'a LayerLoad>) -> ActivationPeaks {
    let mut kept: Vec<u64> = Vec::new();
    let mut peaks = ActivationPeaks::default();
    for load in layers {
        kept.resize(kept.len().max(load.ranks()), 0);
        for (rank, kept) in kept.iter_mut().enumerate().take(load.ranks()) {
            *kept += load.rank_rows(rank);
        }
        if load.largest() > peaks.layer_rows {
            peaks.layer_rows = load.largest();
            peaks.layer_mean_rows = load.total / load.ranks().max(1) as u64;
        }
    }
    peaks.kept_rows = kept.iter().copied().max().unwrap_or(0);
    peaks.kept_mean_rows = kept.iter().sum::<u64>() / kept.len().max(1) as u64;
    peaks
}

impl ActivationPeaks {
    /// Rows that a rank keeps over `layers` layers where `sampled` of them stand for all: the mean grows with the layers, what is
    /// above it with their root, since which rank is hot differs from layer to layer.
    pub(crate) fn kept_over(&self, sampled: u64, layers: u64) -> u64 {
        let sampled = sampled.max(1);
        let above = u128::from(self.kept_rows.saturating_sub(self.kept_mean_rows));
        let mean = u128::from(self.kept_mean_rows) * u128::from(layers);
        let rows = (mean + above * u128::from((layers * sampled).isqrt())) / u128::from(sampled);
        u64::try_from(rows).unwrap_or(u64::MAX)
    }

    /// The larger of both, part by part.
    pub fn max(self, other: Self) -> Self {
        let kept = if self.kept_rows >= other.kept_rows { self } else { other };
        let layer = if self.layer_rows >= other.layer_rows { self } else { other };
        Self { layer_rows: layer.layer_rows, layer_mean_rows: layer.layer_mean_rows, ..kept }
    }
}
