//! One training step of one system: layers, pipeline, data parallelism, optimizer.
//!
//! ```text
//! for every data-parallel group, layer and microbatch: counts ─► balancer ─► LayerLoad
//! op(chunk of layers, microbatch, way) = sum over its layers of the pass       (events: rank by rank through the layers)
//! step = pipeline(ops) of the slowest group + all-reduce that backward does not hide + optimizer + placements
//! ```
//!
//! With `layers_sampled` a few layers stand for all: each for its neighbours.

use serde::Serialize;
use ultraep_plan::{Topology, TopologySpec};

use crate::SimError;
use crate::balancer::{Balancer, LayerLoad, SyncRule, System};
use crate::closed::ClosedForm;
use crate::error::within;
use crate::event::EventLevel;
use crate::fit::{HISTORY_STEPS, warm_up};
use crate::layer::{Batch, Direction, Fidelity, LayerModel, LayerTimes, LayerWork};
use crate::machine::{Machine, at_rate_ps};
use crate::memory::{ActivationPeaks, activation_peaks};
use crate::model::ModelSpec;
use crate::pipeline::{Op, Pipeline, PipelineError, Schedule};
use crate::process::{LoadProcess, ProcessParams};
use crate::random::{normal, random};
use crate::span::Span;

/// Optimizer traffic of a parameter: gradient, master weight and two moments read, three of them and the weight written.
const OPTIMIZER_BYTES: u64 = 28;
/// Weight and optimizer state of a parameter, moved when an expert is placed elsewhere.
const STATE_BYTES: u64 = 16;

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
    /// Whether backward runs the forward again.
    pub recompute: bool,
    /// Layers with experts that are simulated; the others repeat them.
    pub layers_sampled: u32,
    /// The load.
    pub process: ProcessParams,
    /// Speed weights of the ranks, `[N]`; empty for full speed.
    pub speeds: Vec<u32>,
    /// Whether the planner knows the speed weights.
    pub speeds_known: bool,
    /// What the planner gets wrong.
    pub mistake: Mistake,
    /// What links do.
    pub jitter: Jitter,
}

/// What one system makes of a step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SystemReport {
    /// The system.
    pub system: String,
    /// Time of the step.
    pub step_ps: u64,
    /// Mean forward of a layer with experts.
    pub forward: LayerTimes,
    /// Mean backward of a layer with experts.
    pub backward: LayerTimes,
    /// Mean imbalance as routed.
    pub imbalance_before: f64,
    /// Mean imbalance after balancing.
    pub imbalance: f64,
    /// Largest imbalance after balancing.
    pub imbalance_worst: f64,
    /// Mean number of replicas of a layer.
    pub replicas: f64,
    /// Mean of the most replicas of one expert.
    pub fanout: f64,
    /// Share of rows that another rank than their source processes.
    pub remote_fraction: f64,
    /// Share of the pipeline's time that stages wait.
    pub bubble_fraction: f64,
    /// All-reduce of gradients that backward does not hide.
    pub all_reduce_ps: u64,
    /// Optimizer.
    pub optimizer_ps: u64,
    /// Experts placed anew, share of one step.
    pub placement_ps: u64,
    /// Model operations a second and accelerator, in tera.
    pub tflops: f64,
    /// Tokens a second, all accelerators together.
    pub tokens_per_s: f64,
    /// Peaks of activation memory.
    #[serde(skip)]
    pub peaks: ActivationPeaks,
    /// Events handled; 0 in closed form.
    pub events: u64,
    /// Digest of all that happened.
    pub digest: u64,
}

/// All that came out of a step.
#[derive(Clone, Debug)]
pub struct StepReport {
    /// Figures.
    pub system: SystemReport,
    /// The pipeline of the slowest group.
    pub ops: Vec<(Op, u64, u64)>,
    /// What each rank did when in the first forward and backward op of the first stage; empty in closed form or unless asked
    /// for.
    pub spans: Vec<Span>,
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

    /// Accelerators.
    pub fn gpus(&self) -> u64 {
        u64::from(self.ranks) * u64::from(self.pipeline.stages) * u64::from(self.data_parallel)
    }

    /// Layers of every pipeline part, in the order of the model: part `chunk * stages + stage`.
    fn parts(&self) -> Vec<std::ops::Range<u32>> {
        let parts = self.pipeline.stages * self.pipeline.chunks;
        let (each, extra) = (self.model.layers / parts, self.model.layers % parts);
        let start = |part: u32| part * each + part.min(extra);
        (0..parts).map(|part| start(part)..start(part + 1)).collect()
    }

