//! The observer that writes the run folder, and keeps what the final table needs.

use std::path::Path;

use ultraep_run::{
    Imbalance, Metric, PolicyMeasurement, PolicyTable, ProfileSummary, Profiler, ProfilerOptions, ReferenceMetrics,
    RunStatus, RunWriter, StepMetrics, StepParts, UtcTime,
};
use ultraep_runtime::{LayerRecord, Part, StepTime};
use ultraep_trace::{Record, TraceMeta};

use crate::report::{Comparison, Observer, Phase, StepReport};
use crate::{TrainConfig, TrainError};

/// Writes a run folder while a run goes.
pub struct RunFolder {
    writer: RunWriter,
    profiler: Profiler,
    config: TrainConfig,
    summary: Summary,
}

/// What a run came to, for the table and the screen.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Losses of the training: step and loss.
    pub losses: Vec<(u64, f32)>,
    /// Losses of the reference: step and loss.
    pub reference_losses: Vec<(u64, f32)>,
    /// Policies compared.
    pub measurements: Vec<PolicyMeasurement>,
    /// Largest relative difference of gradients between policies, where it was measured.
    pub gradient_difference: Option<f64>,
    /// Optimizer time of every step of the training.
    pub optimizer_ns: Vec<u64>,
    /// Imbalance over all (step, microbatch, layer) of the training.
    pub balance: BalanceCount,
    /// What was recorded of it, once the run has ended.
    pub profile: ProfileSummary,
}

/// How the training's own plans came out.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct BalanceCount {
    /// Plans made.
    pub plans: u64,
    /// Plans whose final imbalance is at most 1.02.
    pub within: u64,
    /// Plans above 1.02 that reach the proven lower bound: no plan could do better.
    pub at_bound: u64,
    /// Sum of imbalances before balancing.
    pub sum_before: f64,
    /// Sum of imbalances after balancing.
    pub sum_after: f64,
    /// Worst imbalance before balancing.
    pub worst_before: f64,
    /// Worst imbalance after balancing.
    pub worst_after: f64,
    /// Sum of proven lower bounds of the imbalance after balancing: no plan inside the domains gets below.
    pub sum_bound: f64,
    /// Largest lower bound.
    pub worst_bound: f64,
}

/// Final imbalance that a plan should reach.
const TARGET: f64 = 1.02;

impl BalanceCount {
    fn add(&mut self, record: &LayerRecord) {
        let (before, after, bound) = (record.imbalance_before(), record.imbalance_after(), record.imbalance_bound());
        self.plans += 1;
        self.sum_bound += bound;
        self.worst_bound = self.worst_bound.max(bound);
        self.sum_before += before;
        self.sum_after += after;
        self.worst_before = self.worst_before.max(before);
        self.worst_after = self.worst_after.max(after);
        if after <= TARGET {
            self.within += 1;
        } else if record.domains.iter().all(|d| d.threshold <= d.lower_bound) {
            self.at_bound += 1;
        }
    }

    /// Mean imbalance before and after.
    pub fn means(&self) -> (f64, f64) {
        let plans = self.plans.max(1) as f64;
        (self.sum_before / plans, self.sum_after / plans)
    }

    /// Mean lower bound of the imbalance after balancing.
    pub fn mean_bound(&self) -> f64 {
        self.sum_bound / self.plans.max(1) as f64
    }
}

impl RunFolder {
    /// Over a folder that was just made, or taken up at `resumed_step`.
    pub fn new(writer: RunWriter, config: TrainConfig, resumed_step: Option<u64>) -> Result<Self, TrainError> {
        let trace = match resumed_step {
            Some(step) => writer.resume_trace(step)?.0,
            None => {
                let mut meta = TraceMeta::of_topology(&config.topology()?, config.layers);
                meta.top_k = Some(config.top_k);
                meta.tokens_per_rank = Some(config.tokens_per_rank() as u64);
                writer.create_trace(meta)?
            }
        };
        // A whole step must fit, or long ones would always lose their last layers.
        let records_of_step = config.layers * config.microbatches as usize;
        let ring = ProfilerOptions::default().ring.max(2 * records_of_step);
        let profiler = Profiler::start(trace, ProfilerOptions { every: config.profile_every, ring })?;
        Ok(Self { writer, profiler, config, summary: Summary::default() })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        self.writer.folder()
    }

    /// What the run came to so far.
    pub fn summary(&self) -> &Summary {
        &self.summary
    }

