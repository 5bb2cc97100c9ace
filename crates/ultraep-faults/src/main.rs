//! Long runs of the fault enumeration and of the simulation: `cargo xtask kill-points`, `cargo xtask simulate`.

#![forbid(unsafe_code)]

use std::error::Error;
use std::fmt::Display;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use ultraep_fabric::simulated::{Fault, FaultKind, Schedule};
use ultraep_faults::enumerate::{KINDS, fault_points};
use ultraep_faults::leftovers::Leftovers;
use ultraep_faults::{
    Ending, FaultText, Ground, Profile, RankEnd, RunError, Scenario, rank_process, run, run_and_kill, seeds,
};
use ultraep_plan::Rank;

/// Ranks that fail on purpose: what the others make of it
#[derive(Parser)]
#[command(name = "ultraep-faults", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run seeded schedules with faults drawn from the seed: results are those of threads, or every rank names the cause
    #[command(
        after_help = "Examples:\n  cargo xtask simulate --seeds 100000\n  cargo xtask simulate --from 17 --seeds 1"
    )]
    Simulate {
        #[command(flatten)]
        sizes: Sizes,
        /// How many seeds
        #[arg(long, default_value_t = 10_000)]
        seeds: u64,
        /// The first of them
        #[arg(long, default_value_t = 0)]
        from: u64,
    },
    /// Kill ranks' processes from outside, at whatever instruction they are
    #[command(after_help = "Example:\n  cargo xtask kill-anytime --rounds 2000")]
    KillAnytime {
        #[command(flatten)]
        sizes: Sizes,
        /// How many groups
        #[arg(long, default_value_t = 1000)]
        rounds: u64,
        /// The kill comes within so many microseconds of the group's start
        #[arg(long, default_value_t = 30_000)]
        within_us: u64,
    },
    /// Lose each rank at each operation in each way: all others name it
    #[command(
        after_help = "Examples:\n  cargo xtask kill-points --ranks 8\n  cargo xtask kill-points --fabric processes --every 7\n  \
                            cargo xtask kill-points --fabric simulated --fault 1:before:12:killed"
    )]
    KillPoints {
        #[command(flatten)]
        sizes: Sizes,
        /// Where the ranks run
        #[arg(long, value_enum, default_value_t = Where::Simulated)]
        fabric: Where,
        /// Only every so-many-th point
        #[arg(long, default_value_t = 1)]
        every: usize,
        /// Only this one: RANK:before|in-flight:NUMBER:fails|panics|killed|hangs
        #[arg(long)]
        fault: Option<FaultText>,
        /// The group's timeout where time is real, in milliseconds
        #[arg(long, default_value_t = 2000)]
        timeout_ms: u64,
    },
}

/// The work of the ranks.
#[derive(Args)]
struct Sizes {
    /// Ranks of the group
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    ranks: u16,
    /// MoE layers
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    layers: u16,
    /// Microbatches
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=64))]
    microbatches: u16,
}

