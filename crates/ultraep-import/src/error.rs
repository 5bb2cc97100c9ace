//! Why a recording was refused: which file, where in it, what was found and what is allowed.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use ultraep_plan::MAX_EXPERTS;
use ultraep_run::RunError;
use ultraep_trace::TraceError;

/// Why a recording could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImportError {
    /// The system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// No known recording.
    #[error("{}: {reason}", path.display())]
    Unknown {
        /// The file or folder.
        path: PathBuf,
        /// What it looks like, and what is known.
        reason: String,
    },
    /// The contents were refused.
    #[error("{}: {place}: {problem}", path.display())]
    Contents {
        /// The file.
        path: PathBuf,
        /// Where in it.
        place: Place,
        /// What is wrong.
        problem: Problem,
    },
    /// Our own trace was refused.
    #[error("{}: {source}", path.display())]
    Trace {
        /// The file.
        path: PathBuf,
        /// Why.
        source: TraceError,
    },
    /// A run folder was refused.
    #[error(transparent)]
    Run(#[from] RunError),
}

/// Where in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Place {
    /// The file as a whole.
    File,
    /// A line, from 1.
    Line(u64),
    /// A row of a table, from 0.
    Row(u64),
    /// A byte, from 0.
    Byte(u64),
    /// A key, an entry of an archive, an array.
    Key(String),
    /// A number of an array, from 0.
    Index(Vec<u64>),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File => f.write_str("the file"),
            Self::Line(line) => write!(f, "line {line}"),
            Self::Row(row) => write!(f, "row {row} (from 0)"),
            Self::Byte(byte) => write!(f, "byte {byte}"),
            Self::Key(key) => write!(f, "{key:?}"),
            Self::Index(index) => write!(f, "{index:?} (from 0)"),
        }
    }
}

/// What is wrong at a place.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// Not well-formed.
    #[error("{0}")]
    Syntax(String),
    /// An expert beyond the layer's, or beyond the limit.
    #[error("expert {got}: allowed are 0 to {}", most - 1)]
    Expert {
        /// As read.
        got: i64,
        /// Experts there are, or the limit.
        most: usize,
    },
    /// Something that is no count.
    #[error("{got} is no count of tokens: allowed are whole numbers from 0 to 2147483647")]
    Count {
        /// As read.
        got: String,
    },
    /// A size over its limit, refused before memory was taken for it.
    #[error("{what} {got}: allowed are up to {max}")]
    Limit {
        /// Of what.
        what: &'static str,
        /// As read.
        got: u64,
        /// The limit.
        max: u64,
    },
    /// A value that must be another.
    #[error("{what} {got}: expected {expected}")]
    Differs {
        /// Which value.
        what: &'static str,
        /// As read.
        got: String,
        /// What other places say.
        expected: String,
    },
    /// Something that has to be there and is not.
    #[error("no {0}")]
    Missing(String),
    /// Known, and not supported.
    #[error("{0}")]
    Unsupported(String),
    /// What content cannot tell: the words name the option that decides.
    #[error("{0}")]
    Ambiguous(String),
    /// Where experts are, not how many tokens they got.
    #[error("a placement map ({0}), not loads: ultraep check MAP --load LOADS judges it")]
    Placement(String),
    /// Numbers that a small float cannot hold exactly.
    #[error("{0}: counts must be exact; --as counts takes them as they are")]
    Rounded(String),
    /// A pickle that names a class or function outside the allow-list. Nothing was executed.
    #[error("the pickle calls {0}, which is not on the list of what may be in a recording; nothing was executed")]
    PickleCall(String),
    /// A path that would leave the recording's folder.
    #[error("the path {0:?} leaves the recording's folder")]
    Path(String),
}

impl Problem {
    pub(crate) fn syntax(error: impl fmt::Display) -> Self {
        // Parsers quote their input: keep a message to a line that a screen can show.
        Self::Syntax(error.to_string().chars().take(300).collect())
    }

    pub(crate) fn differs(what: &'static str, got: impl fmt::Display, expected: impl fmt::Display) -> Self {
        Self::Differs { what, got: got.to_string(), expected: expected.to_string() }
    }

    pub(crate) fn at(self, path: &Path, place: Place) -> ImportError {
        ImportError::Contents { path: path.to_owned(), place, problem: self }
    }
}

impl ImportError {
    /// The same error with another name for the file.
    pub(crate) fn renamed(self, name: impl FnOnce(PathBuf) -> PathBuf) -> Self {
        match self {
            Self::Io { path, source } => Self::Io { path: name(path), source },
            Self::Unknown { path, reason } => Self::Unknown { path: name(path), reason },
            Self::Contents { path, place, problem } => Self::Contents { path: name(path), place, problem },
            Self::Trace { path, source } => Self::Trace { path: name(path), source },
            other @ Self::Run(_) => other,
        }
    }

    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }
}

/// An expert id below `experts`, where their number is known.
pub(crate) fn expert_below(got: i64, experts: Option<usize>) -> Result<u16, Problem> {
    let most = experts.unwrap_or(MAX_EXPERTS).min(MAX_EXPERTS);
    match u16::try_from(got) {
        Ok(id) if usize::from(id) < most => Ok(id),
        _ => Err(Problem::Expert { got, most }),
    }
}

/// An expert id as the planner can hold it.
pub(crate) fn expert_id(got: i64) -> Result<u16, Problem> {
    expert_below(got, None)
}

/// A layer as a trace can hold it.
pub(crate) fn layer_id(got: u64) -> Result<u32, Problem> {
    let max = ultraep_trace::MAX_LAYERS as u64 - 1;
    if got <= max { Ok(got as u32) } else { Err(Problem::Limit { what: "layer", got, max }) }
}

/// A count as the planner can hold it.
pub(crate) fn count(got: i128) -> Result<u32, Problem> {
    match u32::try_from(got) {
        Ok(count) if count <= ultraep_plan::MAX_TOKENS => Ok(count),
        _ => Err(Problem::Count { got: got.to_string() }),
    }
}
