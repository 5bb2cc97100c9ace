//! One training step of one system: layers, pipeline, data parallelism, optimizer.
//!
//! ```text
//! for every data-parallel group, layer and microbatch: counts ─► balancer ─► LayerLoad
//! op(chunk of layers, microbatch, way) = sum over its layers of the pass       (events: rank by rank through the layers)
//! step = pipeline(ops) of the slowest group + all-reduce that backward does not hide + optimizer + placements
//! ```
//!
//! With `layers_sampled` a few layers stand for all: each for its neighbours.

use std::sync::Arc;

use ultraep_plan::{Topology, TopologySpec};

use crate::SimError;
use crate::balancer::{SyncRule, System};
use crate::error::within;
use crate::footprint::Footprint;
use crate::layer::{Batch, Fidelity, LayerWork};
use crate::machine::Machine;
use crate::memory::ActivationPeaks;
use crate::model::ModelSpec;
use crate::pipeline::{Pipeline, PipelineError, Schedule};
use crate::process::ProcessParams;
use crate::recorded::RecordedLoads;
use crate::report::{StepReport, report};
use crate::runner::{Group, Runner, Sums, loads};

/// What is wrong with what the planner sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mistake {
    /// Nothing.
    #[default]
    None,
    /// It plans from the counts of the microbatch before.
    StaleCounts,
    /// Its plan comes later by so much.
    LatePlan {
        /// Nanoseconds on top of the plan's time.
        late_ns: u64,
    },
}

/// What a layer does not keep for backward, so that backward runs it again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Recompute {
    /// All is kept.
    #[default]
    Nothing,
    /// Attention and the rest of the layer, under no new plan: what the experts need is kept.
    Attention,
    /// The whole layer, all-to-all and experts too.
    Layer,
}

impl Recompute {
    /// From the least work to the least memory.
    pub const ALL: [Self; 3] = [Self::Nothing, Self::Attention, Self::Layer];
}

/// Links whose rate varies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Jitter {
    /// Standard deviation of an all-to-all's time, in percent; it only ever gets longer.
    pub percent: u32,
}

/// A training step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepSpec {
    /// The model.
    pub model: ModelSpec,
    /// The machine.
    pub machine: Machine,
    /// `N`, ranks of an EP group.
    pub ranks: u32,
    /// `G`, ranks of a domain.
    pub domain_ranks: u32,
    /// `R`, slots on a rank.
    pub slots: u32,
    /// Tokens of a microbatch.
    pub batch: Batch,
    /// Pipeline of EP groups.
    pub pipeline: Pipeline,
    /// EP groups side by side, each with data of its own.
    pub data_parallel: u32,
    /// Of these, how many are simulated; the slowest counts.
    pub groups_sampled: u32,
    /// What backward runs again because it is not kept.
    pub recompute: Recompute,
    /// Layers with experts that are simulated; the others repeat them.
    pub layers_sampled: u32,
    /// The load.
    pub process: ProcessParams,
    /// Recorded routing instead, scaled to the tokens of the batch; `process` then only gives shape and tokens.
    pub recorded: Option<Arc<RecordedLoads>>,
    /// Speed weights of the ranks, `[N]`; empty for full speed.
    pub speeds: Vec<u32>,
    /// Whether the planner knows the speed weights.
    pub speeds_known: bool,
    /// What the planner gets wrong.
    pub mistake: Mistake,
    /// What links do.
    pub jitter: Jitter,
}

impl StepSpec {
    /// The EP group.
    pub fn topology(&self) -> Result<Topology, SimError> {
        let spec = TopologySpec {
            ranks: self.ranks as usize,
            experts: self.model.experts as usize,
            domain_ranks: self.domain_ranks as usize,
            slots_per_rank: self.slots as usize,
        };
        let topology = Topology::new(spec)?;
        Ok(if self.speeds.is_empty() || !self.speeds_known { topology } else { topology.with_speeds(&self.speeds)? })
    }

