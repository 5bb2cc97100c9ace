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
    /// Median parallel time of a step.
    pub step_ns: u64,
    /// Where it went, in that step.
    pub parts: StepParts,
    /// Throughput over that of `ideal`, where that was measured.
    pub share_of_ideal: Option<f64>,
    /// Tokens by parallel time.
    pub throughput_tokens_per_s: f64,
    /// Most tokens on one rank in a layer and microbatch.
    pub peak_tokens_per_rank: u64,
    /// Median wall time of a step, where ranks do not outnumber cores.
    #[serde(default)]
    pub wall_ns: Option<u64>,
}

impl PolicyTable {
    /// A table of measurements: one row a policy, in the order of first appearance. Imbalance, replicas and crossed tokens
    /// are means over a policy's measurements, worst values and peaks are maxima. Time and its parts are those of the
    /// median measurement (of two middle ones the faster), throughput is its tokens over its time. The share of ideal is
    /// the median over steps of the ideal's time over the policy's, step by step: neighbours in time share the machine's
    /// moods. Wall time is there if every measurement has it.
    pub fn of_measurements(title: String, notes: Vec<String>, measurements: &[PolicyMeasurement]) -> Self {
        let mut policies: Vec<&str> = Vec::new();
        for measurement in measurements {
            if !policies.contains(&measurement.policy.as_str()) {
                policies.push(&measurement.policy);
            }
        }
        let of = |policy: &str| measurements.iter().filter(|m| m.policy == policy).collect::<Vec<_>>();
        let ideal = of(IDEAL);
        let row = |policy| PolicyRow { share_of_ideal: share(&of(policy), &ideal), ..row_of(policy, &of(policy)) };
        let rows = policies.into_iter().map(row).collect();
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
    let count = measurements.len() as f64;
    let mean = |value: fn(&PolicyMeasurement) -> f64| measurements.iter().map(|m| value(m)).sum::<f64>() / count;
    let worst = |value: fn(&PolicyMeasurement) -> f64| measurements.iter().map(|m| value(m)).fold(0.0, f64::max);
    let mut by_time = measurements.to_vec();
    by_time.sort_by_key(|m| m.parallel_step_ns);
    let median = by_time[(by_time.len() - 1) / 2];
    let wall = measurements.iter().map(|m| m.wall_ns).collect::<Option<Vec<_>>>();
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
        step_ns: median.parallel_step_ns,
        parts: median.parts,
        share_of_ideal: None,
        throughput_tokens_per_s: match median.parallel_step_ns {
            0 => 0.0,
            ns => median.tokens as f64 * 1e9 / ns as f64,
        },
        peak_tokens_per_rank: measurements.iter().map(|m| m.peak_tokens_per_rank).max().unwrap_or(0),
        wall_ns: wall.and_then(|mut wall| {
            wall.sort_unstable();
            wall.get((wall.len() - 1) / 2).copied()
        }),
    }
}

/// Median over the steps that both were measured on of the ideal's time over the policy's.
fn share(measurements: &[&PolicyMeasurement], ideal: &[&PolicyMeasurement]) -> Option<f64> {
    let ratio = |m: &&PolicyMeasurement| {
        let same_step = ideal.iter().find(|i| i.step == m.step)?;
        (m.parallel_step_ns > 0).then(|| same_step.parallel_step_ns as f64 / m.parallel_step_ns as f64)
    };
    let mut ratios: Vec<f64> = measurements.iter().filter_map(ratio).collect();
    ratios.sort_by(f64::total_cmp);
    ratios.get(ratios.len().saturating_sub(1) / 2).copied()
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
