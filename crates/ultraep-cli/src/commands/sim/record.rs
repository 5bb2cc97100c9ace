//! What a simulation says: rows of paper, simulated, difference; as tables and as JSON.

use std::collections::BTreeMap;
use std::io::Write;

use serde::Serialize;
use ultraep_sim::{Fit, SystemReport};

use super::plan_file::{Experiment, Metric, Paper, Plan};
use crate::error::CliError;
use crate::output::Output;
use crate::table::{Cell, Column, Table};

/// `ultraep.sim/1`.
#[derive(Debug, Serialize)]
pub(super) struct Record {
    pub(super) schema: &'static str,
    pub(super) title: String,
    pub(super) source: String,
    pub(super) experiment: &'static str,
    pub(super) machine: String,
    pub(super) seed: u32,
    pub(super) notes: Vec<String>,
    pub(super) cases: Vec<CaseRecord>,
}

/// One case.
#[derive(Debug, Default, Serialize)]
pub(super) struct CaseRecord {
    pub(super) name: String,
    /// Where it is one of several along an axis: the case they share, the axis and the value on it.
    pub(super) along: Option<Along>,
    /// The load, in words.
    pub(super) load: String,
    pub(super) rows: Vec<Row>,
    /// Systems that a rank has too little memory for, with what they need; their figures say what they would take.
    pub(super) does_not_fit: Vec<String>,
    /// Everything that was simulated, in full, where steps were.
    pub(super) systems: Vec<SystemReport>,
}

/// A point on an axis.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Along {
    pub(super) case: String,
    pub(super) axis: &'static str,
    pub(super) at: f64,
}

/// One figure.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Row {
    pub(super) system: String,
    pub(super) metric: Metric,
    pub(super) paper: Option<f64>,
    pub(super) simulated: f64,
    /// Simulated over paper less one for amounts, simulated less paper for shares and imbalances.
    pub(super) difference: Option<f64>,
    /// `calibrated` where something was fitted to the paper's figure, `predicted` where not.
    pub(super) how: Option<&'static str>,
}

impl Metric {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Tflops => "TFLOPS a GPU",
            Self::OfIdeal => "of ideal",
            Self::OverNone => "over none",
            Self::Imbalance => "imbalance",
            Self::ForwardExpertsMs => "forward experts ms",
            Self::ForwardAllToAllMs => "forward all-to-all ms",
            Self::ForwardRestMs => "forward rest ms",
            Self::BackwardExpertsMs => "backward experts ms",
            Self::BackwardAllToAllMs => "backward all-to-all ms",
            Self::BackwardRestMs => "backward rest ms",
            Self::KeptPeak => "peak kept activations",
            Self::LayerPeak => "peak of one layer",
            Self::StepMs => "step ms",
            Self::Replicas => "replicas",
            Self::Fanout => "largest fan-out",
            Self::Remote => "rows that cross ranks",
            Self::TokensPerS => "tokens/s",
            Self::SyncMs => "weight sync ms",
            Self::Relayed => "experts relayed",
            Self::TtftMs => "mean TTFT ms",
            Self::RecoveryMs => "recovery ms, once",
            Self::MemoryGb => "memory of a rank GB",
            Self::ActivationsGb => "activations GB",
            Self::ActivationsOverIdeal => "activations over ideal",
        }
    }

    /// Whether it is a share, compared by points.
    fn is_share(self) -> bool {
        matches!(self, Self::OfIdeal | Self::Remote)
    }

    /// Whether it is a ratio, compared by what is between.
    fn is_ratio(self) -> bool {
        matches!(
            self,
            Self::Imbalance
                | Self::OverNone
                | Self::KeptPeak
                | Self::LayerPeak
                | Self::Relayed
                | Self::ActivationsOverIdeal
        )
    }

    fn show(self, value: f64) -> String {
        match self {
            _ if self.is_share() => format!("{:.1}%", 100.0 * value),
            Self::Tflops => format!("{value:.1}"),
            Self::StepMs
            | Self::Replicas
            | Self::Fanout
            | Self::TtftMs
            | Self::RecoveryMs
            | Self::MemoryGb
            | Self::ActivationsGb => {
                format!("{value:.1}")
            }
            Self::TokensPerS => format!("{value:.0}"),
            _ => format!("{value:.2}"),
        }
    }

    fn show_difference(self, difference: f64) -> String {
        match self {
            _ if self.is_share() => format!("{:+.1} points", 100.0 * difference),
            _ if self.is_ratio() => format!("{difference:+.2}"),
            _ => format!("{:+.1}%", 100.0 * difference),
        }
    }
}

