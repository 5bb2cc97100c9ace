//! Why a simulation was refused.

use ultraep_baselines::BuildError;
use ultraep_plan::{PlanViolation, ProblemError, SolveError, SplitError, TopologyError, TransferModelError};
use ultraep_schedule::LimitsError;

use crate::pipeline::PipelineError;

/// Why a simulation was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SimError {
    /// A number outside its limits.
    #[error("{what} {got}: allowed are {least} to {most}")]
    Range {
        /// Which number.
        what: &'static str,
        /// What it was.
        got: u64,
        /// Least allowed.
        least: u64,
        /// Most allowed.
        most: u64,
    },
    /// A list of the wrong length.
    #[error("{what}: {got} values where {expected} belong")]
    Length {
        /// Which list.
        what: &'static str,
        /// Its length.
        got: usize,
        /// What it must be.
        expected: usize,
    },
    /// The group is none.
    #[error(transparent)]
    Topology(#[from] TopologyError),
    /// The policy cannot serve the group.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The policy refused the counts.
    #[error(transparent)]
    Solve(#[from] SolveError),
    /// The counts were refused.
    #[error(transparent)]
    Problem(#[from] ProblemError),
    /// The split was refused.
    #[error(transparent)]
    Split(#[from] SplitError),
    /// A policy's plan breaks a rule: a bug of the policy.
    #[error("{policy}: the plan breaks a rule: {violation}")]
    Plan {
        /// The policy.
        policy: &'static str,
        /// The rule.
        violation: PlanViolation,
    },
    /// The fabric is none.
    #[error(transparent)]
    Transfer(#[from] TransferModelError),
    /// The scheduler refused its limits.
    #[error(transparent)]
    Limits(LimitsError),
    /// The pipeline schedule is none.
    #[error(transparent)]
    Pipeline(#[from] PipelineError),
    /// A rank has too little memory.
    #[error("does not fit: {} needed on a rank, which has {}", gigabytes(*needed_bytes), gigabytes(*have_bytes))]
    Memory {
        /// Needed.
        needed_bytes: u64,
        /// There.
        have_bytes: u64,
    },
    /// No load process has the imbalance asked for.
    #[error(
        "no load process has a mean imbalance of {target_permille} thousandths here: within reach are {least_permille} to {most_permille}"
    )]
    Fit {
        /// What was asked for.
        target_permille: u64,
        /// Least within reach.
        least_permille: u64,
        /// Most within reach.
        most_permille: u64,
    },
}

/// In words, rounded up to a tenth.
fn gigabytes(bytes: u64) -> String {
    let tenths = bytes.div_ceil(100_000_000);
    format!("{}.{} GB", tenths / 10, tenths % 10)
}

/// Refuses a number outside `least..=most`.
pub(crate) fn within(what: &'static str, got: u64, least: u64, most: u64) -> Result<(), SimError> {
    if (least..=most).contains(&got) { Ok(()) } else { Err(SimError::Range { what, got, least, most }) }
}
