//! Errors of serving.

use ultraep_baselines::BuildError;
use ultraep_fabric::{AccessError, FabricError};
use ultraep_plan::TopologyError;
use ultraep_run::RunError;
use ultraep_runtime::RuntimeError;
use ultraep_schedule::{LimitsError, Refusal};
use ultraep_text::TextError;
use ultraep_train::TrainError;

/// Why serving or a measurement did not start, or ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The checkpoint or its model does not serve.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// The EP group is impossible.
    #[error(transparent)]
    Topology(#[from] TopologyError),
    /// A policy cannot serve this group.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// Bounds do not fit together.
    #[error(transparent)]
    Limits(#[from] LimitsError),
    /// The text does not serve.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The runtime failed.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The fabric failed.
    #[error(transparent)]
    Fabric(#[from] FabricError),
    /// Memory was used while an operation owned it.
    #[error("memory in use: {0}")]
    Access(#[from] AccessError),
    /// The tensor library failed.
    #[error("tensor library: {0}")]
    Tensor(#[from] candle_core::Error),
    /// A request cannot be admitted.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// A run folder could not be written.
    #[error(transparent)]
    Run(#[from] RunError),
    /// A policy that changes the model's outputs.
    #[error("policy {0} forces the routing, so its outputs mean nothing; it cannot serve")]
    ForcedRouting(&'static str),
    /// A context longer than the KV budget could hold, or than text can be.
    #[error("a context of {got} tokens: allowed are 1 to {limit}")]
    Context {
        /// Asked for.
        got: usize,
        /// Most.
        limit: usize,
    },
    /// A rank ended although it was not told to.
    #[error("the ranks ended: {0}")]
    Ranks(String),
    /// A setting outside what is allowed.
    #[error("{0}")]
    Setting(String),
    /// A file of this program's own could not be read or written, or a socket not used.
    #[error("{what}: {error}")]
    Io {
        /// What was tried, with the path or address.
        what: String,
        /// Why it failed.
        error: std::io::Error,
    },
    /// A plot could not be drawn.
    #[error("plot: {0}")]
    Plot(String),
}

impl ServeError {
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |error| Self::Io { what, error }
    }
}
