//! What historical policies remember: the experts' loads of the last few microbatches.

use ultraep_plan::Problem;

/// How long a historical policy remembers and how often it plans anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HistoryParams {
    /// Microbatches whose loads are summed for planning, at least 1.
    pub window: usize,
    /// Microbatches between two placements, at least 1.
    pub interval: usize,
}

impl Default for HistoryParams {
    /// Three, as in the paper's training runs (there: global batches).
    fn default() -> Self {
        Self { window: 3, interval: 3 }
    }
}

/// A ring of the last observed expert loads and their sum. Memory is taken once.
#[derive(Clone, Debug)]
pub struct History {
    params: HistoryParams,
    experts: usize,
    /// `[window, E]`, a ring.
    ring: Vec<u32>,
    /// Sum over the ring, `[E]`.
    sums: Vec<u64>,
    observed: u64,
}

impl History {
    /// An empty history of `experts` experts. A window or interval of 0 counts as 1.
    pub fn new(experts: usize, params: HistoryParams) -> Self {
        let params = HistoryParams { window: params.window.max(1), interval: params.interval.max(1) };
        Self { params, experts, ring: vec![0; params.window * experts], sums: vec![0; experts], observed: 0 }
    }

    /// Takes in a microbatch. True when it is time for a new placement: after every `interval` microbatches.
    pub fn observe(&mut self, problem: &Problem<'_>) -> bool {
        let start = (self.observed % self.params.window as u64) as usize * self.experts;
        let slot = &mut self.ring[start..start + self.experts];
        for (sum, old) in self.sums.iter_mut().zip(slot.iter_mut()) {
            *sum -= u64::from(core::mem::take(old));
        }
        for source in 0..problem.topology().ranks() {
            for (expert, &count) in problem.row(source).iter().enumerate().take(self.experts) {
                slot[expert] += count;
                self.sums[expert] += u64::from(count);
            }
        }
        self.observed += 1;
        self.observed.is_multiple_of(self.params.interval as u64)
    }

    /// Load of every expert over the window, `[E]`, in tokens.
    pub fn loads(&self) -> &[u64] {
        &self.sums
    }
}
