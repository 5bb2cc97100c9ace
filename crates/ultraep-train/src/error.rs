//! Errors of training.

use std::path::PathBuf;

use ultraep_baselines::ParsePolicyError;
use ultraep_fabric::{AccessError, FabricError};
use ultraep_model::ConfigError;
use ultraep_plan::{ParseRatioError, TopologyError};
use ultraep_runtime::RuntimeError;
use ultraep_text::TextError;

/// Why a training run ended early or did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// The model's sizes do not fit together.
    #[error(transparent)]
    Model(#[from] ConfigError),
    /// The EP group is impossible.
    #[error(transparent)]
    Topology(#[from] TopologyError),
    /// No such policy.
    #[error(transparent)]
    Policy(#[from] ParsePolicyError),
    /// The target imbalance is no ratio.
    #[error("target imbalance {beta:?}: {error}")]
    Beta {
        /// As given.
        beta: String,
        /// What is wrong with it.
        error: ParseRatioError,
    },
    /// A target below perfect balance.
    #[error("target imbalance {0}: the largest rank load cannot be below the mean; allowed is 1 and more")]
    BetaBelowOne(String),
    /// The bandwidth is no positive number.
    #[error("link of {0} Gbit/s: it must be a positive number")]
    Link(f64),
    /// Something that must be at least 1 is 0.
    #[error("{0} is 0; it must be at least 1")]
    Zero(&'static str),
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
    /// The tensor library would use threads of its own.
    #[error("the tensor library would use {threads} threads: set {} to 1", crate::TENSOR_THREADS.join(" and "))]
    TensorThreads {
        /// How many.
        threads: usize,
    },
    /// Loss or gradient is not a finite number any more.
    #[error("step {step}: the {what} is {value}; try a smaller learning rate")]
    Diverged {
        /// Which step.
        step: u64,
        /// Loss or norm of the gradient.
        what: &'static str,
        /// Its value.
        value: f32,
    },
    /// A setting is no number, or not in its range.
    #[error("{what} of {value}: it must be a finite number, {least}")]
    Number {
        /// Which.
        what: &'static str,
        /// As given.
        value: f32,
        /// What is the least.
        least: &'static str,
    },
    /// A run that no machine could hold.
    #[error("{what}: {got} asked for, at most {limit} possible")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// How large it is.
        got: u128,
        /// How large it may be.
        limit: u128,
    },
    /// Ranks do not agree on a value that must be the same.
    #[error("{what}: policy {policy} gives {got}, {reference} gave {expected}; outputs must not depend on the policy")]
    Differs {
        /// What.
        what: &'static str,
        /// The policy that differs.
        policy: &'static str,
        /// Its value.
        got: f32,
        /// The policy compared with.
        reference: &'static str,
        /// Its value.
        expected: f32,
    },
    /// A file could not be read or written.
    #[error("{action} {}: {error}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        error: std::io::Error,
    },
    /// A checkpoint is damaged or belongs to something else.
    #[error("checkpoint {}: {reason}", path.display())]
    Checkpoint {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The text that a run keeps cannot be read, or is not what it was.
    #[error("{}: {reason}", path.display())]
    PinnedText {
        /// The file of the run.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The run folder could not be written.
    #[error(transparent)]
    Run(#[from] ultraep_run::RunError),
    /// A value could not be encoded.
    #[error("encode: {0}")]
    Encode(String),
}

impl TrainError {
    pub(crate) fn file(action: &'static str, path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |error| Self::File { action, path, error }
    }
}