    /// Which sampled layer stands for a layer; `None` for one without experts.
    fn sample(&self, layer: u32) -> Option<usize> {
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
    Ok(report(spec, &system, sums, group))
}

/// Sums over layers, microbatches and groups.
#[derive(Default)]
struct Sums {
    loads: u64,
    before: f64,
    after: f64,
    worst: f64,
    replicas: u64,
    fanout: u64,
    remote: f64,
    moved: u64,
    peaks: ActivationPeaks,
    passes: [u64; 2],
    forward: LayerTimes,
    backward: LayerTimes,
    events: u64,
    digest: u64,
}

/// One group's run.
#[derive(Default)]
struct Group {
    timeline_ps: u64,
    ops: Vec<(Op, u64, u64)>,
    busy_ps: Vec<u64>,
    last_backward_ps: u64,
    spans: Vec<Span>,
}

/// Loads of every sampled layer and microbatch of a group, `[layers, microbatches]`.
fn loads(
    spec: &StepSpec,
    system: &System,
    topology: &Topology,
    group: u32,
    sums: &mut Sums,
) -> Result<Vec<LayerLoad>, SimError> {
    let model = spec.machine.transfer_model(&spec.model);
    let mut process = LoadProcess::new(spec.process)?;
    let (microbatches, layers) = (spec.pipeline.microbatches, spec.layers_sampled.min(spec.model.moe_layers()));
    let (mut counts, mut seen, mut all) = (Vec::new(), Vec::new(), Vec::new());
    let mut shared: Option<Balancer> = None;
    for layer in 0..layers {
        let mut balancer = match shared.take() {
            Some(balancer) if !system.policy.is_historical() => balancer,
            _ => Balancer::new(system, topology, model)?,
        };
        warm_up(&mut balancer, &mut process, layer, microbatches, &mut counts)?;
        let mut moved = 0;
        for microbatch in 0..microbatches {
            let moment = group * microbatches + microbatch;
            process.counts(layer, HISTORY_STEPS, moment, &mut counts);
            let mut load = LayerLoad::default();
            if spec.mistake == Mistake::StaleCounts {
                match moment.checked_sub(1) {
                    Some(before) => process.counts(layer, HISTORY_STEPS, before, &mut seen),
                    None => process.counts(layer, HISTORY_STEPS - 1, microbatches, &mut seen),
                }
                balancer.planned_for(&seen, &counts, &mut load)?;
            } else {
                balancer.microbatch(&counts, &mut load)?;
            }
            moved = moved.max(load.moved);
            sums.take(&load);
            all.push(load);
        }
        sums.moved += u64::from(moved);
        shared = Some(balancer);
    }
    for microbatch in 0..microbatches as usize {
        let of = all.iter().skip(microbatch).step_by(microbatches as usize);
        sums.peaks = sums.peaks.max(activation_peaks(of));
    }
    Ok(all)
}

impl Sums {
    fn take(&mut self, load: &LayerLoad) {
        self.loads += 1;
        self.before += load.imbalance_before();
        self.after += load.imbalance();
        self.worst = self.worst.max(load.imbalance());
        self.replicas += u64::from(load.replicas);
        self.fanout += u64::from(load.fanout);
        self.remote += load.remote_fraction();
    }
}

/// Runs the ops of a group.
struct Runner<'a> {
    spec: &'a StepSpec,
    work: &'a LayerWork,
    /// For recomputation: the forward without planning.
    again: LayerWork,
    loads: &'a [LayerLoad],
    parts: Vec<std::ops::Range<u32>>,
    closed: ClosedForm,
    events: EventLevel,
    fidelity: Fidelity,
    spans: Vec<Span>,
    keep_spans: bool,
    ready: Vec<u64>,
}

impl<'a> Runner<'a> {
    fn new(spec: &'a StepSpec, work: &'a LayerWork, loads: &'a [LayerLoad], fidelity: Fidelity, keep: bool) -> Self {
        Self {
            spec,
            work,
            again: LayerWork { plan_ps: 0, reroute_ps: 0, ..work.clone() },
            loads,
            parts: spec.parts(),
            closed: ClosedForm::default(),
            events: if keep { EventLevel::with_spans() } else { EventLevel::default() },
            fidelity,
            spans: Vec::new(),
            keep_spans: keep,
            ready: vec![0; spec.ranks as usize],
        }
    }

