//! What historical policies have seen, so that a run that goes on from a checkpoint plans as if it had never stopped.
//!
//! A historical policy places anew every `interval` microbatches from the loads of the last `window`. With `period` a multiple of
//! both, all it knows after `n` microbatches follows from those since the last but one multiple of `period`: at most
//! `2 period` of them, and the first is where it would begin to count again.

use ultraep_baselines::{HistoryParams, PolicyKind, PolicyParams};

/// Expert loads of a layer's last microbatches.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Observed {
    period: usize,
    experts: usize,
    /// `[microbatches, E]`.
    loads: Vec<u32>,
}

impl Observed {
    /// Nothing seen. Remembers nothing when no policy is historical.
    pub(crate) fn new(kinds: &[PolicyKind], params: &PolicyParams, experts: usize) -> Self {
        let history = |kind: &PolicyKind| match kind {
            PolicyKind::Eplb => Some(params.eplb.history),
            PolicyKind::Lplb => Some(params.lplb.history),
            _ => None,
        };
        let lengths =
            kinds.iter().filter_map(history).flat_map(|HistoryParams { window, interval }| [window, interval]);
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
        let mut params = PolicyParams::default();
        params.eplb.history = HistoryParams { window: 2, interval: 3 };
        let mut observed = Observed::new(&[PolicyKind::None, PolicyKind::Eplb], &params, 1);
        for n in 1..100u32 {
            observed.push(&[n - 1]);
            let first = observed.loads()[0];
            assert!(first.is_multiple_of(6), "{n}: begins at {first}");
            assert_eq!(observed.loads(), (first..n).collect::<Vec<_>>());
            assert!(first == 0 || n > first + 6, "{n}: the placement at {} needs those before it", first + 6);
        }
        let mut nothing = Observed::new(&[PolicyKind::Ultraep], &params, 1);
        nothing.push(&[1]);
        assert!(nothing.loads().is_empty());
    }
}
