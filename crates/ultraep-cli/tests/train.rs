//! `ultraep train` as a user runs it: both fabrics, wrong input, a rank killed, Ctrl-C, resume.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use assert_cmd::cargo::cargo_bin;
use serde_json::Value;
use tempfile::TempDir;

/// A run of a second: three ranks, one layer.
const TINY: [&str; 28] = [
    "train",
    "--ranks",
    "3",
    "--hidden",
    "16",
    "--heads",
    "2",
    "--layers",
    "1",
    "--experts",
    "7",
    "--top-k",
    "2",
    "--intermediate",
    "16",
    "--sequences",
    "2",
    "--sequence-tokens",
    "16",
    "--min-quota",
    "1",
    "--warmup",
    "1",
    "--compare-every",
    "2",
    "--steps",
    "4",
    "--checked",
];

struct Bench {
    folder: TempDir,
}

impl Bench {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let lines = |i: usize| format!("line {i} of a text that is long enough, {} and {}\n", i * 7 % 31, i * i % 97);
        fs::write(folder.path().join("text.md"), (0..200).map(lines).collect::<String>()).unwrap();
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(cargo_bin("ultraep"));
        command.args(TINY).arg("--text").arg(self.path("text.md")).arg("--runs").arg(self.path("runs"));
        command.args(arguments).stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Run folders, oldest first.
    fn runs(&self) -> Vec<PathBuf> {
        let mut runs: Vec<_> = fs::read_dir(self.path("runs")).unwrap().map(|e| e.unwrap().path()).collect();
        runs.sort();
        runs
    }
}

fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&output.stdout)))
}

/// The last line of stderr, which must be the error, and the exit code.
fn error(output: &Output) -> (String, i32) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    let line = stderr.lines().rfind(|line| line.starts_with("error: ")).unwrap_or_else(|| panic!("no error: {stderr}"));
    assert!(!stderr.contains("panicked"), "{stderr}");
    (line.to_string(), output.status.code().unwrap())
}

fn tensor_bytes(checkpoint: &Value) -> Vec<Vec<u8>> {
    let folder = Path::new(checkpoint.as_str().unwrap());
    let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|e| e == "safetensors"));
    files.sort();
    files.iter().map(|path| fs::read(path).unwrap()).collect()
}

#[test]
fn threads_and_processes_train_the_same_model_bit_for_bit() {
    let bench = Bench::new();
    let threads = json(&bench.run(&["--json"]));
    let processes = json(&bench.run(&["--json", "--fabric", "processes"]));
    assert_eq!(threads["final_loss"], processes["final_loss"]);
    assert!(tensor_bytes(&threads["checkpoint"]) == tensor_bytes(&processes["checkpoint"]), "the weights differ");
    assert_eq!(threads["table"]["rows"].as_array().unwrap().len(), 5);
    assert!(threads["gradient_difference"].as_f64().unwrap() < 1e-5);
    assert!(threads["reference_loss_difference"].as_f64().unwrap() < 1e-4);
}

