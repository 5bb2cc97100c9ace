//! A small group of ranks with skewed batches, for the tests of order and of disagreement.

use std::time::Duration;

use crate::noise::noise;
use ultraep_baselines::{PolicyKind, PolicyParams, Recipe};
use ultraep_device::ExpertShape;
use ultraep_fabric::{Fabric, GroupSpec, Region};
use ultraep_plan::{Topology, TopologySpec};
use ultraep_runtime::{
    Endpoint, ExpertParallel, LayerMasters, Link, RuntimeConfig, RuntimeError, TransferConfig, VirtualLayer,
};

pub(crate) const SHAPE: ExpertShape = ExpertShape { hidden: 8, intermediate: 4 };
pub(crate) const TOKENS: usize = 12;
pub(crate) const TOP_K: usize = 2;

/// Our policy with replicas of any size, in checked mode.
pub(crate) fn config(ranks: usize, experts: usize, layers: usize, max_microbatches: usize) -> RuntimeConfig {
    let spec = TopologySpec { ranks, experts, domain_ranks: ranks, slots_per_rank: 2 };
    RuntimeConfig {
        topology: Topology::new(spec).expect("a small group"),
        layers,
        max_microbatches,
        shape: SHAPE,
        tokens_per_rank: TOKENS,
        top_k: TOP_K,
        policies: Recipe::all(&[PolicyKind::Ultraep], PolicyParams { min_quota: 1, ..PolicyParams::default() }),
        link: Link::default(),
        transfer: TransferConfig::default(),
        checked: true,
    }
}

pub(crate) fn group(config: &RuntimeConfig) -> GroupSpec {
    GroupSpec { windows: config.windows(), timeout: Duration::from_secs(20), ..GroupSpec::new(config.topology.ranks()) }
}

pub(crate) fn runtime(config: RuntimeConfig, fabric: Box<dyn Fabric>) -> Result<ExpertParallel, RuntimeError> {
    let own = config.topology.masters(fabric.rank());
    let weights = |layer: usize, expert: usize| noise(SHAPE.weight_len(), (layer * 1000 + expert + 1) as u64);
    let layer = |layer| LayerMasters {
        weights: Region::from_vec(own.clone().flat_map(|expert| weights(layer, expert)).collect::<Vec<_>>()),
        grads: Region::zeroed(own.len() * SHAPE.weight_bytes()),
    };
    let masters = (0..config.layers).map(layer).collect();
    let endpoint = Endpoint::new(fabric, config.link);
    ExpertParallel::new(config, endpoint, masters)
}

/// A rank's batch in a virtual layer; half of all tokens take one expert first, another in each microbatch.
pub(crate) struct Batch {
    pub(crate) x: Vec<f32>,
    pub(crate) gates: Vec<f32>,
    pub(crate) dy: Vec<f32>,
    pub(crate) chosen: Vec<u32>,
}

pub(crate) fn batch(rank: usize, experts: usize, at: VirtualLayer) -> Batch {
    let seed = (rank as u64 + 1) * 1_000_003 + at.layer as u64 * 1009 + at.microbatch * 31;
    let hot = (at.microbatch as usize * 3 + at.layer) % experts;
    let pick = |token: usize| {
        let first = if token.is_multiple_of(2) { hot } else { (token * 7 + rank * 3) % experts };
        let second = (first + 1 + (token * 5 + rank) % (experts - 1)) % experts;
        [first as u32, second as u32]
    };
    Batch {
        x: noise(TOKENS * SHAPE.hidden, seed),
        gates: noise(TOKENS * TOP_K, seed + 1),
        dy: noise(TOKENS * SHAPE.hidden, seed + 2),
        chosen: (0..TOKENS).flat_map(pick).collect(),
    }
}
