//! The commands, one file each.

mod bench;
mod compare;
mod load;
mod plan;

use std::io::Write;

use crate::error::CliError;

/// What the user asked for.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Plan for one load: which experts get replicas where, and how many tokens each processes
    Plan(plan::Args),
    /// Compare all policies on the same loads
    Compare(compare::Args),
    /// Write a synthetic load to a file
    Load(load::Args),
    /// Measure how long planning, splitting and rerouting take
    #[command(subcommand, arg_required_else_help = false)]
    Bench(bench::Bench),
}

impl Command {
    pub(crate) fn run(&self, out: &mut dyn Write) -> Result<(), CliError> {
        match self {
            Self::Plan(args) => plan::run(args, out),
            Self::Compare(args) => compare::run(args, out),
            Self::Load(args) => load::run(args),
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
