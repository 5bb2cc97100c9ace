//! The overview and a layer as JSON, in bounded size.

use serde::Serialize;
use ultraep_baselines::PolicyKind;
use ultraep_replay::{Distribution, Hardware};

use crate::ViewError;
use crate::entry::{Entry, State};
use crate::metrics::RunJson;
use crate::picture::round;
use crate::settings::WhatIfJson;
use crate::summary::{Cell, EXPERT_WIDTH, Layer, Measured, Summary};

/// Most rows of the heat map; layers beyond are taken together.
const ROWS_MAX: usize = 128;
/// Bars of the distribution.
const BARS: usize = 48;
/// Most layers listed one by one.
const LAYERS_MAX: usize = 1024;

/// All that is viewed.
#[derive(Debug, Serialize)]
pub(crate) struct Recordings {
    schema: &'static str,
    recordings: Vec<About>,
    policies: Vec<Policy>,
    hardware: Vec<&'static str>,
}

#[derive(Debug, Serialize)]
struct Policy {
    name: &'static str,
    description: &'static str,
    is_historical: bool,
}

/// What a recording is and how far it is read.
#[derive(Debug, Serialize)]
pub(crate) struct About {
    pub(crate) title: String,
    pub(crate) format: String,
    is_run: bool,
    pub(crate) ranks: usize,
    pub(crate) experts: usize,
    domain: usize,
    top_k: Option<usize>,
    notes: Vec<String>,
    settings: WhatIfJson,
    /// Grows with every change.
    pub(crate) revision: u64,
    read: u64,
    records: u64,
    /// Whether all that there is was read.
    is_read: bool,
    pub(crate) is_live: bool,
    error: Option<String>,
    /// Whose plans are shown.
    policy: Option<String>,
    /// Records that had no plan and were planned by the settings.
    planned: u64,
}

/// The overview of a recording.
#[derive(Debug, Serialize)]
pub(crate) struct Overview {
    pub(crate) about: About,
    /// The main figures in sentences.
    pub(crate) words: Vec<String>,
    first_step: u64,
    last_step: u64,
    microbatches: u64,
    before: Quantiles,
    after: Quantiles,
    replicas_mean: f64,
    /// Null where no split was recorded.
    remote_share: Option<f64>,
    refused: u64,
    heat: Heat,
    distribution: Histogram,
    series: Series,
    worst: Vec<Case>,
    layer_count: usize,
    /// The first of them.
    layers: Vec<LayerLine>,
    run: Option<RunJson>,
}

#[derive(Debug, Serialize)]
struct Quantiles {
    count: u64,
    mean: f64,
    p50: f64,
    p95: f64,
    worst: f64,
}

/// Mean imbalance of layers over time.
#[derive(Debug, Serialize)]
struct Heat {
    /// First layer of every row.
    layers: Vec<u32>,
    layers_per_row: usize,
    /// First step of every column.
    steps: Vec<u64>,
    microbatches_per_column: u64,
    /// `[rows, columns]` row-major; null where nothing is.
    before: Vec<Option<f64>>,
    after: Vec<Option<f64>>,
}

#[derive(Debug, Serialize)]
struct Histogram {
    /// `[bars + 1]`.
    edges: Vec<f64>,
    before: Vec<u64>,
    after: Vec<u64>,
}

/// Over time, of all layers or of one.
#[derive(Debug, Default, Serialize)]
struct Series {
    steps: Vec<u64>,
    before_mean: Vec<f64>,
    before_worst: Vec<f64>,
    after_mean: Vec<Option<f64>>,
    after_worst: Vec<Option<f64>>,
    /// Step and microbatch of the largest imbalance before balancing.
    places: Vec<(u64, u32)>,
}

#[derive(Debug, Serialize)]
struct Case {
    step: u64,
    microbatch: u32,
    layer: u32,
    before: f64,
    after: Option<f64>,
    replicas: u32,
    tokens: u64,
}

#[derive(Debug, Serialize)]
struct LayerLine {
    layer: u32,
    before_mean: f64,
    before_worst: f64,
    after_mean: Option<f64>,
    after_worst: Option<f64>,
}

/// One layer.
#[derive(Debug, Serialize)]
pub(crate) struct LayerView {
    about: About,
    layer: u32,
    layer_below: Option<u32>,
    layer_above: Option<u32>,
    line: LayerLine,
    series: Series,
    microbatches_per_column: u64,
    experts: ExpertHeat,
    worst: Vec<Case>,
}

