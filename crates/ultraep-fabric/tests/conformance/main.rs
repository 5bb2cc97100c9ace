//! The conformance suite of `ultraep-conformance` on every fabric of this crate.
//!
//!     cargo test -p ultraep-fabric --test conformance -- [NAME...] [--seed S] [--list]
//!
//! For process groups this binary starts itself again with `--as-rank`.

mod launchers;
mod launching;

use launchers::{Attached, Processes, Simulated, Threads};
use std::process::ExitCode;

const AGAIN: &str = "cargo test -p ultraep-fabric --test conformance --";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let Some(code) = launchers::run_child(&arguments).or_else(|| launching::run_child(&arguments)) {
        return code;
    }
    // Two schedules for each case.
    ultraep_conformance::main(&[&Threads, &Processes, &Attached, &Simulated(0), &Simulated(1)], AGAIN, launching::TESTS)
}
