//! Why something cannot be viewed.

use std::path::PathBuf;

use ultraep_import::{ImportError, WriteUetError};
use ultraep_plan::TopologyError;
use ultraep_replay::{AnatomyError, EvaluateError, HardwareError, ReplanError};
use ultraep_run::RunError;
use ultraep_trace::TraceError;

/// Why something cannot be viewed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ViewError {
    /// A recording that cannot be read.
    #[error(transparent)]
    Import(#[from] ImportError),
    /// A recording of which no trace for this group can be made.
    #[error("{path}: {source}")]
    Convert {
        /// Which.
        path: PathBuf,
        /// Why.
        source: Box<WriteUetError>,
    },
    /// A trace that cannot be read.
    #[error("{path}: {source}")]
    Trace {
        /// Which.
        path: PathBuf,
        /// Why.
        source: TraceError,
    },
    /// A run folder that cannot be read.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The system refused.
    #[error("{path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// What it said.
        source: std::io::Error,
    },
    /// A group that cannot be.
    #[error(
        "{path}: {source}; valid for {experts} experts are 1 to {experts} ranks, best those that divide them: {divisors}"
    )]
    Group {
        /// Which recording.
        path: PathBuf,
        /// Why.
        source: TopologyError,
        /// `E`.
        experts: usize,
        /// Rank counts that give all ranks equally many masters.
        divisors: String,
    },
    /// A recording without any load.
    #[error("{path}: nothing is recorded in it")]
    Empty {
        /// Which.
        path: PathBuf,
    },
    /// Masters that lie otherwise than a group of ours has them, so that nothing can be planned.
    #[error("{path}: masters lie on ranks as {got:?}; groups of ours have {expected:?}")]
    Masters {
        /// Which trace.
        path: PathBuf,
        /// As recorded, the beginning.
        got: Vec<u32>,
        /// As a group of ours has them, the beginning.
        expected: Vec<u32>,
    },
    /// A setting that cannot be, from the command line or a request.
    #[error("{what} {got:?}: allowed are {allowed}")]
    Setting {
        /// Which.
        what: &'static str,
        /// As given.
        got: String,
        /// What is possible.
        allowed: String,
    },
    /// A group that a request asks for.
    #[error(transparent)]
    Topology(#[from] TopologyError),
    /// A hardware file.
    #[error(transparent)]
    Hardware(#[from] HardwareError),
    /// A microbatch that the policy refuses.
    #[error(transparent)]
    Evaluate(#[from] EvaluateError),
    /// A microbatch that could not be planned anew.
    #[error(transparent)]
    Replan(#[from] ReplanError),
    /// A plan of which no picture can be made.
    #[error(transparent)]
    Anatomy(#[from] AnatomyError),
    /// Something that the recording does not have.
    #[error("no {what}: {known}")]
    NotFound {
        /// What was asked for.
        what: String,
        /// What there is.
        known: String,
    },
}

impl ViewError {
    /// Whether the input is at fault, rather than the program or the system.
    pub fn is_input(&self) -> bool {
        match self {
            Self::Io { .. } => false,
            Self::Convert { source, .. } => !matches!(**source, WriteUetError::Write(_)),
            Self::Evaluate(error) => error.is_input(),
            Self::Replan(error) => error.is_input(),
            _ => true,
        }
    }
}
