//! Batches replayed: exact counts from recorded routing, real policies, and the virtual clock's critical path from measured
//! costs.
//!
//! ```text
//! a batch of L layers, all maxima over ranks, T_r tokens and A_r arrived rows on rank r:
//!   for each layer:
//!     max(dense + attention + router + the layer before's weighted sum)  | all-gather of counts
//!     plan + max(reroute, weight sync beside it, as its transfer plan says) | dispatch: rows of the busiest link
//!     max(rows in and out + sum over its physical experts of expert time) | combine: the same rows back
//!   max(weighted sum + head)
//! ```
//!
//! as [`ultraep_runtime::StepTime`] adds it up; weight sync by the runtime's own [`SyncPlanner`]. Source: the paper's critical path (section 3). Left out, as there: latency of
//! a message.

use std::sync::Arc;

use ultraep_baselines::ideal::balanced_counts;
use ultraep_baselines::{PolicyKind, PolicyParams, build};
use ultraep_plan::measure::{Measure, imbalance, master_loads};
use ultraep_plan::{Plan, PlannedTransfers, Policy, Problem, Rank, SplitWorkspace, SyncPlanner, Topology, split_all};
use ultraep_runtime::{Link, RuntimeConfig};
use ultraep_schedule::{Batch, BatchTime, Limits, Request, RequestId, Scheduler};

use super::costs::Costs;
use super::routing::RecordedPrompt;
use crate::rank::GroupConfig;
use crate::{ServeError, ServedModel};

/// The group and policies that are compared.
#[derive(Clone, Debug)]
pub struct PolicySettings {
    /// The EP group.
    pub topology: Topology,
    /// In the order of the table.
    pub policies: Vec<PolicyKind>,
    /// Their parameters.
    pub params: PolicyParams,
    /// Bandwidth of a rank's link.
    pub link: Link,
}

impl PolicySettings {
    /// The group of the real engine's ranks that runs `policies`, `cores` at a time, with at most `tokens_per_rank` tokens of a
    /// batch on each.
    pub(crate) fn group(&self, policies: Vec<PolicyKind>, tokens_per_rank: usize, cores: usize) -> GroupConfig {
        GroupConfig {
            ranks: self.topology.ranks(),
            slots: self.topology.slots(Rank::new(0)),
            policies,
            params: self.params,
            tokens_per_rank,
            link: self.link,
            checked: false,
            timeout: std::time::Duration::from_secs(300),
            cores,
        }
    }

    /// The runtime that would run `model`, as far as planning transfers needs it.
    pub(crate) fn runtime(&self, model: &ServedModel) -> Result<RuntimeConfig, ServeError> {
        self.group(self.policies.clone(), 1, 0).runtime(model)
    }
}

/// What all replays share.
#[derive(Clone)]
pub struct World {
    pub(crate) settings: PolicySettings,
    pub(crate) costs: Costs,
    /// Recorded routing of the pool.
    pub(crate) pool: Arc<Vec<RecordedPrompt>>,
    pub(crate) layers: usize,
    pub(crate) top_k: usize,
    pub(crate) row_bytes: u64,
    runtime: RuntimeConfig,
}

impl World {
    /// Of recorded routing of `model`.
    pub fn new(
        settings: PolicySettings,
        costs: Costs,
        pool: Arc<Vec<RecordedPrompt>>,
        model: &ServedModel,
    ) -> Result<Self, ServeError> {
        let config = model.config();
        Ok(Self {
            runtime: settings.runtime(model)?,
            settings,
            costs,
            pool,
            layers: config.layers,
            top_k: config.top_k,
            row_bytes: (config.hidden * size_of::<f32>()) as u64,
        })
    }
}

/// Most loads that planning is measured on.
const LOADS_MAX: usize = 24;

/// Loads to measure planning on: of the first batches when the whole pool comes at once, `[N, E]` each.
pub fn sample_loads(
    pool: &[RecordedPrompt],
    limits: &Limits,
    topology: &Topology,
    model: &ServedModel,
) -> Result<Vec<Vec<u32>>, ServeError> {
    let mut scheduler = Scheduler::new(Limits { queue_max: pool.len().max(1), ..*limits })?;
    for (id, prompt) in pool.iter().enumerate() {
        scheduler.admit(Request { id: RequestId(id as u64), prompt_tokens: prompt.tokens, new_tokens: 1 })?;
    }
    let (mut batch, mut loads) = (Batch::default(), Vec::new());
    while loads.len() < LOADS_MAX {
        scheduler.compose(&mut batch);
        if batch.is_empty() {
            break;
        }
        for layer in 0..model.config().layers {
            let mut counts = vec![0; topology.ranks() * topology.experts()];
            count(
                &batch,
                layer,
                model.config().top_k,
                topology.experts(),
                |request| &pool[request as usize],
                &mut counts,
            );
            loads.push(counts);
        }
    }
    Ok(loads)
}

