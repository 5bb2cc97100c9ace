//! A small model on a small rack.
#![allow(dead_code, reason = "each test takes what it needs")]

use ultraep_baselines::{HistoryParams, LplbLinks, PolicyKind};
use ultraep_plan::TransferParams;
use ultraep_sim::{
    Attention, Batch, Calibrated, Jitter, Machine, Mistake, ModelSpec, Pipeline, ProcessParams, Recompute, StepSpec,
    SyncRule, System,
};

pub(crate) fn model() -> ModelSpec {
    ModelSpec {
        name: "small".to_string(),
        layers: 6,
        dense_layers: 1,
        hidden: 2048,
        dense_width: 4096,
        expert_width: 1024,
        experts: 32,
        shared_experts: 1,
        top_k: 4,
        vocabulary: 32_000,
        attention: Attention { heads: 16, kv_heads: 4, head_width: 128, latent: None },
        sources: vec!["made up".to_string()],
    }
}

pub(crate) fn machine() -> Machine {
    Machine {
        name: "small".to_string(),
        domain_ranks: 8,
        link_bytes_per_s: 900_000_000_000,
        scale_out_bytes_per_s: 50_000_000_000,
        memory_bytes_per_s: 8_000_000_000_000,
        memory_bytes: 186_000_000_000,
        hop_ns: 2_000,
        tile_rows: 128,
        gemm_ns: 3_000,
        chunk_bytes: 262_144,
        chunk_tokens: 256,
        count_ns: 10_000,
        reroute_ns: 37_000,
        sync_start_ns: 20_000,
        calibrated: Calibrated {
            forward_flops_per_s: 1_000_000_000_000_000,
            backward_flops_per_s: 1_000_000_000_000_000,
            backward_fixed_permille: 61,
            forward_a2a_bytes_per_s: 600_000_000_000,
            backward_a2a_bytes_per_s: 600_000_000_000,
            forward_incast_permille: 800,
            backward_incast_permille: 50,
            forward_element_fs: 40_000,
            backward_element_fs: 60_000,
            outside_permille: 300,
        },
        sources: Vec::new(),
    }
}

pub(crate) fn system(policy: PolicyKind) -> System {
    let sync = match policy {
        PolicyKind::None | PolicyKind::Ideal => SyncRule::Never,
        PolicyKind::Eplb => SyncRule::Placement { bytes_per_s: 64_000_000_000 },
        PolicyKind::Lplb => SyncRule::Collectives { start_ns: 100_000, bytes_per_s: 64_000_000_000 },
        _ => SyncRule::Transfers(TransferParams::default()),
    };
    let plan_ns = if matches!(sync, SyncRule::Transfers(_)) { 100_000 } else { 0 };
    let history = HistoryParams { window: 6, interval: 6 };
    System {
        name: policy.name().to_string(),
        policy,
        sync,
        plan_ns,
        min_quota: 64,
        history,
        max_variables: 512,
        links: LplbLinks::default(),
    }
}

pub(crate) fn step() -> StepSpec {
    let model = model();
    StepSpec {
        machine: machine(),
        ranks: 8,
        domain_ranks: 8,
        slots: 2,
        batch: Batch { tokens_per_rank: 4096, sequence: 2048 },
        pipeline: Pipeline { stages: 1, chunks: 1, microbatches: 2 },
        data_parallel: 1,
        groups_sampled: 1,
        recompute: Recompute::Nothing,
        layers_sampled: model.moe_layers(),
        process: ProcessParams {
            ranks: 8,
            experts: 32,
            tokens_per_rank: 4096,
            top_k: 4,
            skew_milli: 900,
            drift_milli: 300,
            spread_milli: 500,
            layer_spread_milli: 0,
            microbatch_spread_milli: 0,
            seed: 7,
        },
        recorded: None,
        speeds: Vec::new(),
        speeds_known: true,
        mistake: Mistake::None,
        jitter: Jitter::default(),
        model,
    }
}

/// 64 ranks with two of 128 experts each: the shape of the published experiments.
pub(crate) fn rack() -> StepSpec {
    let mut spec = step();
    (spec.model.experts, spec.model.top_k) = (128, 8);
    (spec.ranks, spec.domain_ranks, spec.machine.domain_ranks) = (64, 64, 64);
    spec.batch.tokens_per_rank = 8192;
    let StepSpec { model, batch, .. } = &spec;
    let (experts, top_k, tokens_per_rank) = (model.experts, model.top_k, batch.tokens_per_rank);
    spec.process = ProcessParams { ranks: 64, experts, tokens_per_rank, top_k, ..spec.process };
    spec
}
