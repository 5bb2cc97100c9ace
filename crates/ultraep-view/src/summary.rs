//! A whole trace in bounded memory: what the overview and a layer's page show.
//!
//! Time is cut into columns of equally many microbatches of a layer. A summary starts with one microbatch a column; when a
//! layer has more than the columns it may have, neighbours are merged in all layers and the width doubles. So a summary
//! never takes more than [`CELLS_MAX`] cells and as many sums of expert loads, however long the trace, and half of its
//! columns are in use at least.

use std::collections::BTreeMap;

use ultraep_replay::Distribution;

/// Most columns of a layer.
const COLUMNS_MAX: usize = 256;
/// Fewest, where there are very many layers.
const COLUMNS_MIN: usize = 16;
/// Most cells of all layers.
pub(crate) const CELLS_MAX: usize = 1 << 20;
/// Columns of loads that stand for one column of expert loads.
pub(crate) const EXPERT_WIDTH: usize = 4;
/// Most groups of experts whose loads are kept apart.
pub(crate) const EXPERT_GROUPS_MAX: usize = 128;
/// Worst cases kept, over all layers and of each.
pub(crate) const WORST_KEPT: usize = 12;

/// One layer in one microbatch, measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Measured {
    pub(crate) step: u64,
    pub(crate) microbatch: u32,
    pub(crate) layer: u32,
    /// Largest over mean rank load as routed.
    pub(crate) before: f64,
    /// As planned; `None` where the policy refused the microbatch.
    pub(crate) after: Option<f64>,
    pub(crate) replicas: u32,
    /// Tokens processed on another rank than their source; `None` where a plan was recorded without its split.
    pub(crate) remote_tokens: Option<u64>,
    pub(crate) total_tokens: u64,
}

/// Neighbouring microbatches of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Cell {
    pub(crate) count: u32,
    pub(crate) first_step: u64,
    pub(crate) before_sum: f64,
    pub(crate) before_max: f64,
    pub(crate) after_count: u32,
    pub(crate) after_sum: f64,
    pub(crate) after_max: f64,
    /// Step and microbatch of the largest imbalance before balancing.
    pub(crate) worst: (u64, u32),
}

impl Cell {
    fn of(m: &Measured) -> Self {
        Self {
            count: 1,
            first_step: m.step,
            before_sum: m.before,
            before_max: m.before,
            after_count: u32::from(m.after.is_some()),
            after_sum: m.after.unwrap_or(0.0),
            after_max: m.after.unwrap_or(0.0),
            worst: (m.step, m.microbatch),
        }
    }

    pub(crate) fn merge(&mut self, other: &Self) {
        if other.before_max > self.before_max {
            self.worst = other.worst;
        }
        self.count += other.count;
        self.first_step = self.first_step.min(other.first_step);
        self.before_sum += other.before_sum;
        self.before_max = self.before_max.max(other.before_max);
        self.after_count += other.after_count;
        self.after_sum += other.after_sum;
        self.after_max = self.after_max.max(other.after_max);
    }

    pub(crate) fn before_mean(&self) -> f64 {
        self.before_sum / f64::from(self.count.max(1))
    }

    pub(crate) fn after_mean(&self) -> Option<f64> {
        (self.after_count > 0).then(|| self.after_sum / f64::from(self.after_count))
    }
}

/// One layer.
#[derive(Clone, Debug, Default)]
pub(crate) struct Layer {
    seen: u64,
    pub(crate) cells: Vec<Cell>,
    /// Tokens of each group of experts, `[columns / EXPERT_WIDTH, groups]`.
    pub(crate) expert_loads: Vec<u64>,
    pub(crate) worst: Vec<Measured>,
}

