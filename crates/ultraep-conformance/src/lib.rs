//! The conformance suite of fabrics: one list of cases that every backend of [`ultraep_fabric::Fabric`] must pass.
//!
//! What it is for: a backend, of whatever crate, is right when its test binary hands a [`Launcher`] to [`main`] and the cases pass.
//! They cover collectives and their bits, windows, one-sided operations, signals, core permits, what must be refused, tile streams of
//! random plans, and ranks that die, hang, leave early or disagree.
//!
//! What it must never do: depend on how a group is started, or on anything of a backend that [`Fabric`] does not say. A
//! case is skipped, aloud and counted, only where it needs core permits or sends and receives that a fabric does not have
//! ([`Capabilities`](ultraep_fabric::Capabilities); one without direct access needs the latter), or where its launcher cannot make it happen: a rank that is killed needs
//! to be a process, a rank that hangs needs real time.
//!
//! # Use
//! ```no_run
//! use std::process::ExitCode;
//! use ultraep_conformance::{Ended, Launcher, Nature, Run};
//! use ultraep_fabric::{Capabilities, run_threads};
//!
//! struct Threads;
//!
//! impl Launcher for Threads {
//!     fn name(&self) -> String {
//!         "threads".to_owned()
//!     }
//!     fn nature(&self) -> Nature {
//!         Nature { own_processes: false, real_time: true }
//!     }
//!     fn capabilities(&self) -> Capabilities {
//!         Capabilities { direct: true, point_to_point: false, core_permits: true, stamps: true }
//!     }
//!     fn run(&self, run: &Run) -> Result<Ended, String> {
//!         Ok(run.in_this_process(|spec, main| run_threads(spec, main)))
//!     }
//! }
//!
//! fn main() -> ExitCode {
//!     ultraep_conformance::main(&[&Threads], "cargo test -p my-fabric --test conformance --", &[])
//! }
//! ```
//! A fabric without a supervisor runs its ranks with [`Run::on_threads`] or [`Run::on_processes`]; what the ranks saw is then what the
//! group says.
//!
//! `STREAM_PLANS` in the environment is how many random plans each group moves (`cargo xtask streams`).
//!
//! [`Fabric`]: ultraep_fabric::Fabric

mod case;
mod collectives;
mod failures;
mod launch;
mod leftovers;
mod one_sided;
mod point_to_point;
mod recorder;
mod rules;
mod runner;
mod streams;

pub use case::{Case, Ending, Need, Report};
pub use launch::{Ended, Launcher, Nature, RankMain, Run};
pub use leftovers::Leftovers;
pub use runner::{Test, main};

/// Every case, in the order in which they run.
#[must_use]
pub fn cases() -> Vec<Case> {
    let lists =
        [collectives::CASES, one_sided::CASES, point_to_point::CASES, rules::CASES, streams::CASES, failures::CASES];
    lists.into_iter().flatten().copied().collect()
}
