//! The work that ranks fail in: forward and backward of several layers and microbatches through the runtime.

use std::time::Duration;

use ultraep_baselines::{PolicyKind, PolicyParams, Recipe};
use ultraep_device::ExpertShape;
use ultraep_fabric::stream::TileSizes;
use ultraep_fabric::{Fabric, GroupSpec, OperationKind, Region};
use ultraep_plan::{Rank, Topology, TopologyError, TopologySpec, TransferMode, TransferParams};
use ultraep_runtime::{
    Endpoint, ExpertParallel, LayerMasters, Link, Pass, Recompute, Routing, RuntimeConfig, RuntimeError,
    TransferConfig, VirtualClock, VirtualLayer,
};
use xxhash_rust::xxh64::{Xxh64, xxh64};

const SHAPE: ExpertShape = ExpertShape { hidden: 8, intermediate: 4 };
const TOKENS: usize = 12;
const TOP_K: usize = 2;
const MICROBATCHES_IN_FLIGHT: usize = 2;

/// Sizes of the work. Every rank keeps two microbatches in flight: forward 0, forward 1, backward 0, forward 2, backward 1,
/// and so on. Of every second microbatch the forward is run again before its backward, and experts are recomputed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scenario {
    /// Ranks of the group.
    pub ranks: usize,
    /// MoE layers.
    pub layers: usize,
    /// Microbatches.
    pub microbatches: u64,
    /// The group's timeout.
    pub timeout: Duration,
}

/// What an undisturbed run does and gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Profile {
    /// Operations of each rank in order, its leaving included, `[ranks][operations]`.
    pub operations: Vec<Vec<OperationKind>>,
    /// Digest of each rank's results, `[ranks]`.
    pub digests: Vec<u64>,
}

impl Scenario {
    /// Two layers and two microbatches on `ranks` ranks, with a timeout that no healthy run reaches.
    pub fn small(ranks: usize) -> Self {
        Self { ranks, layers: 2, microbatches: 2, timeout: Duration::from_secs(60) }
    }

    fn experts(&self) -> usize {
        2 * self.ranks
    }

    /// The runtime's configuration: our policy with replicas of any size and relays, in checked mode.
    ///
    /// # Errors
    /// [`TopologyError`] for a number of ranks that no group can have.
    pub fn config(&self) -> Result<RuntimeConfig, TopologyError> {
        let spec =
            TopologySpec { ranks: self.ranks, experts: self.experts(), domain_ranks: self.ranks, slots_per_rank: 2 };
        Ok(RuntimeConfig {
            topology: Topology::new(spec)?,
            layers: self.layers,
            max_microbatches: MICROBATCHES_IN_FLIGHT,
            shape: SHAPE,
            tokens_per_rank: TOKENS,
            top_k: TOP_K,
            policies: Recipe::all(&[PolicyKind::Ultraep], PolicyParams { min_quota: 1, ..PolicyParams::default() }),
            link: Link::default(),
            // Relays wherever an expert has two replicas, several chunks, and no threads but the ranks'.
            transfer: TransferConfig {
                params: TransferParams {
                    mode: TransferMode::Relay,
                    min_replicas: 2,
                    max_stripes: 2,
                    ..TransferParams::default()
                },
                weights: TileSizes { tile_bytes: 64, chunk_bytes: 128 },
                gradients: TileSizes { tile_bytes: 128, chunk_bytes: 256 },
                reduce_workers: 0,
                ..TransferConfig::default()
            },
            checked: true,
        })
    }

    /// The group to start.
    ///
    /// # Errors
    /// As for [`Scenario::config`].
    pub fn group(&self) -> Result<GroupSpec, TopologyError> {
        let mut spec = GroupSpec::new(self.ranks);
        spec.windows = self.config()?.windows();
        spec.timeout = self.timeout;
        let numbers = [self.ranks as u64, self.layers as u64, self.microbatches];
        let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        spec.config_digest = xxh64(&bytes, 0);
        Ok(spec)
    }

    /// One rank's part: the digest of all outputs and gradients that it computed.
    ///
    /// # Errors
    /// The runtime's.
    pub fn run_rank(&self, config: RuntimeConfig, fabric: Box<dyn Fabric>) -> Result<u64, RuntimeError> {
        let mut work = Work::new(self, config, fabric)?;
        let warm_up = self.microbatches.min(MICROBATCHES_IN_FLIGHT as u64 - 1);
        for microbatch in 0..warm_up {
            work.forward(microbatch)?;
        }
        for microbatch in 0..self.microbatches {
            if microbatch + warm_up < self.microbatches {
                work.forward(microbatch + warm_up)?;
            }
            work.backward(microbatch)?;
        }
        work.finish()
    }
}

/// One rank at work.
struct Work {
    moe: ExpertParallel,
    rank: usize,
    experts: usize,
    layers: usize,
    digest: Xxh64,
    y: Vec<f32>,
    dx: Vec<f32>,
    d_gates: Vec<f32>,
}

/// A rank's batch in a layer.
struct Batch {
    x: Vec<f32>,
    gates: Vec<f32>,
    dy: Vec<f32>,
    chosen: Vec<u32>,
}

