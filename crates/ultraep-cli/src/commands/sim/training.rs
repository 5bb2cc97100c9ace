//! Training steps: a case becomes a [`StepSpec`], systems run on it, figures come out by metric.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use indicatif::{ProgressBar, ProgressStyle};
use ultraep_plan::FULL_SPEED;
use ultraep_sim::{
    Batch, Fidelity, Fit, FitTarget, Jitter, Mistake, Pipeline, ProcessParams, Recompute, StepReport, StepSpec, System,
    fit_process, simulate_step,
};

use super::files::{machine, model, systems};
use super::plan_file::{Case, Metric, Recomputation};
use super::recording;
use crate::error::CliError;

/// Layers that a load process is fitted on at most.
const FIT_LAYERS: u32 = 16;

/// A case ready to run.
#[derive(Clone, Debug)]
pub(super) struct Ready {
    pub(super) spec: StepSpec,
    /// What the load process was fitted to, and what it has.
    pub(super) fit: Option<Fit>,
}

/// Prepares a case: reads its files and fits its load.
pub(super) fn prepare(case: &Case, machine_name: &str, seed: u32) -> Result<Ready, CliError> {
    let mut spec = spec(case, machine_name, seed)?;
    if let Some(path) = &case.load.recording {
        let shape = recording::Shape { ranks: spec.ranks, experts: spec.model.experts, top_k: spec.model.top_k };
        let recorded = recording::read(path, case, shape)?;
        spec.layers_sampled = spec.layers_sampled.min(recorded.layers() as u32);
        spec.recorded = Some(Arc::new(recorded));
        return Ok(Ready { spec, fit: None });
    }
    let fit = fit(case, &spec)?;
    Ok(prepared(spec, fit))
}

/// As [`prepare`], with the load that `fitted` was fitted to: what differs between two cases must not change their load.
pub(super) fn prepare_like(case: &Case, fitted: &Ready, machine_name: &str, seed: u32) -> Result<Ready, CliError> {
    let mut spec = spec(case, machine_name, seed)?;
    spec.recorded.clone_from(&fitted.spec.recorded);
    spec.layers_sampled = spec.layers_sampled.min(fitted.spec.layers_sampled);
    spec.process = fitted.spec.process;
    Ok(Ready { spec, fit: fitted.fit })
}

fn prepared(mut spec: StepSpec, fit: Option<Fit>) -> Ready {
    if let Some(fit) = fit {
        spec.process = fit.params;
    }
    Ready { spec, fit }
}

/// A case without its load.
fn spec(case: &Case, machine_name: &str, seed: u32) -> Result<StepSpec, CliError> {
    let mut model = model(&case.model)?;
    model.top_k = case.top_k.unwrap_or(model.top_k);
    model.experts = case.experts.unwrap_or(model.experts);
    let machine = machine(machine_name)?.with_bandwidth_percent(case.bandwidth_percent);
    let ranks = case.ranks - case.lost_ranks.min(case.ranks - 1);
    let mut speeds = Vec::new();
    if !case.slow.is_empty() {
        speeds = vec![FULL_SPEED; ranks as usize];
        for slow in &case.slow {
            let Some(speed) = speeds.get_mut(slow.rank as usize) else {
                let last = ranks - 1;
                return Err(CliError::Input(format!(
                    "{}: slow rank {}: allowed are 0 to {last}",
                    case.name, slow.rank
                )));
            };
            *speed = FULL_SPEED * slow.speed_percent / 100;
        }
    }
    let process = ProcessParams {
        ranks,
        experts: model.experts,
        tokens_per_rank: case.tokens,
        top_k: model.top_k,
        skew_milli: case.load.skew.unwrap_or(0),
        drift_milli: case.load.drift.unwrap_or(0),
        spread_milli: case.load.spread,
        layer_spread_milli: case.load.layer_spread,
        microbatch_spread_milli: case.load.microbatch_spread,
        seed: u64::from(seed),
    };
    let mistake = match (case.stale_counts, case.late_plan_us) {
        (true, _) => Mistake::StaleCounts,
        (false, 0) => Mistake::None,
        (false, us) => Mistake::LatePlan { late_ns: u64::from(us) * 1000 },
    };
    let mut spec = StepSpec {
        ranks,
        domain_ranks: case.domain.unwrap_or_else(|| ranks.min(machine.domain_ranks)).min(ranks),
        slots: case.slots,
        batch: Batch { tokens_per_rank: case.tokens, sequence: case.sequence },
        pipeline: Pipeline { stages: case.stages, chunks: case.chunks, microbatches: case.microbatches },
        data_parallel: case.data_parallel,
        groups_sampled: case.groups_sampled.min(case.data_parallel),
        recompute: match case.recompute {
            Recomputation::Auto | Recomputation::Nothing => Recompute::Nothing,
            Recomputation::Attention => Recompute::Attention,
            Recomputation::Layer => Recompute::Layer,
        },
        layers_sampled: case.layers_sampled.min(model.moe_layers()),
        process,
        recorded: None,
        speeds,
        speeds_known: case.speeds_known,
        mistake,
        jitter: Jitter { percent: case.jitter_percent },
        model,
        machine,
    };
    let in_case = |error: ultraep_sim::SimError| CliError::Input(format!("case {:?}: {error}", case.name));
    if case.recompute == Recomputation::Auto {
        spec.recompute = spec.least_recompute().map_err(in_case)?;
    }
    Ok(spec)
}

