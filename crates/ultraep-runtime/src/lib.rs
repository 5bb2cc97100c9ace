//! One rank's runtime: everything between the router's choice of experts and the rows that come back from them.
//!
//! * [`Manager`]: slots shared by all layers, registered masters, policies, the ring of plans kept from forward to backward
//!   (virtual layers), weight sync, grad reduce, checked mode.
//! * [`ExpertParallel`]: the whole path of one MoE layer over the manager: count, all-gather, plan, weight sync beside
//!   reroute, dispatch, grouped experts, combine; and its backward.
//! * [`VirtualClock`]: parallel time, measured on fewer cores than ranks.
//!
//! What it must never do: plan in a backward pass or a recomputation (it replays), let an optimizer see a slot, or decide
//! anything from the time: the clock is read for reports only.

#![forbid(unsafe_code)]

mod clock;
mod config;
mod endpoint;
mod exchange;
mod expert_parallel;
mod manager;
#[cfg(test)]
mod no_allocation;
mod record;

pub use clock::{Deadline, PARTS, Part, StepTime, VirtualClock};
pub use config::{Link, RuntimeConfig};
pub use endpoint::Endpoint;
pub use expert_parallel::{ExpertParallel, Pass, Recompute, Routing};
pub use manager::{LayerMasters, Manager};
pub use record::LayerRecord;
pub use ultraep_balancer::{BalancerError as RuntimeError, History, TransferConfig, VirtualLayer};
