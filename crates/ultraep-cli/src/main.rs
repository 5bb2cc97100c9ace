//! The `ultraep` command: parses arguments, dispatches, and turns every error into one line and an exit code.
//!
//! What it is for: the only place that reads the command line. Each command has a file under `commands`.
//!
//! What it must never do: compute anything that a library could, or print logs on stdout (results only; everything else
//! goes to stderr).

#![forbid(unsafe_code)]

mod commands;
mod error;
mod input;
mod options;
mod output;
mod picture;
mod shell_word;
mod suggest;
mod svg;
mod table;
mod timing;

use std::io::{self, BufWriter, Write};
use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use commands::Command;
use error::CliError;
use output::{Output, TableFormat};

/// Balance the experts of mixture-of-experts models from the exact load, in real time.
#[derive(Debug, Parser)]
#[command(name = "ultraep", version, max_term_width = 100, arg_required_else_help = false, after_help = EXIT_CODES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
    /// How tables are written: table, csv (nothing else on standard output, plain numbers) or md
    #[arg(
        long = "format",
        global = true,
        value_enum,
        default_value_t,
        value_name = "FORMAT",
        hide_possible_values = true
    )]
    tables: TableFormat,
}

const EXIT_CODES: &str = "Exit codes: 0 success, 1 failure, 2 usage or bad input.";

/// The parser, for completions and manual pages.
pub(crate) fn command() -> clap::Command {
    Cli::command()
}

fn main() -> ExitCode {
    let result = match Cli::try_parse() {
        Ok(cli) => run(&cli),
        Err(error) => CliError::from_clap(&error),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => error.report(),
    }
}

fn run(cli: &Cli) -> Result<(), CliError> {
    let mut stdout = BufWriter::new(io::stdout().lock());
    cli.command.run(&mut Output::new(&mut stdout, cli.tables, output::terminal_width()))?;
    stdout.flush()?;
    Ok(())
}
