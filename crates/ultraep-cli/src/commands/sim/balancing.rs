//! Balancing alone: every system on synthetic loads of given imbalance, layer by layer.

use std::collections::BTreeMap;

use ultraep_load::{LoadParams, Workload, generate};
use ultraep_plan::{Ratio, Topology, TopologySpec};
use ultraep_sim::{
    Balancer, FitTarget, LayerLoad, LoadProcess, Machine, ModelSpec, ProcessParams, System, fit_process,
};

use super::files::{machine, model, systems};
use super::plan_file::{Case, Grid, Metric, Paper, Plan};
use super::record::{Along, CaseRecord, rows};
use super::training::in_parallel;
use crate::error::CliError;

/// The workload that is a load process fitted to each imbalance, as in training.
const PROCESS: &str = "process";

/// One group at one initial imbalance.
struct Cell<'a> {
    case: &'a Case,
    model: ModelSpec,
    topology: Topology,
    ratio: f64,
    systems: Vec<System>,
}

/// One record for every case and ratio, and one for the means over all where the grid has figures of the paper.
pub(super) fn run(plan: &Plan, threads: usize) -> Result<Vec<CaseRecord>, CliError> {
    let Some(grid) = &plan.grid else {
        return Err(CliError::Input(format!("{}: no [grid]: experiment \"balancing\" needs it", plan.title)));
    };
    let workload = match grid.workload.as_str() {
        PROCESS => None,
        name => Some(name.parse::<Workload>().map_err(|e| CliError::Input(format!("{e}, {PROCESS}")))?),
    };
    let machine = machine(&plan.machine)?;
    let mut cells = Vec::new();
    for case in &plan.case {
        for &ratio in &grid.ratios {
            cells.push(cell(plan, case, ratio)?);
        }
    }
    let measured =
        in_parallel(cells.len(), threads, |index| cells[index].measure(&machine, grid, workload, plan.seed))?;
    let metrics = match plan.metrics.is_empty() {
        true => vec![Metric::Imbalance, Metric::Replicas, Metric::Fanout, Metric::Remote],
        false => plan.metrics.clone(),
    };
    let mut records = Vec::new();
    if !grid.paper.is_empty() {
        let words = "means over all groups and initial imbalances".to_string();
        records.push(record("all".to_string(), words, &metrics, &mean(&measured), &grid.paper));
    }
    for (cell, figures) in cells.iter().zip(&measured) {
        let paper: Vec<Paper> =
            cell.case.paper.iter().filter(|p| p.ratio.is_none_or(|r| r == cell.ratio)).cloned().collect();
        let load = format!("{} loads ({}) with an imbalance of {}", grid.seeds, grid.workload, cell.ratio);
        let along = Along { case: cell.case.name.clone(), axis: "initial imbalance", at: cell.ratio };
        let name = format!("{}, initial {}", cell.case.name, cell.ratio);
        records.push(CaseRecord { along: Some(along), ..record(name, load, &metrics, figures, &paper) });
    }
    Ok(records)
}

type Figures = Vec<(String, BTreeMap<Metric, f64>)>;

fn record(name: String, load: String, metrics: &[Metric], figures: &Figures, paper: &[Paper]) -> CaseRecord {
    CaseRecord { name, load, rows: rows(metrics, figures, paper), ..CaseRecord::default() }
}

fn cell<'a>(plan: &Plan, case: &'a Case, ratio: f64) -> Result<Cell<'a>, CliError> {
    let mut model = model(&case.model)?;
    model.experts = case.experts.unwrap_or(model.experts);
    let spec = TopologySpec {
        ranks: case.ranks as usize,
        experts: model.experts as usize,
        domain_ranks: case.domain.unwrap_or(case.ranks) as usize,
        slots_per_rank: case.slots as usize,
    };
    let topology = Topology::new(spec).map_err(|error| CliError::Input(format!("case {:?}: {error}", case.name)))?;
    Ok(Cell { case, model, topology, ratio, systems: systems(&plan.systems, case.microbatches)? })
}

