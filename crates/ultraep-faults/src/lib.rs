//! Ranks that fail on purpose, and what the others make of it.
//!
//! What it is for: showing that a rank that stops between any two operations of the runtime leaves every other rank with an
//! error that names it, and that no order of events changes a bit of the result. The real runtime ([`Scenario`] drives
//! `ExpertParallel` over several layers and microbatches) runs on threads, on processes and on the simulated fabric.
//!
//! * [`FaultyEndpoint`] wraps any fabric and strikes its rank at one operation.
//! * [`enumerate`](enumerate::fault_points) lists every (rank, operation, kind) of a scenario; [`run`] runs it with one of
//!   them; [`Ending::check`] judges.
//! * [`seeds`] draws schedules and faults from seeds.
//!
//! What it must never do: be depended on by anything that runs in production; decide anything from the time.

#![forbid(unsafe_code)]

mod ending;
pub mod enumerate;
mod fault_text;
mod faulty;
mod ground;
pub mod leftovers;
mod scenario;
pub mod seeds;

pub use ending::{Ending, RankEnd};
pub use fault_text::{BadFault, FaultText};
pub use faulty::{Bystanders, FaultyEndpoint};
pub use ground::{Ground, JOIN_FLAG, RunError, rank_process, run, run_and_kill};
pub use scenario::{Profile, Scenario};
