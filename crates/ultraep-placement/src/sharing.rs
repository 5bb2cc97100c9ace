//! What a map does with a load when every token of an expert goes to each of its copies alike, as engines do.
//!
//! Tokens are counted in [`Sharing::UNIT`]ths, so that a third of a token is no float: a copy's share is rounded down to a
//! unit, and sums are exact after that.

use ultraep_baselines::load_a_copy;

use crate::PlacementMap;
use crate::map::held;

/// Loads of the ranks under a map, and the tokens that leave their source, for one layer of one microbatch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sharing {
    /// Load of every rank, `[N]`, in [`Sharing::UNIT`]ths of a token.
    pub rank_loads: Vec<u64>,
    /// Tokens processed away from their source, in [`Sharing::UNIT`]ths; 0 where the sources are not given.
    pub remote: u64,
    /// Tokens in all.
    pub tokens: u64,
}

impl Sharing {
    /// Parts of a token that are counted.
    pub const UNIT: u64 = ultraep_baselines::LOAD_UNIT;

    /// Under row `row` of `map`, of `counts`, `[N, E]` row-major: tokens of each source rank for each expert. `None` when
    /// the counts are not of that shape, or an expert with tokens is nowhere.
    pub fn of_counts(map: &PlacementMap, row: usize, counts: &[u32]) -> Option<Self> {
        let shape = map.shape();
        if counts.len() != shape.ranks * shape.experts {
            return None;
        }
        let mut loads = vec![0_u64; shape.experts];
        for source in counts.chunks(shape.experts) {
            loads.iter_mut().zip(source).for_each(|(load, &count)| *load += u64::from(count));
        }
        let mut sharing = Self::of_loads(map, row, &loads)?;
        let copies = map.copies(row);
        let mut local = 0;
        for (rank, source) in counts.chunks(shape.experts).enumerate() {
            local += held(map.on(row, rank)).map(|e| load_a_copy(source[e].into(), copies[e])).sum::<u64>();
        }
        sharing.remote = (sharing.tokens * Self::UNIT).saturating_sub(local);
        Some(sharing)
    }

    /// Under row `row` of `map`, of the experts' loads, `[E]`; the sources are not known. `None` as above.
    pub fn of_loads(map: &PlacementMap, row: usize, loads: &[u64]) -> Option<Self> {
        let (shape, copies) = (map.shape(), map.copies(row));
        if loads.len() != shape.experts || loads.iter().zip(&copies).any(|(&load, &copies)| load > 0 && copies == 0) {
            return None;
        }
        let on = |rank| held(map.on(row, rank)).map(|e| load_a_copy(loads[e], copies[e])).sum();
        Some(Self { rank_loads: (0..shape.ranks).map(on).collect(), remote: 0, tokens: loads.iter().sum() })
    }

    /// Largest over mean rank load; 1 without tokens.
    pub fn imbalance(&self) -> f64 {
        let largest = self.rank_loads.iter().copied().max().unwrap_or(0);
        let total = self.tokens as f64 * Self::UNIT as f64;
        if self.tokens == 0 { 1.0 } else { largest as f64 * self.rank_loads.len() as f64 / total }
    }

    /// Tokens processed away from their source.
    pub fn remote_tokens(&self) -> f64 {
        self.remote as f64 / Self::UNIT as f64
    }
}
