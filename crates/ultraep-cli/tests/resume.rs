//! A run that goes on: with its own text, in its own folder or beside it, by the command that it printed.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use assert_cmd::cargo::cargo_bin;
use serde_json::Value;
use tempfile::TempDir;

/// A run of a second: two ranks, one layer.
const TINY: &str = "train --ranks 2 --hidden 16 --heads 2 --layers 1 --experts 4 --top-k 2 --intermediate 16 --sequences 2 \
                    --sequence-tokens 16 --min-quota 1 --warmup 1 --compare-every 0 --no-reference --steps 4 --json";

struct Bench {
    folder: TempDir,
}

impl Bench {
    fn new() -> Self {
        let bench = Self { folder: TempDir::new().unwrap() };
        bench.write_text(7);
        bench
    }

    /// Another text for another factor.
    fn write_text(&self, factor: usize) {
        let line =
            |i: usize| format!("line {i} of a text that is long enough, {} and {}\n", i * factor % 31, i * i % 97);
        fs::write(self.folder.path().join("text.md"), (0..200).map(line).collect::<String>()).unwrap();
    }

    fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(cargo_bin("ultraep"));
        command.current_dir(self.folder.path()).args(arguments.split_whitespace()).stdin(Stdio::null());
        command
    }

    fn first(&self, arguments: &str) -> PathBuf {
        let result = self.command(&format!("{TINY} --text text.md --runs runs {arguments}")).output().unwrap();
        self.folder.path().join(json(&result)["run_folder"].as_str().unwrap())
    }

    fn resume(&self, run: &Path, arguments: &str) -> Output {
        let mut command = self.command(&format!("train --json {arguments}"));
        command.arg("--resume").arg(run).output().unwrap()
    }
}

fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn info(run: &Path) -> Value {
    serde_json::from_slice(&fs::read(run.join("run.json")).unwrap()).unwrap()
}

fn losses(run: &Path) -> Vec<String> {
    let metrics = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let loss = |line: &str| serde_json::from_str::<Value>(line).unwrap()["loss"].to_string();
    metrics.lines().filter(|line| line.contains("\"loss\"")).map(loss).collect()
}

#[test]
fn a_run_keeps_its_text_whatever_becomes_of_the_files() {
    let bench = Bench::new();
    let (before, after) = (bench.first(""), bench.first(""));
    json(&bench.resume(&before, "--steps 6"));
    bench.write_text(11);
    let result = json(&bench.resume(&after, "--steps 6"));
    assert_eq!(bench.folder.path().join(result["run_folder"].as_str().unwrap()), after, "it goes on in its own folder");
    assert_eq!(losses(&before).len(), 6);
    assert_eq!(losses(&before), losses(&after), "taken up before and after the text was changed");
}

#[test]
fn another_text_model_or_seed_is_refused_with_one_line() {
    let bench = Bench::new();
    let run = bench.first("");
    bench.write_text(11);
    for (arguments, names) in [
        ("--steps 6 --text text.md", "text.md"),
        ("--steps 6 --seed 5", "seed"),
        ("--steps 6 --hidden 32", "hidden"),
        ("--steps 4", "--steps"),
    ] {
        let output = bench.resume(&run, arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        let line =
            stderr.lines().rfind(|line| line.starts_with("error: ")).unwrap_or_else(|| panic!("{arguments}: {stderr}"));
        assert!(line.contains(names), "{arguments}: {line}");
        assert_eq!(output.status.code(), Some(2), "{arguments}");
    }
    assert_eq!(losses(&run).len(), 4, "the run is as it was");
}

#[test]
fn another_policy_or_rate_goes_on_in_a_folder_that_says_so() {
    let bench = Bench::new();
    let run = bench.first("");
    let before = fs::read(run.join("metrics.jsonl")).unwrap();
    for (arguments, name) in
        [("--policy none", "policy"), ("--learning-rate 0.5", "learning_rate"), ("--ranks 4", "ranks")]
    {
        let result = json(&bench.resume(&run, &format!("--steps 5 {arguments}")));
        let beside = bench.folder.path().join(result["run_folder"].as_str().unwrap());
        assert_ne!(beside, run, "{arguments}");
        assert_eq!(beside.parent(), run.parent(), "{arguments}: beside the first");
        let continued = &info(&beside)["continued"][0];
        assert_eq!(continued["step"], 4, "{arguments}");
        assert!(continued["from"].as_str().unwrap().contains("step-00000004"), "{arguments}: {continued}");
        assert!(continued["changed"].as_array().unwrap().iter().any(|change| change["name"] == name), "{continued}");
    }
    assert_eq!(fs::read(run.join("metrics.jsonl")).unwrap(), before, "the first run stays as it was");
}

#[test]
fn the_printed_command_goes_on_verbatim() {
    let bench = Bench::new();
    let mut command = bench.command(&format!("{TINY} --text text.md --steps 100000 --save-every 2"));
    command.args(["--runs", "runs with 'spaces'"]).stderr(Stdio::piped()).stdout(Stdio::null());
    let child = command.spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    let runs = bench.folder.path().join("runs with 'spaces'");
    let run = || fs::read_dir(&runs).ok()?.next()?.ok();
    while run().is_none_or(|run| ultraep_train::find_checkpoint(&run.path()).is_err()) {
        assert!(Instant::now() < deadline, "no checkpoint within a minute");
        std::thread::sleep(Duration::from_millis(50));
    }
    Command::new("kill").arg("-INT").arg(child.id().to_string()).status().unwrap();
    let said = String::from_utf8(child.wait_with_output().unwrap().stderr).unwrap();
    let printed =
        said.lines().skip_while(|line| *line != "go on with:").nth(1).unwrap_or_else(|| panic!("{said}")).trim();
    // The same command, with an end.
    let again = format!("{printed} --steps 100001");
    let mut stopped = Command::new("timeout");
    stopped.args(["--signal=INT", "5", "sh", "-c", &format!("exec {again}")]).current_dir(bench.folder.path());
    let mut stopped = stopped.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let mut stderr = String::new();
    std::io::Read::read_to_string(&mut stopped.stderr.take().unwrap(), &mut stderr).unwrap();
    stopped.wait().unwrap();
    assert!(stderr.contains("going on after step"), "{stderr}");
    assert_eq!(fs::read_dir(&runs).unwrap().count(), 1, "in the same folder");
}

#[test]
fn checkpoints_are_pruned_and_files_are_what_the_umask_leaves() {
    let bench = Bench::new();
    let command = bench.command(&format!("{TINY} --text text.md --runs runs --steps 5 --save-every 1 --keep 2"));
    let words: Vec<String> = command.get_args().map(|word| word.to_string_lossy().into_owned()).collect();
    let line = format!("umask 027; exec {} {}", cargo_bin("ultraep").display(), words.join(" "));
    let output = Command::new("sh").current_dir(bench.folder.path()).args(["-c", &line]).output().unwrap();
    let run = bench.folder.path().join(json(&output)["run_folder"].as_str().unwrap());
    let mut kept: Vec<String> = fs::read_dir(run.join("checkpoints"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    kept.sort();
    assert_eq!(kept, ["step-00000004", "step-00000005"]);
    let mut folders = vec![run];
    let mut files = 0;
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
            if entry.file_type().unwrap().is_dir() {
                folders.push(entry.path());
                continue;
            }
            files += 1;
            let mode = entry.metadata().unwrap().permissions().mode() & 0o777;
            assert_eq!(mode, 0o640, "{}", entry.path().display());
        }
    }
    assert!(files > 6, "{files} files");
}
