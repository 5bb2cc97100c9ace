//! `table.json` and `table.md`: the policies side by side.

use std::borrow::Borrow;

use serde::{Deserialize, Serialize};

use crate::{Imbalance, PolicyMeasurement, StepParts};

/// Name and version of the table, `schema` of `table.json`.
pub const TABLE_SCHEMA: &str = "ultraep.table/1";

/// Name of the policy that others are measured against.
const IDEAL: &str = "ideal";

/// The policies of a run side by side.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicyTable {
    /// [`TABLE_SCHEMA`].
    pub schema: String,
    /// What was run, one line: model, ranks, slots, steps.
    pub title: String,
    /// What the times are (parallel time under which bandwidth, or wall time) and whatever else a reader must know.
    pub notes: Vec<String>,
    /// The rows, in the order of the screen.
    pub rows: Vec<PolicyRow>,
}

/// One policy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicyRow {
    /// Its name.
    pub policy: String,
    /// As routed.
    pub imbalance_before: Imbalance,
    /// As planned.
    pub imbalance_after: Imbalance,
    /// Mean number of replicas a layer.
    pub replicas_per_layer: f64,
    /// Token choices processed on another rank than their source, over all.
    pub tokens_crossed_fraction: f64,
    /// Mean parallel time of a step.
    pub step_ns: u64,
    /// Where it went, means.
    pub parts: StepParts,
    /// Throughput over that of `ideal`, where that was measured.
    pub share_of_ideal: Option<f64>,
    /// Tokens by parallel time.
    pub throughput_tokens_per_s: f64,
    /// Most tokens on one rank in a layer and microbatch.
    pub peak_tokens_per_rank: u64,
    /// Mean wall time of a step, where ranks do not outnumber cores.
    #[serde(default)]
    pub wall_ns: Option<u64>,
}

impl PolicyTable {
    /// A table of measurements: one row a policy, in the order of first appearance. Means are over a policy's
    /// measurements (times rounded down to a nanosecond), worst values and peaks are maxima, throughput is tokens over
    /// time, and wall time is there if every measurement has it.
    pub fn of_measurements(title: String, notes: Vec<String>, measurements: &[PolicyMeasurement]) -> Self {
        let mut policies: Vec<&str> = Vec::new();
        for measurement in measurements {
            if !policies.contains(&measurement.policy.as_str()) {
                policies.push(&measurement.policy);
            }
        }
        let of = |policy: &str| measurements.iter().filter(|m| m.policy == policy).collect::<Vec<_>>();
        let mut rows: Vec<PolicyRow> = policies.into_iter().map(|policy| row_of(policy, &of(policy))).collect();
        let ideal = rows.iter().find(|r| r.policy == IDEAL).map(|r| r.throughput_tokens_per_s);
        for row in &mut rows {
            row.share_of_ideal = ideal.filter(|&t| t > 0.0).map(|t| row.throughput_tokens_per_s / t);
        }
        Self { schema: TABLE_SCHEMA.to_string(), title, notes, rows }
    }

