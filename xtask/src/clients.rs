//! A server against the clients that people use, as they come from their registries: each is installed into a folder of its own
//! below `target/clients`, asked to do what its users do, and what it saw is judged (`xtask/clients/*.py`). What cannot be installed
//! is said and left out.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::memory::absent;
use crate::root;
use crate::server::Server;

/// Arguments of the check.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Use a build of this profile
    #[arg(long, default_value = "dev", value_parser = ["release", "dev"])]
    profile: String,
    /// Only these checks: openai, lm-eval, benchmark, metrics, promtool
    #[arg(value_parser = ["openai", "lm-eval", "benchmark", "metrics", "promtool"])]
    only: Vec<String>,
    /// A client that cannot be installed is a failure
    #[arg(long)]
    require: bool,
}

/// A client in Python.
struct Client {
    name: &'static str,
    script: &'static str,
    /// Packages with what they need.
    packages: &'static [&'static str],
    /// Packages alone: what they say that they need is hundreds of megabytes that these checks never touch.
    alone: &'static [&'static str],
}

const CLIENTS: [Client; 4] = [
    Client { name: "openai", script: "openai_client.py", packages: &["openai==3.57.0"], alone: &[] },
    Client { name: "metrics", script: "metrics_client.py", packages: &["prometheus_client==0.26.0"], alone: &[] },
    Client {
        name: "lm-eval",
        script: "lm_eval_client.py",
        packages: &[
            "numpy==2.4.6",
            "jinja2==3.1.6",
            "pyyaml==6.0.4",
            "requests==2.34.2",
            "aiohttp==3.14.5",
            "tenacity==9.2.1",
            "tqdm==4.70.1",
            "regex==2026.11.19",
            "jsonlines==4.0.0",
        ],
        alone: &["lm_eval==0.4.13"],
    },
    Client {
        name: "benchmark",
        script: "serving_benchmark.py",
        packages: &["numpy==2.4.6", "requests==2.34.2", "aiohttp==3.14.5", "tqdm==4.70.1"],
        // The last whose serving benchmark is one file; it follows vLLM's.
        alone: &["sglang==0.4.1.post7"],
    },
];

/// Longest sequence of the server.
const CONTEXT: &str = "600";

/// Runs the check.
pub(crate) fn check(args: &Args) -> Result<(), String> {
    crate::cargo(["build", "--quiet", "--profile", &args.profile, "--locked", "-p", "ultraep-cli"])?;
    let profile = if args.profile == "dev" { "debug" } else { "release" };
    let program = root().join("target").join(profile).join("ultraep");
    let folder = root().join("target/clients");
    std::fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let checkpoint = train(&program, &folder)?;
    let options = ["--ranks", "4", "--context", CONTEXT, "--min-quota", "1", "--checked", "--host", "localhost"];
    let server = Server::start(&program, &checkpoint, &folder.join("access.log"), &options)?;
    let is_asked = |name: &str| args.only.is_empty() || args.only.iter().any(|only| only == name);
    let (mut wrong, mut left_out) = (Vec::new(), Vec::new());
    for client in CLIENTS.iter().filter(|client| is_asked(client.name)) {
        println!("{}", client.name);
        match installed(client, &folder) {
            Err(reason) => left_out.push(skip(client.name, &reason)),
            Ok(python) => wrong.extend(run(client, &python, &server).err()),
        }
    }
    if is_asked("promtool") {
        println!("promtool");
        match promtool(&folder) {
            Err(reason) => left_out.push(skip("promtool", &reason)),
            Ok(program) => wrong.extend(lint(&program, &server.metrics()?).err()),
        }
    }
    wrong.extend(server.stop().err());
    if args.require {
        wrong.extend(left_out.iter().map(|name| format!("{name} was left out")));
    }
    println!("{} checks went wrong, {} were left out", wrong.len(), left_out.len());
    if wrong.is_empty() { Ok(()) } else { Err(wrong.join("; ")) }
}