    fn check(&self) -> Result<(), SimError> {
        within("layers with experts", u64::from(self.model.moe_layers()), 1, 1024)?;
        within("layers sampled", u64::from(self.layers_sampled), 1, 1024)?;
        within("data-parallel groups", u64::from(self.data_parallel), 1, 1 << 20)?;
        within("groups sampled", u64::from(self.groups_sampled), 1, u64::from(self.data_parallel))?;
        within("microbatches", u64::from(self.pipeline.microbatches), 1, 4096)?;
        within(
            "tokens of a process",
            u64::from(self.process.tokens_per_rank),
            1,
            u64::from(self.batch.tokens_per_rank),
        )?;
        within("ranks of the process", u64::from(self.process.ranks), u64::from(self.ranks), u64::from(self.ranks))?;
        let experts = u64::from(self.model.experts);
        within("experts of the process", u64::from(self.process.experts), experts, experts)?;
        if !self.speeds.is_empty() && self.speeds.len() != self.ranks as usize {
            let (got, expected) = (self.speeds.len(), self.ranks as usize);
            return Err(SimError::Length { what: "speeds", got, expected });
        }
        let parts = self.pipeline.stages.saturating_mul(self.pipeline.chunks);
        if parts > self.model.layers {
            return Err(PipelineError::Layers { parts, layers: self.model.layers }.into());
        }
        Ok(())
    }

    /// The least recomputation under which an even load fits the machine's memory; all of it where nothing fits.
    pub fn least_recompute(&self) -> Result<Recompute, SimError> {
        let schedule = Schedule::new(self.pipeline)?;
        let rows = u64::from(self.batch.tokens_per_rank) * u64::from(self.model.top_k);
        let kept = rows * u64::from(self.layers_sampled.min(self.model.moe_layers()));
        let even = ActivationPeaks { kept_rows: kept, kept_mean_rows: kept, layer_rows: rows, layer_mean_rows: rows };
        let fits = |&recompute: &Recompute| {
            let spec = Self { recompute, ..self.clone() };
            Footprint::training(&spec, SyncRule::Never, &schedule, &even).check(&self.machine).is_ok()
        };
        Ok(Recompute::ALL.into_iter().find(fits).unwrap_or(Recompute::Layer))
    }

    /// Accelerators.
    pub fn gpus(&self) -> u64 {
        u64::from(self.ranks) * u64::from(self.pipeline.stages) * u64::from(self.data_parallel)
    }

    /// Layers of every pipeline part, in the order of the model: part `chunk * stages + stage`.
    pub(crate) fn parts(&self) -> Vec<std::ops::Range<u32>> {
        let parts = self.pipeline.stages * self.pipeline.chunks;
        let (each, extra) = (self.model.layers / parts, self.model.layers % parts);
        let start = |part: u32| part * each + part.min(extra);
        (0..parts).map(|part| start(part)..start(part + 1)).collect()
    }

    /// Which sampled layer stands for a layer; `None` for one without experts.
    pub(crate) fn sample(&self, layer: u32) -> Option<usize> {
        let moe = layer.checked_sub(self.model.dense_layers)?;
        let (sampled, all) = (u64::from(self.layers_sampled.min(self.model.moe_layers())), self.model.moe_layers());
        Some((u64::from(moe) * sampled / u64::from(all)) as usize)
    }
}

/// Simulates a step under a system. With `spans` the event level keeps what ranks did in the first microbatch.
pub fn simulate_step(
    spec: &StepSpec,
    system: &System,
    fidelity: Fidelity,
    spans: bool,
) -> Result<StepReport, SimError> {
    spec.check()?;
    let topology = spec.topology()?;
    let late = match spec.mistake {
        Mistake::LatePlan { late_ns } if system.plan_ns > 0 => late_ns,
        _ => 0,
    };
    let system = System { plan_ns: system.plan_ns + late, ..system.clone() };
    let schedule = Schedule::new(spec.pipeline)?;
    let mut work = LayerWork::new(&spec.machine, &spec.model, spec.batch, &system, &topology);
    if !spec.speeds.is_empty() {
        work.speeds.clone_from(&spec.speeds);
    }
    let mut sums = Sums::default();
    let mut slowest: Option<Group> = None;
    for group in 0..spec.groups_sampled {
        let loads = loads(spec, &system, &topology, group, &mut sums)?;
        let mut runner = Runner::new(spec, &work, &loads, fidelity, spans && group == 0);
        let run = runner.run(&schedule, &mut sums);
        if slowest.as_ref().is_none_or(|s| run.timeline_ps > s.timeline_ps) {
            let kept = slowest.take().map(|s| s.spans).unwrap_or_default();
            slowest = Some(Group { spans: if run.spans.is_empty() { kept } else { run.spans }, ..run });
        }
    }
    let group = slowest.unwrap_or_default();
    Ok(report(spec, &system, &schedule, sums, group))
}
