//! Checks that are commands of their own: `cargo xtask --help`. CI runs them in a small size.

mod clients;
mod memory;
mod serve_soak;
mod server;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Build the planner alone as `no_std`: no clock, no files, no threads can be in it
    Purity,
    /// Fuzz the planner, the split and every input format
    Fuzz {
        /// Seconds for each target
        #[arg(long, default_value_t = 600)]
        seconds: u32,
        /// Targets; all of them by default
        targets: Vec<String>,
    },
    /// Plans, splits and assignments have the recorded digests: debug and release, with and without vector instructions,
    /// one thread and two
    Digests,
    /// The planner over the grid of loads: imbalance and replicas against the published planners
    Grid,
    /// The planner's speed: plan and own split, medians and worst cases
    Speed,
    /// The viewer in a real headless Chromium, which must be in PATH
    Browser {
        /// Folder for pictures of every view
        #[arg(long, value_name = "FOLDER")]
        screenshots: Option<PathBuf>,
    },
    /// Weight sync and grad reduce of random plans in all formats, on threads and on processes: every bit
    Streams {
        /// Plans on each fabric
        #[arg(long, default_value_t = 1000)]
        plans: u32,
    },
    /// Commands that read whole traces take the same memory whatever the size (Linux)
    Memory {
        /// Size of the trace that is generated
        #[arg(long, default_value_t = 4096)]
        megabytes: u64,
    },
    /// Damaged recordings over all readers: no panic, bounded memory and time (Linux)
    Mutate {
        /// How many files
        #[arg(long, default_value_t = 20_000)]
        files: u64,
        /// Number of the first, which seeds its changes
        #[arg(long, default_value_t = 0)]
        from: u64,
    },
    /// The fabric under failures and the train command under kills and interrupts, again and again
    Soak {
        /// How many times
        #[arg(long, default_value_t = 20)]
        rounds: u32,
    },
    /// A server against real clients: openai, lm-eval, a serving benchmark, promtool (needs Python's pip; Debian for promtool)
    Clients(clients::Args),
    /// A server under load for half an hour, hostile clients beside ordinary ones: no error, no restart, no growth of memory, a
    /// good end (Linux)
    ServeSoak(serve_soak::Args),
    /// The runtime under seeded schedules with faults: `cargo xtask simulate --help`
    #[command(disable_help_flag = true)]
    Simulate {
        /// For the command behind it
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Ranks' processes killed at whatever instruction: `cargo xtask kill-anytime --help`
    #[command(disable_help_flag = true)]
    KillAnytime {
        /// For the command behind it
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Ranks lost at each operation in each way: `cargo xtask kill-points --help`
    #[command(disable_help_flag = true)]
    KillPoints {
        /// For the command behind it
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
}

fn main() -> ExitCode {
    let result = match Cli::parse().task {
        Task::Purity => cargo(["build", "--locked", "-p", "ultraep-plan", "--no-default-features"]),
        Task::Fuzz { seconds, targets } => fuzz(seconds, &targets),
        Task::Digests => digests(),
        Task::Grid => cargo(["bench", "--locked", "-p", "ultraep-plan", "--bench", "grid"]),
        Task::Speed => cargo(["bench", "--locked", "-p", "ultraep-plan", "--bench", "speed"]),
        Task::Browser { screenshots } => browser(screenshots),
        Task::Streams { plans } => streams(plans),
        Task::Memory { megabytes } => memory::check(megabytes),
        Task::Mutate { files, from } => mutate(files, from),
        Task::Soak { rounds } => soak(rounds),
        Task::Clients(args) => clients::check(&args),
        Task::ServeSoak(args) => serve_soak::check(&args),
        Task::Simulate { arguments } => faults("simulate", arguments),
        Task::KillAnytime { arguments } => faults("kill-anytime", arguments),
        Task::KillPoints { arguments } => faults("kill-points", arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(1)
        }
    }
}

/// The repository's root.
fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

fn run(command: &mut Command) -> Result<(), String> {
    let shown = format!("{command:?}");
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("{shown}: {status}")),
        Err(error) => Err(format!("{shown}: {error}")),
    }
}

fn cargo<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Result<(), String> {
    run(Command::new("cargo").args(arguments).current_dir(root()))
}

