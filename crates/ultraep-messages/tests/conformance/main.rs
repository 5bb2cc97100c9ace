//! The conformance suite over a transport of Unix sockets: ranks as threads, and as processes.
//!
//!     cargo test -p ultraep-messages --test conformance -- [NAME...] [--seed S] [--list]
//!
//! For processes this binary starts itself again with `--as-rank`.

#[path = "../sockets/mod.rs"]
mod sockets;

use sockets::Sockets;
use std::cell::Cell;
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::time::Duration;
use ultraep_conformance::{Ended, Launcher, Nature, Run};
use ultraep_fabric::Capabilities;
use ultraep_messages::MessageFabric;

const CAN: Capabilities = Capabilities { direct: false, point_to_point: true, core_permits: false, stamps: true };
const AGAIN: &str = "cargo test -p ultraep-messages --test conformance --";

/// How long ranks may take to start, however busy the machine is.
const WITHIN: Duration = Duration::from_secs(60);

struct Threads;

impl Launcher for Threads {
    fn name(&self) -> String {
        "messages between threads".to_owned()
    }

    fn nature(&self) -> Nature {
        Nature { own_processes: false, real_time: true }
    }

    fn capabilities(&self) -> Capabilities {
        CAN
    }

    fn run(&self, run: &Run) -> Result<Ended, String> {
        let sockets = Sockets::mesh(run.ranks).map_err(|error| error.to_string())?;
        let sockets: Vec<Mutex<Option<Sockets>>> = sockets.into_iter().map(|one| Mutex::new(Some(one))).collect();
        run.on_threads(|rank| {
            let transport = sockets[rank.index()].lock().map_err(|_| "poisoned")?.take().ok_or("started twice")?;
            MessageFabric::start(&run.spec(), transport, WITHIN).map_err(|error| error.to_string())
        })
    }
}

#[derive(Default)]
struct Processes {
    groups: Cell<usize>,
}

impl Launcher for Processes {
    fn name(&self) -> String {
        "messages between processes".to_owned()
    }

    fn nature(&self) -> Nature {
        Nature { own_processes: true, real_time: true }
    }

    fn capabilities(&self) -> Capabilities {
        CAN
    }

    fn run(&self, run: &Run) -> Result<Ended, String> {
        let myself = std::env::current_exe().map_err(|error| error.to_string())?;
        self.groups.set(self.groups.get() + 1);
        let group = format!("ultraep-messages/{}/{}", std::process::id(), self.groups.get());
        run.on_processes(|rank| {
            let mut command = Command::new(&myself);
            command.args(["--as-rank", &group, &rank.to_string()]).args(run.words());
            command
        })
    }
}

/// The other side of [`Processes`]: this process is a rank.
fn run_child(arguments: &[String]) -> Option<ExitCode> {
    let [flag, group, rank, words @ ..] = arguments else { return None };
    if flag != "--as-rank" {
        return None;
    }
    let start = || {
        let run = Run::from_words(words).ok_or("no such case")?;
        let rank = rank.parse().map_err(|_| "no rank")?;
        let transport = Sockets::connect(group, rank, run.ranks, WITHIN);
        let fabric = MessageFabric::start(&run.spec(), transport.map_err(|error| error.to_string())?, WITHIN);
        Ok::<_, String>((run, fabric.map_err(|error| error.to_string())?))
    };
    Some(match start() {
        Ok((run, fabric)) => run.as_process(fabric),
        Err(why) => {
            eprintln!("rank {rank} did not start: {why}");
            ExitCode::FAILURE
        }
    })
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let Some(code) = run_child(&arguments) {
        return code;
    }
    ultraep_conformance::main(&[&Threads, &Processes::default()], AGAIN, &[])
}