#[test]
fn the_run_folder_holds_what_is_documented() {
    let bench = Bench::new();
    let output = bench.run(&[]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let screen = String::from_utf8_lossy(&output.stdout);
    for word in ["ultraep", "eplb-exact", "ideal", "peak tokens", "largest difference"] {
        assert!(screen.contains(word), "{word} is missing on the screen:\n{screen}");
    }
    let run = &bench.runs()[0];
    let info: Value = serde_json::from_slice(&fs::read(run.join("run.json")).unwrap()).unwrap();
    assert_eq!(info["status"]["state"], "finished");
    assert_eq!(info["config"]["ranks"], 3);
    let lines = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let of = |kind: &str| lines.lines().filter(|l| l.contains(&format!("\"type\":\"{kind}\""))).count();
    assert_eq!((of("step"), of("reference"), of("policy")), (4, 4, 10));
    let table: Value = serde_json::from_slice(&fs::read(run.join("table.json")).unwrap()).unwrap();
    assert_eq!(table["rows"][0]["policy"], "none");
    assert!(fs::read_to_string(run.join("table.md")).unwrap().contains("| ultraep |"));
    let reader = ultraep_run::RunReader::open(run).unwrap();
    let trace = reader.trace().unwrap().unwrap();
    assert_eq!(trace.records(), 4, "one record a step, layer and microbatch");
}

#[test]
fn wrong_input_is_one_line_and_exit_code_2() {
    let bench = Bench::new();
    fs::write(bench.path("empty.md"), "").unwrap();
    fs::write(bench.path("short.md"), "a few words\n").unwrap();
    let with_text = |name: &str| {
        let mut command = Command::new(cargo_bin("ultraep"));
        command.args(TINY).arg("--runs").arg(bench.path("runs")).arg("--text").arg(bench.path(name));
        command.output().unwrap()
    };
    let cases = [
        (with_text("nowhere"), "nowhere"),
        (with_text("empty.md"), "empty"),
        (with_text("short.md"), "short"),
        (bench.run(&["--policy", "magic"]), "magic"),
        (bench.run(&["--fabric", "pigeons"]), "threads"),
        (bench.run(&["--ranks", "9"]), "7 experts on 9 ranks"),
        (bench.run(&["--domain", "2"]), "domains of 2"),
        (bench.run(&["--slots", "9999"]), "allowed are 0 to 64"),
        (bench.run(&["--heads", "3"]), "3 heads"),
        (bench.run(&["--top-k", "8"]), "top-8 of 7"),
        (bench.run(&["--beta", "0.5"]), "an imbalance is at least 1"),
        (bench.run(&["--min-quota", "0"]), "allowed are 1 to"),
        (
            bench.run(&["--policy", "ideal"]),
            "ideal is a bound that policies are compared with: allowed are none, eplb, ",
        ),
        (bench.run(&["--link-gbps", "0"]), "positive"),
        (bench.run(&["--steps", "0"]), "steps"),
        (bench.run(&["--learning-rate", "nan"]), "learning rate of NaN"),
        (bench.run(&["--clip", "0"]), "above 0"),
        (bench.run(&["--sequences", "9223372036854775807"]), "allowed are 1 to 1048576"),
        (bench.run(&["--sequences", "1048576", "--sequence-tokens", "4096"]), "tokens of a microbatch"),
        (bench.run(&["--hidden", "4611686018427387904"]), "allowed are 1 to 1048576"),
        (bench.run(&["--hidden", "1048576", "--intermediate", "1048576"]), "elements of an expert"),
        (bench.run(&["--microbatches", "4294967295"]), "rebalancings of eplb"),
        (bench.run(&["--resume", "/nowhere/at/all"]), "/nowhere/at/all"),
    ];
    for (output, word) in cases {
        let (line, code) = error(&output);
        assert!(line.contains(word), "expected {word:?} in {line}");
        assert_eq!(code, 2, "{line}");
    }
    assert!(!bench.path("runs").exists(), "nothing was begun");
}

#[test]
fn domains_are_planned_on_their_own_and_their_lower_bound_is_told() {
    let bench = Bench::new();
    let group = ["--ranks", "16", "--experts", "32", "--domain", "4", "--slots", "3", "--no-reference"];
    let output = bench.run(&[&group[..], &["--json"]].concat());
    let balance = &json(&output)["balance"];
    let of = |name: &str| balance[name].as_f64().unwrap();
    assert!(of("lower_bound_mean") > 1.0 && of("lower_bound_mean") <= of("imbalance_after_mean"), "{balance}");
    assert!(of("lower_bound_worst") <= of("imbalance_after_worst"), "{balance}");
    let screen = bench.run(&group);
    assert!(String::from_utf8_lossy(&screen.stdout).contains("domains of 4: lower bound"), "{screen:?}");
}

#[test]
fn another_group_goes_on_in_a_folder_of_its_own() {
    let bench = Bench::new();
    json(&bench.run(&["--json", "--no-reference"]));
    let first = bench.runs().remove(0);
    let whole = fs::read(first.join("metrics.jsonl")).unwrap();
    let resume = first.display().to_string();
    let options = ["--json", "--no-reference", "--ranks", "5", "--steps", "5", "--resume", &resume];
    let second = json(&bench.run(&options));
    assert_eq!(second["steps"], 5);
    assert_ne!(second["run_folder"].as_str().unwrap(), resume);
    assert_eq!(fs::read(first.join("metrics.jsonl")).unwrap(), whole, "the first run stays as it was");
}

/// Starts a long run and waits until it has trained some steps.
fn started(bench: &Bench, arguments: &[&str]) -> (Child, BufReader<std::process::ChildStderr>) {
    let mut command =
        bench.command(&["--steps", "100000", "--no-reference", "--compare-every", "0", "--save-every", "5"]);
    let mut child = command.args(arguments).stderr(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let stderr = BufReader::new(child.stderr.take().unwrap());
    let deadline = Instant::now() + Duration::from_secs(60);
    // A checkpoint that is whole: one still being written has another name.
    let run = || fs::read_dir(bench.path("runs")).ok()?.next()?.ok();
    while run().is_none_or(|run| ultraep_train::find_checkpoint(&run.path()).is_err()) {
        assert!(Instant::now() < deadline, "no step within a minute");
        std::thread::sleep(Duration::from_millis(50));
    }
    (child, stderr)
}

/// Waits for the end, at most a minute, and gives the error line and the exit code.
fn ended(mut child: Child, stderr: BufReader<std::process::ChildStderr>) -> (String, i32) {
    let deadline = Instant::now() + Duration::from_secs(60);
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break status,
            None if Instant::now() > deadline => {
                child.kill().unwrap();
                panic!("the run hangs");
            }
            None => std::thread::sleep(Duration::from_millis(50)),
        }
    };
    let lines: Vec<String> = stderr.lines().map_while(Result::ok).collect();
    let line = lines.iter().rfind(|l| l.starts_with("error: ")).unwrap_or_else(|| panic!("no error in {lines:?}"));
    (line.clone(), status.code().unwrap())
}

