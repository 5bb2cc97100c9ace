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
    /// The larger of both, part by part.
    pub fn max(self, other: Self) -> Self {
        let kept = if self.kept_rows >= other.kept_rows { self } else { other };
        let layer = if self.layer_rows >= other.layer_rows { self } else { other };
        Self { layer_rows: layer.layer_rows, layer_mean_rows: layer.layer_mean_rows, ..kept }
    }
}
