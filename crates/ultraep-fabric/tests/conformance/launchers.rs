//! The suite's launchers for the fabrics of this crate.

use std::fmt::Display;
use std::io::Read;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;
use ultraep_conformance::{Ended, Launcher, Nature, Run};
use ultraep_fabric::attach::{StoreServer, TcpStore, attach};
use ultraep_fabric::processes::{self, JoinInfo};
use ultraep_fabric::simulated::{Simulation, run_simulated};
use ultraep_fabric::{Capabilities, run_threads};
use ultraep_plan::Rank;

/// How long processes may take to start, however busy the machine is.
const WITHIN: Duration = Duration::from_secs(60);

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
        Capabilities { direct: true, point_to_point: false, core_permits: true, stamps: true }
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
        Capabilities { direct: false, point_to_point: false, core_permits: true, stamps: true }
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
        Capabilities { direct: true, point_to_point: false, core_permits: true, stamps: true }
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

/// Processes that find each other through a store, and that nobody supervises.
pub(crate) struct Attached;

impl Launcher for Attached {
    fn name(&self) -> String {
        "attached processes".to_owned()
    }

    fn nature(&self) -> Nature {
        Nature { own_processes: true, real_time: true }
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { direct: true, point_to_point: false, core_permits: true, stamps: true }
    }

    fn run(&self, run: &Run) -> Result<Ended, String> {
        let myself = std::env::current_exe().map_err(text)?;
        let store = StoreServer::bind("127.0.0.1:0").map_err(text)?;
        run.on_processes(|rank| {
            let mut command = Command::new(&myself);
            command.args(["--as-attached", &store.address().to_string(), &rank.to_string()]).args(run.words());
            command
        })
    }
}

/// The other side of [`Processes`] and [`Attached`]: this process is a rank.
pub(crate) fn run_child(arguments: &[String]) -> Option<ExitCode> {
    let run = match arguments {
        [flag, info, words @ ..] if flag == "--as-rank" => joined(info, words),
        [flag, store, rank, words @ ..] if flag == "--as-attached" => attached(store, rank, words),
        _ => return None,
    };
    Some(run.unwrap_or_else(|why| {
        eprintln!("{arguments:?}: {why}");
        ExitCode::FAILURE
    }))
}

fn joined(info: &str, words: &[String]) -> Result<ExitCode, String> {
    let run = Run::from_words(words).ok_or("no such case")?;
    let report = run.main(processes::join(&run.spec(), info.parse().map_err(text)?).map_err(text)?)?;
    println!("report {report}");
    Ok(ExitCode::SUCCESS)
}

fn attached(store: &str, rank: &str, words: &[String]) -> Result<ExitCode, String> {
    let run = Run::from_words(words).ok_or("no such case")?;
    let spec = run.spec();
    let mut store = TcpStore::connect(store, "conformance", WITHIN).map_err(text)?;
    let rank = Rank::new(rank.parse().map_err(text)?);
    let fabric = attach("group", rank, &spec, &mut store, WITHIN).map_err(text)?;
    Ok(run.as_process(fabric))
}
