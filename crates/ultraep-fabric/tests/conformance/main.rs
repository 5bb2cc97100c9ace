//! The conformance suite: one list of cases, run on every kind of fabric. Another backend is held to the same list.
//!
//!     cargo test -p ultraep-fabric --test conformance -- [NAME...] [--seed S] [--list]
//!
//! `STREAM_PLANS` in the environment is how many random plans each group moves (`cargo xtask streams`).
//!
//! For process groups this binary starts itself again with `--as-rank`.

mod collectives;
mod failures;
mod harness;
mod launching;
mod one_sided;
mod rules;
mod streams;

use harness::{Case, Wanted};
use std::process::ExitCode;

fn cases() -> Vec<Case> {
    let lists = [collectives::CASES, one_sided::CASES, rules::CASES, streams::CASES, failures::CASES];
    lists.into_iter().flatten().copied().collect()
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let Some(code) = harness::run_child(&arguments, &cases()) {
        return code;
    }
    if let Some(code) = launching::run_child(&arguments) {
        return code;
    }
    let wanted = Wanted::parse(&arguments);
    if wanted.list {
        cases().iter().for_each(|case| println!("{}: test", case.name));
        launching::TESTS.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    let mut tally = harness::run_cases(&cases(), &wanted);
    for (name, test) in launching::TESTS.iter().filter(|(name, _)| wanted.name(name)) {
        tally.note(&format!("processes {name}"), test());
    }
    tally.finish()
}
