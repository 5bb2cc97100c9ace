//! Real text as domains, and deterministic byte-level batches.
//!
//! What it is for: a training run needs real text whose kind changes, because expert load shifts between domains of
//! input (source code, prose, markup, data). [`Corpus::from_paths`] reads what the user names; [`Corpus::discover`] reads
//! what a machine with a Rust toolchain has: the crates that cargo unpacked for this build, the toolchain's
//! documentation, the project's own files. [`Sampler`] cuts batches from a corpus: a stateless function of (seed,
//! position), so that resuming needs no sampler state and every rank can compute its own batch. Its module documents the
//! schedule by which the mixture of domains rotates.
//!
//! What it must never do: read a clock or the environment (roots come in as arguments); use the network; follow a
//! symbolic link while walking a folder; write a file; use floating point or hash iteration. The same files give the
//! same corpus, in the same order, on every machine.
//!
//! ```
//! use std::sync::Arc;
//! use ultraep_text::{BatchPosition, Corpus, Sampler, SamplerSpec, TextDomain};
//!
//! let text = TextDomain { name: "text".into(), bytes: b"one line of text\n".repeat(20), files: 1, origin: "a test".into() };
//! let corpus = Arc::new(Corpus { domains: vec![text], ..Corpus::default() });
//! let sampler = Sampler::new(corpus, SamplerSpec { sequence_tokens: 32, seed: 7, ..SamplerSpec::default() })?;
//! let position = BatchPosition { step: 0, microbatch: 0, rank: 3 };
//! let batch = sampler.batch(position, 4); // [4, 32 + 1] bytes
//! assert_eq!(batch.len(), 4 * 33);
//! assert_eq!(batch, sampler.batch(position, 4));
//! # Ok::<(), ultraep_text::TextError>(())
//! ```
#![forbid(unsafe_code)]

mod corpus;
mod discover;
mod error;
mod gather;
mod kind;
mod mix;
mod mixture;
mod sampler;
mod snapshot;
mod walk;

pub use corpus::{Corpus, Limits, Skipped, TextDomain, TextSource};
pub use discover::Discovery;
pub use error::TextError;
pub use mixture::{DEFAULT_TURN_STEPS, Mixture};
pub use sampler::{BatchPosition, MAX_SEQUENCE_TOKENS, Sampler, SamplerSpec};
