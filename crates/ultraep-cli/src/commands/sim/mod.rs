//! `ultraep sim`: what training and prefill take on a rack, beside what was published.

mod balancing;
mod calibration;
mod files;
mod plan_file;
mod plots;
mod prefill;
mod record;
mod recording;
mod sweep;
mod timeline;
mod training;

use std::io::Write;
use std::path::{Path, PathBuf};

pub(super) use self::files::model;
use self::files::{PLANS, machine, plan, systems};
use self::plan_file::{Case, Experiment, Metric, Plan};
use self::record::{CaseRecord, Record, load_words, rows};
use self::training::{Ready, figures, in_parallel, prepare, relate, step};
use super::write_json;
use crate::commands::train::cores;
use crate::error::{CliError, note};
use crate::options;
use crate::output::Output;
use ultraep_sim::{Fidelity, StepReport, System, recovery_ps};

pub(crate) const EXAMPLES: &str = "Examples:
  ultraep sim figure-11                    training throughput beside the paper's
  ultraep sim figure-13 --svg plots        with plots
  ultraep sim figure-11 --trace step.json  with a timeline of a step
  ultraep sim my-plan.toml --json          a plan of your own
  ultraep sim --print figure-11 > my.toml  a shipped plan, to start your own from
  ultraep sim calibrate                    how the machine's constants were fitted";

/// Plan file and output.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// A plan file, or the name of one that comes with the program
    #[arg(value_name = "PLAN")]
    plan: Option<String>,
    /// Print the plan file as it comes with the program, and run nothing
    #[arg(long, conflicts_with_all = ["json", "svg", "trace", "fidelity", "seed", "threads"])]
    print: bool,
    /// JSON (schemas ultraep.sim/1, ultraep.sim-sweep/1, ultraep.sim-calibration/1) instead of tables
    #[arg(long)]
    json: bool,
    /// Write SVG plots into this folder, one a metric
    #[arg(long, value_name = "FOLDER")]
    svg: Option<PathBuf>,
    /// Write a timeline of the last system but `ideal` on the first case, at the event level (Chrome trace, for Perfetto)
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// closed-form or events, instead of what the plan says
    #[arg(long, value_name = "FIDELITY", value_parser = fidelity)]
    fidelity: Option<Fidelity>,
    /// Seed: another than the plan's
    #[arg(long, value_name = "SEED")]
    seed: Option<u32>,
    #[arg(long, value_name = "N", value_parser = options::threads(), help = options::THREADS)]
    threads: Option<usize>,
}

pub(crate) fn run(args: &Args, out: &mut Output<'_>) -> Result<(), CliError> {
    let known = || PLANS.map(|(name, _)| name).join(", ");
    let Some(name) = &args.plan else {
        return Err(CliError::Input(format!("no plan: allowed are a file or one of {}", known())));
    };
    if args.print {
        let Some((_, text)) = PLANS.iter().find(|(shipped, _)| shipped == name) else {
            return Err(CliError::Input(format!("--print {name}: allowed are {}", known())));
        };
        write!(out, "{text}")?;
        return Ok(());
    }
    let mut plan = plan(name)?;
    has_outputs(args, name, plan.experiment)?;
    plan.fidelity = args.fidelity.unwrap_or(plan.fidelity);
    plan.seed = args.seed.unwrap_or(plan.seed);
    let threads = args.threads.unwrap_or_else(cores);
    if plan.experiment == Experiment::Calibration {
        return calibration::run(&plan, args.json, out);
    }
    if plan.experiment == Experiment::Sweep {
        let record = sweep::run(&plan, threads)?;
        return if args.json { write_json(out, &record) } else { record.print(out) };
    }
    let mut record = Record::new(&plan, &machine(&plan.machine)?.name);
    record.cases = match plan.experiment {
        Experiment::Balancing => balancing::run(&plan, threads)?,
        Experiment::Prefill => prefill::run(&plan, threads)?,
        _ => training_cases(&plan, threads)?,
    };
    if let Some(folder) = &args.svg {
        let stem = Path::new(name).file_stem().unwrap_or_default().to_string_lossy().into_owned();
        for path in plots::write(folder, &stem, &record)? {
            note(format!("wrote {}", path.display()));
        }
    }
    if let Some(path) = &args.trace {
        trace(&plan, path)?;
    }
    if args.json { write_json(out, &record) } else { record.print(out) }
}

/// Refuses what an experiment of this kind has no output for, before anything is run.
fn has_outputs(args: &Args, name: &str, experiment: Experiment) -> Result<(), CliError> {
    let kind = experiment.name();
    if args.trace.is_some() && experiment != Experiment::Training {
        return Err(CliError::Input(format!(
            "--trace: {name} is an experiment of {kind}, which has no step to show: allowed are plans of training"
        )));
    }
    if args.svg.is_some() && matches!(experiment, Experiment::Sweep | Experiment::Calibration) {
        return Err(CliError::Input(format!(
            "--svg: {name} is an experiment of {kind}, which has no plots: allowed are plans of training, balancing and \
             prefill"
        )));
    }
    Ok(())
}

fn fidelity(text: &str) -> Result<Fidelity, String> {
    match text {
        "closed-form" => Ok(Fidelity::ClosedForm),
        "events" => Ok(Fidelity::Events),
        _ => Err("allowed are closed-form and events".to_owned()),
    }
}

fn trace(plan: &Plan, path: &Path) -> Result<(), CliError> {
    let case = &plan.case[0];
    let systems = systems(&plan.systems, case.microbatches)?;
    let Some(system) = systems.iter().rev().find(|system| system.name != "ideal") else {
        return Err(CliError::Input("--trace: the plan has no system but ideal".to_string()));
    };
    let report = step(&prepare(case, &plan.machine, plan.seed)?, system, Fidelity::Events, true)?;
    timeline::write(path, &report)?;
    note(format!("wrote {}: {} on {}", path.display(), system.name, case.name));
    Ok(())
}

/// The system and what it would need, where a rank has not so much memory.
fn does_not_fit(ready: &Ready, system: &System, report: &StepReport) -> Option<String> {
    let refused = report.system.memory.check(&ready.spec.machine).err()?;
    Some(format!("{}: {refused}", system.name))
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
    let case = |(index, case): (usize, &Case)| {
        let of = || jobs.iter().zip(&reports).filter(|((of, _), _)| *of == index);
        let mut all: Vec<_> = of().map(|((_, system), report)| (system.name.clone(), figures(report))).collect();
        relate(&mut all);
        if case.lost_ranks > 0 {
            let spec = &ready[index].spec;
            let once = recovery_ps(&spec.machine, &spec.model, case.ranks) as f64 / 1e9 * f64::from(case.lost_ranks);
            all.iter_mut().for_each(|(_, figures)| _ = figures.insert(Metric::RecoveryMs, once));
        }
        CaseRecord {
            name: case.name.clone(),
            along: None,
            load: load_words(ready[index].fit.as_ref()),
            rows: rows(&metrics, &all, &case.paper),
            does_not_fit: of()
                .filter_map(|((_, system), report)| does_not_fit(&ready[index], system, report))
                .collect(),
            systems: of().map(|(_, report)| report.system.clone()).collect(),
        }
    };
    Ok(plan.case.iter().enumerate().map(case).collect())
}
