//! The suite's launchers for the fabrics of this crate.

use std::fmt::Display;
use std::io::Read;
use std::process::{Command, ExitCode, Stdio};
use ultraep_conformance::{Ended, Launcher, Nature, Run};
use ultraep_fabric::processes::{self, JoinInfo};
use ultraep_fabric::simulated::{Simulation, run_simulated};
use ultraep_fabric::{Capabilities, run_threads};
use ultraep_plan::Rank;

/// For `map_err`.
pub(crate) fn text(error: impl Display) -> String {
    error.to_string()
}

pub(crate) struct Threads;

impl Launcher for Threads {
    fn name(&self) -> String {
        "threads".to_owned()
    }

    fn nature(&self) -> Nature {
        Nature { own_processes: false, real_time: true }
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { direct: true, core_permits: true, stamps: true }
    }

    fn run(&self, run: &Run) -> Result<Ended, String> {
        Ok(run.in_this_process(|spec, main| run_threads(spec, main)))
    }
}

/// Under the schedule of a seed.
pub(crate) struct Simulated(pub(crate) u64);

impl Launcher for Simulated {
    fn name(&self) -> String {
        format!("simulated (schedule {})", self.0)
    }

    fn nature(&self) -> Nature {
        Nature { own_processes: false, real_time: false }
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { direct: false, core_permits: true, stamps: true }
    }

    fn run(&self, run: &Run) -> Result<Ended, String> {
        let simulation = Simulation::new(self.0);
        Ok(run.in_this_process(|spec, main| run_simulated(spec, &simulation, main)?.result))
    }
}

pub(crate) struct Processes;

impl Launcher for Processes {
    fn name(&self) -> String {
        "processes".to_owned()
    }

    fn nature(&self) -> Nature {
        Nature { own_processes: true, real_time: true }
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { direct: true, core_permits: true, stamps: true }
    }

    fn run(&self, run: &Run) -> Result<Ended, String> {
        let myself = std::env::current_exe().map_err(text)?;
        let start = |_, info: JoinInfo| {
            let mut command = Command::new(&myself);
            command.args(["--as-rank", &info.to_string()]).args(run.words());
            command.stdout(Stdio::piped());
            command
        };
        let mut group = processes::launch(&run.spec(), start).map_err(text)?;
        let mut outputs: Vec<_> = (0..run.ranks).map(|rank| group.take_stdout(Rank::new(rank))).collect();
        let failure = group.wait().err().map(|error| (error.rank(), error.to_string()));
        let mut reports = Vec::new();
        for output in &mut outputs {
            let mut said = String::new();
            output.as_mut().ok_or("no pipe")?.read_to_string(&mut said).map_err(text)?;
            reports.push(said.strip_prefix("report ").and_then(|report| report.trim().parse().ok()));
        }
        Ok(Ended { failure, reports })
    }
}

/// The other side of [`Processes`]: this process is a rank.
pub(crate) fn run_child(arguments: &[String]) -> Option<ExitCode> {
    let [flag, info, words @ ..] = arguments else { return None };
    if flag != "--as-rank" {
        return None;
    }
    let run = || {
        let run = Run::from_words(words).ok_or("no such case")?;
        run.main(processes::join(&run.spec(), info.parse().map_err(text)?).map_err(text)?)
    };
    Some(match run() {
        Ok(report) => {
            println!("report {report}");
            ExitCode::SUCCESS
        }
        Err(why) => {
            eprintln!("rank {info} of {words:?}: {why}");
            ExitCode::FAILURE
        }
    })
}