    fn run(&mut self, schedule: &Schedule, sums: &mut Sums) -> Group {
        let bytes = 2 * u64::from(self.spec.model.hidden) * u64::from(self.spec.batch.tokens_per_rank);
        let hand_over = match self.spec.pipeline.stages {
            1 => 0,
            _ => at_rate_ps(bytes, self.spec.machine.scale_out_bytes_per_s) + 1000 * self.spec.machine.hop_ns,
        };
        let timeline = schedule.run(hand_over, |op| self.op(op, sums));
        let model: &dyn LayerModel = match self.fidelity {
            Fidelity::ClosedForm => &self.closed,
            Fidelity::Events => &self.events,
        };
        sums.digest = sums.digest.rotate_left(1) ^ model.digest();
        sums.events += if self.fidelity == Fidelity::Events { self.events.events() } else { 0 };
        let last = timeline.ops.iter().filter(|(op, ..)| op.direction == Direction::Backward);
        let last_backward_ps = last.map(|(_, start, end)| end - start).next_back().unwrap_or(0);
        Group {
            timeline_ps: timeline.total_ps,
            busy_ps: timeline.busy_ps,
            ops: timeline.ops,
            last_backward_ps,
            spans: std::mem::take(&mut self.spans),
        }
    }

    fn op(&mut self, op: Op, sums: &mut Sums) -> u64 {
        let part = (op.chunk * self.spec.pipeline.stages + op.stage) as usize;
        let layers = self.parts[part].clone();
        self.ready.fill(0);
        match op.direction {
            Direction::Forward => layers.for_each(|layer| self.layer(op, layer, sums)),
            Direction::Backward => layers.rev().for_each(|layer| self.layer(op, layer, sums)),
        }
        if part + 1 == self.parts.len() {
            self.delay(self.head_ps(op.direction));
        }
        let spans = self.events.take_spans();
        if self.keep_spans && op.stage == 0 && op.chunk == 0 && op.microbatch == 0 {
            let offset = self.spans.iter().map(|s| s.end_ps).max().unwrap_or(0);
            let moved = |s: Span| Span { start_ps: s.start_ps + offset, end_ps: s.end_ps + offset, ..s };
            self.spans.extend(spans.into_iter().map(moved));
        }
        self.ready.iter().copied().max().unwrap_or(0)
    }

    fn head_ps(&self, direction: Direction) -> u64 {
        let flops = u64::from(self.spec.batch.tokens_per_rank) * self.spec.model.head_flops();
        let c = &self.spec.machine.calibrated;
        match direction {
            Direction::Forward => at_rate_ps(flops, c.forward_flops_per_s),
            Direction::Backward => at_rate_ps(2 * flops, c.backward_flops_per_s),
        }
    }

    fn delay(&mut self, ps: u64) {
        self.ready.iter_mut().for_each(|time| *time += ps);
    }

    fn layer(&mut self, op: Op, layer: u32, sums: &mut Sums) {
        let c = &self.spec.machine.calibrated;
        let Some(sample) = self.spec.sample(layer) else {
            let flops = u64::from(self.spec.batch.tokens_per_rank)
                * self.spec.model.dense_layer_flops(self.spec.batch.sequence);
            return self.delay(match op.direction {
                Direction::Forward => at_rate_ps(flops, c.forward_flops_per_s),
                Direction::Backward => at_rate_ps(2 * flops, c.backward_flops_per_s),
            });
        };
        let load = &self.loads[sample * self.spec.pipeline.microbatches as usize + op.microbatch as usize];
        let model: &mut dyn LayerModel = match self.fidelity {
            Fidelity::ClosedForm => &mut self.closed,
            Fidelity::Events => &mut self.events,
        };
        if op.direction == Direction::Backward && self.spec.recompute {
            model.pass(&self.again, load, Direction::Forward, &mut self.ready);
        }
        let times = model.pass(self.work, load, op.direction, &mut self.ready);
        match op.direction {
            Direction::Forward => sums.forward.add(&times),
            Direction::Backward => {
                sums.backward.add(&times);
                let rest = self.work.forward.rest_ps + self.work.backward.rest_ps;
                self.delay((u128::from(rest) * u128::from(c.outside_permille) / 1000) as u64);
            }
        }
        sums.passes[usize::from(op.direction == Direction::Backward)] += 1;
        if self.spec.jitter.percent > 0 {
            let way = u64::from(op.direction == Direction::Backward);
            let moment = u64::from(op.microbatch) << 1 | way;
            let mut rng = random(self.spec.process.seed, JITTER, u64::from(layer), moment);
            let deviation = normal(&mut rng).unsigned_abs() * u64::from(self.spec.jitter.percent);
            self.delay(times.all_to_all_ps / 4096 * deviation / 100);
        }
    }
}

