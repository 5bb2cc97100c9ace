//! The runs of a step's groups: loads first, then every op of the pipeline through its layers.

use ultraep_plan::Topology;
use ultraep_plan::time::at_rate_ps;

use std::sync::Arc;

use crate::SimError;
use crate::balancer::{Balancer, LayerLoad, System};
use crate::closed::ClosedForm;
use crate::event::EventLevel;
use crate::fit::{HISTORY_STEPS, warm_up};
use crate::layer::{Direction, Fidelity, LayerModel, LayerTimes, LayerWork};
use crate::memory::{ActivationPeaks, activation_peaks};
use crate::pipeline::{Op, Schedule};
use crate::process::LoadProcess;
use crate::random::{normal, random};
use crate::span::Span;
use crate::step::{Mistake, Recompute, StepSpec};
/// Sums over layers, microbatches and groups.
#[derive(Default)]
pub(crate) struct Sums {
    pub(crate) loads: u64,
    pub(crate) before: f64,
    pub(crate) after: f64,
    pub(crate) worst: f64,
    pub(crate) replicas: u64,
    pub(crate) fanout: u64,
    pub(crate) remote: f64,
    pub(crate) moved: u64,
    pub(crate) peaks: ActivationPeaks,
    pub(crate) passes: [u64; 2],
    pub(crate) forward: LayerTimes,
    pub(crate) backward: LayerTimes,
    pub(crate) events: u64,
    pub(crate) digest: u64,
}

/// One group's run.
#[derive(Default)]
pub(crate) struct Group {
    pub(crate) timeline_ps: u64,
    pub(crate) ops: Vec<(Op, u64, u64)>,
    pub(crate) busy_ps: Vec<u64>,
    pub(crate) last_backward_ps: u64,
    pub(crate) spans: Vec<Span>,
}

/// Loads of every sampled layer and microbatch of a group, `[layers, microbatches]`.
pub(crate) fn loads(
    spec: &StepSpec,
    system: &System,
    topology: &Topology,
    group: u32,
    sums: &mut Sums,
) -> Result<Vec<LayerLoad>, SimError> {
    let model = spec.machine.transfer_model(&spec.model);
    let mut process = match &spec.recorded {
        Some(recorded) => LoadProcess::recorded(spec.process, Arc::clone(recorded))?,
        None => LoadProcess::new(spec.process)?,
    };
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
pub(crate) struct Runner<'a> {
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
    pub(crate) fn new(
        spec: &'a StepSpec,
        work: &'a LayerWork,
        loads: &'a [LayerLoad],
        fidelity: Fidelity,
        keep: bool,
    ) -> Self {
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

    pub(crate) fn run(&mut self, schedule: &Schedule, sums: &mut Sums) -> Group {
        let bytes = 2 * u64::from(self.spec.model.hidden) * u64::from(self.spec.batch.tokens_per_rank);
        let hand_over = match self.spec.pipeline.stages {
            1 => 0,
            _ => at_rate_ps(bytes, self.spec.machine.scale_out_bytes_per_s)
                .saturating_add(1000 * self.spec.machine.hop_ns),
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
        self.ready.iter_mut().for_each(|time| *time = time.saturating_add(ps));
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
        if op.direction == Direction::Backward && self.spec.recompute == Recompute::Layer {
            model.pass(&self.again, load, Direction::Forward, &mut self.ready);
        }
        let times = model.pass(self.work, load, op.direction, &mut self.ready);
        match op.direction {
            Direction::Forward => sums.forward.add(&times),
            Direction::Backward => {
                sums.backward.add(&times);
                let rest = self.work.forward.rest_ps.saturating_add(self.work.backward.rest_ps);
                let outside = u128::from(rest) * u128::from(c.outside_permille) / 1000;
                self.delay(u64::try_from(outside).unwrap_or(u64::MAX));
                if self.spec.recompute == Recompute::Attention {
                    self.delay(self.work.forward.rest_ps);
                }
            }
        }
        sums.passes[usize::from(op.direction == Direction::Backward)] += 1;
        if self.spec.jitter.percent > 0 {
            let way = u64::from(op.direction == Direction::Backward);
            let moment = u64::from(op.microbatch) << 1 | way;
            let mut rng = random(self.spec.process.seed, JITTER, u64::from(layer), moment);
            let deviation = normal(&mut rng).unsigned_abs() * u64::from(self.spec.jitter.percent);
            let longer = u128::from(times.all_to_all_ps) * u128::from(deviation) / (100 << 12);
            self.delay(u64::try_from(longer).unwrap_or(u64::MAX));
        }
    }
}

/// Purpose of jitter's random numbers.
const JITTER: u32 = 5;
