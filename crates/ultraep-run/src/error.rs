//! Why a run folder could not be written or read.

use std::io;
use std::path::PathBuf;

use ultraep_trace::TraceError;

/// Why a run folder could not be written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// The folder of a new run is there already.
    #[error("{}: exists already; a run never writes into another's folder", path.display())]
    Exists {
        /// The folder.
        path: PathBuf,
    },
    /// Another process writes this run.
    #[error("{}: another process is writing this run", path.display())]
    Busy {
        /// The folder.
        path: PathBuf,
    },
    /// No run folder: it has no `run.json`.
    #[error("{}: no run folder (it has no run.json)", path.display())]
    NotARun {
        /// The folder.
        path: PathBuf,
    },
    /// A file of another format or version.
    #[error("{}: schema {got:?}; this reader knows {expected:?}", path.display())]
    Schema {
        /// The file.
        path: PathBuf,
        /// As read.
        got: String,
        /// What it should be.
        expected: &'static str,
    },
    /// The system refused to write. What was saved before is still there.
    #[error("{}: cannot be written: {source}; {kept}", path.display())]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// What is still there, in words.
        kept: String,
        /// What the system said.
        source: io::Error,
    },
    /// The system refused to read.
    #[error("{}: cannot be read: {source}", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file or line larger than its limit.
    #[error("{}: {what} of more than {max_bytes} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// `a file`, `a line`.
        what: &'static str,
        /// The limit.
        max_bytes: u64,
    },
    /// JSON that is not what it should be.
    #[error("{}{}: {reason}", path.display(), line.map(|l| format!(" line {l}")).unwrap_or_default())]
    Json {
        /// The file.
        path: PathBuf,
        /// Line of a file of lines, from 1.
        line: Option<u64>,
        /// What is wrong.
        reason: String,
    },
    /// The trace could not be written or read.
    #[error("{}: {source}", path.display())]
    Trace {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: TraceError,
    },
}

impl RunError {
    pub(crate) fn read(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Read { path, source }
    }

    pub(crate) fn write(path: impl Into<PathBuf>, kept: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let (path, kept) = (path.into(), kept.into());
        move |source| Self::Write { path, kept, source }
    }
}