fn skip(name: &'static str, reason: &str) -> &'static str {
    println!("  SKIP {name}: {reason}");
    name
}

/// A model of a second: what it says does not matter here.
fn train(program: &Path, folder: &Path) -> Result<PathBuf, String> {
    let runs = folder.join("runs");
    std::fs::remove_dir_all(&runs).or_else(absent).map_err(|error| format!("{}: {error}", runs.display()))?;
    let sizes = "--ranks 3 --hidden 16 --heads 2 --layers 1 --experts 8 --top-k 2 --intermediate 16 --sequences 2 \
                 --sequence-tokens 16 --min-quota 1 --warmup 1 --compare-every 0 --no-reference --steps 2";
    let mut command = Command::new(program);
    command.arg("train").args(sizes.split_whitespace()).arg("--text").arg(root().join("docs")).arg("--runs").arg(&runs);
    crate::run(command.stdout(Stdio::null()).stderr(Stdio::null()))?;
    let mut made = std::fs::read_dir(&runs).map_err(|error| format!("{}: {error}", runs.display()))?;
    made.find_map(|entry| Some(entry.ok()?.path())).ok_or_else(|| format!("{}: no run in it", runs.display()))
}

/// The last line that a command said of its failure.
fn told(command: &mut Command) -> Result<(), String> {
    let shown = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().map_err(|error| format!("{shown}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let line = text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("it said nothing");
    Err(format!("{shown}: {}: {line}", output.status))
}

/// Python of the folder in which the client is installed.
fn installed(client: &Client, folder: &Path) -> Result<PathBuf, String> {
    let environment = folder.join("python");
    let python = environment.join("bin/python");
    if !python.exists() {
        told(Command::new("python3").args(["-m", "venv"]).arg(&environment))?;
    }
    for (more, packages) in [(&[][..], client.packages), (&["--no-deps"], client.alone)] {
        if !packages.is_empty() {
            let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:"];
            told(Command::new(&python).args(pip).args(more).args(packages))?;
        }
    }
    Ok(python)
}

fn run(client: &Client, python: &Path, server: &Server) -> Result<(), String> {
    let mut command = Command::new(python);
    command.arg(root().join("xtask/clients").join(client.script)).env("PYTHONDONTWRITEBYTECODE", "1");
    command.env("ULTRAEP_URL", server.url()).env("ULTRAEP_API_KEY", server.key()).env("ULTRAEP_CONTEXT", CONTEXT);
    command.env("ULTRAEP_MODEL", server.model()).stdin(Stdio::null());
    crate::run(&mut command).map_err(|_| format!("{} saw what must not be", client.name))
}

/// `promtool` of the machine, or of Debian's package, unpacked and not installed.
fn promtool(folder: &Path) -> Result<PathBuf, String> {
    if told(Command::new("promtool").arg("--version")).is_ok() {
        return Ok("promtool".into());
    }
    let (unpacked, at) = (folder.join("prometheus"), "usr/bin/promtool");
    if !unpacked.join(at).exists() {
        told(Command::new("apt-get").args(["download", "--quiet", "prometheus"]).current_dir(folder)).or_else(
            |_| {
                told(Command::new("apt-get").args(["update", "--quiet"]))?;
                told(Command::new("apt-get").args(["download", "--quiet", "prometheus"]).current_dir(folder))
            },
        )?;
        let files = std::fs::read_dir(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        let is_package = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "deb");
        let package = files.filter_map(|file| Some(file.ok()?.path())).find(is_package).ok_or("no package came")?;
        told(Command::new("dpkg-deb").arg("--extract").arg(&package).arg(&unpacked))?;
    }
    Ok(unpacked.join(at))
}

/// `promtool check metrics` must say nothing.
fn lint(program: &Path, metrics: &str) -> Result<(), String> {
    let refuse = |error: std::io::Error| format!("promtool: {error}");
    let mut command = Command::new(program);
    command.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(refuse)?;
    if let Some(mut input) = child.stdin.take() {
        std::io::Write::write_all(&mut input, metrics.as_bytes()).map_err(refuse)?;
    }
    let output = child.wait_with_output().map_err(refuse)?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    let series = metrics.lines().filter(|line| !line.starts_with('#')).count();
    if output.status.success() && said.trim().is_empty() {
        println!("  ok  promtool check metrics: nothing to say of {series} series");
        return Ok(());
    }
    println!("  WRONG  promtool check metrics: {}: {said}", output.status);
    Err("promtool has something to say".into())
}