/// `cargo-fuzz` below the target folder, installed when it is not there.
fn cargo_fuzz() -> Result<PathBuf, String> {
    let tools = root().join("target/tools");
    let program = tools.join("bin/cargo-fuzz");
    if !program.exists() {
        let tools = tools.display().to_string();
        cargo(["install", "--quiet", "--locked", "cargo-fuzz", "--version", "0.13.2", "--root", &tools])?;
    }
    Ok(program)
}

/// What a fuzz target may take in all, and at once: an input that makes a reader take more is a finding.
const FUZZ_MEMORY: &str = "-rss_limit_mb=2048";
const FUZZ_ALLOCATION: &str = "-malloc_limit_mb=1024";

fn fuzz(seconds: u32, targets: &[String]) -> Result<(), String> {
    let program = cargo_fuzz()?;
    let folder = root().join("fuzz/fuzz_targets");
    let entries = std::fs::read_dir(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let names = entries.filter_map(|e| e.ok()?.path().file_stem()?.to_str().map(str::to_string));
    let mut all: Vec<String> = names.collect();
    all.sort();
    if let Some(unknown) = targets.iter().find(|target| !all.contains(target)) {
        return Err(format!("no fuzz target {unknown}: there are {}", all.join(", ")));
    }
    for target in if targets.is_empty() { &all } else { targets } {
        let limit = format!("-max_total_time={seconds}");
        // The stable compiler, told to allow the sanitizer flags that the fuzzer needs.
        let mut command = Command::new(&program);
        command
            .args(["run", target, "--", &limit, FUZZ_MEMORY, FUZZ_ALLOCATION])
            .current_dir(root().join("fuzz"))
            .env("RUSTC_BOOTSTRAP", "1");
        run(&mut command)?;
    }
    Ok(())
}

/// The golden test in every build; the test itself solves on one thread and on two.
fn digests() -> Result<(), String> {
    for profile in ["dev", "release"] {
        for features in [&["--features", "std"][..], &["--no-default-features"]] {
            eprintln!("golden digests: profile {profile}, {}", features.join(" "));
            let test = ["test", "--quiet", "--locked", "-p", "ultraep-plan", "--test", "golden", "--profile", profile];
            cargo(test.iter().chain(features))?;
        }
    }
    Ok(())
}

/// A command of `ultraep-faults`.
fn faults(command: &str, arguments: Vec<String>) -> Result<(), String> {
    let run = ["run", "--quiet", "--locked", "--release", "-p", "ultraep-faults", "--", command];
    cargo(run.into_iter().map(String::from).chain(arguments))
}

/// The same tests as in `cargo test`, but a missing Chromium is a failure.
fn browser(screenshots: Option<PathBuf>) -> Result<(), String> {
    let mut command = Command::new("cargo");
    command.args(["test", "--quiet", "--locked", "-p", "ultraep-view", "--test", "browser"]).current_dir(root());
    if let Some(folder) = screenshots {
        let folder = std::path::absolute(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        command.env("ULTRAEP_SCREENSHOTS", folder);
    }
    run(command.env("ULTRAEP_REQUIRE_BROWSER", "1"))
}

/// Groups of the conformance suite's cases that run random plans.
const STREAM_GROUPS: u32 = 5;

fn streams(plans: u32) -> Result<(), String> {
    let mut command = Command::new("cargo");
    command.args(["test", "--locked", "--release", "-p", "ultraep-fabric", "--test", "conformance", "--", "streams_"]);
    command.env("STREAM_PLANS", plans.div_ceil(STREAM_GROUPS).to_string()).current_dir(root());
    run(&mut command)
}

fn mutate(files: u64, from: u64) -> Result<(), String> {
    let mut command = Command::new("cargo");
    command.args(["test", "--locked", "-p", "ultraep-import", "--test", "mutate", "--", "no_mutated_file"]);
    command.env("MUTATED_FILES", files.to_string()).env("MUTATED_FROM", from.to_string()).current_dir(root());
    run(&mut command)
}

fn soak(rounds: u32) -> Result<(), String> {
    for round in 1..=rounds {
        eprintln!("round {round} of {rounds}");
        cargo(["test", "--quiet", "--locked", "--release", "-p", "ultraep-fabric"])?;
        cargo(["test", "--quiet", "--locked", "--release", "-p", "ultraep-cli", "--test", "train"])?;
    }
    Ok(())
}
