//! One rank's part in a batch: its model over the runtime, and the KV caches of the sequences that live on it. The live
//! engine and the offline measurements run batches through this alone.

use std::collections::HashMap;

use ultraep_baselines::{PolicyKind, PolicyParams, Recipe};
use ultraep_fabric::{Fabric, GroupSpec, Region};
use ultraep_model::{Inferred, SequenceCache, SequenceChunk, SharedExperts, Transformer, Wanted};
use ultraep_plan::{Topology, TopologySpec};
use ultraep_runtime::{
    Endpoint, ExpertParallel, LayerMasters, LayerRecord, Link, RuntimeConfig, StepTime, TransferConfig,
};
use ultraep_schedule::{Batch, RequestId};

use crate::{ServeError, ServedModel};

/// The EP group that serves.
#[derive(Clone, Debug)]
pub struct GroupConfig {
    /// `N`, ranks.
    pub ranks: usize,
    /// `R`, slots on each rank.
    pub slots: usize,
    /// Policies that batches may run under; the first is in force at start.
    pub policies: Vec<PolicyKind>,
    /// Their parameters.
    pub params: PolicyParams,
    /// Most tokens of a rank in a batch.
    pub tokens_per_rank: usize,
    /// Bandwidth that the virtual clock charges.
    pub link: Link,
    /// Whether every plan is checked and compared between ranks.
    pub checked: bool,
    /// After this long a rank that waits for another gives up and names it.
    pub timeout: std::time::Duration,
    /// Ranks that compute at a time; 0 for all.
    pub cores: usize,
}

impl GroupConfig {
    /// The runtime of each rank for `model`: for inference, without memory for gradients.
    pub fn runtime(&self, model: &ServedModel) -> Result<RuntimeConfig, ServeError> {
        let config = model.config();
        let topology = Topology::new(TopologySpec {
            ranks: self.ranks,
            experts: config.experts,
            domain_ranks: self.ranks,
            slots_per_rank: self.slots,
        })?;
        for &kind in &self.policies {
            ultraep_baselines::build(kind, &topology, &self.params)?;
        }
        Ok(RuntimeConfig {
            topology,
            layers: config.layers,
            max_microbatches: 0,
            shape: config.expert_shape(),
            tokens_per_rank: self.tokens_per_rank,
            top_k: config.top_k,
            policies: Recipe::all(&self.policies, self.params),
            link: self.link,
            transfer: TransferConfig::default(),
            checked: self.checked,
        })
    }

    /// The group to start.
    pub fn group(&self, runtime: &RuntimeConfig) -> GroupSpec {
        GroupSpec {
            ranks: self.ranks,
            windows: runtime.windows(),
            timeout: self.timeout,
            cores: self.cores,
            config_digest: 0,
        }
    }
}

/// What a rank is to run of a batch: for every chunk of its own, tokens and which logits are wanted.
pub(crate) struct ChunkInput<'a> {
    pub(crate) tokens: &'a [u8],
    pub(crate) wanted: Wanted,
}

/// One rank at work.
pub(crate) struct RankEngine {
    rank: usize,
    experts: SharedExperts,
    model: Transformer,
    caches: HashMap<RequestId, SequenceCache>,
    batches: u64,
}

impl RankEngine {
    /// Over `fabric`, whose group was started for `runtime`.
    pub(crate) fn new(
        fabric: Box<dyn Fabric>,
        model: &ServedModel,
        runtime: &RuntimeConfig,
    ) -> Result<Self, ServeError> {
        let rank = fabric.rank();
        let own = runtime.topology.masters(rank);
        let masters = |layer| LayerMasters {
            weights: Region::from_vec(model.experts(layer, own.clone()).to_vec()),
            grads: Region::zeroed(0),
        };
        let masters = (0..runtime.layers).map(masters).collect();
        let endpoint = Endpoint::new(fabric, runtime.link);
        let mut experts = ExpertParallel::new(runtime.clone(), endpoint, masters)?;
        if rank.index() == 0 {
            experts.record();
        }
        let experts = SharedExperts::new(experts);
        let mut transformer =
            Transformer::for_inference(*model.config(), model.parameters(), experts.clone(), model.rotary())?;
        for (layer, moe) in transformer.moe_layers_mut().enumerate() {
            moe.router_mut().set_bias(model.router_bias(layer))?;
        }
        Ok(Self { rank: rank.index(), experts, model: transformer, caches: HashMap::new(), batches: 0 })
    }

    pub(crate) fn experts(&self) -> &SharedExperts {
        &self.experts
    }

    /// Runs this rank's part of a batch under a policy. Together with all other ranks, the same batches in the same order.
    pub(crate) fn run(
        &mut self,
        batch: &Batch,
        inputs: &[ChunkInput<'_>],
        policy: PolicyKind,
    ) -> Result<Inferred, ServeError> {
        for released in batch.released() {
            self.caches.remove(&released.request);
        }
        self.experts.lock().manager.set_policy(policy.name())?;
        let own = batch.of_rank(self.rank);
        let mut caches: Vec<_> = own
            .iter()
            .map(|chunk| match chunk.reserves {
                Some(tokens) => SequenceCache::new(self.model.config(), tokens as usize),
                None => {
                    self.caches.remove(&chunk.request).unwrap_or_else(|| SequenceCache::new(self.model.config(), 0))
                }
            })
            .collect();
        let parts = inputs.iter().zip(&mut caches);
        let mut chunks: Vec<_> =
            parts.map(|(input, cache)| SequenceChunk { tokens: input.tokens, cache, wanted: input.wanted }).collect();
        let number = self.batches;
        self.batches += 1;
        let inferred = self.model.infer(&mut chunks, number).map_err(|error| match self.experts.take_failure() {
            Some(failure) => ServeError::Runtime(failure),
            None => ServeError::Tensor(error),
        })?;
        self.caches.extend(own.iter().map(|chunk| chunk.request).zip(caches));
        Ok(inferred)
    }

    /// Ends a batch: what it took in parallel time, and on rank 0 what its layers did.
    pub(crate) fn finish_batch(&mut self) -> Result<(StepTime, u64, Vec<LayerRecord>), ServeError> {
        let mut experts = self.experts.lock();
        let time = experts.endpoint.finish_step()?;
        let synced_ns = experts.manager.take_synced_ns();
        Ok((time, synced_ns, experts.take_records()))
    }

    /// Ends this rank's part in the group in good order.
    pub(crate) fn leave(self) -> Result<(), ServeError> {
        let Self { experts, model, .. } = self;
        drop(model);
        match experts.into_inner() {
            Some(experts) => Ok(experts.into_endpoint().leave()?),
            None => Err(ServeError::Ranks("a tensor still holds the experts".into())),
        }
    }
}
