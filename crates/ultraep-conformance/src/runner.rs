//! Runs the cases on each launcher, and counts.

use crate::case::{Case, Ending, ensure};
use crate::cases;
use crate::launch::{Launcher, Run};
use crate::leftovers::Leftovers;
use std::collections::HashMap;
use std::process::ExitCode;
use std::time::Instant;

/// A test beside the cases: its name, and what to run.
pub type Test = (&'static str, fn() -> Result<(), String>);

/// The main function of a backend's test binary: runs the cases on each of the `launchers`, then the `tests`, as the arguments of the
/// process say (`[NAME...] [--seed S] [--list]`). `again` is the command that runs this binary, for the lines of cases that fail.
#[must_use]
pub fn main(launchers: &[&dyn Launcher], again: &str, tests: &[Test]) -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let wanted = Wanted::parse(&arguments);
    if wanted.list {
        cases().iter().for_each(|case| println!("{}: test", case.name));
        tests.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    let mut tally = Tally::default();
    let mut earlier = HashMap::new();
    for launcher in launchers {
        run_cases(*launcher, &wanted, again, &mut tally, &mut earlier);
    }
    for (name, test) in tests.iter().filter(|(name, _)| wanted.name(name)) {
        tally.note(name, test());
    }
    tally.finish()
}

/// What the command line asks for.
struct Wanted {
    names: Vec<String>,
    seed: Option<u64>,
    list: bool,
}

impl Wanted {
    fn parse(arguments: &[String]) -> Self {
        let mut wanted = Self { names: Vec::new(), seed: None, list: false };
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--seed" => wanted.seed = arguments.next().and_then(|seed| seed.parse().ok()),
                "--list" => wanted.list = true,
                // Flags of the usual test harness that mean nothing here.
                flag if flag.starts_with('-') => {}
                name => wanted.names.push(name.to_owned()),
            }
        }
        wanted
    }

    fn name(&self, name: &str) -> bool {
        self.names.is_empty() || self.names.iter().any(|wanted| name.contains(wanted.as_str()))
    }
}

/// Counts outcomes.
#[derive(Default)]
struct Tally {
    passed: usize,
    skipped: usize,
    failed: Vec<String>,
}

impl Tally {
    fn note(&mut self, what: &str, result: Result<(), String>) {
        match result {
            Ok(()) => self.passed += 1,
            Err(why) => {
                println!("FAILED {what}: {why}");
                self.failed.push(what.to_owned());
            }
        }
    }

    fn finish(self) -> ExitCode {
        println!("{} passed, {} failed, {} skipped", self.passed, self.failed.len(), self.skipped);
        self.failed.iter().for_each(|what| println!("  failed: {what}"));
        if self.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

/// What ranks reported in each case, with its ranks and seed, on the first fabric where it ran.
type Earlier = HashMap<String, Vec<Option<u64>>>;

fn run_cases(launcher: &dyn Launcher, wanted: &Wanted, again: &str, tally: &mut Tally, earlier: &mut Earlier) {
    let (name, nature, capabilities) = (launcher.name(), launcher.nature(), launcher.capabilities());
    for case in cases().into_iter().filter(|case| wanted.name(case.name)) {
        if let Some(reason) = case.needs.iter().find_map(|need| need.missing(nature, capabilities)) {
            println!("SKIP {name} {}: {reason}", case.name);
            tally.skipped += 1;
            continue;
        }
        let seeds = wanted.seed.map_or(case.seeds.to_vec(), |seed| vec![seed]);
        for (ranks, seed) in case.ranks.iter().flat_map(|&ranks| seeds.iter().map(move |&seed| (ranks, seed))) {
            let point = format!("{} with {ranks} ranks, seed {seed}", case.name);
            let result = run_one(launcher, case, ranks, seed).and_then(|ending| {
                let before = earlier.entry(point.clone()).or_insert_with(|| ending.reports.clone());
                let same = ending.failure.is_some() || *before == ending.reports;
                ensure(same, || "ranks saw something else on another fabric".to_owned())
            });
            let result = result.map_err(|why| format!("{why}\n  again: {again} {} --seed {seed}", case.name));
            tally.note(&format!("{name} {point}"), result);
        }
    }
}

/// Runs a case once, checks how it ended and that nothing is left of it.
fn run_one(launcher: &dyn Launcher, case: Case, ranks: usize, seed: u64) -> Result<Ending, String> {
    let before = Leftovers::now();
    let start = Instant::now();
    let ended = launcher.run(&Run { case, ranks, seed })?;
    let ending = Ending { ranks, seed, failure: ended.failure, reports: ended.reports, elapsed: start.elapsed() };
    (case.verify)(&ending)?;
    before.compare()?;
    Ok(ending)
}
