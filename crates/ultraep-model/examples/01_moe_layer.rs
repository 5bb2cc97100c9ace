//! An MoE layer in a candle model of your own: two ranks, four experts, one slot a rank, live balancing.
//!
//! Run with `cargo run -p ultraep-model --example 01_moe_layer`.

use candle_core::{Device, Tensor, Var};
use ultraep_baselines::{PolicyKind, PolicyParams, Recipe};
use ultraep_device::ExpertShape;
use ultraep_fabric::{Fabric, GroupSpec, Region, run_threads};
use ultraep_model::{MoeLayer, Router, RouterKind, SharedExperts};
use ultraep_plan::{Topology, TopologySpec};
use ultraep_runtime::{
    Endpoint, ExpertParallel, LayerMasters, Link, Pass, Recompute, RuntimeConfig, RuntimeError, TransferConfig,
};

const TOKENS: usize = 64;
const SHAPE: ExpertShape = ExpertShape { hidden: 16, intermediate: 8 };

/// What one rank saw: imbalance before and after balancing, and the size of its experts' gradient.
type Seen = (f64, f64, f32);

pub(crate) fn main() {
    let topology = Topology::new(TopologySpec { ranks: 2, experts: 4, domain_ranks: 2, slots_per_rank: 1 });
    let config = RuntimeConfig {
        topology: topology.expect("four experts fit on two ranks"),
        layers: 1,
        max_microbatches: 1,
        shape: SHAPE,
        tokens_per_rank: TOKENS,
        top_k: 2,
        policies: Recipe::all(&[PolicyKind::Ultraep], PolicyParams { min_quota: 1, ..PolicyParams::default() }),
        link: Link::default(),
        transfer: TransferConfig::default(),
        checked: true,
    };
    let group = GroupSpec { windows: config.windows(), ..GroupSpec::new(config.topology.ranks()) };
    let seen = run_threads(&group, |fabric| rank(fabric, &config)).expect("both ranks end well");
    for (rank, (before, after, gradient)) in seen.into_iter().enumerate() {
        println!("rank {rank}: imbalance {before:.2} -> {after:.2}, gradient of its experts {gradient:.3}");
        assert!(before > 1.2 && after < 1.05);
        assert!(gradient > 0.0);
    }
}

fn rank(fabric: Box<dyn Fabric>, config: &RuntimeConfig) -> Result<Seen, Error> {
    // Masters are memory of yours, registered where it is: weights and gradients of the experts at home here.
    let own = config.topology.masters(fabric.rank());
    let weights: Vec<f32> = own.clone().flat_map(|expert| noise(SHAPE.weight_len(), expert as f32 + 1.0)).collect();
    let masters =
        LayerMasters { grads: Region::zeroed(weights.len() * size_of::<f32>()), weights: Region::from_vec(weights) };
    let mut experts = ExpertParallel::new(config.clone(), Endpoint::new(fabric, config.link), vec![masters.clone()])?;
    experts.record();
    let experts = SharedExperts::new(experts);

    // The router's projection is an ordinary variable. For three tokens of four this one prefers experts 0 and 1, both at home on rank 0.
    let mut projection = noise(SHAPE.hidden * 4, 9.0);
    projection.chunks_exact_mut(4).for_each(|row| row[..2].iter_mut().for_each(|w| *w += 0.2));
    let projection = Var::from_tensor(&Tensor::from_vec(projection, (SHAPE.hidden, 4), &Device::Cpu)?)?;
    let router = Router::new(RouterKind::Softmax { aux_coefficient: 0.01 }, projection.as_tensor().clone(), 2)?;
    let layer = MoeLayer::new(0, router, experts.clone());

    // In the model: a tensor in, a tensor out, and gradients as with any other operation.
    let mut x = noise(TOKENS * SHAPE.hidden, 3.0);
    x.chunks_exact_mut(SHAPE.hidden).skip(TOKENS / 4).flatten().for_each(|v| *v += 0.3);
    let x = Var::from_tensor(&Tensor::from_vec(x, (TOKENS, SHAPE.hidden), &Device::Cpu)?)?;
    let (y, aux_loss) = layer.forward(x.as_tensor(), 0, Pass::Train(Recompute::Nothing))?;
    let mut loss = y.sqr()?.mean_all()?;
    if let Some(aux_loss) = aux_loss {
        loss = (loss + aux_loss)?;
    }
    let gradients = loss.backward()?;
    assert!(gradients.get(&x).is_some() && gradients.get(&projection).is_some());

    let mut experts = experts.lock();
    experts.finish_backward()?;
    let record = experts.take_records().swap_remove(0);
    let gradient = masters.grads.read::<f32>().map_err(RuntimeError::from)?.iter().map(|g| g * g).sum::<f32>().sqrt();
    Ok((record.imbalance_before(), record.imbalance_after(), gradient))
}

fn noise(len: usize, seed: f32) -> Vec<f32> {
    (0..len).map(|i| ((i as f32 + seed) * 12.9898).sin() * 0.3).collect()
}

/// The runtime's error, or the tensor library's.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}
