//! Prefill serving in virtual time: the project's scheduler composes batches, the layers of the model say what they take.
//!
//! ```text
//! arrivals (Poisson) ─► Scheduler::compose ─► tokens and contexts of every rank ─► counts ─► balancer ─► forward of all layers
//! ```
//!
//! A few layers stand for all. Attention takes as long as on the rank with the most work; historical policies see every batch,
//! and a batch in which they place experts anew waits for the move.

use std::sync::Arc;

use serde::Serialize;
use ultraep_plan::time::at_rate_ps;
use ultraep_plan::{Topology, TopologySpec};
use ultraep_schedule::{Arrival, Limits, LimitsError, TtftSummary, simulate};

use crate::SimError;
use crate::balancer::{Balancer, LayerLoad, SyncRule, System};
use crate::closed::ClosedForm;
use crate::error::within;
use crate::footprint::Footprint;
use crate::layer::{Batch, Direction, LayerWork};
use crate::machine::Machine;
use crate::memory::{ActivationPeaks, activation_peaks};
use crate::model::ModelSpec;
use crate::process::{LoadProcess, ProcessParams};
use crate::recorded::RecordedLoads;

/// A serving system and what it is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrefillSpec {
    /// The model.
    pub model: ModelSpec,
    /// The machine.
    pub machine: Machine,
    /// `G`, ranks of a domain; the limits give the ranks.
    pub domain_ranks: u32,
    /// `R`, slots on a rank.
    pub slots: u32,
    /// Bounds of the scheduler.
    pub limits: Limits,
    /// Layers with experts that are simulated; the others repeat them.
    pub layers_sampled: u32,
    /// The load.
    pub process: ProcessParams,
    /// Recorded counts instead: each source's tokens choose experts in the recorded proportions. `process` then only gives the
    /// shape and the seed.
    pub recorded: Option<Arc<RecordedLoads>>,
}

/// What one system makes of arrivals.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PrefillReport {
    /// The system.
    pub system: String,
    /// Time to the first token.
    pub ttft: TtftSummary,
    /// Requests refused because the queue was full.
    pub refused: usize,
    /// Prompt tokens a second while batches ran.
    pub tokens_per_s: f64,
    /// Batches.
    pub batches: u64,
    /// Mean imbalance as routed.
    pub imbalance_before: f64,
    /// Mean imbalance after balancing.
    pub imbalance: f64,
    /// Memory of a rank.
    pub memory: Footprint,
    /// Peaks of activation memory.
    #[serde(skip)]
    pub peaks: ActivationPeaks,
}

/// Why the scheduler refused its limits.
fn limits_error(error: LimitsError) -> SimError {
    SimError::Limits(error)
}

/// Serves `arrivals` under a system.
pub fn simulate_prefill(spec: &PrefillSpec, system: &System, arrivals: &[Arrival]) -> Result<PrefillReport, SimError> {
    spec.limits.validate().map_err(limits_error)?;
    within("layers with experts", u64::from(spec.model.moe_layers()), 1, 1024)?;
    within("layers sampled", u64::from(spec.layers_sampled), 1, u64::from(spec.model.moe_layers()))?;
    let ranks = spec.limits.ranks as u64;
    within("ranks of the process", u64::from(spec.process.ranks), ranks, ranks)?;
    let topology = Topology::new(TopologySpec {
        ranks: spec.limits.ranks,
        experts: spec.model.experts as usize,
        domain_ranks: spec.domain_ranks as usize,
        slots_per_rank: spec.slots as usize,
    })?;
    let memory = Footprint::prefill(spec, system.sync, u64::from(spec.limits.kv_tokens_per_rank));
    memory.check(&spec.machine)?;
    let mut server = Server::new(spec, system, topology)?;
    let simulation = simulate(spec.limits, arrivals, &mut |batch: &ultraep_schedule::Batch| server.batch_ns(batch));
    let simulation = simulation.map_err(limits_error)?;
    if let Some(error) = server.failed {
        return Err(error);
    }
    let ttft: Vec<u64> = simulation.served.iter().filter_map(|s| s.ttft_ns()).collect();
    let count = server.loads.max(1) as f64;
    Ok(PrefillReport {
        system: system.name.clone(),
        refused: simulation.served.len() - ttft.len(),
        ttft: TtftSummary::of(ttft),
        tokens_per_s: server.tokens as f64 * 1e9 / simulation.busy_ns.max(1) as f64,
        batches: simulation.batches,
        imbalance_before: server.before / count,
        imbalance: server.after / count,
        memory,
        peaks: server.peaks,
    })
}

struct Server<'a> {
    spec: &'a PrefillSpec,
    system: &'a System,
    topology: Topology,
    process: LoadProcess,
    /// One a sampled layer.
    balancers: Vec<Balancer>,
    counts: Vec<u32>,
    layers: Vec<LayerLoad>,
    batches: u32,
    tokens: u64,
    loads: u64,
    before: f64,
    after: f64,
    peaks: ActivationPeaks,
    failed: Option<SimError>,
}

