//! The closed form: the largest of each part over all ranks, added up.
//!
//! ```text
//! T_dispatch = hop + max over r of max(sent[r], received[r] + incast excess[r]) / link      (scale-out beside it)
//! T_combine  = the same with every flow turned round
//! T_experts  = max over r of (fixed + sum over r's instances of (gemm + whole tiles))
//! ```
//!
//! `O(N + instances)` a pass.

use xxhash_rust::xxh64::Xxh64;

use crate::balancer::LayerLoad;
use crate::layer::{Direction, LayerModel, LayerTimes, LayerWork};

/// The model.
#[derive(Clone, Default)]
pub struct ClosedForm {
    digest: Xxh64,
}

impl ClosedForm {
    /// The parts of a pass that starts everywhere at once.
    pub fn times(work: &LayerWork, load: &LayerLoad, direction: Direction) -> LayerTimes {
        let ranks = || 0..load.ranks();
        let rest_ps = ranks().map(|rank| work.rest_ps(rank, direction)).max().unwrap_or(0);
        let experts_ps = ranks().map(|rank| work.experts_ps(load, rank, direction)).max().unwrap_or(0);
        let all_to_all_ps = all_to_all_ps(work, load, direction);
        let (plan_ps, sync_ps) = match direction {
            Direction::Forward => (work.plan_ps, ranks().map(|rank| work.sync_ps(load, rank)).max().unwrap_or(0)),
            Direction::Backward => (0, work.exposed_backward_ps(load)),
        };
        LayerTimes { rest_ps, plan_ps, sync_ps, all_to_all_ps, experts_ps }
    }
}

fn all_to_all_ps(work: &LayerWork, load: &LayerLoad, direction: Direction) -> u64 {
    let pass = work.pass(direction);
    let near = |sent: u64, received: u64, excess: u64| {
        let taking = received * pass.link_row_ps + excess * pass.incast_row_ps;
        taking.max(sent * pass.link_row_ps)
    };
    let (mut dispatch, mut combine, mut far) = (0, 0, 0);
    for r in 0..load.ranks() {
        dispatch = dispatch.max(near(load.sent[r], load.received[r], load.excess[r]));
        combine = combine.max(near(load.received[r], load.sent[r], load.excess_out[r]));
        far = far.max(load.sent_far[r].max(load.received_far[r]) * pass.far_row_ps);
    }
    let one_way = |near: u64| if near.max(far) == 0 { 0 } else { near.max(far) + work.hop_ps };
    one_way(dispatch) + one_way(combine)
}

impl LayerModel for ClosedForm {
    fn pass(&mut self, work: &LayerWork, load: &LayerLoad, direction: Direction, ready: &mut [u64]) -> LayerTimes {
        let times = Self::times(work, load, direction);
        let start = ready.iter().copied().max().unwrap_or(0);
        ready.fill(start + times.total_ps());
        for part in [times.rest_ps, times.plan_ps, times.sync_ps, times.all_to_all_ps, times.experts_ps] {
            self.digest.update(&part.to_le_bytes());
        }
        times
    }

    fn digest(&self) -> u64 {
        self.digest.digest()
    }
}
