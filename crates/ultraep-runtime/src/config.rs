//! What a runtime is built from, and the sizes that follow.

use std::fmt;
use std::sync::Arc;

use ultraep_device::ExpertShape;
use ultraep_fabric::stream::{Element, EngineSpec, ExpertLayout, LayoutError, Shard, Slots, TileSizes};
use ultraep_fabric::{WindowId, WindowSpec};
use ultraep_plan::{PolicyFactory, Rank, Topology, TransferParams};

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

/// How expert state is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TransferConfig {
    /// Who sends: mode, relay trees and their knobs.
    pub params: TransferParams,
    /// How weights are cut.
    pub weights: TileSizes,
    /// How gradients are cut.
    pub gradients: TileSizes,
    /// Latency of a hop in the model of the fabric that transfers are planned by, nanoseconds.
    pub hop_ns: u64,
    /// Worker threads of each rank that take part in weight sync, beside the rank's own.
    pub sync_workers: usize,
    /// Worker threads of each rank that do grad reduce beside its computation. With none, the rank's own thread does it when it
    /// needs the buffers again.
    pub reduce_workers: usize,
    /// See [`EngineSpec::streaming_from_bytes`].
    pub streaming_from_bytes: u64,
}

impl Default for TransferConfig {
    /// Adaptive; weight sync on the rank's own thread, for which it waits anyway, and one worker thread for grad reduce.
    fn default() -> Self {
        Self {
            params: TransferParams::default(),
            weights: TileSizes::WEIGHTS,
            gradients: TileSizes::GRADIENTS,
            hop_ns: 0,
            sync_workers: 0,
            reduce_workers: 1,
            streaming_from_bytes: EngineSpec::STREAMING_FROM_BYTES,
        }
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

    /// Places in the ring of plans for each layer: an inference keeps its plan while it runs.
    pub(crate) fn ring_places(&self) -> usize {
        self.max_microbatches.max(1)
    }

    /// Bytes of gradients beside this many bytes of weights.
    pub(crate) fn grad_bytes(&self, weight_bytes: usize) -> usize {
        if self.trains() { weight_bytes } else { 0 }
    }

    /// Places for physical experts on each rank, over all policies: masters, then slots, or more where a baseline's rules
    /// ask for it.
    pub(crate) fn physical_per_rank(&self) -> usize {
        self.policies.iter().map(|policy| policy.physical_per_rank(&self.topology)).max().unwrap_or(0)
    }

    /// Places for replicas on each rank. Ranks with fewer masters have the more slots, so that all windows are equal.
    pub fn slot_capacity(&self) -> usize {
        let masters = (0..self.topology.ranks()).map(|r| self.topology.masters(Rank::new(r)).len());
        self.physical_per_rank().saturating_sub(masters.min().unwrap_or(0))
    }

    /// Symmetric windows to start the fabric with. Memory is taken page by page as it is touched, so the worst case
    /// (every row of the group on one rank) costs address space, not memory.
    pub fn windows(&self) -> Vec<WindowSpec> {
        let slots = |slots: Result<Slots, LayoutError>| slots.ok().and_then(|slots| slots.window_bytes());
        // What has no size has more bytes than a group can be started with.
        let weight_bytes = slots(self.weight_slots()).unwrap_or(usize::MAX);
        let grad_bytes = self.grad_bytes(slots(self.grad_slots()).unwrap_or(usize::MAX));
        let row_bytes = self.shape.hidden * size_of::<f32>();
        let rows = self.rows_per_rank();
        let window = |name: &'static str, bytes: usize| WindowSpec { name: name.into(), bytes };
        vec![
            window("slot_weights", weight_bytes),
            window("slot_grads", grad_bytes),
            window("expert_rows", self.topology.ranks() * rows * row_bytes),
            window("source_rows", rows * row_bytes),
        ]
    }

    /// Experts as they are here: `f32`, fc1 and fc2 in one piece ([`ExpertShape`]).
    pub(crate) fn layout(&self) -> Result<ExpertLayout, LayoutError> {
        ExpertLayout::new(&[Shard::new(Element::F32, 1, self.shape.weight_len())])
    }

    /// Where replicas' weights are.
    pub(crate) fn weight_slots(&self) -> Result<Slots, LayoutError> {
        Ok(Slots::new(window::SLOT_WEIGHTS, self.layout()?, self.transfer.weights, self.slot_capacity()))
    }

    /// Where replicas' gradients are.
    pub(crate) fn grad_slots(&self) -> Result<Slots, LayoutError> {
        Ok(Slots::new(window::SLOT_GRADS, self.layout()?, self.transfer.gradients, self.slot_capacity()))
    }
}
