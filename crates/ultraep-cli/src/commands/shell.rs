//! `ultraep completions` and `ultraep man`: what shells and `man` need, from the parser itself.

use std::io::Write;
use std::path::PathBuf;

use clap_complete::Shell;

use crate::error::CliError;
use crate::output::Output;

/// Arguments of `ultraep completions`.
#[derive(Debug, clap::Args)]
#[command(after_help = COMPLETIONS)]
pub(crate) struct CompletionsArgs {
    /// Shell to complete in: bash, elvish, fish, powershell or zsh
    #[arg(value_enum, value_name = "SHELL", hide_possible_values = true)]
    shell: Shell,
}

/// Arguments of `ultraep man`.
#[derive(Debug, clap::Args)]
#[command(after_help = MAN)]
pub(crate) struct ManArgs {
    /// Folder for the pages, one a command; made where it is not there
    #[arg(value_name = "DIR")]
    folder: PathBuf,
}

const COMPLETIONS: &str = "Examples:
  ultraep completions bash > ~/.local/share/bash-completion/completions/ultraep
  ultraep completions zsh > ~/.zfunc/_ultraep
  ultraep completions fish > ~/.config/fish/completions/ultraep.fish";

const MAN: &str = "Examples:
  ultraep man ~/.local/share/man/man1
  ultraep man . && man ./ultraep-replay.1";

pub(crate) fn completions(args: &CompletionsArgs, out: &mut Output<'_>) -> Result<(), CliError> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut crate::command(), "ultraep", &mut script);
    out.text(&script)
}

pub(crate) fn man(args: &ManArgs, out: &mut Output<'_>) -> Result<(), CliError> {
    let failed = |error: std::io::Error| CliError::Failure(format!("{}: {error}", args.folder.display()));
    std::fs::create_dir_all(&args.folder).map_err(failed)?;
    clap_mangen::generate_to(crate::command(), &args.folder).map_err(failed)?;
    writeln!(out, "{}: a page for each command, ultraep.1 for all", args.folder.display())?;
    Ok(())
}