impl Work {
    fn new(scenario: &Scenario, config: RuntimeConfig, fabric: Box<dyn Fabric>) -> Result<Self, RuntimeError> {
        let rank = fabric.rank();
        let own = config.topology.masters(rank);
        let weights = |layer: usize, expert: usize| noise(SHAPE.weight_len(), (layer * 1000 + expert + 1) as u64);
        let layer = |layer| LayerMasters {
            weights: Region::from_vec(own.clone().flat_map(|expert| weights(layer, expert)).collect::<Vec<_>>()),
            grads: Region::zeroed(own.len() * SHAPE.weight_bytes()),
        };
        let masters = (0..scenario.layers).map(layer).collect();
        let mut endpoint = Endpoint::new(fabric, config.link);
        // Nothing is decided from the time; without one, not even the stamps differ between runs.
        endpoint.clock = VirtualClock::with_source(|| 0);
        Ok(Self {
            moe: ExpertParallel::new(config, endpoint, masters)?,
            rank: rank.index(),
            experts: scenario.experts(),
            layers: scenario.layers,
            digest: Xxh64::new(0),
            y: vec![0.0; TOKENS * SHAPE.hidden],
            dx: vec![0.0; TOKENS * SHAPE.hidden],
            d_gates: vec![0.0; TOKENS * TOP_K],
        })
    }

    fn batch(&self, layer: usize, microbatch: u64) -> Batch {
        let seed = (self.rank as u64 + 1) * 1_000_003 + layer as u64 * 1009 + microbatch * 31;
        // Half of all tokens take one expert first, another in each microbatch.
        let hot = (microbatch as usize * 3 + layer) % self.experts;
        let pick = |token: usize| {
            let first = if token.is_multiple_of(2) { hot } else { (token * 7 + self.rank * 3) % self.experts };
            let second = (first + 1 + (token * 5 + self.rank) % (self.experts - 1)) % self.experts;
            [first as u32, second as u32]
        };
        Batch {
            x: noise(TOKENS * SHAPE.hidden, seed),
            gates: noise(TOKENS * TOP_K, seed + 1),
            dy: noise(TOKENS * SHAPE.hidden, seed + 2),
            chosen: (0..TOKENS).flat_map(pick).collect(),
        }
    }

    fn forward(&mut self, microbatch: u64) -> Result<(), RuntimeError> {
        for layer in 0..self.layers {
            self.pass(layer, microbatch, Pass::Train(recompute(microbatch)))?;
        }
        Ok(())
    }

    fn pass(&mut self, layer: usize, microbatch: u64, pass: Pass) -> Result<(), RuntimeError> {
        let batch = self.batch(layer, microbatch);
        let routing = Routing { experts: &batch.chosen, gates: &batch.gates };
        self.moe.forward(VirtualLayer { layer, microbatch }, pass, routing, &batch.x, &mut self.y)?;
        update(&mut self.digest, &self.y);
        Ok(())
    }

    fn backward(&mut self, microbatch: u64) -> Result<(), RuntimeError> {
        for layer in (0..self.layers).rev() {
            if recompute(microbatch) == Recompute::Experts {
                self.pass(layer, microbatch, Pass::Replay(Recompute::Experts))?;
            }
            let Batch { x, gates, dy, .. } = self.batch(layer, microbatch);
            let at = VirtualLayer { layer, microbatch };
            self.moe.backward(at, &gates, &x, &dy, &mut self.dx, &mut self.d_gates)?;
            update(&mut self.digest, &self.dx);
            update(&mut self.digest, &self.d_gates);
        }
        Ok(())
    }

    fn finish(mut self) -> Result<u64, RuntimeError> {
        self.moe.finish_backward()?;
        self.moe.endpoint.finish_step()?;
        for layer in 0..self.layers {
            let grads = &self.moe.manager.masters(layer).grads;
            update(&mut self.digest, &grads.read::<f32>()?);
        }
        self.moe.into_endpoint().leave()?;
        Ok(self.digest.digest())
    }
}

fn recompute(microbatch: u64) -> Recompute {
    if microbatch.is_multiple_of(2) { Recompute::Nothing } else { Recompute::Experts }
}

fn update(digest: &mut Xxh64, values: &[f32]) {
    values.iter().for_each(|value| digest.update(&value.to_bits().to_le_bytes()));
}

/// Values between -0.5 and 0.5 (xorshift).
fn noise(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..len).map(|_| next()).collect()
}

impl Profile {
    /// The number of a rank's last collective: whoever is lost from then on may have been needed by nobody.
    pub fn last_collective(&self, rank: Rank) -> u64 {
        let one_sided = |kind: &OperationKind| {
            matches!(
                kind,
                OperationKind::Put
                    | OperationKind::Get
                    | OperationKind::Signal
                    | OperationKind::AwaitSignal
                    | OperationKind::Stream
                    | OperationKind::Leave
            )
        };
        let operations = &self.operations[rank.index()];
        operations.iter().rposition(|kind| !one_sided(kind)).unwrap_or(0) as u64
    }
}
