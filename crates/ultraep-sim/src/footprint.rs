//! What a rank's memory must hold, and whether it does.
//!
//! ```text
//! training (bf16 weights, fp32 gradients, AdamW in fp32 sharded over data parallelism), on the first pipeline stage
//!   weights, gradients   2 and 4 bytes a parameter: masters, and what every rank has (attention, router, shared experts,
//!                        embedding)
//!   optimizer            12 bytes a parameter; masters over the data-parallel groups, the rest over all their ranks
//!   slots                R experts, 2 + 4 bytes a parameter: once for all layers; for each layer where experts are placed
//!   kept                 for each microbatch in flight and layer: its input, 2 hidden a token; attention's tensors and two more
//!                        of width hidden, unless attention is recomputed; of every row its input, gate and up,
//!                        2 hidden + 4 width, unless the layer is
//!   working              one layer: attention's tensors, and of every row of the fullest rank also activation and output
//! prefill                weights, slots, one layer's working set, KV
//! ```
//!
//! Source for what a layer keeps: Korthikanti et al., arXiv 2205.05198, with a fused attention that keeps no scores and gates
//! applied before the last matrix, so that an expert's output is not kept. Left out: logits (the loss is taken in pieces),
//! communication buffers, fragmentation.

use serde::Serialize;

use crate::SimError;
use crate::balancer::SyncRule;
use crate::machine::Machine;
use crate::memory::ActivationPeaks;
use crate::model::ModelSpec;
use crate::pipeline::Schedule;
use crate::prefill::PrefillSpec;
use crate::step::{Recompute, StepSpec};

const WEIGHT_BYTES: u64 = 2;
const GRADIENT_BYTES: u64 = 4;
/// Weight in fp32 and two moments.
const OPTIMIZER_BYTES: u64 = 12;

/// Bytes on the fullest rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Footprint {
    /// Weights of masters and of what every rank has.
    pub weights_bytes: u64,
    /// Their gradients.
    pub gradients_bytes: u64,
    /// The rank's share of the optimizer's state.
    pub optimizer_bytes: u64,
    /// Replicas' weights and gradients.
    pub slots_bytes: u64,
    /// Activations kept for backward and the working set of one layer.
    pub activations_bytes: u64,
    /// Keys and values.
    pub kv_bytes: u64,
}

impl Footprint {
    /// All of it.
    pub fn total_bytes(&self) -> u64 {
        let Self { weights_bytes, gradients_bytes, optimizer_bytes, slots_bytes, activations_bytes, kv_bytes } = *self;
        [weights_bytes, gradients_bytes, optimizer_bytes, slots_bytes, activations_bytes, kv_bytes]
            .into_iter()
            .fold(0, u64::saturating_add)
    }

    /// Refuses what a rank of `machine` has no memory for.
    pub fn check(&self, machine: &Machine) -> Result<(), SimError> {
        let (needed_bytes, have_bytes) = (self.total_bytes(), machine.memory_bytes);
        if needed_bytes > have_bytes { Err(SimError::Memory { needed_bytes, have_bytes }) } else { Ok(()) }
    }

    /// Of a training step. `peaks` are rows of one microbatch over the layers sampled.
    pub(crate) fn training(spec: &StepSpec, sync: SyncRule, schedule: &Schedule, peaks: &ActivationPeaks) -> Self {
        let model = &spec.model;
        let parts = u64::from(spec.pipeline.stages * spec.pipeline.chunks);
        let layers = u64::from(model.layers).div_ceil(u64::from(spec.pipeline.stages));
        let (masters, dense) = parameters(model, u64::from(spec.ranks), layers);
        let groups = u64::from(spec.data_parallel);
        let sharded = masters.div_ceil(groups) + dense.div_ceil(groups * u64::from(spec.ranks));
        let replica = (WEIGHT_BYTES + GRADIENT_BYTES) * model.expert_parameters();
        // Layers of microbatches in flight: forward done, backward not.
        let kept_layers = u64::from(schedule.in_flight(0)) * u64::from(model.layers).div_ceil(parts);
        let tokens = u64::from(spec.batch.tokens_per_rank);
        let attention = match spec.recompute {
            Recompute::Nothing => 2 * bytes_of(model.hidden) + 2 * model.attention.activations(),
            Recompute::Attention | Recompute::Layer => 0,
        };
        let inputs = kept_layers.saturating_mul(tokens * (bytes_of(model.hidden) + attention));
        let row = bytes_of(model.hidden) + 2 * bytes_of(model.expert_width);
        let shared = tokens * u64::from(model.shared_experts) * 2 * bytes_of(model.expert_width);
        let sampled = u64::from(spec.layers_sampled.min(model.moe_layers()));
        let kept = match spec.recompute {
            Recompute::Layer => 0,
            Recompute::Nothing | Recompute::Attention => peaks
                .kept_over(sampled, kept_layers)
                .saturating_mul(row)
                .saturating_add(kept_layers.saturating_mul(shared)),
        };
        Self {
            weights_bytes: WEIGHT_BYTES * (masters + dense),
            gradients_bytes: GRADIENT_BYTES * (masters + dense),
            optimizer_bytes: OPTIMIZER_BYTES * sharded,
            slots_bytes: slots(spec.slots, replica, sync, layers),
            activations_bytes: inputs.saturating_add(kept).saturating_add(working(model, tokens, peaks.layer_rows)),
            kv_bytes: 0,
        }
    }

