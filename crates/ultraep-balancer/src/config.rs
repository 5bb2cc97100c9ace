//! What a balancer is built from, and the sizes that follow.

use std::sync::Arc;

use ultraep_fabric::stream::{EngineSpec, ExpertLayout, Slots, TileSizes};
use ultraep_fabric::{WindowId, WindowSpec};
use ultraep_plan::{PolicyFactory, Rank, SyncPlanner, Topology, TransferParams};

use crate::BalancerError;

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
    /// Worker threads of each rank that take part in weight sync, beside the rank's own. With none, a rank feeds its replicas only
    /// while it waits itself.
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

/// When a place in the ring of virtual layers is free again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Release {
    /// When the caller says so; a full ring is an error.
    #[default]
    Explicit,
    /// When it is the oldest of a full ring, as in the released package.
    Cyclic,
}

/// Sizes and choices of one balancer; the same on every rank.
#[derive(Clone, Debug)]
pub struct BalancerConfig {
    /// The EP group.
    pub topology: Topology,
    /// MoE layers.
    pub layers: usize,
    /// Virtual layers of one layer that are in flight at a time, at least 1: microbatches between forward and backward.
    pub in_flight: usize,
    /// When a virtual layer's place is free again.
    pub release: Release,
    /// Tensors of an expert's weights.
    pub weights: ExpertLayout,
    /// Tensors of its gradients; `None` for a balancer that only infers: it has no memory for them.
    pub gradients: Option<ExpertLayout>,
    /// Windows of the fabric for the slots' weights and gradients (the second stays unused when there are none), with the bytes
    /// that [`BalancerConfig::windows`] gives. Balancers of one group need windows of their own.
    pub window_ids: [WindowId; 2],
    /// Policies to plan with. The first is active at start.
    pub policies: Vec<Arc<dyn PolicyFactory>>,
    /// Bandwidth of a rank's link, by which transfers are planned: bytes a second in each direction.
    pub link_bytes_per_s: u64,
    /// How weights and gradients are moved.
    pub transfer: TransferConfig,
    /// Checked mode: every plan and split is checked and their digests are compared between ranks.
    pub checked: bool,
}

impl BalancerConfig {
    /// Places for physical experts on each rank, over all policies: masters, then slots, or more where a baseline's rules
    /// ask for it. Physical ids are `rank * physical_per_rank + physical index`.
    #[must_use]
    pub fn physical_per_rank(&self) -> usize {
        self.policies.iter().map(|policy| policy.physical_per_rank(&self.topology)).max().unwrap_or(0)
    }

    /// Places for replicas on each rank. Ranks with fewer masters have the more slots, so that all windows are equal.
    #[must_use]
    pub fn slot_capacity(&self) -> usize {
        let masters = (0..self.topology.ranks()).map(|r| self.topology.masters(Rank::new(r)).len());
        self.physical_per_rank().saturating_sub(masters.min().unwrap_or(0))
    }

    /// Where replicas' weights are.
    #[must_use]
    pub fn weight_slots(&self) -> Slots {
        Slots::new(self.window_ids[0], self.weights.clone(), self.transfer.weights, self.slot_capacity())
    }

    /// Where replicas' gradients are, if there are any.
    #[must_use]
    pub fn grad_slots(&self) -> Option<Slots> {
        let layout = self.gradients.clone()?;
        Some(Slots::new(self.window_ids[1], layout, self.transfer.gradients, self.slot_capacity()))
    }

    /// The two windows to start the fabric with: weights, gradients (0 bytes when there are none). What has no size has more bytes
    /// than a group can be started with.
    #[must_use]
    pub fn windows(&self) -> [WindowSpec; 2] {
        let bytes = |slots: Slots| slots.window_bytes().unwrap_or(usize::MAX);
        let window = |name: &str, bytes: usize| WindowSpec { name: name.to_owned(), bytes };
        let gradients = self.grad_slots().map_or(0, bytes);
        [window("slot_weights", bytes(self.weight_slots())), window("slot_grads", gradients)]
    }

    /// The planner of transfers for the experts, the link and the rule of this configuration.
    ///
    /// # Errors
    /// [`BalancerError::TransferModel`] when an expert has more chunks than a transfer may have, or the link is too slow.
    pub fn sync_planner(&self) -> Result<SyncPlanner, BalancerError> {
        let model = self.weight_slots().model(self.link_bytes_per_s, self.transfer.hop_ns)?;
        Ok(SyncPlanner::new(&self.topology, model, self.transfer.params)?)
    }
}
