//! Prefill serving with the balancer on the hot path.
//!
//! * [`Engine`]: EP ranks as threads under a supervisor, driven by [`ultraep_schedule::Scheduler`]: chunked prefill with
//!   continuous batching, every layer of every batch balanced on its exact load.
//! * [`http`]: the OpenAI-compatible edge over it.
//! * [`bench`]: the same scheduler offline, all policies over the same recorded routing, in virtual time.
//! * [`loadtest`]: open-loop load on a server, from outside.
//!
//! What it must never do: hold a lock while a rank computes, let a slow client or disk stall a batch, grow without bound
//! (queue, KV, bodies, connections and events have limits), or let a request's output depend on what ran beside it.

#![forbid(unsafe_code)]

pub mod bench;
mod engine;
mod error;
pub mod http;
pub mod loadtest;
mod metrics;
mod model;
pub mod plot;
mod rank;
mod record;

pub use engine::{
    Engine, EngineConfig, EngineHandle, Event, FinishReason, Generation, Health, Sampling, ScoredToken, SubmitError,
    Subscription,
};
pub use error::ServeError;
pub use metrics::{Format, Metrics, Outcome};
pub use model::ServedModel;
pub use rank::GroupConfig;
pub use record::{Observer, Recorder};
