//! Logits of inference are those of the training-side forward, bit for bit, under every policy, number of ranks, cutting
//! into chunks and composition of batches.

use std::sync::Arc;
use std::time::Duration;

use candle_core::{Error, Result};
use ultraep_baselines::{PolicyKind, PolicyParams, Recipe};
use ultraep_device::attention::Rotary;
use ultraep_fabric::{Fabric, GroupSpec, Region, run_threads};
use ultraep_model::{
    ExpertParameters, ModelConfig, Parameters, RouterKind, SequenceCache, SequenceChunk, SharedExperts, Transformer,
    VOCABULARY, Wanted,
};
use ultraep_plan::{Topology, TopologySpec};
use ultraep_runtime::{Endpoint, ExpertParallel, LayerMasters, Link, Pass, Recompute, RuntimeConfig, TransferConfig};

const SEED: u64 = 11;
const SEQUENCES: usize = 3;
const TOKENS: usize = 75;

fn model_config() -> ModelConfig {
    ModelConfig {
        hidden: 32,
        heads: 2,
        layers: 2,
        experts: 8,
        top_k: 2,
        intermediate: 16,
        sequence_tokens: TOKENS,
        router: RouterKind::Softmax { aux_coefficient: 0.01 },
    }
}

fn runtime(ranks: usize, policy: PolicyKind, max_microbatches: usize) -> RuntimeConfig {
    let config = model_config();
    let group = TopologySpec { ranks, experts: config.experts, domain_ranks: ranks, slots_per_rank: 2 };
    RuntimeConfig {
        topology: Topology::new(group).unwrap(),
        layers: config.layers,
        max_microbatches,
        shape: config.expert_shape(),
        tokens_per_rank: SEQUENCES * TOKENS,
        top_k: config.top_k,
        policies: Recipe::all(&[policy], PolicyParams { min_quota: 1, ..Default::default() }),
        link: Link::default(),
        transfer: TransferConfig::default(),
        checked: true,
    }
}

fn text() -> Vec<u8> {
    (0..SEQUENCES * TOKENS).map(|i| (i * i % 251) as u8).collect()
}

fn experts(fabric: Box<dyn Fabric>, config: RuntimeConfig) -> Result<SharedExperts> {
    let own = config.topology.masters(fabric.rank());
    let init = ExpertParameters { shape: config.shape, layers: config.layers, seed: SEED };
    let grads = if config.trains() { own.len() * config.shape.weight_bytes() } else { 0 };
    let masters = |layer| LayerMasters {
        weights: Region::from_vec(init.weights(layer, own.clone())),
        grads: Region::zeroed(grads),
    };
    let masters = (0..config.layers).map(masters).collect();
    let endpoint = Endpoint::new(fabric, config.link);
    Ok(SharedExperts::new(ExpertParallel::new(config, endpoint, masters).map_err(Error::wrap)?))
}

fn leave(experts: SharedExperts) -> Result<()> {
    let experts = experts.into_inner().ok_or_else(|| Error::msg("still shared"))?;
    experts.into_endpoint().leave().map_err(Error::wrap)
}

fn group(config: &RuntimeConfig) -> GroupSpec {
    let ranks = config.topology.ranks();
    GroupSpec { windows: config.windows(), timeout: Duration::from_secs(20), ..GroupSpec::new(ranks) }
}

/// Logits of every token from the forward of training, `[sequences * tokens, 256]`.
fn training_side() -> Vec<f32> {
    let config = runtime(1, PolicyKind::None, 1);
    let run = |fabric| -> Result<Vec<f32>> {
        let experts = experts(fabric, config.clone())?;
        let parameters = Parameters::new(&model_config(), SEED)?;
        let model = Transformer::new(model_config(), &parameters, experts.clone())?;
        let (logits, aux) = model.forward(&text(), 0, Pass::Train(Recompute::Nothing))?;
        assert!(aux.is_some());
        let values = logits.flatten_all()?.to_vec1::<f32>()?;
        drop((model, logits, aux));
        leave(experts)?;
        Ok(values)
    };
    run_threads(&group(&config), run).unwrap_or_else(|error| panic!("{error}")).swap_remove(0)
}