    /// Of serving prefill with a KV cache of `kv_tokens` tokens. Buffers are sized at the start, for the worst batch: all its
    /// tokens choose the experts of one rank.
    pub fn prefill(spec: &PrefillSpec, sync: SyncRule, kv_tokens: u64) -> Self {
        let model = &spec.model;
        let layers = u64::from(model.layers);
        let ranks = spec.limits.ranks as u64;
        let (masters, dense) = parameters(model, ranks, layers);
        let instances = u64::from(model.experts).div_ceil(ranks) + u64::from(spec.slots);
        let rows = u64::from(spec.limits.chunk_tokens) * instances.min(u64::from(model.top_k));
        let tokens = u64::from(spec.limits.chunk_tokens_per_rank());
        Self {
            weights_bytes: WEIGHT_BYTES * (masters + dense),
            kv_bytes: kv_tokens.saturating_mul(kv_token_bytes(model)),
            slots_bytes: slots(spec.slots, model.expert_bytes(), sync, layers),
            activations_bytes: working(model, tokens, rows),
            ..Self::default()
        }
    }

    /// Tokens of a KV cache for which a rank has room beside all else.
    pub fn kv_room_tokens(spec: &PrefillSpec, sync: SyncRule) -> u64 {
        let others = Self::prefill(spec, sync, 0).total_bytes();
        spec.machine.memory_bytes.saturating_sub(others) / kv_token_bytes(&spec.model).max(1)
    }
}

/// Parameters of masters and of what every rank has, on a stage of `layers` layers (with the embedding).
fn parameters(model: &ModelSpec, ranks: u64, layers: u64) -> (u64, u64) {
    let with_experts = layers.min(u64::from(model.moe_layers()));
    let masters = with_experts * u64::from(model.experts).div_ceil(ranks) * model.expert_parameters();
    let shared = u64::from(model.shared_experts) * model.expert_parameters();
    let router = u64::from(model.hidden) * u64::from(model.experts);
    let attention = model.attention.parameters(model.hidden);
    let without = (layers - with_experts) * 3 * u64::from(model.hidden) * u64::from(model.dense_width);
    let embedding = u64::from(model.hidden) * u64::from(model.vocabulary);
    let embeddings = if layers == u64::from(model.layers) { 2 * embedding } else { embedding };
    (masters, layers * attention + with_experts * (shared + router) + without + embeddings)
}

fn slots(slots: u32, replica_bytes: u64, sync: SyncRule, layers: u64) -> u64 {
    let once = u64::from(slots) * replica_bytes;
    match sync {
        SyncRule::Never => 0,
        SyncRule::Transfers(_) | SyncRule::Collectives { .. } => once,
        SyncRule::Placement { .. } => once.saturating_mul(layers),
    }
}

/// One layer: tokens through attention, rows through experts.
fn working(model: &ModelSpec, tokens: u64, rows: u64) -> u64 {
    let (hidden, width) = (bytes_of(model.hidden), bytes_of(model.expert_width));
    let attention = 2 * hidden + 2 * model.attention.activations();
    tokens.saturating_mul(attention).saturating_add(rows.saturating_mul(2 * hidden + 3 * width))
}

fn kv_token_bytes(model: &ModelSpec) -> u64 {
    2 * u64::from(model.layers) * model.attention.kv_width()
}

/// A row of bf16.
fn bytes_of(width: u32) -> u64 {
    2 * u64::from(width)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peaks(kept_rows: u64, kept_mean_rows: u64) -> ActivationPeaks {
        ActivationPeaks { kept_rows, kept_mean_rows, layer_rows: 0, layer_mean_rows: 0 }
    }

    #[test]
    fn what_is_above_the_mean_grows_with_the_root_of_the_layers() {
        assert_eq!(peaks(1500, 1000).kept_over(10, 10), 1500);
        assert_eq!(peaks(1500, 1000).kept_over(10, 40), 4000 + 1000);
        assert_eq!(peaks(1000, 1000).kept_over(1, 94), 94_000);
        assert_eq!(peaks(0, 0).kept_over(0, 94), 0);
    }
}