    /// The table so far: none before a policy was compared.
    pub fn table(&self) -> Option<PolicyTable> {
        let Summary { measurements, optimizer_ns, .. } = &self.summary;
        if measurements.is_empty() {
            return None;
        }
        // The optimizer does the same under every policy; it ran in the training only.
        let mut sorted = optimizer_ns.clone();
        sorted.sort_unstable();
        let optimizer = sorted.get(sorted.len() / 2).copied().unwrap_or(0);
        let with_optimizer = |m: &PolicyMeasurement| PolicyMeasurement {
            parallel_step_ns: m.parallel_step_ns + optimizer,
            parts: StepParts { optimizer_ns: m.parts.optimizer_ns + optimizer, ..m.parts },
            wall_ns: m.wall_ns.map(|wall| wall + optimizer),
            ..m.clone()
        };
        let measurements: Vec<_> = measurements.iter().map(with_optimizer).collect();
        let mut table = PolicyTable::of_measurements(self.title(), self.notes(), &measurements);
        let position = |policy: &str| self.config.compare.iter().position(|name| name == policy);
        table.rows.sort_by_key(|row| position(&row.policy));
        Some(table)
    }

    fn title(&self) -> String {
        let c = &self.config;
        format!(
            "{} ranks, {} experts ({} a rank), top-{}, {} slots a rank, {} layers of width {}, {} tokens a step",
            c.ranks,
            c.experts,
            c.experts.div_ceil(c.ranks),
            c.top_k,
            c.slots,
            c.layers,
            c.hidden,
            c.tokens_per_step()
        )
    }

    fn notes(&self) -> Vec<String> {
        let steps = self.summary.measurements.iter().map(|m| m.step).collect::<std::collections::BTreeSet<_>>();
        let mut notes = vec![
            format!(
                "Times are parallel time: each rank's CPU time between synchronisation points, the slowest rank's at \
                 each, plus transfers at {} Gbit/s a rank and direction (by default what one core copies between two \
                 ranks' memory). Every policy ran the same {} steps from the same weights, twice each, of which the \
                 faster counts; medians over those steps. \
                 The optimizer's time is the training's median, the same for all.",
                self.config.link_gbps,
                steps.len()
            ),
            "eplb keeps its replicas where they are, in memory of their own for every layer: moving them is hardly \
             charged here, as the second run of a step finds them in place. ideal forces balanced routing, so its outputs \
             mean nothing; a plan that keeps more tokens at home can be faster."
                .to_string(),
        ];
        if !self.config.experts.is_multiple_of(self.config.ranks) {
            let uneven =
                "ideal balances experts; ranks have unequal numbers of them here, so it does not balance ranks.";
            notes.push(uneven.to_string());
        }
        notes
    }

    /// Ends the run: the table if there is one, and the status.
    pub fn finish(mut self, status: RunStatus, ended: UtcTime) -> Result<(Summary, Option<PolicyTable>), TrainError> {
        let table = self.table();
        if let Some(table) = &table {
            self.writer.write_table(table)?;
        }
        self.summary.profile = self.profiler.finish()?;
        self.writer.update_info(|info| info.profile = Some(self.summary.profile))?;
        self.writer.end(status, ended)?;
        Ok((self.summary, table))
    }

    fn record(&mut self, step: u64, records: &[LayerRecord]) -> Result<(), TrainError> {
        if !self.profiler.wants(step) {
            return Ok(());
        }
        for (i, record) in records.iter().enumerate() {
            let microbatch = (i / self.config.layers) as u32;
            self.profiler.record(|to| fill_record(to, step, microbatch, record))?;
        }
        Ok(())
    }
}

/// Copies what a layer did in a step's microbatch, into memory that is there.
pub fn fill_record(to: &mut Record, step: u64, microbatch: u32, record: &LayerRecord) {
    (to.step, to.microbatch, to.layer) = (step, microbatch, record.at.layer as u32);
    to.before.clone_from(&record.counts);
    let plan = to.after.get_or_insert_default();
    plan.policy.clear();
    plan.policy.push_str(record.policy);
    plan.digest = record.digest;
    plan.offsets.clone_from(&record.offsets);
    plan.instances.clone_from(&record.instances);
    plan.split.get_or_insert_default().clone_from(&record.split);
    to.top_k = None;
}

impl Observer for RunFolder {
    fn begin(&mut self, _: Phase, _: u64) -> Result<(), TrainError> {
        Ok(())
    }

