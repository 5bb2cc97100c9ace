//! The commands, one file each.

mod advise;
mod bench;
mod check;
mod compare;
mod load;
mod moved;
mod pass;
mod placement;
mod plan;
mod recordings;
mod replay;
mod serving;
mod shell;
mod sim;
mod trace;
mod train;
mod view;

use std::path::Path;

use serde::{Serialize, Serializer};
use ultraep_plan::{Rank, Topology};
use ultraep_replay::{Evaluated, Evaluator, Finer, LeastQuota, quotient};

use crate::error::CliError;
use crate::output::Output;

/// What the user asked for.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Train a mixture-of-experts model with live balancing, and compare policies on the way
    Train(Box<train::Args>),
    /// Plan for one load: which experts get replicas where, and how many tokens each processes
    Plan(plan::Args),
    /// Compare all policies on the same loads
    Compare(compare::Args),
    /// Write a synthetic load to a file
    Load(load::Args),
    /// Replay a recording: what every policy would have made of its load
    Replay(Box<replay::Args>),
    /// Say what balancing is worth for a recording, on one page: slots, domain, memory, break-even
    Advise(Box<advise::Args>),
    /// Judge a placement by a load, beside what ours would be
    Check(Box<check::Args>),
    /// Simulate training and prefill on a rack, beside what was published
    Sim(sim::Args),
    /// Serve completions over HTTP: chunked prefill, every layer of every batch balanced
    Serve(Box<serving::ServeArgs>),
    /// Load a server with open-loop arrivals of real prompts, and time first tokens
    Loadtest(Box<serving::LoadTestArgs>),
    /// Compare policies on prefill under load, in virtual time over recorded routing
    PrefillBench(Box<serving::BenchArgs>),
    /// Look into recordings and convert them
    #[command(subcommand, arg_required_else_help = false)]
    Trace(trace::Trace),
    /// Show runs and recordings as pages in a browser, and follow a run at work
    View(Box<view::ViewArgs>),
    /// Write a run or recording as one HTML file that opens offline
    Report(Box<view::ReportArgs>),
    /// Measure how long planning, splitting, rerouting, weight sync and grad reduce take
    #[command(subcommand, arg_required_else_help = false)]
    Bench(bench::Bench),
    /// Print the completions of a shell
    Completions(shell::CompletionsArgs),
    /// Write the manual pages
    Man(shell::ManArgs),
    /// One rank of a training run, started by `train --fabric processes`
    #[command(hide = true)]
    Rank(train::RankArgs),
}

impl Command {
    pub(crate) fn run(&self, out: &mut Output<'_>) -> Result<(), CliError> {
        match self {
            Self::Train(args) => train::run(args, out),
            Self::Rank(args) => train::run_as_rank(args, out),
            Self::Plan(args) => plan::run(args, out),
            Self::Compare(args) => compare::run(args, out),
            Self::Load(args) => load::run(args),
            Self::Replay(args) => replay::run(args, out),
            Self::Advise(args) => advise::run(args, out),
            Self::Check(args) => check::run(args, out),
            Self::Serve(args) => serving::serve(args, out),
            Self::Loadtest(args) => serving::loadtest(args, out),
            Self::PrefillBench(args) => serving::bench(args, out),
            Self::Sim(args) => sim::run(args, out),
            Self::Trace(trace) => trace.run(out),
            Self::View(args) => view::view(args, out),
            Self::Report(args) => view::report(args, out),
            Self::Bench(bench) => bench.run(out),
            Self::Completions(args) => shell::completions(args, out),
            Self::Man(args) => shell::man(args, out),
        }
    }
}

/// Writes JSON on one line.
fn write_json(out: &mut Output<'_>, value: &impl Serialize) -> Result<(), CliError> {
    out.json(value)
}

/// A least quota, for people; `tokens` is what it came to.
fn quota_words(asked: LeastQuota, tokens: &str) -> String {
    let tokens = if tokens == "1" { "1 token".to_owned() } else { format!("{tokens} tokens") };
    match asked {
        LeastQuota::OfLoad => format!("{tokens} (auto: 1/32 of the mean load of a rank, at most 1024)"),
        LeastQuota::Tokens(_) => tokens,
    }
}

/// The largest smaller least quota that settles the microbatch planned last, else the smallest that makes it more even, in
/// words; `None` where none does.
fn finer(evaluator: &mut Evaluator, counts: &[u32], planned: &Evaluated) -> Result<Option<String>, CliError> {
    let (mut best, mut min_quota) = (None, planned.min_quota / 2);
    while min_quota >= 1 {
        let found = evaluator.finer(counts, min_quota)?;
        best = found.or(best);
        if found.is_some_and(|finer| finer.is_settled) {
            break;
        }
        min_quota /= 2;
    }
    Ok(best.map(|Finer { min_quota, imbalance, replicas, .. }| {
        format!(
            "--min-quota {min_quota} would reach an imbalance of {:.4} (replicas: {replicas}), where replicas of at least {} tokens \
             reach {:.4} (replicas: {})",
            quotient(imbalance),
            planned.min_quota,
            quotient(planned.imbalance_after),
            planned.report.replicas
        )
    }))
}

/// A file that cannot be is the user's choice; one that cannot be written is a failure.
fn write_error(path: &Path) -> impl FnOnce(std::io::Error) -> CliError {
    use std::io::ErrorKind::{AlreadyExists, InvalidInput, NotADirectory, NotFound, PermissionDenied};
    let path = path.to_owned();
    move |error| {
        let kind = error.kind();
        let words = match kind {
            AlreadyExists => format!("{}: exists: allowed is a name that is free", path.display()),
            _ => format!("{}: {error}", path.display()),
        };
        let is_choice = matches!(kind, AlreadyExists | InvalidInput | NotADirectory | NotFound | PermissionDenied);
        if is_choice { CliError::Input(words) } else { CliError::Failure(words) }
    }
}

/// One number, or one a rank where ranks differ.
#[derive(Debug)]
struct PerRank(Vec<usize>);

impl PerRank {
    fn masters(topology: &Topology) -> Self {
        Self((0..topology.ranks()).map(|r| topology.masters(Rank::new(r)).len()).collect())
    }

    fn slots(topology: &Topology) -> Self {
        Self((0..topology.ranks()).map(|r| topology.slots(Rank::new(r))).collect())
    }
}

impl Serialize for PerRank {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match &self.0[..] {
            [first, rest @ ..] if rest.iter().all(|n| n == first) => first.serialize(serializer),
            all => all.serialize(serializer),
        }
    }
}

impl std::fmt::Display for PerRank {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let range = (self.0.iter().min(), self.0.iter().max());
        match range {
            (Some(least), Some(most)) if least != most => write!(f, "{least} to {most}"),
            (most, _) => write!(f, "{}", most.copied().unwrap_or(0)),
        }
    }
}
