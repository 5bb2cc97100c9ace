//! What historical policies have seen, so that a run that goes on from a checkpoint plans as if it had never stopped.
//!
//! A historical policy places anew every `interval` microbatches from the loads of the last `window`. With `period` a multiple of
//! both, all it knows after `n` microbatches follows from those since the last but one multiple of `period`: at most
//! `2 period` of them, and the first is where it would begin to count again.

use ultraep_plan::Lookback;

/// Expert loads of a layer's last microbatches.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Observed {
    period: usize,
    experts: usize,
    /// `[microbatches, E]`.
    loads: Vec<u32>,
}

impl Observed {
    /// Nothing seen, for the historical ones among the policies. Remembers nothing when there are none.
    pub(crate) fn new(historical: impl Iterator<Item = Lookback>, experts: usize) -> Self {
        let lengths = historical.flat_map(|Lookback { window, interval }| [window, interval]);
        let period = lengths.map(|length| length.max(1)).reduce(least_common_multiple).unwrap_or(0);
        Self { period, experts, loads: Vec::new() }
    }

    /// Takes in a microbatch, `[E]`.
    pub(crate) fn push(&mut self, loads: &[u32]) {
        if self.period == 0 {
            return;
        }
        if self.loads.len() >= 2 * self.period * self.experts {
            self.loads.drain(..self.period * self.experts);
        }
        self.loads.extend_from_slice(loads);
    }

    /// `[microbatches, E]`.
    pub(crate) fn loads(&self) -> &[u32] {
        &self.loads
    }
}

fn least_common_multiple(a: usize, b: usize) -> usize {
    let (mut x, mut y) = (a, b);
    while y > 0 {
        (x, y) = (y, x % y);
    }
    a / x * b
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_begins_at_a_whole_period_and_spans_the_last_placement() {
        let mut observed = Observed::new([Lookback { window: 2, interval: 3 }].into_iter(), 1);
        for n in 1..100u32 {
            observed.push(&[n - 1]);
            let first = observed.loads()[0];
            assert!(first.is_multiple_of(6), "{n}: begins at {first}");
            assert_eq!(observed.loads(), (first..n).collect::<Vec<_>>());
            assert!(first == 0 || n > first + 6, "{n}: the placement at {} needs those before it", first + 6);
        }
        let mut nothing = Observed::new(std::iter::empty(), 1);
        nothing.push(&[1]);
        assert!(nothing.loads().is_empty());
    }
}