/// A trace so far.
#[derive(Clone, Debug)]
pub(crate) struct Summary {
    columns_max: usize,
    /// Microbatches a column.
    width: u64,
    experts: usize,
    /// Groups of experts whose loads are kept apart.
    pub(crate) groups: usize,
    pub(crate) records: u64,
    pub(crate) steps: Option<(u64, u64)>,
    pub(crate) before: Distribution,
    pub(crate) after: Distribution,
    pub(crate) replicas: u64,
    pub(crate) remote_tokens: u64,
    /// Tokens of which it is known where they are processed.
    pub(crate) placed_tokens: u64,
    /// Microbatches that the policy refused.
    pub(crate) refused: u64,
    pub(crate) layers: BTreeMap<u32, Layer>,
    pub(crate) worst: Vec<Measured>,
}

impl Summary {
    /// For a trace with so many layers and experts.
    pub(crate) fn new(layers: usize, experts: usize) -> Self {
        let columns = (CELLS_MAX / layers.max(1)).clamp(COLUMNS_MIN, COLUMNS_MAX);
        // A power of two, so that merging neighbours leaves no half column.
        let columns_max = 1 << columns.ilog2();
        let rows = layers.max(1) * (columns_max / EXPERT_WIDTH);
        let groups = experts.clamp(1, EXPERT_GROUPS_MAX).min((4 * CELLS_MAX / rows).max(1));
        Self {
            columns_max,
            width: 1,
            experts: experts.max(1),
            groups,
            records: 0,
            steps: None,
            before: Distribution::default(),
            after: Distribution::default(),
            replicas: 0,
            remote_tokens: 0,
            placed_tokens: 0,
            refused: 0,
            layers: BTreeMap::new(),
            worst: Vec::new(),
        }
    }

    /// Adds one layer of one microbatch with its counts, `[N, E]`.
    pub(crate) fn add(&mut self, measured: Measured, counts: &[u32]) {
        let seen = self.layers.get(&measured.layer).map_or(0, |layer| layer.seen);
        if seen / self.width >= self.columns_max as u64 {
            self.halve();
        }
        self.records += 1;
        let (first, last) = self.steps.unwrap_or((measured.step, measured.step));
        self.steps = Some((first.min(measured.step), last.max(measured.step)));
        self.before.add(measured.before);
        match measured.after {
            Some(after) => self.after.add(after),
            None => self.refused += 1,
        }
        self.replicas += u64::from(measured.replicas);
        if let Some(remote_tokens) = measured.remote_tokens {
            self.remote_tokens += remote_tokens;
            self.placed_tokens += measured.total_tokens;
        }
        keep_worst(&mut self.worst, measured);
        let layer = self.layers.entry(measured.layer).or_default();
        keep_worst(&mut layer.worst, measured);
        let column = (layer.seen / self.width) as usize;
        layer.seen += 1;
        match layer.cells.get_mut(column) {
            Some(cell) => cell.merge(&Cell::of(&measured)),
            None => layer.cells.push(Cell::of(&measured)),
        }
        let first = column / EXPERT_WIDTH * self.groups;
        if layer.expert_loads.len() <= first {
            layer.expert_loads.resize(first + self.groups, 0);
        }
        let loads = &mut layer.expert_loads[first..first + self.groups];
        for row in counts.chunks_exact(self.experts) {
            for (expert, &count) in row.iter().enumerate() {
                loads[expert * self.groups / self.experts] += u64::from(count);
            }
        }
    }

    /// Merges neighbouring columns of every layer.
    fn halve(&mut self) {
        self.width *= 2;
        for layer in self.layers.values_mut() {
            let merged = layer.cells.chunks(2).filter_map(|pair| {
                let (mut cell, rest) = (*pair.first()?, &pair[1..]);
                rest.iter().for_each(|other| cell.merge(other));
                Some(cell)
            });
            layer.cells = merged.collect();
            let rows: Vec<&[u64]> = layer.expert_loads.chunks(self.groups).collect();
            let merged = rows.chunks(2).flat_map(|pair| {
                let sum = |group: usize| pair.iter().map(|row| row[group]).sum::<u64>();
                (0..self.groups).map(sum).collect::<Vec<_>>()
            });
            layer.expert_loads = merged.collect();
        }
    }