/// Parts of sequences that run together: (rank, sequence, tokens).
type Plan<'a> = &'a [&'a [(usize, usize, usize)]];

/// The same logits, from inference in these batches.
fn inferred(ranks: usize, policy: PolicyKind, plan: Plan<'_>) -> Vec<f32> {
    let config = runtime(ranks, policy, 0);
    let rotary = Arc::new(Rotary::new(TOKENS, 16));
    let run = |fabric: Box<dyn Fabric>| -> Result<Vec<(usize, Vec<f32>)>> {
        let rank = fabric.rank().index();
        let experts = experts(fabric, config.clone())?;
        let parameters = Parameters::new(&model_config(), SEED)?;
        let model = Transformer::for_inference(model_config(), &parameters, experts.clone(), rotary.clone())?;
        let mut caches: Vec<_> = (0..SEQUENCES).map(|_| SequenceCache::new(&model_config(), TOKENS)).collect();
        let (text, mut rows) = (text(), Vec::new());
        for (number, batch) in plan.iter().enumerate() {
            let own = |sequence: usize| batch.iter().find(|p| (p.0, p.1) == (rank, sequence));
            let mut chunks = Vec::new();
            let mut first_rows = Vec::new();
            for (sequence, cache) in caches.iter_mut().enumerate() {
                if let Some(&(_, _, tokens)) = own(sequence) {
                    let first = sequence * TOKENS + cache.len();
                    first_rows.extend(first..first + tokens);
                    chunks.push(SequenceChunk { tokens: &text[first..first + tokens], cache, wanted: Wanted::All });
                }
            }
            let inferred = model.infer(&mut chunks, number as u64)?;
            assert_eq!(inferred.choices[1].len(), first_rows.len() * 2);
            rows.extend(first_rows.into_iter().zip(inferred.logits.chunks_exact(VOCABULARY).map(<[f32]>::to_vec)));
        }
        drop(model);
        leave(experts)?;
        Ok(rows)
    };
    let rows = run_threads(&group(&config), run).unwrap_or_else(|error| panic!("{error}"));
    let mut rows: Vec<_> = rows.into_iter().flatten().collect();
    rows.sort_by_key(|(row, _)| *row);
    assert!(rows.iter().map(|(row, _)| *row).eq(0..SEQUENCES * TOKENS), "every token once");
    rows.into_iter().flat_map(|(_, logits)| logits).collect()
}

#[test]
fn logits_are_those_of_training_under_every_policy_and_composition() {
    let reference = training_side();
    let whole: Plan<'_> = &[&[(0, 0, 75), (0, 1, 75), (0, 2, 75)]];
    assert!(inferred(1, PolicyKind::None, whole) == reference, "one rank, one batch");
    // Chunks of odd sizes, sequences that come and go, ranks without a token.
    let mixed: Plan<'_> = &[
        &[(0, 0, 10), (3, 1, 1)],
        &[(0, 0, 60), (3, 1, 7), (1, 2, 33)],
        &[(3, 1, 64)],
        &[(0, 0, 1), (3, 1, 3), (1, 2, 42)],
        &[(0, 0, 4)],
    ];
    let policies = [PolicyKind::None, PolicyKind::Ultraep, PolicyKind::EplbExact, PolicyKind::Eplb, PolicyKind::MoonEp];
    for policy in policies {
        assert!(inferred(4, policy, mixed) == reference, "four ranks, {policy}");
    }
    let spread: Plan<'_> = &[&[(0, 0, 75), (1, 1, 75)], &[(1, 2, 75)]];
    assert!(inferred(2, PolicyKind::Ultraep, spread) == reference, "two ranks");
}

#[test]
fn a_runtime_for_inference_has_no_memory_for_gradients_and_refuses_to_train() {
    let config = runtime(1, PolicyKind::Ultraep, 0);
    let bytes = |config: &RuntimeConfig, name| config.windows().into_iter().find(|w| w.name == name).unwrap().bytes;
    assert_eq!(bytes(&config, "slot_grads"), 0);
    assert!(bytes(&runtime(1, PolicyKind::Ultraep, 1), "slot_grads") > 0 && bytes(&config, "slot_weights") > 0);
    let run = |fabric| -> Result<String> {
        let experts = experts(fabric, config.clone())?;
        assert_eq!(experts.lock().manager.masters(0).grads.bytes(), 0);
        let parameters = Parameters::new(&model_config(), SEED)?;
        let model = Transformer::new(model_config(), &parameters, experts.clone())?;
        let refused = model.forward(&text(), 0, Pass::Train(Recompute::Nothing)).err().map(|e| e.to_string());
        let cache = &mut SequenceCache::new(&model_config(), 4);
        let mut chunks = [SequenceChunk { tokens: b"12345", cache, wanted: Wanted::Nothing }];
        assert!(model.infer(&mut chunks, 1).is_err(), "five tokens in a cache of four");
        drop(model);
        leave(experts)?;
        Ok(refused.unwrap_or_default())
    };
    let messages = run_threads(&group(&config), run).unwrap_or_else(|error| panic!("{error}"));
    assert!(messages[0].contains("inference only"), "{messages:?}");
}
