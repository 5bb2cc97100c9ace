//! The layer as another candle model would use it, through public names only, against the same layer in plain tensors.

use std::time::Duration;

use candle_core::{D, DType, Device, Error, Result, Tensor, Var};
use ultraep_baselines::{PolicyKind, PolicyParams, Recipe};
use ultraep_device::ExpertShape;
use ultraep_fabric::{Fabric, GroupSpec, Region, run_threads};
use ultraep_model::{ExpertParameters, MoeLayer, Router, RouterKind, SharedExperts};
use ultraep_plan::{Topology, TopologySpec};
use ultraep_runtime::{Endpoint, ExpertParallel, LayerMasters, Link, Pass, Recompute, RuntimeConfig, TransferConfig};

const RANKS: usize = 2;
const EXPERTS: usize = 5;
const TOP_K: usize = 2;
const TOKENS: usize = 24;
const SHAPE: ExpertShape = ExpertShape { hidden: 12, intermediate: 10 };
const INIT: ExpertParameters = ExpertParameters { shape: SHAPE, layers: 1, seed: 5 };

fn config() -> RuntimeConfig {
    let group = TopologySpec { ranks: RANKS, experts: EXPERTS, domain_ranks: RANKS, slots_per_rank: 2 };
    RuntimeConfig {
        topology: Topology::new(group).unwrap(),
        layers: 1,
        max_microbatches: 1,
        shape: SHAPE,
        tokens_per_rank: TOKENS,
        top_k: TOP_K,
        policies: Recipe::all(&[PolicyKind::Ultraep], PolicyParams { min_quota: 1, ..PolicyParams::default() }),
        link: Link::default(),
        transfer: TransferConfig::default(),
        checked: true,
    }
}

fn wave(rows: usize, cols: usize, step: f32) -> Result<Tensor> {
    let values: Vec<f32> = (0..rows * cols).map(|i| ((i as f32 + 1.0) * step).sin()).collect();
    Tensor::from_vec(values, (rows, cols), &Device::Cpu)
}

/// What a rank's model holds: input, projection of the router, and the gradient that comes from above.
fn model(rank: usize) -> Result<(Var, Var, Tensor)> {
    let x = Var::from_tensor(&wave(TOKENS, SHAPE.hidden, 0.37 + rank as f32)?)?;
    let projection = Var::from_tensor(&wave(SHAPE.hidden, EXPERTS, 0.91)?)?;
    Ok((x, projection, wave(TOKENS, SHAPE.hidden, 0.53 + rank as f32)?))
}

/// Output, gradient of the input, gradient of the projection.
type Outcome = [Vec<f32>; 3];

fn outcome(y: &Tensor, x: &Var, projection: &Var, dy: &Tensor) -> Result<Outcome> {
    let grads = (y * dy)?.sum_all()?.backward()?;
    let of = |var: &Var| grads.get(var).ok_or_else(|| Error::msg("no gradient"))?.flatten_all()?.to_vec1::<f32>();
    Ok([y.flatten_all()?.to_vec1::<f32>()?, of(x)?, of(projection)?])
}

/// A rank's outcome and the load after balancing over the mean.
fn through_the_layer(fabric: Box<dyn Fabric>) -> Result<(Outcome, f64)> {
    let (rank, config) = (fabric.rank(), config());
    let own = config.topology.masters(rank);
    let masters = LayerMasters {
        weights: Region::from_vec(INIT.weights(0, own.clone())),
        grads: Region::zeroed(own.len() * SHAPE.weight_bytes()),
    };
    let endpoint = Endpoint::new(fabric, config.link);
    let mut experts = ExpertParallel::new(config, endpoint, vec![masters]).map_err(Error::wrap)?;
    experts.record();
    let experts = SharedExperts::new(experts);
    let (x, projection, dy) = model(rank.index())?;
    let router = Router::new(RouterKind::Softmax { aux_coefficient: 0.0 }, projection.as_tensor().clone(), TOP_K)?;
    let layer = MoeLayer::new(0, router, experts.clone());
    let (y, _) = layer.forward(&x, 0, Pass::Train(Recompute::Nothing))?;
    let result = outcome(&y, &x, &projection, &dy)?;
    drop((layer, y));
    let mut experts = experts.into_inner().ok_or_else(|| Error::msg("still shared"))?;
    experts.finish_backward().map_err(Error::wrap)?;
    let imbalance = experts.take_records()[0].imbalance_before();
    experts.into_endpoint().leave().map_err(Error::wrap)?;
    Ok((result, imbalance))
}

/// All experts on all tokens, weighted by the gates of those chosen.
fn in_plain_tensors(rank: usize) -> Result<Outcome> {
    let (x, projection, dy) = model(rank)?;
    let scores = x.matmul(&projection)?.exp()?;
    let scores = scores.broadcast_div(&scores.sum_keepdim(D::Minus1)?)?;
    let chosen = scores.arg_sort_last_dim(false)?.narrow(1, 0, TOP_K)?.contiguous()?;
    let gates = scores.gather(&chosen, 1)?;
    let gates = gates.broadcast_div(&gates.sum_keepdim(D::Minus1)?)?;
    let mut y = x.zeros_like()?;
    for expert in 0..EXPERTS {
        let weights = INIT.weights(0, expert..expert + 1);
        let (fc1, fc2) = weights.split_at(SHAPE.fc1_len());
        let fc1 = Tensor::from_slice(fc1, (SHAPE.hidden, 2 * SHAPE.intermediate), &Device::Cpu)?;
        let fc2 = Tensor::from_slice(fc2, (SHAPE.intermediate, SHAPE.hidden), &Device::Cpu)?;
        let both = x.matmul(&fc1)?;
        let gate = both.narrow(1, 0, SHAPE.intermediate)?;
        let up = both.narrow(1, SHAPE.intermediate, SHAPE.intermediate)?;
        let out = (gate.silu()? * up)?.matmul(&fc2)?;
        let here = chosen.eq(expert as u32)?.to_dtype(DType::F32)?;
        y = (y + out.broadcast_mul(&(&gates * here)?.sum_keepdim(1)?)?)?;
    }
    outcome(&y, &x, &projection, &dy)
}

#[test]
fn outputs_and_gradients_are_those_of_plain_tensors() {
    let group = GroupSpec { windows: config().windows(), timeout: Duration::from_secs(20), ..GroupSpec::new(RANKS) };
    let results = run_threads(&group, through_the_layer).unwrap_or_else(|error| panic!("{error}"));
    for (rank, (got, imbalance)) in results.iter().enumerate() {
        assert!(*imbalance > 1.05, "the load must be skewed: {imbalance}");
        let want = in_plain_tensors(rank).unwrap();
        for (what, (got, want)) in
            ["output", "gradient of x", "gradient of the router"].iter().zip(got.iter().zip(&want))
        {
            let largest = want.iter().fold(0f32, |m, w| m.max(w.abs()));
            let difference = got.iter().zip(want).fold(0f32, |m, (g, w)| m.max((g - w).abs()));
            assert!(largest > 0.01 && difference < 2e-5 * largest.max(1.0), "{what}, rank {rank}: off by {difference}");
        }
    }
}
