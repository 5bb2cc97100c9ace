//! Fits the machine's constants to one model's published breakdown of a layer, under forced-even routing and under none.
//!
//! ```text
//! experts     ideal and none give the time of a row and what is fixed (forward: nothing can be fixed below zero, then the
//!             row time that is off by the same share on both)
//! all-to-all  ideal gives the link's rate; none gives the incast (bisected on the closed form over sampled loads)
//! rest        what GEMMs at the experts' rate do not explain is time for each token and unit of width
//! outside     the throughput of ideal gives what of a step the layers do not explain
//! ```
//!
//! Floats are allowed here: what comes out is rounded to integers, printed and kept in a machine file.

use crate::balancer::{Balancer, LayerLoad, SyncRule, System};
use crate::closed::ClosedForm;
use crate::layer::{Direction, Fidelity, LayerWork};
use crate::machine::{Calibrated, Machine};
use crate::process::LoadProcess;
use crate::step::{StepSpec, simulate_step};
use crate::{SimError, fit};
use ultraep_baselines::{HistoryParams, LplbLinks, PolicyKind};

/// Published times of one layer, in microseconds, and the step's throughput.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Breakdown {
    /// Experts, all-to-all, rest; forward.
    pub forward_us: [u64; 3],
    /// Experts, all-to-all, rest; backward.
    pub backward_us: [u64; 3],
}

/// What is fitted to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Routing forced to be even.
    pub ideal: Breakdown,
    /// No balancing.
    pub none: Breakdown,
    /// Throughput of ideal, model operations a second and accelerator, in giga.
    pub ideal_gflops: u64,
}

/// A system that only routes.
pub fn plain(policy: PolicyKind) -> System {
    System {
        name: policy.name().to_string(),
        policy,
        sync: SyncRule::Never,
        plan_ns: 0,
        min_quota: 1,
        history: HistoryParams::default(),
        max_variables: 0,
        links: LplbLinks::default(),
    }
}

/// The machine of `spec` with constants fitted on its model, batch and load.
pub fn calibrate(spec: &StepSpec, target: &Target) -> Result<Machine, SimError> {
    let loads = |policy| sample(spec, policy);
    let (ideal, none) = (loads(PolicyKind::Ideal)?, loads(PolicyKind::None)?);
    let mut machine = spec.machine.clone();
    experts(&mut machine, spec, target, &ideal, &none);
    links(&mut machine, spec, target, &ideal);
    rest(&mut machine, spec, target);
    incast(&mut machine, spec, target, &none)?;
    outside(&mut machine, spec, target)?;
    Ok(machine)
}

fn sample(spec: &StepSpec, policy: PolicyKind) -> Result<Vec<LayerLoad>, SimError> {
    let topology = spec.topology()?;
    let mut balancer = Balancer::new(&plain(policy), &topology, spec.machine.transfer_model(&spec.model))?;
    let mut process = LoadProcess::new(spec.process)?;
    let (mut counts, mut all) = (Vec::new(), Vec::new());
    for layer in 0..spec.layers_sampled {
        for microbatch in 0..spec.pipeline.microbatches {
            process.counts(layer, fit::HISTORY_STEPS, microbatch, &mut counts);
            let mut load = LayerLoad::default();
            balancer.microbatch(&counts, &mut load)?;
            all.push(load);
        }
    }
    Ok(all)
}

/// Mean rows, tiles rounded up, of the busiest rank, and its instances.
fn busiest(loads: &[LayerLoad], tile: u64) -> (f64, f64) {
    let mut sums = (0, 0);
    for load in loads {
        let tiled = |rank: usize| load.rows_of(rank).iter().map(|&r| u64::from(r).div_ceil(tile) * tile).sum::<u64>();
        if let Some(rank) = (0..load.ranks()).max_by_key(|&rank| tiled(rank)) {
            sums = (sums.0 + tiled(rank), sums.1 + load.rows_of(rank).len());
        }
    }
    (sums.0 as f64 / loads.len().max(1) as f64, sums.1 as f64 / loads.len().max(1) as f64)
}