    /// As Markdown: the main figures, then the parts of the step. Times in milliseconds.
    pub fn to_markdown(&self) -> String {
        let mut text = format!("# {}\n\n", self.title.replace('\n', " "));
        let has_wall_time = self.rows.iter().any(|r| r.wall_ns.is_some());
        let mut header = vec![
            "policy",
            "imbalance before",
            "worst",
            "imbalance after",
            "worst",
            "replicas a layer",
            "crossed ranks",
            "step ms",
            "of ideal",
            "tokens/s",
            "peak tokens",
        ];
        header.extend(has_wall_time.then_some("wall ms"));
        put_row(&mut text, &header);
        put_rule(&mut text, header.len());
        for row in &self.rows {
            let mut cells = vec![
                escape(&row.policy),
                format!("{:.3}", row.imbalance_before.mean),
                format!("{:.3}", row.imbalance_before.worst),
                format!("{:.3}", row.imbalance_after.mean),
                format!("{:.3}", row.imbalance_after.worst),
                format!("{:.1}", row.replicas_per_layer),
                format!("{:.1}%", 100.0 * row.tokens_crossed_fraction),
                milliseconds(row.step_ns),
                row.share_of_ideal.map_or_else(|| "-".to_string(), |share| format!("{:.1}%", 100.0 * share)),
                format!("{:.0}", row.throughput_tokens_per_s),
                row.peak_tokens_per_rank.to_string(),
            ];
            cells.extend(has_wall_time.then(|| row.wall_ns.map_or_else(|| "-".to_string(), milliseconds)));
            put_row(&mut text, &cells);
        }
        text.push_str("\n## Parts of the step, ms\n\n");
        let mut header = vec!["policy"];
        header.extend(StepParts::default().named().iter().map(|(name, _)| *name));
        put_row(&mut text, &header);
        put_rule(&mut text, header.len());
        for row in &self.rows {
            let mut cells = vec![escape(&row.policy)];
            cells.extend(row.parts.named().iter().map(|&(_, ns)| milliseconds(ns)));
            put_row(&mut text, &cells);
        }
        text.push_str(
            "\nThe step is the sum of its parts without weight sync, of which only the exposed part counts.\n",
        );
        for note in &self.notes {
            text.push_str(&format!("\n{}\n", note.replace('\n', " ")));
        }
        text
    }
}

/// `measurements` are of this policy, at least one.
fn row_of(policy: &str, measurements: &[&PolicyMeasurement]) -> PolicyRow {
    let count = measurements.len() as u64;
    let mean = |value: fn(&PolicyMeasurement) -> f64| measurements.iter().map(|m| value(m)).sum::<f64>() / count as f64;
    let worst = |value: fn(&PolicyMeasurement) -> f64| measurements.iter().map(|m| value(m)).fold(0.0, f64::max);
    // Saturating: the measurements may come from a file.
    let total =
        |value: fn(&PolicyMeasurement) -> u64| measurements.iter().map(|m| value(m)).fold(0, u64::saturating_add);
    let (total_ns, tokens) = (total(|m| m.parallel_step_ns), total(|m| m.tokens));
    let parts = measurements.iter().fold(StepParts::default(), |sum, m| sum.zip(&m.parts, u64::saturating_add));
    let has_wall_time = measurements.iter().all(|m| m.wall_ns.is_some());
    PolicyRow {
        policy: policy.to_string(),
        imbalance_before: Imbalance {
            mean: mean(|m| m.imbalance_before.mean),
            worst: worst(|m| m.imbalance_before.worst),
        },
        imbalance_after: Imbalance {
            mean: mean(|m| m.imbalance_after.mean),
            worst: worst(|m| m.imbalance_after.worst),
        },
        replicas_per_layer: mean(|m| m.replicas_per_layer),
        tokens_crossed_fraction: mean(|m| m.tokens_crossed_fraction),
        step_ns: total_ns / count,
        parts: parts.zip(&parts, |sum, _| sum / count),
        share_of_ideal: None,
        throughput_tokens_per_s: if total_ns == 0 { 0.0 } else { tokens as f64 * 1e9 / total_ns as f64 },
        peak_tokens_per_rank: measurements.iter().map(|m| m.peak_tokens_per_rank).max().unwrap_or(0),
        wall_ns: has_wall_time.then(|| total(|m| m.wall_ns.unwrap_or(0)) / count),
    }
}

fn put_row<S: Borrow<str>>(text: &mut String, cells: &[S]) {
    text.push_str(&format!("| {} |\n", cells.join(" | ")));
}

/// Names to the left, numbers to the right.
fn put_rule(text: &mut String, columns: usize) {
    text.push_str(&format!("|---|{}\n", "---:|".repeat(columns - 1)));
}

fn milliseconds(ns: u64) -> String {
    format!("{:.2}", ns as f64 / 1e6)
}

fn escape(cell: &str) -> String {
    cell.replace('|', "\\|").replace('\n', " ")
}
