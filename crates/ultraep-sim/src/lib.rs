//! The simulator: what a training step or a prefill batch of a mixture-of-experts model takes on a rack, under each policy.
//!
//! What it is for: answers for people who do not have the rack. The planner and the transfer planner are the project's own,
//! run on generated or recorded counts; only the machine is a model. Time is integer picoseconds; equal inputs give equal
//! results and one digest, on every machine.
//!
//! ```text
//! LoadProcess ─► counts [N, E] ─► Balancer (real policy, split, transfer planner) ─► LayerLoad
//!     LayerLoad ─► Fidelity: closed form | events ─► LayerTimes ─► pipeline ─► StepReport
//!               └► the scheduler's batches (closed form)                   ─► PrefillReport
//! ```
//!
//! Two fidelities stand behind one trait, [`LayerModel`]: [`ClosedForm`] takes the largest of each part over ranks,
//! [`EventLevel`] moves chunks over links that ranks share. They agree within 5% (`tests/fidelity.rs`).
//!
//! What it must never do: read a clock, the environment or a file; start a thread; print; let a float decide (floats are in
//! [`calibrate`] and in reports). A bad description is a typed error, never a panic.

#![forbid(unsafe_code)]

mod balancer;
pub mod calibrate;
mod closed;
mod error;
mod event;
mod fit;
mod footprint;
mod layer;
mod machine;
mod memory;
mod model;
mod pipeline;
mod prefill;
mod process;
mod queue;
mod random;
mod recorded;
mod recovery;
mod report;
mod runner;
mod span;
mod step;

pub use balancer::{Balancer, LayerLoad, SyncRule, System};
pub use closed::ClosedForm;
pub use error::SimError;
pub use event::EventLevel;
pub use fit::{Fit, FitTarget, fit_process};
pub use footprint::Footprint;
pub use layer::{Batch, Direction, Fidelity, LayerModel, LayerTimes, LayerWork, PassWork};
pub use machine::{Calibrated, Machine};
pub use memory::{ActivationPeaks, activation_peaks};
pub use model::{Attention, Latent, ModelSpec, bounded};
pub use pipeline::{Op, Pipeline, PipelineError, Schedule, Timeline};
pub use prefill::{PrefillReport, PrefillSpec, simulate_prefill};
pub use process::{LoadProcess, ProcessParams};
pub use queue::EventQueue;
pub use recorded::RecordedLoads;
pub use recovery::recovery_ps;
pub use report::{StepReport, SystemReport};
pub use span::{Span, Stream};
pub use step::{Jitter, Mistake, Recompute, StepSpec, simulate_step};
