//! The planner: from the exact load of one MoE layer in one microbatch to a plan, that is, which experts get replicas
//! on which ranks and how many tokens each instance processes (arXiv 2606.04101, sections on planning and reroute).
//!
//! What it is for: every rank of an EP group calls it with the same all-gathered counts and gets the same plan, so that
//! nothing else has to be exchanged.
//!
//! What it must never do: read a clock, the environment or a file; start a thread; log; use random numbers, hash
//! iteration, floating point (the one exception is policy `ultraep-v1`, whose published behaviour is defined in
//! 32-bit floats) or `unsafe`; allocate while solving. It is `no_std` with `alloc`.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod deal;
mod ids;
mod plan;
mod policy;
mod problem;
mod topology;

pub use deal::{Turns, dealt};
pub use ids::{Domain, Expert, PhysicalIndex, Rank};
pub use plan::{DomainOutcome, Instance, Plan, SplitRule, StopReason};
pub use policy::{PlanRules, Policy, SlotRule, SolveError};
pub use problem::{Problem, ProblemError};
pub use topology::{FULL_SPEED, MAX_EXPERTS, MAX_RANKS, MAX_SLOTS, Topology, TopologyError, TopologySpec};

/// The most tokens one problem may hold in all. Sums of loads fit `u32`, products of two sums fit `u64`.
pub const MAX_TOKENS: u32 = i32::MAX as u32;
