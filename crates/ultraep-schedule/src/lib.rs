//! Which tokens of which requests run in which batch: chunked prefill with continuous batching over the ranks of an EP
//! group, and the same in virtual time.
//!
//! * [`Scheduler`]: a bounded queue, admission by KV budget, and [`Scheduler::compose`], which fills one batch up to the
//!   chunk budget. Attention is data-parallel: a sequence lives on one rank from its first chunk to its last token.
//! * [`arrivals`] and [`Lengths`]: open-loop Poisson arrivals and prompt lengths, functions of a seed.
//! * [`simulate`]: the scheduler in virtual time under any [`BatchTime`]; [`TtftSummary`] says what came of it.
//!
//! The live server, the offline benchmark and simulators drive this one scheduler.
//!
//! What it must never do: read a clock, start a thread, do input or output, or know a model. Time is an argument, in
//! whole nanoseconds. Equal inputs give equal batches on every machine; floats are in reports only.
//!
//! ```
//! use ultraep_schedule::{Batch, Limits, Request, RequestId, Scheduler};
//!
//! let limits = Limits {
//!     ranks: 2,
//!     chunk_tokens: 512,
//!     context_per_token: 0,
//!     kv_tokens_per_rank: 4096,
//!     sequences_per_rank: 8,
//!     queue_max: 16,
//! };
//! let mut scheduler = Scheduler::new(limits)?;
//! scheduler.admit(Request { id: RequestId(7), prompt_tokens: 300, new_tokens: 1 })?;
//! let mut batch = Batch::default();
//! scheduler.compose(&mut batch); // the first 256 tokens, on rank 0: its half of the budget
//! assert_eq!(batch.of_rank(0)[0].tokens, 256);
//! scheduler.compose(&mut batch); // the other 44; the first token comes out, and that ends the request
//! assert_eq!((batch.of_rank(0)[0].produces, batch.of_rank(0)[0].ends), (Some(0), true));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

mod arrivals;
mod batch;
mod limits;
mod scheduler;
mod simulate;
mod summary;

pub use arrivals::{Arrival, ArrivalSpec, Lengths, LengthsError, arrivals};
pub use batch::{Batch, Chunk, Phase, Released};
pub use limits::{Limits, LimitsError};
pub use scheduler::{Refusal, Request, RequestId, Scheduler};
pub use simulate::{BatchTime, Served, Simulation, simulate};
pub use summary::{TtftSummary, percentile};
