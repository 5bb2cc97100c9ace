//! `ultraep sim`: what training and prefill take on a rack, beside what was published.

mod balancing;
mod calibration;
mod files;
mod record;
mod training;

use std::io::Write;
use std::num::NonZeroUsize;

use self::files::{Experiment, Metric, PLANS, Plan, machine, plan, systems};
use self::record::{CaseRecord, Record, load_words, rows};
use self::training::{figures, in_parallel, prepare, relate, step};
use super::write_json;
use crate::error::CliError;

pub(crate) const EXAMPLES: &str = "Examples:
  ultraep sim figure-11                    training throughput beside the paper's
  ultraep sim my-plan.toml --json          a plan of your own
  ultraep sim calibrate                    how the machine's constants were fitted";

/// Plan file and output.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// A plan file, or the name of one that comes with the program
    #[arg(value_name = "PLAN")]
    plan: Option<String>,
    /// JSON (schema ultraep.sim/1) instead of tables
    #[arg(long)]
    json: bool,
    /// Threads; the result does not depend on them [default: all cores]
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
}

pub(crate) fn run(args: &Args, out: &mut dyn Write) -> Result<(), CliError> {
    let known = || PLANS.map(|(name, _)| name).join(", ");
    let Some(name) = &args.plan else {
        return Err(CliError::Input(format!("no plan: allowed are a file or one of {}", known())));
    };
    let plan = plan(name)?;
    let threads = args.threads.or_else(|| std::thread::available_parallelism().ok()).map_or(1, NonZeroUsize::get);
    if plan.experiment == Experiment::Calibration {
        return calibration::run(&plan, out);
    }
    let mut record = Record::new(&plan, &machine(&plan.machine)?.name);
    record.cases = match plan.experiment {
        Experiment::Training => training_cases(&plan, threads)?,
        Experiment::Balancing => balancing::run(&plan, threads)?,
        _ => Vec::new(),
    };
    match args.json {
        true => write_json(out, &record),
        false => record.print(out),
    }
}

fn training_cases(plan: &Plan, threads: usize) -> Result<Vec<CaseRecord>, CliError> {
    let metrics = match plan.metrics.is_empty() {
        true => vec![Metric::Tflops, Metric::OfIdeal, Metric::Imbalance],
        false => plan.metrics.clone(),
    };
    let ready = in_parallel(plan.case.len(), threads, |index| prepare(&plan.case[index], &plan.machine, plan.seed))?;
    let mut jobs = Vec::new();
    for (index, case) in plan.case.iter().enumerate() {
        jobs.extend(systems(&plan.systems, case.microbatches)?.into_iter().map(|system| (index, system)));
    }
    let run = |job: usize| step(&ready[jobs[job].0], &jobs[job].1, plan.fidelity, false);
    let reports = in_parallel(jobs.len(), threads, run)?;
    let case = |(index, case): (usize, &files::Case)| {
        let of = || jobs.iter().zip(&reports).filter(|((of, _), _)| *of == index);
        let mut all: Vec<_> = of().map(|((_, system), report)| (system.name.clone(), figures(report))).collect();
        relate(&mut all);
        CaseRecord {
            name: case.name.clone(),
            load: load_words(ready[index].fit.as_ref()),
            rows: rows(&metrics, &all, &case.paper),
            systems: of().map(|(_, report)| report.system.clone()).collect(),
        }
    };
    Ok(plan.case.iter().enumerate().map(case).collect())
}