/// Tokens of experts over time, as a multiple of an even share.
#[derive(Debug, Serialize)]
struct ExpertHeat {
    experts: usize,
    /// Rows; where there are fewer than experts, row `g` stands for the experts `e` with `e * groups / experts = g`.
    groups: usize,
    steps: Vec<u64>,
    /// `[groups, columns]` row-major.
    load: Vec<f64>,
    /// Over all time, `[groups]`.
    total: Vec<f64>,
}

pub(crate) fn recordings(entries: &[std::sync::Arc<Entry>]) -> Recordings {
    let policy = |kind: PolicyKind| Policy {
        name: kind.name(),
        description: kind.description(),
        is_historical: kind.is_historical(),
    };
    Recordings {
        schema: "ultraep.view/1",
        recordings: entries.iter().map(|entry| entry.about(&entry.state())).collect(),
        policies: PolicyKind::ALL.into_iter().map(policy).collect(),
        hardware: Hardware::built_in_names().to_vec(),
    }
}

impl Entry {
    pub(crate) fn about(&self, state: &State) -> About {
        let source = &self.source;
        let mut notes = source.notes.clone();
        notes.extend(state.ending.clone());
        notes.extend(least_quota_note(&source.planned, state));
        if state.summary.refused > 0 {
            let refused = state.summary.refused;
            notes.push(format!("{refused} microbatches are refused by the policy: no load after balancing is shown"));
        }
        About {
            title: source.title.clone(),
            format: source.format.clone(),
            is_run: source.run.is_some(),
            ranks: source.meta.ranks,
            experts: source.meta.experts,
            domain: source.meta.domain_ranks,
            top_k: source.meta.top_k,
            notes,
            settings: source.planned.json(),
            revision: self.revision(),
            read: state.progress.read,
            records: state.progress.records,
            is_read: state.progress.read == state.progress.records,
            is_live: state.is_live,
            error: state.error.clone(),
            policy: state.progress.policy.clone(),
            planned: state.progress.planned,
        }
    }

    pub(crate) fn overview(&self) -> Overview {
        let state = self.state();
        let summary = &state.summary;
        let (first_step, last_step) = summary.steps.unwrap_or_default();
        let share = |part: u64, all: u64| round(if all == 0 { 0.0 } else { part as f64 / all as f64 });
        Overview {
            about: self.about(&state),
            words: crate::words::describe(&self.source, &state),
            first_step,
            last_step,
            microbatches: summary.records,
            before: Quantiles::of(&summary.before),
            after: Quantiles::of(&summary.after),
            replicas_mean: share(summary.replicas, summary.records),
            remote_share: summary.remote_share().map(round),
            refused: summary.refused,
            heat: Heat::of(summary),
            distribution: Histogram::of(&summary.before, &summary.after),
            series: Series::of((0..summary.columns()).filter_map(|column| summary.over_layers(column))),
            worst: summary.worst.iter().map(Case::of).collect(),
            layer_count: summary.layers.len(),
            layers: summary.layers.iter().take(LAYERS_MAX).map(|(&id, layer)| LayerLine::of(id, layer)).collect(),
            run: state.run.clone(),
        }
    }

    pub(crate) fn layer(&self, id: u32) -> Result<LayerView, ViewError> {
        let state = self.state();
        let summary = &state.summary;
        let Some(layer) = summary.layers.get(&id) else {
            let known: Vec<String> = summary.layers.keys().take(64).map(u32::to_string).collect();
            return Err(ViewError::NotFound {
                what: format!("layer {id}"),
                known: format!("there are {}", known.join(", ")),
            });
        };
        Ok(LayerView {
            about: self.about(&state),
            layer: id,
            layer_below: summary.layers.range(..id).next_back().map(|(&id, _)| id),
            layer_above: summary.layers.range(id + 1..).next().map(|(&id, _)| id),
            line: LayerLine::of(id, layer),
            series: Series::of(layer.cells.iter().copied()),
            microbatches_per_column: summary.width(),
            experts: ExpertHeat::of(summary, layer, self.source.meta.experts),
            worst: layer.worst.iter().map(Case::of).collect(),
        })
    }
}

/// Where a smaller least quota would have made plans more even: say so.
fn least_quota_note(planned: &crate::settings::WhatIf, state: &State) -> Option<String> {
    let progress = &state.progress;
    (progress.finer > 0).then(|| {
        let words = crate::settings::quota_words(planned.min_quota);
        format!(
            "{} of {} plans made here would be more even with replicas of less than {words}: try --min-quota 1",
            progress.finer, progress.planned
        )
    })
}

impl Quantiles {
    fn of(distribution: &Distribution) -> Self {
        Self {
            count: distribution.count,
            mean: distribution.mean(),
            p50: distribution.quantile(50),
            p95: distribution.quantile(95),
            worst: distribution.largest,
        }
    }
}