fn signal(pid: u32, name: &str) {
    assert!(Command::new("kill").arg(format!("-{name}")).arg(pid.to_string()).status().unwrap().success());
}

fn children(pid: u32) -> Vec<u32> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    text.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

#[test]
fn a_killed_rank_is_named_and_leaves_nothing_behind() {
    let bench = Bench::new();
    let (child, stderr) = started(&bench, &["--fabric", "processes"]);
    let ranks = children(child.id());
    assert_eq!(ranks.len(), 3);
    signal(ranks[2], "KILL");
    let (line, code) = ended(child, stderr);
    assert!(line.contains("rank 2") && line.contains('9'), "{line}");
    assert_eq!(code, 1);
    for rank in ranks {
        assert!(!Path::new(&format!("/proc/{rank}")).exists(), "process {rank} is left");
    }
    let checkpoint = ultraep_train::find_checkpoint(&bench.runs()[0]).unwrap();
    assert!(checkpoint.exists(), "what was saved is there");
}

#[test]
fn a_suspended_rank_is_called_that_and_a_run_that_was_suspended_goes_on() {
    let bench = Bench::new();
    let (child, stderr) = started(&bench, &["--fabric", "processes", "--timeout-s", "3"]);
    let ranks = children(child.id());
    let all = || std::iter::once(child.id()).chain(ranks.iter().copied());
    // All of it, as by Ctrl-Z, for longer than a rank may be silent.
    all().for_each(|pid| signal(pid, "STOP"));
    std::thread::sleep(Duration::from_secs(7));
    all().for_each(|pid| signal(pid, "CONT"));
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(children(child.id()), ranks, "it goes on");
    // One alone.
    signal(ranks[1], "STOP");
    let (line, code) = ended(child, stderr);
    assert!(line.contains("rank 1") && line.contains("suspended") && !line.contains("lost"), "{line}");
    assert_eq!(code, 1);
}

