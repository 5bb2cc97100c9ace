//! The first example, as two processes that only their environment tells who they are.

#[path = "../examples/01_two_processes.rs"]
mod two_processes;

use std::error::Error;
use std::process::{Command, Stdio};

type AnyError = Box<dyn Error + Send + Sync>;

/// One of the processes that the test starts; by itself it does nothing.
#[test]
fn one_process() -> Result<(), AnyError> {
    if std::env::var_os("ULTRAEP_PORT").is_some() { two_processes::main() } else { Ok(()) }
}

#[test]
fn two_processes_train_as_if_unbalanced() -> Result<(), AnyError> {
    // A port that is free now.
    let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port().to_string();
    let start = |rank: &str| {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["one_process", "--exact", "--nocapture"]);
        command.envs([("RANK", rank), ("WORLD_SIZE", "2"), ("ULTRAEP_PORT", &port)]);
        command.stdout(Stdio::piped()).spawn()
    };
    for process in [start("1")?, start("0")?] {
        let output = process.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && said.contains("64 of 128 rows, 1 replicas"), "{said}");
    }
    Ok(())
}
