//! The commands, one file each.

mod bench;
mod compare;
mod plan;
mod recordings;
mod replay;
mod trace;
mod train;

use std::io::Write;

use crate::error::CliError;

/// What the user asked for.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Train a mixture-of-experts model with live balancing, and compare policies on the way
    Train(Box<train::Args>),
    /// Plan for one load: which experts get replicas where, and how many tokens each processes
    Plan(plan::Args),
    /// Compare all policies on the same loads
    Compare(compare::Args),
    /// Replay a recording: what every policy would have made of its load
    Replay(Box<replay::Args>),
    /// Look into recordings and convert them
    #[command(subcommand, arg_required_else_help = false)]
    Trace(trace::Trace),
    /// Measure how long planning, splitting and rerouting take
    #[command(subcommand, arg_required_else_help = false)]
    Bench(bench::Bench),
    /// One rank of a training run, started by `train --fabric processes`
    #[command(hide = true)]
    Rank(train::RankArgs),
}

impl Command {
    pub(crate) fn run(&self, out: &mut dyn Write) -> Result<(), CliError> {
        match self {
            Self::Train(args) => train::run(args, out),
            Self::Rank(args) => train::run_as_rank(args, out),
            Self::Plan(args) => plan::run(args, out),
            Self::Compare(args) => compare::run(args, out),
            Self::Replay(args) => replay::run(args, out),
            Self::Trace(trace) => trace.run(out),
            Self::Bench(bench) => bench.run(out),
        }
    }
}

/// Writes JSON on one line.
fn write_json(out: &mut dyn Write, value: &impl serde::Serialize) -> Result<(), CliError> {
    serde_json::to_writer(&mut *out, value)?;
    writeln!(out)?;
    Ok(())
}