impl Heat {
    fn of(summary: &Summary) -> Self {
        let layers: Vec<(u32, &Layer)> = summary.layers.iter().map(|(&id, layer)| (id, layer)).collect();
        let layers_per_row = layers.len().div_ceil(ROWS_MAX).max(1);
        let columns = summary.columns();
        let mut heat = Self {
            layers: Vec::new(),
            layers_per_row,
            steps: (0..columns).map(|c| summary.over_layers(c).map_or(0, |cell| cell.first_step)).collect(),
            microbatches_per_column: summary.width(),
            before: Vec::new(),
            after: Vec::new(),
        };
        for row in layers.chunks(layers_per_row) {
            heat.layers.extend(row.first().map(|(id, _)| *id));
            for column in 0..columns {
                let mut cells = row.iter().filter_map(|(_, layer)| layer.cells.get(column).copied());
                let mut sum = cells.next();
                if let Some(sum) = &mut sum {
                    cells.for_each(|cell| sum.merge(&cell));
                }
                heat.before.push(sum.map(|cell| round(cell.before_mean())));
                heat.after.push(sum.and_then(|cell| cell.after_mean()).map(round));
            }
        }
        heat
    }
}

impl Histogram {
    /// Bars of equal ratio from 1 to the largest value: imbalance is a ratio.
    fn of(before: &Distribution, after: &Distribution) -> Self {
        let most = before.largest.max(after.largest).max(1.01);
        let edge = |bar: usize| most.powf(bar as f64 / BARS as f64);
        let count = |distribution: &Distribution| {
            let mut bars = vec![0; BARS];
            for (value, count) in distribution.bins() {
                let bar = (value.max(1.0).ln() / most.ln() * BARS as f64) as usize;
                bars[bar.min(BARS - 1)] += count;
            }
            bars
        };
        Self { edges: (0..=BARS).map(|bar| round(edge(bar))).collect(), before: count(before), after: count(after) }
    }
}

impl Series {
    fn of(cells: impl Iterator<Item = Cell>) -> Self {
        let mut series = Self::default();
        for cell in cells {
            series.steps.push(cell.first_step);
            series.before_mean.push(round(cell.before_mean()));
            series.before_worst.push(round(cell.before_max));
            series.after_mean.push(cell.after_mean().map(round));
            series.after_worst.push((cell.after_count > 0).then(|| round(cell.after_max)));
            series.places.push(cell.worst);
        }
        series
    }
}

impl Case {
    fn of(measured: &Measured) -> Self {
        let Measured { step, microbatch, layer, before, after, replicas, total_tokens, .. } = *measured;
        let (before, after) = (round(before), after.map(round));
        Self { step, microbatch, layer, before, after, replicas, tokens: total_tokens }
    }
}

impl LayerLine {
    fn of(layer: u32, cells: &Layer) -> Self {
        let mut all = cells.cells.iter().copied();
        let mut sum = all.next();
        if let Some(sum) = &mut sum {
            all.for_each(|cell| sum.merge(&cell));
        }
        Self {
            layer,
            before_mean: sum.map_or(1.0, |cell| round(cell.before_mean())),
            before_worst: sum.map_or(1.0, |cell| round(cell.before_max)),
            after_mean: sum.and_then(|cell| cell.after_mean()).map(round),
            after_worst: sum.filter(|cell| cell.after_count > 0).map(|cell| round(cell.after_max)),
        }
    }
}

impl ExpertHeat {
    fn of(summary: &Summary, layer: &Layer, experts: usize) -> Self {
        let groups = summary.groups;
        // How many experts a group stands for.
        let mut members = vec![0_u64; groups];
        (0..experts).for_each(|expert| members[expert * groups / experts] += 1);
        let of_even = |loads: &[u64]| {
            let total: u64 = loads.iter().sum();
            let even = |group: usize| total as f64 * members[group] as f64 / experts as f64;
            let share = |(group, &load): (usize, &u64)| if total == 0 { 0.0 } else { load as f64 / even(group) };
            loads.iter().enumerate().map(share).map(|share| (share * 1e3).round() / 1e3).collect::<Vec<f64>>()
        };
        let columns: Vec<Vec<f64>> = layer.expert_loads.chunks(groups).map(of_even).collect();
        let mut total = vec![0; groups];
        for column in layer.expert_loads.chunks(groups) {
            total.iter_mut().zip(column).for_each(|(sum, load)| *sum += load);
        }
        let steps = layer.cells.iter().step_by(EXPERT_WIDTH).map(|cell| cell.first_step);
        Self {
            experts,
            groups,
            steps: steps.take(columns.len()).collect(),
            load: (0..groups).flat_map(|group| columns.iter().map(move |column| column[group])).collect(),
            total: of_even(&total),
        }
    }
}