/// Purpose of jitter's random numbers.
const JITTER: u32 = 5;

fn report(spec: &StepSpec, system: &System, sums: Sums, group: Group) -> StepReport {
    let layers_of_stage = u64::from(spec.model.layers.div_ceil(spec.pipeline.stages));
    let of_experts = u64::from(spec.model.experts.div_ceil(spec.ranks)) * spec.model.expert_parameters();
    let shared = u64::from(spec.model.shared_experts) * spec.model.expert_parameters();
    let dense = spec.model.attention.parameters(spec.model.hidden) + shared;
    let (experts, dense) = (layers_of_stage * of_experts, layers_of_stage * dense);
    // Gradients in fp32; experts are reduced over the groups, dense parameters over all their ranks.
    let ring =
        |bytes: u64, members: u64| (u128::from(2 * bytes) * u128::from(members - 1) / u128::from(members)) as u64;
    let groups = u64::from(spec.data_parallel);
    let bytes = ring(4 * experts, groups) + ring(4 * dense, groups * u64::from(spec.ranks));
    let all_reduce = at_rate_ps(bytes, spec.machine.scale_out_bytes_per_s).saturating_sub(group.last_backward_ps);
    let owned = experts.div_ceil(groups) + dense.div_ceil(groups * u64::from(spec.ranks));
    let optimizer_ps = at_rate_ps(OPTIMIZER_BYTES * owned, spec.machine.memory_bytes_per_s);
    let placement_ps = placement_ps(spec, system, &sums);
    let step_ps = group.timeline_ps + all_reduce + optimizer_ps + placement_ps;
    let count = sums.loads.max(1) as f64;
    let tokens = u64::from(spec.pipeline.microbatches) * u64::from(spec.batch.tokens_per_rank) * u64::from(spec.ranks);
    let seconds = step_ps.max(1) as f64 / 1e12;
    let tokens_per_s = (tokens * groups) as f64 / seconds;
    let stages = group.busy_ps.len().max(1) as f64;
    let busy = group.busy_ps.iter().sum::<u64>() as f64 / (stages * group.timeline_ps.max(1) as f64);
    let system = SystemReport {
        system: system.name.clone(),
        step_ps,
        forward: sums.forward.over(sums.passes[0]),
        backward: sums.backward.over(sums.passes[1]),
        imbalance_before: sums.before / count,
        imbalance: sums.after / count,
        imbalance_worst: sums.worst,
        replicas: sums.replicas as f64 / count,
        fanout: sums.fanout as f64 / count,
        remote_fraction: sums.remote / count,
        bubble_fraction: 1.0 - busy,
        all_reduce_ps: all_reduce,
        optimizer_ps,
        placement_ps,
        tflops: tokens_per_s * spec.model.token_flops(spec.batch.sequence) as f64 / spec.gpus() as f64 / 1e12,
        tokens_per_s,
        peaks: sums.peaks,
        events: sums.events,
        digest: sums.digest,
    };
    StepReport { system, ops: group.ops, spans: group.spans }
}

/// Moving experts when they are placed anew, as a share of one of the steps between two placements.
fn placement_ps(spec: &StepSpec, system: &System, sums: &Sums) -> u64 {
    let SyncRule::Placement { bytes_per_s } = system.sync else { return 0 };
    let sampled = u64::from(spec.layers_sampled.min(spec.model.moe_layers()) * spec.groups_sampled).max(1);
    let layers = u64::from(spec.model.moe_layers()).div_ceil(u64::from(spec.pipeline.stages));
    let moved = STATE_BYTES * spec.model.expert_parameters() * sums.moved * layers / sampled;
    let steps = (system.history.interval as u64).div_ceil(u64::from(spec.pipeline.microbatches)).max(1);
    at_rate_ps(moved, bytes_per_s) / steps
}