fn experts(machine: &mut Machine, spec: &StepSpec, target: &Target, ideal: &[LayerLoad], none: &[LayerLoad]) {
    let tile = u64::from(machine.tile_rows);
    let ((rows, instances), (hot_rows, hot_instances)) = (busiest(ideal, tile), busiest(none, tile));
    let start_us = machine.gemm_ns as f64 / 1e3;
    let fit = |even_us: u64, hot_us: u64| {
        let even = even_us as f64 - instances * start_us;
        let hot = hot_us as f64 - hot_instances * start_us;
        let row = (hot - even) / (hot_rows - rows).max(1.0);
        let fixed_rows = even / row - rows;
        if fixed_rows >= 0.0 {
            return (row, fixed_rows);
        }
        // Least squares of the relative errors.
        let (a, b) = (rows / even, hot_rows / hot);
        ((a + b) / (a * a + b * b), 0.0)
    };
    let flops = |row_us: f64, times: f64| (times * spec.model.row_flops() as f64 / (row_us / 1e6)).round() as u64;
    let (forward, _) = fit(target.ideal.forward_us[0], target.none.forward_us[0]);
    let (backward, fixed) = fit(target.ideal.backward_us[0], target.none.backward_us[0]);
    let c = &mut machine.calibrated;
    (c.forward_flops_per_s, c.backward_flops_per_s) = (flops(forward, 1.0), flops(backward, 2.0));
    let own_rows = f64::from(spec.batch.tokens_per_rank) * f64::from(spec.model.top_k);
    c.backward_fixed_permille = (1000.0 * fixed / own_rows).round() as u32;
}

fn links(machine: &mut Machine, spec: &StepSpec, target: &Target, ideal: &[LayerLoad]) {
    let most = |load: &LayerLoad| load.received.iter().chain(&load.sent).copied().max().unwrap_or(0);
    let rows = ideal.iter().map(most).sum::<u64>() as f64 / ideal.len().max(1) as f64;
    let hops_us = 2.0 * machine.hop_ns as f64 / 1e3;
    let bytes = 2.0 * rows * 2.0 * f64::from(spec.model.hidden);
    let rate = |us: u64| (bytes / ((us as f64 - hops_us).max(1.0) / 1e6)).round() as u64;
    machine.calibrated.forward_a2a_bytes_per_s = rate(target.ideal.forward_us[1]);
    machine.calibrated.backward_a2a_bytes_per_s = rate(target.ideal.backward_us[1]);
}

fn rest(machine: &mut Machine, spec: &StepSpec, target: &Target) {
    let tokens = f64::from(spec.batch.tokens_per_rank);
    let flops = tokens * spec.model.rest_flops(spec.batch.sequence) as f64;
    let width = tokens * f64::from(spec.model.hidden);
    let element_fs = |us: u64, flops: f64, rate: u64| {
        let left_us = us as f64 - flops / rate as f64 * 1e6;
        (left_us.max(0.0) * 1e9 / width).round() as u64
    };
    let c = &mut machine.calibrated;
    c.forward_element_fs = element_fs(target.ideal.forward_us[2], flops, c.forward_flops_per_s);
    c.backward_element_fs = element_fs(target.ideal.backward_us[2], 2.0 * flops, c.backward_flops_per_s);
}

fn incast(machine: &mut Machine, spec: &StepSpec, target: &Target, none: &[LayerLoad]) -> Result<(), SimError> {
    let topology = spec.topology()?;
    for (direction, wanted_us) in
        [(Direction::Forward, target.none.forward_us[1]), (Direction::Backward, target.none.backward_us[1])]
    {
        let mean_us = |permille: u32| {
            let mut trial = machine.clone();
            *incast_of(&mut trial.calibrated, direction) = permille;
            let work = LayerWork::new(&trial, &spec.model, spec.batch, &plain(PolicyKind::None), &topology);
            let sum: u64 = none.iter().map(|l| ClosedForm::times(&work, l, direction).all_to_all_ps / 1000).sum();
            sum / 1000 / none.len().max(1) as u64
        };
        let found = least(|permille| mean_us(permille) >= wanted_us, 20_000);
        *incast_of(&mut machine.calibrated, direction) = found;
    }
    Ok(())
}

fn incast_of(calibrated: &mut Calibrated, direction: Direction) -> &mut u32 {
    match direction {
        Direction::Forward => &mut calibrated.forward_incast_permille,
        Direction::Backward => &mut calibrated.backward_incast_permille,
    }
}

fn outside(machine: &mut Machine, spec: &StepSpec, target: &Target) -> Result<(), SimError> {
    let gflops = |permille: u32| {
        let mut trial = StepSpec { machine: machine.clone(), ..spec.clone() };
        trial.machine.calibrated.outside_permille = permille;
        let report = simulate_step(&trial, &plain(PolicyKind::Ideal), Fidelity::ClosedForm, false)?;
        Ok::<_, SimError>((report.system.tflops * 1e3) as u64)
    };
    let (mut low, mut high) = (0, 10_000);
    while high - low > 1 {
        let middle = u32::midpoint(low, high);
        if gflops(middle)? > target.ideal_gflops { low = middle } else { high = middle }
    }
    machine.calibrated.outside_permille = high;
    Ok(())
}

/// The least number up to `most` for which `reached` holds, for one that goes on holding.
fn least(reached: impl Fn(u32) -> bool, most: u32) -> u32 {
    let (mut low, mut high) = (0, most);
    while low < high {
        let middle = low.midpoint(high);
        if reached(middle) { high = middle } else { low = middle + 1 }
    }
    low
}
