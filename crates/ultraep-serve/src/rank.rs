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
use ultraep_schedule::{Batch, Chunk, RequestId};

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

/// What a batch gave on one rank.
#[derive(Debug, Default)]
pub(crate) struct Ran {
    /// Of the chunks that ran, in their order.
    pub(crate) inferred: Inferred,
    /// Chunks that could not run: the number among the rank's own, ascending, and why.
    pub(crate) refused: Vec<(usize, String)>,
}

impl Ran {
    /// What all chunks gave, where none may fail.
    pub(crate) fn whole(self) -> Result<Inferred, ServeError> {
        match self.refused.into_iter().next() {
            Some((number, reason)) => Err(ServeError::Ranks(format!("chunk {number}: {reason}"))),
            None => Ok(self.inferred),
        }
    }
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
    ///
    /// What is wrong with one chunk ends that chunk alone: it is left out, and the others give what they would have given
    /// beside it, as rows do not depend on each other. An error is one of the group.
    pub(crate) fn run(
        &mut self,
        batch: &Batch,
        inputs: &[ChunkInput<'_>],
        policy: PolicyKind,
    ) -> Result<Ran, ServeError> {
        for released in batch.released() {
            self.caches.remove(&released.request);
        }
        self.experts.lock().manager.set_policy(policy.name())?;
        let (mut parts, mut refused) = (Vec::new(), Vec::new());
        for (number, (chunk, input)) in batch.of_rank(self.rank).iter().zip(inputs).enumerate() {
            match self.prepare(chunk, input) {
                Ok(cache) => parts.push((chunk.request, cache, input)),
                Err(reason) => refused.push((number, reason)),
            }
        }
        let ready = parts.iter_mut();
        let mut chunks: Vec<_> = ready
            .map(|(_, cache, input)| SequenceChunk { tokens: input.tokens, cache, wanted: input.wanted })
            .collect();
        let number = self.batches;
        self.batches += 1;
        let inferred = self.model.infer(&mut chunks, number).map_err(|error| match self.experts.take_failure() {
            Some(failure) => ServeError::Runtime(failure),
            None => ServeError::Tensor(error),
        })?;
        self.caches.extend(parts.into_iter().map(|(request, cache, _)| (request, cache)));
        Ok(Ran { inferred, refused })
    }

    /// Takes the cache that a chunk goes on in, or says why it cannot.
    fn prepare(&mut self, chunk: &Chunk, input: &ChunkInput<'_>) -> Result<SequenceCache, String> {
        let mut cache = match chunk.reserves {
            Some(tokens) => SequenceCache::new(self.model.config(), tokens as usize),
            None => self.caches.remove(&chunk.request).ok_or("its KV cache is gone")?,
        };
        if cache.len() != chunk.start as usize {
            return Err(format!("a chunk from token {} on, but its KV cache ends at {}", chunk.start, cache.len()));
        }
        let part = SequenceChunk { tokens: input.tokens, cache: &mut cache, wanted: input.wanted };
        self.model.check_chunk(&part).map_err(|error| error.to_string())?;
        Ok(cache)
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
