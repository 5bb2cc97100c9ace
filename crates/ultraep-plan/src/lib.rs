//! The planner: from the exact load of one MoE layer in one microbatch to a plan, that is, which experts get replicas
//! on which ranks and how many tokens each instance processes (arXiv 2606.04101, sections on planning and reroute).
//!
//! What it is for: every rank of an EP group calls it with the same all-gathered counts and gets the same plan, so that
//! nothing else has to be exchanged.
//!
//! What it must never do: read a clock, the environment or a file; start a thread; log; use random numbers, hash
//! iteration, floating point (the one exception is policy `ultraep-v1`, whose published behaviour is defined in
//! 32-bit floats) or `unsafe`; allocate while solving. It is `no_std` with `alloc`; the default feature `std` only adds the run-time choice of vector
//! instructions, never other results.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(any(test, feature = "std"))]
extern crate std;

mod assign;
mod check;
mod cost;
mod deal;
mod digest;
mod draft;
mod ids;
pub mod measure;
mod plan;
mod policies;
mod policy;
mod problem;
mod ratio;
mod reroute;
mod split;
mod tally;
pub mod time;
mod topology;
mod transfer;

pub use assign::{AssignError, Cursor, NOWHERE, RouteTable};
pub use check::{PlanReport, PlanViolation, SplitReport, check_plan, check_split};
pub use cost::{Charge, HardwareModel, Overhead, Prediction, Predictor};
pub use deal::{Turns, dealt};
pub use digest::{digest_counts, digest_plan, digest_problem};
pub use ids::{Domain, Expert, PhysicalIndex, Rank};
pub use plan::{DomainOutcome, Instance, Plan, SplitRule, StopReason};
pub use policies::{Greedy, GreedyParams, Ultraep, UltraepParams, UltraepV1, UltraepV1Params, Unbalanced, V1Path};
pub use policy::{Lookback, PlanRules, Policy, PolicyFactory, PolicyRefused, SlotRule, SolveError, TokenChoice};
pub use problem::{Problem, ProblemError};
pub use ratio::{ParseRatioError, Ratio};
pub use split::{SplitError, SplitWorkspace, split_all, split_source};
pub use tally::Tally;
pub use topology::{FULL_SPEED, MAX_EXPERTS, MAX_RANKS, MAX_SLOTS, Topology, TopologyError, TopologySpec};
pub use transfer::{
    BoundTables, Choice, MAX_CHUNKS, MAX_STRIPES, ParseTransferModeError, PlannedTransfers, Stripe, SyncPlanner,
    Transfer, TransferBound, TransferClock, TransferMode, TransferModel, TransferModelError, TransferParams,
    TransferPlan, TransferPlanner, TransferTask, Transfers, TreeRule,
};

/// The most tokens one problem may hold in all. Sums of loads fit `u32`, products of two sums fit `u64`.
pub const MAX_TOKENS: u32 = i32::MAX as u32;