/// Fits the load process of a case; `None` where it is given.
fn fit(case: &Case, spec: &StepSpec) -> Result<Option<Fit>, CliError> {
    let in_case = |error: ultraep_sim::SimError| CliError::Input(format!("case {:?}: {error}", case.name));
    Ok(match case.load.none {
        None if case.load.skew.is_some() => None,
        None => {
            return Err(CliError::Input(format!(
                "case {:?}: load: give `none` (to fit to), `skew` or `recording`",
                case.name
            )));
        }
        Some(none_permille) => {
            let target = FitTarget {
                none_permille,
                historical_permille: case.load.eplb,
                drift_permille: case.load.drift_permille,
                layers: spec.layers_sampled.min(FIT_LAYERS),
                microbatches: case.microbatches,
            };
            let eplb = systems(&["eplb".to_string()], case.microbatches)?;
            let topology = spec.topology().map_err(in_case)?;
            let historical = (&eplb[0], &topology, spec.machine.transfer_model(&spec.model));
            Some(fit_process(spec.process, &target, Some(historical)).map_err(in_case)?)
        }
    })
}

/// Runs `work` on every index below `count` on `threads` threads; the results are in order, whatever the threads did.
pub(super) fn in_parallel<T: Send>(
    count: usize,
    threads: usize,
    work: impl Fn(usize) -> Result<T, CliError> + Sync,
) -> Result<Vec<T>, CliError> {
    let (next, results) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let bar = progress(count);
    let kept = || results.lock().unwrap_or_else(PoisonError::into_inner);
    std::thread::scope(|scope| {
        for _ in 0..threads.clamp(1, count.max(1)) {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= count {
                        return;
                    }
                    let result = work(index);
                    kept().push((index, result));
                    bar.inc(1);
                }
            });
        }
    });
    bar.finish_and_clear();
    let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    results.sort_by_key(|(index, _)| *index);
    results.into_iter().map(|(_, result)| result).collect()
}

/// On stderr, where that is a terminal.
fn progress(length: usize) -> ProgressBar {
    let bar = ProgressBar::new(length as u64);
    let style = ProgressStyle::with_template("{elapsed} [{bar:40}] {pos}/{len}");
    style.map_or(bar.clone(), |style| bar.with_style(style))
}

/// One system's step on a prepared case.
pub(super) fn step(ready: &Ready, system: &System, fidelity: Fidelity, spans: bool) -> Result<StepReport, CliError> {
    let in_system = |error| CliError::Input(format!("system {:?}: {error}", system.name));
    simulate_step(&ready.spec, system, fidelity, spans).map_err(in_system)
}

/// Figures of one step, by metric; those that compare systems are added by [`relate`].
pub(super) fn figures(report: &StepReport) -> BTreeMap<Metric, f64> {
    let ms = |ps: u64| ps as f64 / 1e9;
    let s = &report.system;
    let peak = |most: u64, mean: u64| most as f64 / mean.max(1) as f64;
    BTreeMap::from([
        (Metric::Tflops, s.tflops),
        (Metric::TokensPerS, s.tokens_per_s),
        (Metric::StepMs, ms(s.step_ps)),
        (Metric::Imbalance, s.imbalance),
        (Metric::ForwardExpertsMs, ms(s.forward.experts_ps)),
        (Metric::ForwardAllToAllMs, ms(s.forward.all_to_all_ps)),
        (Metric::ForwardRestMs, ms(s.forward.rest_ps + s.forward.plan_ps + s.forward.sync_ps)),
        (Metric::BackwardExpertsMs, ms(s.backward.experts_ps)),
        (Metric::BackwardAllToAllMs, ms(s.backward.all_to_all_ps)),
        (Metric::BackwardRestMs, ms(s.backward.rest_ps + s.backward.sync_ps)),
        (Metric::KeptPeak, peak(s.peaks.kept_rows, s.peaks.kept_mean_rows)),
        (Metric::LayerPeak, peak(s.peaks.layer_rows, s.peaks.layer_mean_rows)),
        (Metric::ActivationsGb, s.memory.activations_bytes as f64 / 1e9),
        (Metric::MemoryGb, s.memory.total_bytes() as f64 / 1e9),
        (Metric::Replicas, s.replicas),
        (Metric::Fanout, s.fanout),
        (Metric::Remote, s.remote_fraction),
    ])
}

/// Adds what relates systems to `ideal` and `none` where those were run.
pub(super) fn relate(all: &mut [(String, BTreeMap<Metric, f64>)]) {
    // Prefill has no operations a second.
    let steps = all.iter().any(|(_, figures)| figures.contains_key(&Metric::Tflops));
    let rated = if steps { Metric::Tflops } else { Metric::TokensPerS };
    for (ratio, metric, system) in [
        (Metric::OfIdeal, rated, "ideal"),
        (Metric::OverNone, rated, "none"),
        (Metric::ActivationsOverIdeal, Metric::ActivationsGb, "ideal"),
    ] {
        let other = all.iter().find(|(name, _)| name == system).and_then(|(_, figures)| figures.get(&metric).copied());
        let Some(other) = other.filter(|&other| other > 0.0) else { continue };
        for (_, figures) in all.iter_mut() {
            if let Some(own) = figures.get(&metric).copied() {
                figures.insert(ratio, own / other);
            }
        }
    }
}
