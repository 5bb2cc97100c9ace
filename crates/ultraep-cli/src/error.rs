//! Errors of the command: one line on stderr, one exit code.

use std::io::{self, Write};
use std::process::ExitCode;

/// Why the command ends without success.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    /// The user's input: `what: where: what is allowed`.
    #[error("{0}")]
    Input(String),
    /// Something else went wrong.
    #[error("{0}")]
    Failure(String),
    /// Writing the result failed.
    #[error("stdout: {0}")]
    Output(#[from] io::Error),
}

impl CliError {
    /// Bad input, described by a library's error.
    pub(crate) fn input(error: impl std::fmt::Display) -> Self {
        Self::Input(error.to_string())
    }

    /// A failure, described by a library's error.
    pub(crate) fn failure(error: impl std::fmt::Display) -> Self {
        Self::Failure(error.to_string())
    }

    /// Help and version are printed; everything else becomes one line.
    pub(crate) fn from_clap(error: &clap::Error) -> Result<(), Self> {
        if !error.use_stderr() {
            write!(io::stdout(), "{}", error.render())?;
            return Ok(());
        }
        let text = error.to_string();
        let mut paragraphs = text.split("\n\n").map(|p| p.split_whitespace().collect::<Vec<_>>().join(" "));
        let line = paragraphs.next().unwrap_or_default();
        let tip = paragraphs.find(|paragraph| paragraph.starts_with("tip: ")).unwrap_or_default();
        let tip = if tip.is_empty() { tip } else { format!(" ({tip})") };
        Err(Self::Input(format!("{}{tip}", line.trim_start_matches("error: "))))
    }

    /// Prints the error and gives its exit code. A reader that went away is no error.
    pub(crate) fn report(&self) -> ExitCode {
        if matches!(self, Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe) {
            return ExitCode::SUCCESS;
        }
        // Nothing can be done when stderr is gone too.
        let meant = crate::suggest::suggestion(&self.to_string());
        let meant = meant.map_or_else(String::new, |name| format!(" (did you mean {name:?}?)"));
        let _ = writeln!(io::stderr(), "error: {self}{meant}");
        match self {
            Self::Input(_) => ExitCode::from(2),
            Self::Failure(_) | Self::Output(_) => ExitCode::from(1),
        }
    }
}

impl From<ultraep_replay::EvaluateError> for CliError {
    fn from(error: ultraep_replay::EvaluateError) -> Self {
        if error.is_input() { Self::input(error) } else { Self::failure(error) }
    }
}

impl From<ultraep_replay::ReplayError> for CliError {
    fn from(error: ultraep_replay::ReplayError) -> Self {
        if error.is_input() { Self::input(error) } else { Self::failure(error) }
    }
}

impl From<serde_json::Error> for CliError {
    fn from(error: serde_json::Error) -> Self {
        match error.io_error_kind() {
            Some(kind) => Self::Output(kind.into()),
            None => Self::Failure(error.to_string()),
        }
    }
}

/// Prints a remark on stderr.
pub(crate) fn note(text: impl std::fmt::Display) {
    let _ = writeln!(io::stderr(), "note: {text}");
}