    /// Share of tokens processed on another rank than their source, where that is known.
    pub(crate) fn remote_share(&self) -> Option<f64> {
        (self.placed_tokens > 0).then(|| self.remote_tokens as f64 / self.placed_tokens as f64)
    }

    /// Columns in use: those of the longest layer.
    pub(crate) fn columns(&self) -> usize {
        self.layers.values().map(|layer| layer.cells.len()).max().unwrap_or(0)
    }

    /// Microbatches of a layer that a column stands for.
    pub(crate) fn width(&self) -> u64 {
        self.width
    }

    /// Column `column` over all layers.
    pub(crate) fn over_layers(&self, column: usize) -> Option<Cell> {
        let mut cells = self.layers.values().filter_map(|layer| layer.cells.get(column));
        let mut sum = *cells.next()?;
        cells.for_each(|cell| sum.merge(cell));
        Some(sum)
    }
}

/// The largest imbalance before balancing first, ties in the order of the trace.
fn keep_worst(worst: &mut Vec<Measured>, measured: Measured) {
    let at = worst.partition_point(|other| other.before >= measured.before);
    if at < WORST_KEPT {
        worst.insert(at, measured);
        worst.truncate(WORST_KEPT);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(layer: u32, step: u64) -> Measured {
        let before = 1.0 + (step * 7 % 100) as f64 / 10.0;
        let after = (!step.is_multiple_of(10)).then_some(1.0 + before / 100.0);
        Measured {
            step,
            microbatch: 0,
            layer,
            before,
            after,
            replicas: 1,
            remote_tokens: after.map(|_| 1),
            total_tokens: 4,
        }
    }

    #[test]
    fn merging_columns_loses_no_sum_and_keeps_the_worst() {
        let (layers, steps, experts) = (3, 5000_u64, 300);
        let mut summary = Summary::new(layers, experts);
        let counts: Vec<u32> = (0..2 * experts as u32).collect();
        for step in 0..steps {
            (0..layers as u32).for_each(|layer| summary.add(measured(layer, step), &counts));
        }
        assert_eq!((summary.records, summary.steps), (15_000, Some((0, steps - 1))));
        assert!((128..=256).contains(&summary.columns()), "{}", summary.columns());
        for layer in summary.layers.values() {
            assert_eq!(layer.cells.iter().map(|c| u64::from(c.count)).sum::<u64>(), steps);
            let sum: f64 = layer.cells.iter().map(|c| c.before_sum).sum();
            let expected: f64 = (0..steps).map(|step| measured(0, step).before).sum();
            assert!((sum - expected).abs() < 1e-6);
            assert!(layer.cells.windows(2).all(|w| w[0].first_step < w[1].first_step));
            let loads: u64 = layer.expert_loads.iter().sum();
            assert_eq!(loads, steps * counts.iter().map(|&c| u64::from(c)).sum::<u64>());
            assert!(layer.cells.iter().all(|c| measured(0, c.worst.0).before == c.before_max));
        }
        let of_all = summary.over_layers(0).unwrap();
        assert_eq!(u64::from(of_all.count), summary.width() * layers as u64);
        assert_eq!(summary.worst.len(), WORST_KEPT);
        assert!(summary.worst.iter().all(|m| m.before == 1.0 + 9.9));
        assert_eq!((summary.worst[0].layer, summary.worst[1].layer), (0, 1));
        assert_eq!((summary.refused, summary.remote_share()), (1500, Some(0.25)));
    }

    #[test]
    fn very_many_layers_stay_within_the_cells() {
        let layers = 1 << 16;
        let mut summary = Summary::new(layers, 4096);
        for step in 0..40 {
            for layer in (0..layers as u32).step_by(4096) {
                summary.add(measured(layer, step), &[0; 4096]);
            }
        }
        assert!(summary.columns() * layers <= CELLS_MAX);
        assert!(summary.columns() / EXPERT_WIDTH * summary.groups * layers <= 4 * CELLS_MAX);
    }
}
