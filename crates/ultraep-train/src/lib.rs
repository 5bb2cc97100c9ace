//! Training a small MoE transformer with live balancing.
//!
//! [`run_rank`] is one rank's whole part: it builds the model over an endpoint of a fabric, trains, compares policies on the
//! batches at hand, trains a second time without balancing as a reference, and saves. Rank 0 tells an [`Observer`] what
//! happens; [`RunFolder`] is the observer that writes the run folder.
//!
//! What it must never do: print, read the environment, or decide anything from the time. The fabric, the text and the
//! wish to stop come in as arguments.

#![forbid(unsafe_code)]

mod checkpoint;
mod config;
mod error;
mod folder;
mod optimizer;
mod pinned;
mod rank;
mod report;
mod resume;
mod weights;
mod worker;

pub use checkpoint::{CheckpointInfo, find_checkpoint};
pub use config::{RouterChoice, TrainConfig};
pub use error::TrainError;
pub use folder::{BalanceCount, RunFolder, Summary, fill_record};
pub use pinned::{TEXT_COPY_BYTES_MAX, pin_text, pinned_text};
pub use rank::{Outcome, RankJob, run_rank};
pub use report::{Comparison, Observer, Phase, Silent, StepReport};
pub use resume::{Origin, Place};
pub use weights::Weights;

/// Environment variables, each to be set to `1` before the process starts, that keep the tensor library on the rank's
/// thread.
pub const TENSOR_THREADS: [&str; 2] = ["RAYON_NUM_THREADS", "CANDLE_NUM_THREADS"];