impl Sizes {
    fn scenario(&self) -> Scenario {
        Scenario {
            layers: self.layers.into(),
            microbatches: self.microbatches.into(),
            ..Scenario::small(self.ranks.into())
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Where {
    /// Threads under a seeded scheduler: every point, in virtual time
    Simulated,
    /// Threads: `hangs` lasts as long as the timeout
    Threads,
    /// Processes, killed by SIGKILL and stopped by SIGSTOP
    Processes,
}

impl Where {
    /// What can strike a rank there.
    fn kinds(self) -> &'static [FaultKind] {
        match self {
            Self::Simulated | Self::Processes => &KINDS,
            Self::Threads => &[FaultKind::Fails, FaultKind::Panics, FaultKind::Hangs],
        }
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let Some(end) = rank_process(&arguments) {
        return as_rank(end);
    }
    let result = match Cli::parse().command {
        Command::Simulate { sizes, seeds, from } => simulate(&sizes.scenario(), from, seeds),
        Command::KillAnytime { sizes, rounds, within_us } => kill_anytime(&sizes.scenario(), rounds, within_us.max(1)),
        Command::KillPoints { sizes, fabric, every, fault, timeout_ms } => {
            let timeout = Duration::from_millis(timeout_ms);
            kill_points(&sizes.scenario(), fabric, every.max(1), fault, timeout)
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Reports on standard output, for the process that started the group.
fn as_rank(end: Result<RankEnd, RunError>) -> ExitCode {
    match end {
        Ok(end) => {
            println!("{end}");
            match end {
                RankEnd::Finished(_) => ExitCode::SUCCESS,
                _ => ExitCode::FAILURE,
            }
        }
        Err(error) => {
            println!("{}", RankEnd::Failed(error.to_string()));
            ExitCode::FAILURE
        }
    }
}

type Outcome = Result<(), Box<dyn Error>>;

fn progress(length: u64, what: &str) -> ProgressBar {
    let bar = ProgressBar::new(length);
    let style = ProgressStyle::with_template("{msg} {wide_bar} {pos} of {len}, {eta} left");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message(what.to_owned());
    bar
}

fn simulate(scenario: &Scenario, from: u64, count: u64) -> Outcome {
    let profile = scenario.profile()?;
    let bar = progress(count, "seeds");
    let (mut struck, mut turns, mut late, mut digest) = (0u64, 0, 0, 0u64);
    for seed in from..from.saturating_add(count) {
        let end = seeds::check_seed(seed, scenario, &profile)?;
        struck += u64::from(end.ending.failure.is_some());
        if let Some(schedule) = end.ending.schedule {
            turns += schedule.turns;
            late += schedule.landed_late;
            digest = digest.rotate_left(1) ^ schedule.digest;
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    println!(
        "{count} seeds from {from} on {} ranks: {} ended with the results of threads, {struck} with every rank naming the cause",
        scenario.ranks,
        count - struck
    );
    println!("{turns} turns, {late} messages landed late, digest of all schedules {digest:016x}");
    Ok(())
}

fn kill_anytime(scenario: &Scenario, rounds: u64, within_us: u64) -> Outcome {
    let profile = scenario.profile()?;
    let program = std::env::current_exe()?;
    let (bar, before, mut noticed) = (progress(rounds, "rounds"), Leftovers::now(), 0);
    for round in 0..rounds {
        let victim = Rank::new((round % scenario.ranks as u64) as usize);
        // Evenly spread, in an order that goes back and forth.
        let delay = Duration::from_micros(round.wrapping_mul(7919) % within_us);
        let ending = run_and_kill(scenario, &program, victim, delay)?;
        let result = ending.check_killed(&profile, victim).and_then(|result| before.check().map(|()| result));
        noticed += u64::from(result.map_err(|why| format!("killed after {delay:?}: {why}"))?);
        bar.inc(1);
    }
    bar.finish_and_clear();
    println!(
        "{rounds} groups: {noticed} lost a rank and every other rank named it, {} had ended before",
        rounds - noticed
    );
    Ok(())
}

fn kill_points(
    scenario: &Scenario,
    fabric: Where,
    every: usize,
    only: Option<FaultText>,
    timeout: Duration,
) -> Outcome {
    let profile = scenario.profile()?;
    let program = std::env::current_exe()?;
    let points: Vec<Fault> = match only {
        Some(FaultText(fault)) => vec![fault],
        None => fault_points(&profile, fabric.kinds()).step_by(every).collect(),
    };
    let bar = progress(points.len() as u64, "points");
    let (before, mut failures) = (Leftovers::now(), 0);
    let mut report = |what: &dyn Display| {
        failures += 1;
        bar.suspend(|| eprintln!("{what}"));
    };
    for (number, fault) in points.iter().enumerate() {
        let ground = match fabric {
            // Odd seeds: the operations are those of threads.
            Where::Simulated => Ground::Simulated(2 * number as u64 + 1),
            Where::Threads => Ground::Threads,
            Where::Processes => Ground::Processes(&program),
        };
        let short = fault.kind == FaultKind::Hangs && fabric != Where::Simulated;
        let scenario = Scenario { timeout: if short { timeout } else { scenario.timeout }, ..*scenario };
        let ending = run(&scenario, ground, &[*fault])?;
        if let Err(why) = judge(&ending, &profile, fault).and_then(|()| before.check()) {
            report(&why);
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    println!("{} of {} points: every other rank named the one that was lost", points.len() - failures, points.len());
    if failures == 0 { Ok(()) } else { Err(format!("{failures} points failed").into()) }
}

fn judge(ending: &Ending, profile: &Profile, fault: &Fault) -> Result<(), String> {
    let found = ending.check(profile, fault);
    match (&found, &ending.schedule) {
        (Err(why), Some(Schedule { turns, .. })) => Err(format!("{why} (after {turns} turns)")),
        _ => found,
    }
}