#[test]
fn ranks_do_not_outlive_their_parent() {
    let bench = Bench::new();
    let (mut child, _stderr) = started(&bench, &["--fabric", "processes"]);
    let ranks = children(child.id());
    child.kill().unwrap();
    child.wait().unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    while ranks.iter().any(|rank| Path::new(&format!("/proc/{rank}")).exists()) {
        assert!(Instant::now() < deadline, "orphans are left");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn an_interrupt_saves_and_the_run_can_be_taken_up() {
    for (fabric, terminal) in [("threads", false), ("processes", true), ("processes", false)] {
        let bench = Bench::new();
        let (child, stderr) = started(&bench, &["--fabric", fabric]);
        let ranks = children(child.id());
        if terminal {
            // A terminal sends it to the whole group. Ranks told by their parent meanwhile may be gone by their turn.
            let all = ranks.iter().chain([&child.id()]).map(u32::to_string).collect::<Vec<_>>();
            Command::new("kill").arg("-INT").args(all).status().unwrap();
        } else {
            signal(child.id(), "INT");
        }
        let (line, code) = ended(child, stderr);
        assert_eq!(code, 1, "{fabric}: {line}");
        let run = bench.runs().remove(0);
        let info: Value = serde_json::from_slice(&fs::read(run.join("run.json")).unwrap()).unwrap();
        assert_eq!(info["status"]["state"], "interrupted", "{fabric}: {line}");
        let checkpoint = ultraep_train::find_checkpoint(&run).unwrap();
        let step: u64 = checkpoint.file_name().unwrap().to_str().unwrap()["step-".len()..].parse().unwrap();
        let mut again = bench.command(&["--json", "--no-reference", "--compare-every", "0"]);
        let steps = (step + 3).to_string();
        let result = json(&again.arg("--resume").arg(&run).args(["--steps", &steps]).output().unwrap());
        assert_eq!(result["steps"], step + 3, "{fabric}");
        let reader = ultraep_run::RunReader::open(&run).unwrap();
        assert_eq!(reader.trace().unwrap().unwrap().records(), step + 3, "{fabric}: every step once");
    }
}

#[test]
fn an_interrupt_of_the_reference_does_not_ask_to_go_on() {
    let bench = Bench::new();
    let mut command = bench.command(&["--steps", "2000", "--compare-every", "0"]);
    let mut child = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.starts_with("reference with none") {
        line.clear();
        assert!(stderr.read_line(&mut line).unwrap() > 0, "it ended before the reference");
    }
    signal(child.id(), "INT");
    let (line, code) = ended(child, stderr);
    assert!(line.contains("the training was complete") && !line.contains("--resume"), "{line}");
    assert_eq!(code, 1);
}

#[test]
fn a_full_disk_is_told_with_the_file_and_keeps_what_was_saved() {
    // A limit on the size of files stands in for the disk: metrics grow until a write fails, as on a full one.
    let bench = Bench::new();
    let long = ["--steps", "100000", "--no-reference", "--compare-every", "0", "--save-every", "50"];
    let command = bench.command(&long);
    let mut limited = Command::new("sh");
    limited.args(["-c", "trap '' XFSZ; ulimit -f 512; exec \"$@\"", "sh"]).arg(command.get_program());
    let output = limited.args(command.get_args()).stdin(Stdio::null()).output().unwrap();
    let (line, code) = error(&output);
    assert!(line.contains("File too large") && line.contains("runs"), "{line}");
    assert_eq!(code, 1);
    let checkpoint = ultraep_train::find_checkpoint(&bench.runs()[0]).unwrap();
    let step: u64 = checkpoint.file_name().unwrap().to_str().unwrap()["step-".len()..].parse().unwrap();
    let steps = (step + 2).to_string();
    let options = ["--json", "--no-reference", "--steps", &steps, "--resume", checkpoint.to_str().unwrap()];
    assert_eq!(json(&bench.run(&options))["steps"], step + 2);
}

#[test]
fn a_place_that_cannot_be_written_is_told() {
    let bench = Bench::new();
    let output = bench.command(&["--runs", "/proc/no-runs-here"]).output().unwrap();
    let (line, code) = error(&output);
    assert!(line.contains("/proc/no-runs-here"), "{line}");
    assert_eq!(code, 1);
}
