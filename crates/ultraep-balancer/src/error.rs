//! Errors of the balancer, and of the layers that use it.

use ultraep_fabric::stream::LayoutError;
use ultraep_fabric::{AccessError, FabricError};
use ultraep_plan::{
    AssignError, PlanViolation, PolicyRefused, ProblemError, SolveError, SplitError, TransferModelError,
};

use crate::VirtualLayer;

/// Why an operation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BalancerError {
    /// Another rank is lost, late or out of step.
    #[error(transparent)]
    Fabric(#[from] FabricError),
    /// Memory was used while an operation owned it: a bug in the caller's order of calls.
    #[error("memory in use: {0}")]
    Access(#[from] AccessError),
    /// Experts have no size, or masters are not where they should be.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The link or the size of experts is outside of what transfers can be planned for.
    #[error(transparent)]
    TransferModel(#[from] TransferModelError),
    /// A policy could not be built.
    #[error(transparent)]
    Build(#[from] PolicyRefused),
    /// A policy refused the problem.
    #[error("{at}: {source}")]
    Solve {
        /// Where.
        at: VirtualLayer,
        /// Why.
        source: SolveError,
    },
    /// The gathered counts are wrong.
    #[error("{at}: {source}")]
    Counts {
        /// Where.
        at: VirtualLayer,
        /// Why.
        source: ProblemError,
    },
    /// A split could not be made.
    #[error("{at}: {source}")]
    Split {
        /// Where.
        at: VirtualLayer,
        /// Why.
        source: SplitError,
    },
    /// Tokens could not be assigned to instances.
    #[error(transparent)]
    Assign(#[from] AssignError),
    /// The fabric's memory cannot be seen by the host, which computes here.
    #[error("this fabric's windows are not host memory; the host runtime needs them to be")]
    NotHostMemory,
    /// Checked mode: a plan breaks a rule.
    #[error("{at}: policy {policy} broke a rule: {violation}")]
    Plan {
        /// Where.
        at: VirtualLayer,
        /// Which policy.
        policy: &'static str,
        /// What is wrong.
        violation: PlanViolation,
    },
    /// Checked mode: ranks gathered different counts, or made different plans from the same.
    #[error("{at}: rank {rank} has other counts or another plan: digest {theirs:016x}, this rank has {ours:016x}")]
    DigestMismatch {
        /// Where.
        at: VirtualLayer,
        /// The rank that differs.
        rank: usize,
        /// This rank's digest.
        ours: u64,
        /// Its digest.
        theirs: u64,
    },
    /// All microbatches of the ring are in flight.
    #[error("{at}: all {max_microbatches} microbatches of layer {} are in flight; their backward must run first", at.layer)]
    RingExhausted {
        /// Where a plan was to be kept.
        at: VirtualLayer,
        /// The ring's size.
        max_microbatches: usize,
    },
    /// A forward for training in a runtime without gradients.
    #[error("{at}: this runtime was built for inference only (no microbatches between forward and backward)")]
    InferenceOnly {
        /// Where.
        at: VirtualLayer,
    },
    /// A second forward of a virtual layer: it would drop the first one's plan.
    #[error(
        "{at}: its forward has run and its backward has not; a second forward would drop the first one's plan (to run it again, replay it)"
    )]
    InFlight {
        /// Where.
        at: VirtualLayer,
    },
    /// A replay of another batch than the one that was planned for.
    #[error("{at}: the replay has {got} tokens for expert {expert}, the plan was made for {planned}")]
    ReplayDiffers {
        /// Where.
        at: VirtualLayer,
        /// The first expert that differs.
        expert: usize,
        /// Tokens of this rank that were planned for.
        planned: u32,
        /// Tokens of the replay.
        got: u32,
    },
    /// A backward or replay without a forward.
    #[error("{at}: no plan is kept here; its forward has not run or its backward already has")]
    NoPlan {
        /// Where.
        at: VirtualLayer,
    },
    /// A layer that does not exist.
    #[error("layer {layer}: this runtime has layers 0 to {}", layers - 1)]
    Layer {
        /// Asked for.
        layer: usize,
        /// How many there are.
        layers: usize,
    },
    /// A chosen expert does not exist.
    #[error("token {token} chose expert {expert}: experts are 0 to {}", experts - 1)]
    Expert {
        /// Which token.
        token: usize,
        /// What it chose.
        expert: u32,
        /// How many experts there are.
        experts: usize,
    },
    /// An id is neither an expert nor padding.
    #[error("value {at}: expert {id}; allowed are -1 (padding) and 0 to {}", experts - 1)]
    Id {
        /// Place among the ids.
        at: usize,
        /// The id.
        id: i64,
        /// How many experts there are.
        experts: usize,
    },
    /// Something was asked of a virtual layer that has been begun but not planned.
    #[error("{at}: not planned yet")]
    NotPlanned {
        /// Where.
        at: VirtualLayer,
    },
    /// A placement that is not one of this group.
    #[error("{at}: the adopted placement is refused: {reason}")]
    Placement {
        /// Where.
        at: VirtualLayer,
        /// Why.
        reason: String,
    },
    /// An input has the wrong size.
    #[error("{what}: {got} elements, expected {expected}")]
    Size {
        /// Which input.
        what: &'static str,
        /// Its size.
        got: usize,
        /// The size it should have.
        expected: usize,
    },
    /// A policy that this runtime was not built with.
    #[error("policy {0} was not among those this runtime was built with")]
    UnknownPolicy(&'static str),
}