/// Adds a layer's choices of a batch to `counts`, `[N, E]`.
fn count<'p>(
    batch: &Batch,
    layer: usize,
    top_k: usize,
    experts: usize,
    prompt_of: impl Fn(u64) -> &'p RecordedPrompt,
    counts: &mut [u32],
) {
    for chunk in batch.chunks() {
        let at = chunk.start as usize * top_k..(chunk.start + chunk.tokens) as usize * top_k;
        let row = &mut counts[chunk.rank * experts..(chunk.rank + 1) * experts];
        prompt_of(chunk.request.0).choices[layer][at].iter().for_each(|&expert| row[usize::from(expert)] += 1);
    }
}

/// What a policy did over many batches.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Balance {
    /// Sum over layers of tokens (choices) times imbalance as routed; divide by `tokens`.
    pub weighted_before: f64,
    /// The same after balancing.
    pub weighted_after: f64,
    /// Tokens (choices) of all layers.
    pub tokens: u64,
    /// Worst imbalance after balancing among layers of batches that count for it.
    pub worst_after: f64,
    /// Most tokens (choices) on a rank in a layer: the activation peak.
    pub peak_tokens: u64,
    /// The even share of a rank in the largest layer: what the peak would be in the same batches with perfect balance.
    pub even_peak_tokens: u64,
    /// Replicas over all layers.
    pub replicas: u64,
    /// Layers planned.
    pub layers: u64,
    /// Time of weight syncs beyond reroute.
    pub exposed_sync_ns: u64,
}

/// One policy over one sequence of batches. Requests of batches are arrivals whose prompts `prompt_of` names.
pub struct Replay<'w> {
    world: &'w World,
    kind: PolicyKind,
    policies: Vec<Box<dyn Policy>>,
    placements: Vec<Vec<(u16, u16)>>,
    /// Prompt of the pool by request.
    prompt_of: Vec<u32>,
    full_batch_tokens: u64,
    plan: Plan,
    workspace: SplitWorkspace,
    sync: SyncPlanner,
    transfers: PlannedTransfers,
    measure: Measure,
    counts: Vec<u32>,
    split: Vec<u32>,
    balance: Balance,
    /// The first error, after which times mean nothing.
    failure: Option<ServeError>,
}

impl<'w> Replay<'w> {
    /// For requests whose prompts are `prompt_of`. Batches of at least `full_batch_tokens` tokens count for the worst imbalance: a
    /// handful of tokens has no balance.
    pub fn new(
        world: &'w World,
        kind: PolicyKind,
        prompt_of: Vec<u32>,
        full_batch_tokens: u64,
    ) -> Result<Self, ServeError> {
        let topology = &world.settings.topology;
        let policies = (0..world.layers).map(|_| build(kind, topology, &world.settings.params));
        Ok(Self {
            kind,
            policies: policies.collect::<Result<_, _>>()?,
            placements: vec![Vec::new(); world.layers],
            prompt_of,
            full_batch_tokens,
            plan: Plan::default(),
            workspace: SplitWorkspace::new(topology),
            sync: world.runtime.sync_planner()?,
            transfers: PlannedTransfers::new(topology),
            measure: Measure::default(),
            counts: vec![0; topology.ranks() * topology.experts()],
            split: Vec::new(),
            balance: Balance::default(),
            failure: None,
            world,
        })
    }

    /// What the policy did so far, or why it could not.
    pub fn finish(self) -> Result<Balance, ServeError> {
        match self.failure {
            Some(error) => Err(error),
            None => Ok(self.balance),
        }
    }

    /// Exact counts of a layer, `[N, E]`; forced balance for the ideal.
    fn count(&mut self, batch: &Batch, layer: usize) {
        let experts = self.world.settings.topology.experts();
        let top_k = self.world.top_k;
        self.counts.fill(0);
        if self.kind.forces_routing() {
            let ranks = self.world.settings.topology.ranks();
            let sums: Vec<u32> = (0..ranks).map(|r| batch.tokens_of_rank(r) as u32 * top_k as u32).collect();
            self.counts = balanced_counts(&self.world.settings.topology, &sums);
            return;
        }
        let (pool, prompt_of) = (&self.world.pool, &self.prompt_of);
        let prompt = |request: u64| &pool[prompt_of[request as usize] as usize];
        count(batch, layer, top_k, experts, prompt, &mut self.counts);
    }

    /// The counts of a layer of a batch as replayed, for checks against the real engine.
    pub fn counts_of(&mut self, batch: &Batch, layer: usize) -> &[u32] {
        self.count(batch, layer);
        &self.counts
    }