impl Cell<'_> {
    /// Means over seeds.
    fn measure(
        &self,
        machine: &Machine,
        grid: &Grid,
        workload: Option<Workload>,
        seed: u32,
    ) -> Result<Figures, CliError> {
        let loads = self.loads(grid, workload, seed)?;
        let mut all = Vec::new();
        for system in &self.systems {
            let mut sums = BTreeMap::new();
            let transfers = machine.transfer_model(&self.model);
            let mut balancer = Balancer::new(system, &self.topology, transfers).map_err(CliError::input)?;
            for counts in &loads {
                let mut load = LayerLoad::default();
                balancer.microbatch(counts, &mut load).map_err(CliError::input)?;
                let sync = load.sync_ns.iter().copied().max().unwrap_or(0);
                let start = if load.replicas > 0 { machine.sync_start_ns } else { 0 };
                for (metric, value) in [
                    (Metric::Imbalance, load.imbalance()),
                    (Metric::Replicas, f64::from(load.replicas)),
                    (Metric::Fanout, f64::from(load.fanout)),
                    (Metric::Remote, load.remote_fraction()),
                    (Metric::Relayed, f64::from(load.relayed)),
                    (Metric::SyncMs, (sync + start) as f64 / 1e6),
                ] {
                    *sums.entry(metric).or_insert(0.0) += value / f64::from(grid.seeds);
                }
            }
            all.push((system.name.clone(), sums));
        }
        Ok(all)
    }
}

impl Cell<'_> {
    /// Counts of every seed.
    fn loads(&self, grid: &Grid, workload: Option<Workload>, seed: u32) -> Result<Vec<Vec<u32>>, CliError> {
        let in_case = |error: &dyn std::fmt::Display| CliError::Input(format!("case {:?}: {error}", self.case.name));
        let permille = (self.ratio * 1000.0).round() as u32;
        let (tokens_per_rank, top_k) = (self.case.tokens, self.case.top_k.unwrap_or(self.model.top_k));
        let Some(workload) = workload else {
            let base = ProcessParams {
                ranks: self.case.ranks,
                experts: self.model.experts,
                tokens_per_rank,
                top_k,
                skew_milli: 0,
                drift_milli: 0,
                spread_milli: self.case.load.spread,
                layer_spread_milli: self.case.load.layer_spread,
                microbatch_spread_milli: self.case.load.microbatch_spread,
                seed: u64::from(seed),
            };
            let target = FitTarget {
                none_permille: u64::from(permille),
                historical_permille: None,
                drift_permille: 0,
                layers: grid.seeds,
                microbatches: 1,
            };
            let fit = fit_process(base, &target, None).map_err(|error| in_case(&error))?;
            let mut process = LoadProcess::new(fit.params).map_err(|error| in_case(&error))?;
            return Ok((0..grid.seeds).map(|layer| process.sample(layer)).collect());
        };
        let ratio = Ratio::new(permille, 1000)
            .ok_or_else(|| CliError::Input(format!("ratio {}: allowed are 1 and more", self.ratio)))?;
        let load = |index: u32| {
            let seed = u64::from(seed) + u64::from(index);
            let params = LoadParams { tokens_per_rank, top_k, ratio, seed, microbatch: 0 };
            let made = generate(workload, &self.topology, &params).map_err(|error| in_case(&error))?;
            Ok(made.counts().to_vec())
        };
        (0..grid.seeds).map(load).collect()
    }
}

/// Means over cells, system by system.
fn mean(cells: &[Figures]) -> Figures {
    let mut all: Figures = cells
        .first()
        .map(|first| first.iter().map(|(s, _)| (s.clone(), BTreeMap::new())).collect())
        .unwrap_or_default();
    for (index, (_, sums)) in all.iter_mut().enumerate() {
        for cell in cells {
            for (&metric, &value) in &cell[index].1 {
                *sums.entry(metric).or_insert(0.0) += value / cells.len() as f64;
            }
        }
    }
    all
}
