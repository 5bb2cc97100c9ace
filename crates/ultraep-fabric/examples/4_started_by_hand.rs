//! Two processes that you start by hand, with nothing in common but two variables:
//!
//!     RANK=0 WORLD_SIZE=2 cargo run -p ultraep-fabric --example 4_started_by_hand &
//!     RANK=1 WORLD_SIZE=2 cargo run -p ultraep-fabric --example 4_started_by_hand
//!
//! `torchrun --no-python`, `mpirun` and `srun` can start them as well, once RANK and WORLD_SIZE are set. Another port than the usual one:
//! ULTRAEP_PORT. The processes must be on one host.

use std::error::Error;
use std::time::Duration;
use ultraep_fabric::attach::{Rendezvous, attach};
use ultraep_fabric::{GroupSpec, Operation, Region, Span};
use ultraep_plan::Rank;

type AnyError = Box<dyn Error + Send + Sync>;

/// How long the processes may take to come.
const WITHIN: Duration = Duration::from_secs(60);

fn main() -> Result<(), AnyError> {
    // Programs read the environment, libraries do not.
    let place = Rendezvous::from_env(|name| std::env::var(name).ok())?;
    // Rank 0 serves the store; it is needed until all groups are there.
    let (_server, mut store) = place.store(WITHIN)?;

    // A group of all processes, and one of rank 0 alone beside it: windows and signals of one are nothing to the other.
    let mut spec = GroupSpec::new(place.size);
    let inbox = spec.add_window("inbox", 8 * place.size);
    let mut fabric = attach("all", place.rank, &spec, &mut store, WITHIN)?;
    if place.rank == Rank::new(0) {
        let mut alone = attach("rank 0 alone", Rank::new(0), &GroupSpec::new(1), &mut store, WITHIN)?;
        alone.run(Operation::Barrier)?;
        alone.leave()?;
    }

    // Everyone's square, to everyone.
    let (me, ranks) = (fabric.rank().index() as u64, fabric.ranks());
    let squares = Region::from_vec(vec![me * me; ranks]);
    let sizes = vec![8; ranks];
    fabric.run(Operation::AllToAll {
        send: Span::whole(&squares),
        send_bytes: &sizes,
        recv: inbox,
        recv_bytes: &sizes,
    })?;
    let window = fabric.window(inbox).ok_or("no such window")?;
    let expected: Vec<u64> = (0..ranks as u64).map(|rank| rank * rank).collect();
    assert_eq!(window.read::<u64>()?[..], expected[..]);
    println!("rank {me} of {ranks}: {expected:?}");
    fabric.leave()?;
    Ok(())
}

/// One of the processes that the test starts; by itself it does nothing.
#[test]
fn one_process() -> Result<(), AnyError> {
    if std::env::var_os("ULTRAEP_PORT").is_some() { main() } else { Ok(()) }
}

#[test]
fn two_processes_find_each_other() -> Result<(), AnyError> {
    // A port that is free now.
    let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port().to_string();
    let start = |rank: &str| {
        let mut command = std::process::Command::new(std::env::current_exe()?);
        command.args(["one_process", "--exact", "--nocapture"]);
        command.envs([("RANK", rank), ("WORLD_SIZE", "2"), ("ULTRAEP_PORT", &port)]);
        command.stdout(std::process::Stdio::piped()).spawn()
    };
    for (rank, process) in [start("1")?, start("0")?].into_iter().enumerate() {
        let output = process.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let line = format!("rank {} of 2: [0, 1]", 1 - rank);
        assert!(output.status.success() && said.contains(&line), "{said}");
    }
    Ok(())
}