impl<'a> Server<'a> {
    fn new(spec: &'a PrefillSpec, system: &'a System, topology: Topology) -> Result<Self, SimError> {
        let transfers = spec.machine.transfer_model(&spec.model);
        let mut process = match &spec.recorded {
            Some(recorded) => LoadProcess::recorded(spec.process, Arc::clone(recorded))?,
            None => LoadProcess::new(spec.process)?,
        };
        let mut counts = Vec::new();
        let mut balancer = |layer| {
            let mut balancer = Balancer::new(system, &topology, transfers)?;
            // Serving has gone on for a while.
            if system.policy.is_historical() {
                for batch in 0..u32::try_from(system.history.interval).unwrap_or(u32::MAX) {
                    process.counts(layer, 0, batch, &mut counts);
                    balancer.observe(&counts)?;
                }
            }
            Ok::<_, SimError>(balancer)
        };
        Ok(Self {
            spec,
            system,
            balancers: (0..spec.layers_sampled).map(&mut balancer).collect::<Result<_, _>>()?,
            process,
            topology,
            counts: Vec::new(),
            layers: vec![LayerLoad::default(); spec.layers_sampled as usize],
            batches: 0,
            tokens: 0,
            loads: 0,
            before: 0.0,
            after: 0.0,
            peaks: ActivationPeaks::default(),
            failed: None,
        })
    }

    /// After a failure every batch is over at once; the error is reported at the end.
    fn batch_ns(&mut self, batch: &ultraep_schedule::Batch) -> u64 {
        if self.failed.is_some() {
            return 1;
        }
        match self.forward_ps(batch) {
            Ok(ps) => ps.div_ceil(1000).max(1),
            Err(error) => {
                self.failed = Some(error);
                1
            }
        }
    }

    fn forward_ps(&mut self, batch: &ultraep_schedule::Batch) -> Result<u64, SimError> {
        let work = self.work(batch);
        let tokens = |rank: usize| Some(u32::try_from(batch.tokens_of_rank(rank)).unwrap_or(u32::MAX));
        let (mut sum, mut moved) = (0, 0);
        for (layer, (balancer, load)) in (0..).zip(self.balancers.iter_mut().zip(&mut self.layers)) {
            self.process.counts_of(layer, (crate::fit::HISTORY_STEPS, self.batches), tokens, &mut self.counts);
            balancer.microbatch(&self.counts, load)?;
            let times = ClosedForm::times(&work, load, Direction::Forward);
            sum = times.total_ps().saturating_add(sum);
            moved += u64::from(load.moved);
            self.loads += 1;
            self.before += load.imbalance_before();
            self.after += load.imbalance();
        }
        self.peaks = self.peaks.max(activation_peaks(&self.layers));
        self.batches += 1;
        self.tokens += batch.tokens();
        let (layers, sampled) = (u64::from(self.spec.model.moe_layers()), u64::from(self.spec.layers_sampled));
        let placed = match self.system.sync {
            SyncRule::Placement { bytes_per_s } => at_rate_ps(moved * self.spec.model.expert_bytes(), bytes_per_s),
            _ => 0,
        };
        let experts = (u128::from(sum) + u128::from(placed)) * u128::from(layers) / u128::from(sampled);
        Ok(u64::try_from(experts).unwrap_or(u64::MAX).saturating_add(self.outside_ps(&work, batch)))
    }

    /// Constants for the rank with the most attention to do.
    fn work(&self, batch: &ultraep_schedule::Batch) -> LayerWork {
        let of_rank = |rank: usize| {
            let chunks = batch.of_rank(rank);
            let tokens: u64 = chunks.iter().map(|c| u64::from(c.tokens)).sum();
            // Twice the context that a token sees on average: the length of a sequence that is all prompt.
            let context: u64 = chunks.iter().map(|c| u64::from(c.tokens) * u64::from(2 * c.start + c.tokens)).sum();
            (tokens, context.checked_div(tokens).unwrap_or(0))
        };
        let cost = |&(tokens, sequence): &(u64, u64)| {
            u128::from(tokens) * u128::from(self.spec.model.rest_flops(sequence as u32))
        };
        let (tokens, sequence) = (0..self.spec.limits.ranks).map(of_rank).max_by_key(cost).unwrap_or((0, 0));
        let batch = Batch { tokens_per_rank: tokens as u32, sequence: sequence as u32 };
        LayerWork::new(&self.spec.machine, &self.spec.model, batch, self.system, &self.topology)
    }

    /// Layers without experts: the rest of a layer stands for each, with a dense feed-forward in place of experts.
    fn outside_ps(&self, work: &LayerWork, batch: &ultraep_schedule::Batch) -> u64 {
        let dense = 6 * u64::from(self.spec.model.hidden) * u64::from(self.spec.model.dense_width);
        let most = (0..self.spec.limits.ranks).map(|rank| batch.tokens_of_rank(rank)).max().unwrap_or(0);
        let each = work
            .forward
            .rest_ps
            .saturating_add(at_rate_ps(most * dense, self.spec.machine.calibrated.forward_flops_per_s));
        u64::from(self.spec.model.dense_layers).saturating_mul(each)
    }
}