    fn batch(&mut self, batch: &Batch) -> Result<u64, ServeError> {
        let world = self.world;
        let (costs, ranks) = (&world.costs, world.settings.topology.ranks());
        let tokens: Vec<u64> = (0..ranks).map(|r| batch.tokens_of_rank(r)).collect();
        let attention: Vec<u64> = (0..ranks)
            .map(|r| batch.of_rank(r).iter().map(|c| costs.attention(c.tokens.into(), c.start.into())).sum())
            .collect();
        let most = |of: &dyn Fn(usize) -> u64| (0..ranks).map(of).max().unwrap_or(0);
        let layers = world.layers as u64;
        let count_bytes = ((world.settings.topology.experts() + 1) * size_of::<u32>() * (ranks - 1)) as u64;
        let mut ns = 0;
        for layer in 0..world.layers {
            let before = |r: usize| {
                let combined = if layer > 0 { costs.combine.ns(tokens[r]) } else { 0 };
                costs.dense.ns(tokens[r]) / layers + attention[r] + costs.router.ns(tokens[r]) + combined
            };
            ns += most(&before) + world.settings.link.transfer_ns(count_bytes);
            self.count(batch, layer);
            ns += self.layer(layer, &tokens)?;
        }
        let produced = |r: usize| batch.of_rank(r).iter().filter(|c| c.produces.is_some()).count() as u64;
        Ok(ns + most(&|r| costs.combine.ns(tokens[r]) + costs.head.ns(produced(r))))
    }

    /// From the counts to the rows that are back.
    fn layer(&mut self, layer: usize, tokens: &[u64]) -> Result<u64, ServeError> {
        let world = self.world;
        let (topology, costs, link) = (&world.settings.topology, &world.costs, world.settings.link);
        let wrong = |error: String| ServeError::Setting(format!("policy {}: {error}", self.kind));
        let problem = Problem::new(topology, &self.counts).map_err(|e| wrong(e.to_string()))?;
        self.policies[layer].solve(&problem, &mut self.plan).map_err(|e| wrong(e.to_string()))?;
        let width = self.plan.instances().len();
        self.split.clear();
        self.split.resize(topology.ranks() * width, 0);
        split_all(&problem, &self.plan, &mut self.workspace, &mut self.split).map_err(|e| wrong(e.to_string()))?;
        self.sync.plan(&self.plan, &mut self.transfers);
        self.policies[layer].observe(&problem);

        let sync_ns = self.charged_sync_ns(layer);
        let reroute = tokens.iter().map(|&t| costs.reroute.ns(t)).max().unwrap_or(0);
        let exposed = sync_ns.saturating_sub(reroute);
        self.measure.take_split(topology.ranks(), self.plan.instances(), &self.split);
        let there = link.transfer_ns(self.measure.busiest_link() * world.row_bytes);
        let experts = self.experts_ns();
        self.note(exposed);
        let plan_ns = costs.plan_ns.get(self.kind.name()).copied().unwrap_or(0);
        Ok(plan_ns + reroute + exposed + there + experts + there)
    }

    /// Weight sync that the batch waits for: a historical placement that is in place costs nothing.
    fn charged_sync_ns(&mut self, layer: usize) -> u64 {
        let of = |i: &ultraep_plan::Instance| (i.rank.index() as u16, i.physical.index() as u16);
        let placement: Vec<_> = self.plan.instances().iter().map(of).collect();
        let is_new = self.placements[layer] != placement;
        self.placements[layer] = placement;
        if self.kind.is_historical() && !is_new {
            return 0;
        }
        self.sync.measure(&mut self.transfers)
    }

    /// The slowest rank's rows in and out and its experts.
    fn experts_ns(&self) -> u64 {
        let costs = &self.world.costs;
        let mut ns: Vec<u64> = self.measure.processed().iter().map(|&rows| costs.rows.ns(rows)).collect();
        for (instance, rows) in self.plan.instances().iter().zip(self.measure.instances()) {
            ns[instance.rank.index()] += costs.expert.ns(rows.next_multiple_of(ultraep_device::ROW_TILE as u64));
        }
        ns.into_iter().max().unwrap_or(0)
    }

    fn note(&mut self, exposed_sync_ns: u64) {
        let topology = &self.world.settings.topology;
        let (total, largest) = (self.measure.total_tokens(), self.measure.largest());
        let (before, after) = (imbalance(master_loads(topology, &self.counts)), self.measure.imbalance());
        let b = &mut self.balance;
        // Tokens times imbalance: the largest load times the number of ranks.
        if total > 0 {
            b.weighted_before += before.0 as f64;
            b.weighted_after += after.0 as f64;
        }
        b.tokens += total;
        b.peak_tokens = b.peak_tokens.max(largest);
        b.even_peak_tokens = b.even_peak_tokens.max(total.div_ceil(topology.ranks() as u64));
        b.replicas += self.plan.replicas() as u64;
        b.layers += 1;
        b.exposed_sync_ns += exposed_sync_ns;
        if total >= self.full_batch_tokens * self.world.top_k as u64 {
            b.worst_after = b.worst_after.max(after.0 as f64 / after.1 as f64);
        }
    }
}

impl BatchTime for Replay<'_> {
    fn batch_ns(&mut self, batch: &Batch) -> u64 {
        match self.batch(batch) {
            Ok(ns) => ns.max(1),
            Err(error) => {
                self.failure.get_or_insert(error);
                1
            }
        }
    }
}