    fn step(&mut self, report: &StepReport<'_>) -> Result<(), TrainError> {
        if report.phase == Phase::Reference {
            self.summary.reference_losses.push((report.step, report.loss));
            let policy = report.records.first().map_or_else(String::new, |r| r.policy.to_owned());
            let line = ReferenceMetrics { policy, step: report.step, loss: f64::from(report.loss) };
            return Ok(self.writer.append_metric(&Metric::Reference(line))?);
        }
        report.records.iter().for_each(|record| self.summary.balance.add(record));
        self.summary.losses.push((report.step, report.loss));
        self.summary.optimizer_ns.push(report.time.part_ns(Part::Optimizer));
        self.record(report.step, report.records)?;
        self.writer.append_metric(&Metric::Step(StepMetrics {
            step: report.step,
            loss: f64::from(report.loss),
            tokens: report.tokens,
            tokens_per_s: report.tokens as f64 * 1e9 / report.time.total_ns.max(1) as f64,
            imbalance_before: imbalance(report.records, LayerRecord::imbalance_before),
            imbalance_after: imbalance(report.records, LayerRecord::imbalance_after),
            parallel_step_ns: report.time.total_ns,
            parts: parts(&report.time, report.weight_sync_ns),
            wall_ns: self.wall(report.wall_ns),
        }))?;
        Ok(())
    }

    fn compared(&mut self, comparison: &Comparison<'_>) -> Result<(), TrainError> {
        let records = comparison.records;
        let plans = records.len().max(1) as f64;
        let sum = |value: &dyn Fn(&LayerRecord) -> u64| records.iter().map(value).sum::<u64>();
        let total = sum(&LayerRecord::total_tokens).max(1);
        let measurement = PolicyMeasurement {
            policy: comparison.policy.name().to_string(),
            step: comparison.step,
            tokens: comparison.tokens,
            imbalance_before: imbalance(records, LayerRecord::imbalance_before),
            imbalance_after: imbalance(records, LayerRecord::imbalance_after),
            replicas_per_layer: sum(&|r| r.replicas() as u64) as f64 / plans,
            tokens_crossed_fraction: sum(&LayerRecord::crossed_tokens) as f64 / total as f64,
            peak_tokens_per_rank: records.iter().map(LayerRecord::peak_tokens).max().unwrap_or(0),
            parallel_step_ns: comparison.time.total_ns,
            parts: parts(&comparison.time, comparison.weight_sync_ns),
            wall_ns: self.wall(comparison.wall_ns),
        };
        if let Some(difference) = comparison.gradient_difference {
            let largest = self.summary.gradient_difference.unwrap_or(0.0).max(difference);
            self.summary.gradient_difference = Some(largest);
        }
        self.writer.append_metric(&Metric::Policy(measurement.clone()))?;
        self.summary.measurements.push(measurement);
        Ok(())
    }

    fn saved(&mut self, _: u64, _: &Path) -> Result<(), TrainError> {
        Ok(self.profiler.sync()?)
    }
}

impl RunFolder {
    /// Wall time means something only when every rank has a core.
    fn wall(&self, wall_ns: u64) -> Option<u64> {
        (self.config.cores == 0 || self.config.ranks <= self.config.cores).then_some(wall_ns)
    }
}

fn imbalance(records: &[LayerRecord], of: impl Fn(&LayerRecord) -> f64) -> Imbalance {
    let values: Vec<f64> = records.iter().map(of).collect();
    let mean = values.iter().sum::<f64>() / values.len().max(1) as f64;
    Imbalance { mean, worst: values.into_iter().fold(0.0, f64::max) }
}

fn parts(time: &StepTime, weight_sync_ns: u64) -> StepParts {
    StepParts {
        dense_ns: time.part_ns(Part::Dense),
        router_ns: time.part_ns(Part::Router),
        plan_ns: time.part_ns(Part::Plan),
        reroute_ns: time.part_ns(Part::Reroute),
        weight_sync_ns,
        exposed_sync_ns: time.part_ns(Part::WeightSync),
        all_to_all_ns: time.part_ns(Part::AllToAll),
        experts_ns: time.part_ns(Part::Experts),
        grad_reduce_exposed_ns: time.part_ns(Part::GradReduce),
        all_reduce_ns: time.part_ns(Part::AllReduce),
        optimizer_ns: time.part_ns(Part::Optimizer),
    }
}
