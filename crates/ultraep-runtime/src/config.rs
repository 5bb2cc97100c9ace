//! What a runtime is built from, and the sizes that follow.

use std::fmt;
use std::sync::Arc;

use ultraep_balancer::{BalancerConfig, Release, TransferConfig};
use ultraep_device::ExpertShape;
use ultraep_fabric::stream::{Element, ExpertLayout, LayoutError, Shard};
use ultraep_fabric::{WindowId, WindowSpec};
use ultraep_plan::{PolicyFactory, SyncPlanner, Topology};

use crate::RuntimeError;

/// Bandwidth of a rank's link to the scale-up fabric, one direction.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    gbps: f64,
}

impl Link {
    /// 25 GB/s: what one core of a current server copies between two ranks' memory. The machine's memory is the scale-up
    /// fabric here, so this is the link that a rank of a run on this machine really has.
    pub const DEFAULT_GBPS: f64 = 200.0;

    /// A link of `gbps` gigabits a second. `None` unless it is finite and positive.
    pub fn new(gbps: f64) -> Option<Self> {
        (gbps.is_finite() && gbps > 0.0).then_some(Self { gbps })
    }

    /// Bytes a second, at least 1.
    pub fn bytes_per_s(self) -> u64 {
        ((self.gbps * 1e9 / 8.0) as u64).max(1)
    }

    /// Nanoseconds that `bytes` take, rounded up.
    pub fn transfer_ns(self, bytes: u64) -> u64 {
        (bytes as f64 * 8.0 / self.gbps).ceil() as u64
    }
}

impl Default for Link {
    fn default() -> Self {
        Self { gbps: Self::DEFAULT_GBPS }
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} Gbit/s", self.gbps)
    }
}

/// Sizes and choices of one rank's runtime; the same on every rank.
#[derive(Clone, Debug)]
pub struct RuntimeConfig {
    /// The EP group.
    pub topology: Topology,
    /// MoE layers.
    pub layers: usize,
    /// Microbatches between forward and backward at the same time; 0 for a runtime that only infers: it has no memory for
    /// gradients, its masters are registered without any, and it refuses [`crate::Pass::Train`].
    pub max_microbatches: usize,
    /// Sizes of an expert.
    pub shape: ExpertShape,
    /// Most tokens a rank routes in a microbatch.
    pub tokens_per_rank: usize,
    /// Experts a token chooses.
    pub top_k: usize,
    /// Policies to plan with. The first is active at start; others can be switched to between microbatches.
    pub policies: Vec<Arc<dyn PolicyFactory>>,
    /// Bandwidth that the virtual clock charges.
    pub link: Link,
    /// How weights and gradients are moved.
    pub transfer: TransferConfig,
    /// Checked mode: every plan and split is checked and their digests are compared between ranks.
    pub checked: bool,
}

/// Symmetric windows of a runtime, in the order of [`RuntimeConfig::windows`].
pub(crate) mod window {
    use super::WindowId;

    /// Weights of the replicas in the slots.
    pub(crate) const SLOT_WEIGHTS: WindowId = WindowId::new(0);
    /// Gradients of the replicas in the slots.
    pub(crate) const SLOT_GRADS: WindowId = WindowId::new(1);
    /// Rows that arrive at their experts.
    pub(crate) const EXPERT_ROWS: WindowId = WindowId::new(2);
    /// Rows that come back to their source.
    pub(crate) const SOURCE_ROWS: WindowId = WindowId::new(3);
}

impl RuntimeConfig {
    /// Rows a source sends in one microbatch: tokens times top-k.
    pub fn rows_per_rank(&self) -> usize {
        self.tokens_per_rank * self.top_k
    }

    /// Whether there will be backward passes.
    pub fn trains(&self) -> bool {
        self.max_microbatches > 0
    }

    /// Bytes of gradients beside this many bytes of weights.
    pub(crate) fn grad_bytes(&self, weight_bytes: usize) -> usize {
        if self.trains() { weight_bytes } else { 0 }
    }

    /// The balancer of a rank.
    ///
    /// # Errors
    /// [`RuntimeError::Layout`] when an expert has no size.
    pub fn balancer(&self) -> Result<BalancerConfig, RuntimeError> {
        let weights = self.layout()?;
        Ok(BalancerConfig {
            topology: self.topology.clone(),
            layers: self.layers,
            // An inference keeps its plan while it runs.
            in_flight: self.max_microbatches.max(1),
            release: Release::Explicit,
            gradients: self.trains().then(|| weights.clone()),
            weights,
            window_ids: [window::SLOT_WEIGHTS, window::SLOT_GRADS],
            policies: self.policies.clone(),
            link_bytes_per_s: self.link.bytes_per_s(),
            transfer: self.transfer,
            checked: self.checked,
        })
    }

    /// As [`BalancerConfig::sync_planner`]: training, serving and the benchmarks that replay them ask this one.
    ///
    /// # Errors
    /// [`RuntimeError`] when an expert has no size or more chunks than a transfer may have.
    pub fn sync_planner(&self) -> Result<SyncPlanner, RuntimeError> {
        self.balancer()?.sync_planner()
    }

    /// Symmetric windows to start the fabric with. Memory is taken page by page as it is touched, so the worst case
    /// (every row of the group on one rank) costs address space, not memory.
    pub fn windows(&self) -> Vec<WindowSpec> {
        // What has no size has more bytes than a group can be started with.
        let row_bytes = self.shape.hidden.checked_mul(size_of::<f32>());
        let bytes = |rows: Option<usize>| rows.and_then(|rows| rows.checked_mul(row_bytes?)).unwrap_or(usize::MAX);
        let rows = self.tokens_per_rank.checked_mul(self.top_k);
        let window = |name: &str, bytes: usize| WindowSpec { name: name.into(), bytes };
        let slots = self.balancer().map(|balancer| balancer.windows());
        let slots = slots.unwrap_or_else(|_| [window("slot_weights", usize::MAX), window("slot_grads", usize::MAX)]);
        let all_rows = rows.and_then(|rows| rows.checked_mul(self.topology.ranks()));
        let rows = [window("expert_rows", bytes(all_rows)), window("source_rows", bytes(rows))];
        slots.into_iter().chain(rows).collect()
    }

    /// Experts as they are here: `f32`, fc1 and fc2 in one piece ([`ExpertShape`]).
    pub(crate) fn layout(&self) -> Result<ExpertLayout, LayoutError> {
        ExpertLayout::new(&[Shard::new(Element::F32, 1, self.shape.weight_len())])
    }
}
