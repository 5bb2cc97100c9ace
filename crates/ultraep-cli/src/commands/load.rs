//! `ultraep load`: a synthetic load as a file.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;

use ultraep_load::{Format, write};

use crate::error::CliError;
use crate::input::{GroupArgs, WorkloadArgs, workload_list};

/// Arguments of `ultraep load`.
#[derive(Debug, clap::Args)]
#[command(after_help = format!("Workloads:\n{}\n{EXAMPLES}", workload_list()))]
pub(crate) struct Args {
    /// File to write: .json, .csv or .npy
    out: PathBuf,
    #[command(flatten)]
    workload: WorkloadArgs,
}

const EXAMPLES: &str = "Examples:
  ultraep load loads.csv --ratio 4
  ultraep load step3.npy --workload drift --microbatch 3 --ranks 32 --experts 128";

pub(crate) fn run(args: &Args) -> Result<(), CliError> {
    let format = Format::of(&args.out).map_err(CliError::input)?;
    // Slots do not shape a load.
    let group = GroupArgs::uniform(0, None);
    let load = args.workload.generate(&group.topology(args.workload.ranks, args.workload.experts)?)?;
    let failed = |error: std::io::Error| CliError::Failure(format!("{}: {error}", args.out.display()));
    let mut file = BufWriter::new(File::create(&args.out).map_err(failed)?);
    write(&load, format, &mut file).and_then(|()| file.flush()).map_err(failed)
}
