//! A mixture-of-experts transformer language model over bytes, on candle.
//!
//! [`MoeLayer`] is the part that another candle model would use: it takes a batch of hidden states, routes it, and runs the
//! experts expert-parallel through [`ultraep_runtime::ExpertParallel`], with a backward of its own. [`Transformer`] is a model
//! around it: embedding, causal attention with rotary positions, RMS norms, a head.
//!
//! What it must never do: know which policy balances it (its outputs must not depend on that), own an optimizer, or hold
//! expert weights in tensors: masters live in the memory registered with the runtime.

#![forbid(unsafe_code)]

mod config;
mod infer;
mod init;
mod moe;
mod ops;
mod router;
mod transformer;

pub use config::{ConfigError, ModelConfig, RouterKind};
pub use infer::{ChunkError, Inferred, SequenceCache, SequenceChunk, Wanted};
pub use init::{ExpertParameters, Parameter, Parameters};
pub use moe::{MoeLayer, SharedExperts};
pub use router::Router;
pub use transformer::{Losses, Transformer};

/// Byte-level tokens.
pub const VOCABULARY: usize = 256;
