//! What a run says about itself, reduced: how it stands, its losses, its times, its table.

use std::path::Path;

use serde::Serialize;
use ultraep_run::{
    Metric, MetricsReader, PolicyMeasurement, PolicyTable, ProfileSummary, RunInfo, RunReader, RunStatus,
};

use crate::ViewError;

/// Most points of a curve.
const POINTS_MAX: usize = 512;
/// Most measurements of policies kept for a table that is not written yet.
const MEASUREMENTS_MAX: usize = 1 << 14;
/// Most curves of references.
const REFERENCES_MAX: usize = 16;

/// A curve in at most [`POINTS_MAX`] points: means over equally many steps; neighbours are merged as it grows.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Curve {
    #[serde(skip)]
    width: u64,
    #[serde(skip)]
    seen: u64,
    steps: Vec<u64>,
    #[serde(serialize_with = "means")]
    values: Vec<(f64, u64)>,
}

fn means<S: serde::Serializer>(values: &[(f64, u64)], serializer: S) -> Result<S::Ok, S::Error> {
    // JSON has no NaN: a loss that is not finite is null.
    serializer.collect_seq(values.iter().map(|&(sum, count)| {
        let mean = sum / count.max(1) as f64;
        mean.is_finite().then_some((mean * 1e5).round() / 1e5)
    }))
}

impl Curve {
    fn add(&mut self, step: u64, value: f64) {
        self.width = self.width.max(1);
        if (self.seen / self.width) as usize >= POINTS_MAX {
            self.width *= 2;
            self.steps = self.steps.iter().copied().step_by(2).collect();
            let merged = self.values.chunks(2).map(|pair| pair.iter().fold((0.0, 0), |a, b| (a.0 + b.0, a.1 + b.1)));
            self.values = merged.collect();
        }
        let at = (self.seen / self.width) as usize;
        self.seen += 1;
        match self.values.get_mut(at) {
            Some((sum, count)) => (*sum, *count) = (*sum + value, *count + 1),
            None => {
                self.steps.push(step);
                self.values.push((value, 1));
            }
        }
    }
}

/// A reference's curve.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Reference {
    policy: String,
    loss: Curve,
}

/// A run for the page.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct RunJson {
    /// `running`, `finished`, `interrupted`, `failed`, or `killed`.
    state: &'static str,
    reason: Option<String>,
    started: String,
    ended: Option<String>,
    command: String,
    policy: Option<String>,
    steps: Option<u64>,
    steps_done: u64,
    loss: Curve,
    validation: Curve,
    references: Vec<Reference>,
    step_ms: Curve,
    table: Option<PolicyTable>,
    /// What went into the trace: known when the run ends.
    profile: Option<ProfileSummary>,
}

/// Reads a run's metrics as they come.
pub(crate) struct RunFollower {
    metrics: MetricsReader,
    measurements: Vec<PolicyMeasurement>,
    json: RunJson,
    resumed: usize,
}

impl RunFollower {
    pub(crate) fn open(folder: &Path) -> Result<Self, ViewError> {
        let run = RunReader::open(folder)?;
        let info = run.info();
        let json = RunJson {
            state: "running",
            reason: None,
            started: info.started.to_string(),
            ended: None,
            command: info.command.join(" ").chars().take(2000).collect(),
            policy: info.config.get("policy").and_then(|v| v.as_str()).map(|name| name.chars().take(80).collect()),
            steps: info.config.get("steps").and_then(serde_json::Value::as_u64),
            steps_done: 0,
            loss: Curve::default(),
            validation: Curve::default(),
            references: Vec::new(),
            step_ms: Curve::default(),
            table: None,
            profile: None,
        };
        let resumed = info.resumed_from_steps.len();
        Ok(Self { metrics: run.metrics()?, measurements: Vec::new(), json, resumed })
    }

    /// Reads what is new. Whether the run was taken up again meanwhile, so that all has to be read anew.
    pub(crate) fn advance(&mut self, folder: &Path) -> Result<bool, ViewError> {
        let run = RunReader::open(folder)?;
        if run.info().resumed_from_steps.len() != self.resumed {
            return Ok(true);
        }
        while let Some(metric) = self.metrics.next_metric()? {
            self.take(metric);
        }
        self.take_status(run.info(), run.is_being_written());
        self.json.table = match run.table()? {
            None if self.measurements.is_empty() => None,
            None => Some(PolicyTable::of_measurements("so far".to_owned(), Vec::new(), &self.measurements)),
            table => table,
        };
        Ok(false)
    }

    fn take(&mut self, metric: Metric) {
        match metric {
            Metric::Step(step) => {
                self.json.steps_done = self.json.steps_done.max(step.step + 1);
                self.json.loss.add(step.step, step.loss);
                self.json.step_ms.add(step.step, step.parallel_step_ns as f64 / 1e6);
            }
            Metric::Validation(validation) => self.json.validation.add(validation.step, validation.loss),
            Metric::Reference(reference) => {
                let known = self.json.references.iter().position(|r| r.policy == reference.policy);
                let index = match known {
                    Some(index) => index,
                    None if self.json.references.len() == REFERENCES_MAX => return,
                    None => {
                        let policy = reference.policy.chars().take(80).collect();
                        self.json.references.push(Reference { policy, loss: Curve::default() });
                        self.json.references.len() - 1
                    }
                };
                self.json.references[index].loss.add(reference.step, reference.loss);
            }
            Metric::Policy(measurement) if self.measurements.len() < MEASUREMENTS_MAX => {
                self.measurements.push(measurement);
            }
            _ => {}
        }
    }

    fn take_status(&mut self, info: &RunInfo, is_being_written: Option<bool>) {
        (self.json.state, self.json.reason) = match &info.status {
            RunStatus::Running if is_being_written == Some(false) => ("killed", None),
            RunStatus::Running => ("running", None),
            RunStatus::Finished => ("finished", None),
            RunStatus::Interrupted { reason } => ("interrupted", Some(reason.clone())),
            RunStatus::Failed { reason } => ("failed", Some(reason.clone())),
            _ => ("of a later version", None),
        };
        self.json.profile = info.profile;
        self.json.ended = info.ended.map(|time| time.to_string());
    }

    /// Whether somebody may still add to it.
    pub(crate) fn is_running(&self) -> bool {
        self.json.state == "running"
    }

    pub(crate) fn json(&self) -> &RunJson {
        &self.json
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_keeps_its_mean_in_few_points() {
        let mut curve = Curve::default();
        for step in 0..10_000_u64 {
            curve.add(step, step as f64);
        }
        assert!((POINTS_MAX / 2..=POINTS_MAX).contains(&curve.values.len()), "{}", curve.values.len());
        assert_eq!(curve.steps.len(), curve.values.len());
        assert_eq!(curve.values.iter().map(|v| v.1).sum::<u64>(), 10_000);
        let sum: f64 = curve.values.iter().map(|v| v.0).sum();
        assert_eq!(sum, (0..10_000_u64).sum::<u64>() as f64);
        assert_eq!(curve.steps[1], curve.values[0].1);
    }
}
