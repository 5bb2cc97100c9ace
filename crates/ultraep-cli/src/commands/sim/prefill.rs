//! Prefill serving: every system at saturation and at given rates.

use std::collections::BTreeMap;

use ultraep_baselines::HistoryParams;
use ultraep_schedule::{Arrival, ArrivalSpec, Lengths, Limits, arrivals};
use ultraep_sim::{Footprint, PrefillReport, PrefillSpec, System, simulate_prefill};

use super::files::systems;
use super::plan_file::{Case, Metric, Plan, Prefill};
use super::record::{Along, CaseRecord, load_words, rows};
use super::training::{Ready, in_parallel, prepare, relate};
use crate::error::CliError;

/// KV of a rank, in tokens: enough for the longest prompts of all its sequences.
const SEQUENCES_PER_RANK: usize = 64;

/// One record a case at saturation, and one for every rate.
pub(super) fn run(plan: &Plan, threads: usize) -> Result<Vec<CaseRecord>, CliError> {
    let Some(prefill) = &plan.prefill else {
        return Err(CliError::Input(format!("{}: no [prefill]: experiment \"prefill\" needs it", plan.title)));
    };
    let lengths = Lengths::new(prefill.least_tokens, prefill.most_tokens).map_err(CliError::input)?;
    let pool = lengths.draw(prefill.requests as usize, u64::from(plan.seed));
    let ready = in_parallel(plan.case.len(), threads, |index| prepare(&plan.case[index], &plan.machine, plan.seed))?;
    let mut jobs = Vec::new();
    for (case, settings) in plan.case.iter().enumerate() {
        let systems = systems(&plan.systems, settings.microbatches)?;
        let batches = prefill.history_batches as usize;
        let history = HistoryParams { window: batches, interval: batches };
        for rate in std::iter::once(None).chain(prefill.rates.iter().copied().map(Some)) {
            jobs.extend(systems.iter().map(|system| (case, rate, System { history, ..system.clone() })));
        }
    }
    let run = |job: usize| {
        let (case, rate, system) = &jobs[job];
        serve(&ready[*case], &plan.case[*case], system, &requests(prefill, *rate, &pool, plan.seed))
    };
    let reports = in_parallel(jobs.len(), threads, run)?;
    let mut records = Vec::new();
    for (index, case) in plan.case.iter().enumerate() {
        for rate in std::iter::once(None).chain(prefill.rates.iter().copied().map(Some)) {
            let of = jobs.iter().zip(&reports).filter(|((of, at, _), _)| (*of, *at) == (index, rate));
            let mut all: Vec<_> = of.map(|((.., system), report)| (system.name.clone(), figures(report))).collect();
            relate(&mut all);
            let (name, metrics) = match rate {
                None => {
                    let metrics =
                        [Metric::TokensPerS, Metric::OfIdeal, Metric::OverNone, Metric::Imbalance, Metric::LayerPeak];
                    (format!("{}, saturated", case.name), metrics.to_vec())
                }
                Some(rate) => (format!("{}, {rate} requests/s", case.name), vec![Metric::TtftMs]),
            };
            let paper = if rate.is_none() { case.paper.as_slice() } else { &[] };
            let load = load_words(ready[index].fit.as_ref());
            let along = rate.map(|rate| Along { case: case.name.clone(), axis: "requests/s", at: f64::from(rate) });
            records.push(CaseRecord { name, along, load, rows: rows(&metrics, &all, paper), ..CaseRecord::default() });
        }
    }
    Ok(records)
}

/// Arrivals at a rate; all at once without one.
fn requests(prefill: &Prefill, rate: Option<u32>, pool: &[u32], seed: u32) -> Vec<Arrival> {
    let mean_gap_ns = rate.map_or(0, |rate| ArrivalSpec::mean_gap_ns(1000 * u64::from(rate)));
    let spec = ArrivalSpec { requests: prefill.requests as usize, mean_gap_ns, new_tokens: 1, seed: u64::from(seed) };
    arrivals(&spec, pool)
}

fn serve(ready: &Ready, case: &Case, system: &System, arrivals: &[Arrival]) -> Result<PrefillReport, CliError> {
    let longest = arrivals.iter().map(|a| a.prompt_tokens).max().unwrap_or(1);
    let limits = Limits {
        ranks: ready.spec.ranks as usize,
        chunk_tokens: case.tokens.saturating_mul(ready.spec.ranks),
        context_per_token: 0,
        kv_tokens_per_rank: longest.saturating_add(1).saturating_mul(SEQUENCES_PER_RANK as u32),
        sequences_per_rank: SEQUENCES_PER_RANK.min(case.tokens as usize),
        queue_max: arrivals.len().max(1),
    };
    let mut spec = PrefillSpec {
        model: ready.spec.model.clone(),
        machine: ready.spec.machine.clone(),
        domain_ranks: ready.spec.domain_ranks,
        slots: ready.spec.slots,
        limits,
        layers_sampled: ready.spec.layers_sampled,
        process: ready.spec.process,
        recorded: ready.spec.recorded.clone(),
    };
    // No more than there is room for, and at least the longest prompt: where that does not fit, the simulator says so.
    let room = u32::try_from(Footprint::kv_room_tokens(&spec, system.sync)).unwrap_or(u32::MAX);
    spec.limits.kv_tokens_per_rank = spec.limits.kv_tokens_per_rank.min(room.max(longest.saturating_add(1)));
    let in_system = |error| CliError::Input(format!("case {:?}, system {:?}: {error}", case.name, system.name));
    simulate_prefill(&spec, system, arrivals).map_err(in_system)
}

fn figures(report: &PrefillReport) -> BTreeMap<Metric, f64> {
    let peaks = &report.peaks;
    BTreeMap::from([
        (Metric::TokensPerS, report.tokens_per_s),
        (Metric::Imbalance, report.imbalance),
        (Metric::MemoryGb, report.memory.total_bytes() as f64 / 1e9),
        (Metric::TtftMs, report.ttft.mean_ns as f64 / 1e6),
        (Metric::LayerPeak, peaks.layer_rows as f64 / peaks.layer_mean_rows.max(1) as f64),
    ])
}