impl Experiment {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Training => "training",
            Self::Calibration => "calibration",
            Self::Balancing => "balancing",
            Self::Sweep => "sweep",
            Self::Prefill => "prefill",
        }
    }
}

impl Record {
    pub(super) fn new(plan: &Plan, machine: &str) -> Self {
        Self {
            schema: "ultraep.sim/1",
            title: plan.title.clone(),
            source: plan.source.clone(),
            experiment: plan.experiment.name(),
            machine: machine.to_string(),
            seed: plan.seed,
            notes: plan.notes.clone(),
            cases: Vec::new(),
        }
    }

    /// For people.
    pub(super) fn print(&self, out: &mut Output<'_>) -> Result<(), CliError> {
        writeln!(out, "{}", self.title)?;
        if !self.source.is_empty() {
            writeln!(out, "paper: {}", self.source)?;
        }
        for case in &self.cases {
            writeln!(out, "\n{}: {}", case.name, case.load)?;
            out.table(&table(&case.rows))?;
            for system in &case.does_not_fit {
                writeln!(out, "{system}")?;
            }
        }
        for note in &self.notes {
            writeln!(out, "{note}")?;
        }
        Ok(())
    }
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new([
        Column::text("metric", "what is measured, in its unit"),
        Column::text("system", "which balancer"),
        Column::number("paper", "as published"),
        Column::number("simulated", "as simulated here"),
        Column::number("difference", "simulated against published: in percent, points, or plain for ratios"),
        Column::text("how", "calibrated: something was fitted to that figure; predicted: nothing was"),
    ])
    .grouped_by(1);
    for row in rows {
        let metric = row.metric;
        table.row([
            Cell::text(metric.name()),
            Cell::text(row.system.clone()),
            Cell::maybe(row.paper, |value| Cell::shown(metric.show(value), value)),
            Cell::shown(metric.show(row.simulated), row.simulated),
            Cell::maybe(row.difference, |value| Cell::shown(metric.show_difference(value), value)),
            Cell::text(row.how.unwrap_or_default()),
        ]);
    }
    table
}

/// Joins figures with what the paper says, metric by metric in the order of `metrics`.
pub(super) fn rows(metrics: &[Metric], all: &[(String, BTreeMap<Metric, f64>)], paper: &[Paper]) -> Vec<Row> {
    let mut rows = Vec::new();
    for &metric in metrics {
        for (system, figures) in all {
            let Some(&simulated) = figures.get(&metric) else { continue };
            let published = published(paper, system, metric);
            let difference = published.map(|(value, _)| match metric.is_share() || metric.is_ratio() {
                true => simulated - value,
                false => simulated / value - 1.0,
            });
            let how = published.map(|(_, calibrated)| if calibrated { "calibrated" } else { "predicted" });
            let paper = published.map(|(value, _)| value);
            rows.push(Row { system: system.clone(), metric, paper, simulated, difference, how });
        }
    }
    rows
}

/// The paper's figure, or what follows from its throughputs.
fn published(paper: &[Paper], system: &str, metric: Metric) -> Option<(f64, bool)> {
    let given = |system: &str, metric| paper.iter().find(|p| p.system == system && p.metric == metric);
    if let Some(paper) = given(system, metric) {
        return Some((paper.value, paper.calibrated));
    }
    let other = match metric {
        Metric::OfIdeal => "ideal",
        Metric::OverNone => "none",
        _ => return None,
    };
    let (own, other) = (given(system, Metric::Tflops)?, given(other, Metric::Tflops)?);
    (own.system != other.system).then(|| (own.value / other.value, own.calibrated && other.calibrated))
}

/// A fitted load in words.
pub(super) fn load_words(fit: Option<&Fit>) -> String {
    let Some(fit) = fit else { return "load as given".to_string() };
    let permille = |value: u64| value as f64 / 1000.0;
    let historical =
        fit.historical_permille.map_or_else(String::new, |value| format!(", under eplb {:.2}", permille(value)));
    format!(
        "load fitted to {:.2} as routed{historical} (skew {:.2}, drift {:.2} octaves)",
        permille(fit.none_permille),
        f64::from(fit.params.skew_milli) / 1000.0,
        f64::from(fit.params.drift_milli) / 1000.0,
    )
}
