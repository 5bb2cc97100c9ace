//! The balancer: what a training or serving stack calls between its router and its experts.
//!
//! ```text
//! Balancer::new        masters stay in the caller's memory; slots for replicas in two windows of the fabric
//! begin(layer)         a place in the ring of virtual layers
//! count(at, ids)       tokens of this rank for every expert, from ids or a map
//! plan(at)             gathers the counts of all ranks; every rank makes the same plan   (or `adopt` one, or `replay`)
//! sync_weights(at)     replicas get their weights, while the caller computes             -> Pending
//! reroute(at, ids)     logical experts -> physical experts
//!   ... the caller dispatches rows, runs its experts, combines ...
//! reduce_grads(at)     replicas' gradients are added to their masters'                   -> Pending
//! release(at)          the plan is forgotten
//! ```
//!
//! What it is for: everything of the system that does not depend on how a stack routes, dispatches or multiplies. It has no clock, no
//! dispatch, no GEMM, and no opinion on who made the group: the fabric is whatever a [`Plane`] gives.
//!
//! What it must never do: plan in a backward pass or a recomputation (it replays), let an optimizer see a slot, move a master, or
//! start or wait for anything in another order than the other ranks.
//!
//! # Rules for callers
//! * Every rank calls `plan`, `adopt`, `sync_weights` and `reduce_grads` for the same virtual layers in the same order. `wait` is a
//!   rank's own business: one that receives nothing need never call it (with background workers).
//! * A rank's weights may change when [`Balancer::drain`] has returned, not before: a sync may still be reading them.
//! * Slots are shared by all layers: what a layer put there is gone when the next one syncs.

#![forbid(unsafe_code)]

mod adopt;
mod balancer;
mod config;
mod core;
mod count;
mod error;
mod observed;
mod plane;
mod ring;

pub use adopt::Quotas;
pub use balancer::{Balancer, LayerMasters, Pending};
pub use config::{BalancerConfig, Release, TransferConfig};
pub use core::{History, Planned};
pub use count::{TokenId, count_ids, count_map};
pub use error::BalancerError;
pub use plane::Plane;
pub use ring::VirtualLayer;
