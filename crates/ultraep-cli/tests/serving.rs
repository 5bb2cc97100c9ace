//! `serve`, `loadtest` and `prefill-bench` as a user runs them, on a checkpoint of `train`.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use assert_cmd::cargo::cargo_bin;
use serde_json::Value;
use tempfile::TempDir;

struct Trained {
    folder: TempDir,
    run: PathBuf,
}

fn ultraep(arguments: &[&str]) -> Output {
    Command::new(cargo_bin("ultraep")).args(arguments).stdin(Stdio::null()).output().unwrap()
}

/// A model of a second, trained on three ranks.
fn trained() -> Trained {
    let folder = TempDir::new().unwrap();
    let lines = |i: usize| format!("line {i} of a text that is long enough, {} and {}\n", i * 7 % 31, i * i % 97);
    fs::write(folder.path().join("text.md"), (0..300).map(lines).collect::<String>()).unwrap();
    let text = folder.path().join("text.md").display().to_string();
    let runs = folder.path().join("runs");
    let sizes = "--ranks 3 --hidden 16 --heads 2 --layers 1 --experts 8 --top-k 2 --intermediate 16 --sequences 2 \
                 --sequence-tokens 16 --min-quota 1 --warmup 1 --compare-every 0 --no-reference --steps 2";
    let mut arguments = vec!["train", "--text", &text, "--runs", runs.to_str().unwrap()];
    arguments.extend(sizes.split(' ').filter(|a| !a.is_empty()));
    let output = ultraep(&arguments);
    assert!(output.status.success(), "{output:?}");
    let run = fs::read_dir(&runs).unwrap().next().unwrap().unwrap().path();
    Trained { folder, run }
}

fn failure(output: &Output, code: i32) -> String {
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{error}");
    let last = error.lines().last().unwrap_or_default().to_string();
    assert!(last.starts_with("error: "), "{error}");
    last
}

/// A server that is told to stop when the test is over.
struct Server {
    child: Child,
    url: String,
}

impl Server {
    fn start(trained: &Trained, runs: &Path) -> Self {
        let mut command = Command::new(cargo_bin("ultraep"));
        command.args(["serve", "--ranks", "4", "--port", "0", "--context", "600", "--min-quota", "1", "--checked"]);
        command.arg("--checkpoint").arg(&trained.run).arg("--runs").arg(runs);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let url = line.split(' ').next().unwrap_or_default().to_string();
        assert!(url.starts_with("http://127.0.0.1:"), "{line:?}");
        Self { child, url }
    }

    fn stop(mut self) -> Output {
        let told = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status().unwrap();
        assert!(told.success());
        let since = Instant::now();
        while self.child.try_wait().unwrap().is_none() {
            assert!(since.elapsed() < Duration::from_secs(30), "it does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
        self.child.wait_with_output().unwrap()
    }
}

#[test]
fn a_checkpoint_is_served_loaded_and_recorded() {
    let trained = trained();
    let recorded = trained.folder.path().join("served");
    let server = Server::start(&trained, &recorded);
    let text = trained.folder.path().join("text.md").display().to_string();
    let svg = trained.folder.path().join("ttft.svg");
    let load = ["--rps", "20,40", "--seconds", "1", "--prompt-tokens", "20..400", "--json"];
    let mut arguments = vec!["loadtest", "--url", &server.url, "--mix", &text, "--svg", svg.to_str().unwrap()];
    arguments.extend(load);
    let output = ultraep(&arguments);
    assert!(output.status.success(), "{output:?}");
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["schema"], "ultraep.loadtest/1");
    assert_eq!(
        (document["rates"][0]["finished"].as_u64(), document["rates"][1]["finished"].as_u64()),
        (Some(20), Some(40))
    );
    assert!(document["rates"][0]["ttft"]["p95_ns"].as_u64().unwrap() > 0);
    assert!(fs::read_to_string(svg).unwrap().starts_with("<svg"));
    let output = server.stop();
    assert!(output.status.success(), "{output:?}");
    let run = fs::read_dir(&recorded).unwrap().next().unwrap().unwrap().path();
    let info: Value = serde_json::from_slice(&fs::read(run.join("run.json")).unwrap()).unwrap();
    assert_eq!(info["status"]["state"], "finished");
    let seen = ultraep(&["trace", "info", run.join("loads.uet").to_str().unwrap(), "--json"]);
    assert!(seen.status.success(), "{seen:?}");
    let gone = ultraep(&[
        "loadtest",
        "--url",
        "http://127.0.0.1:9",
        "--rps",
        "5",
        "--seconds",
        "1",
        "--mix",
        &text,
        "--prompt-tokens",
        "20..40",
    ]);
    assert!(failure(&gone, 1).contains("no request was answered"));
}

#[test]
fn prefill_bench_gives_the_same_result_from_its_own_costs() {
    let trained = trained();
    let text = trained.folder.path().join("text.md").display().to_string();
    let (first, second) = (trained.folder.path().join("first.json"), trained.folder.path().join("second.json"));
    let svg = trained.folder.path().join("ttft.svg");
    let run = |output: &Path, more: &[&str]| {
        let load = "--ranks 4 --chunk 64 --min-quota 1 --prompts 6 --prompt-tokens 20..200 --requests 40 --rates 20,90";
        let mut arguments = vec!["prefill-bench", "--checkpoint", trained.run.to_str().unwrap(), "--mix", &text];
        arguments.extend(load.split(' '));
        arguments.extend(["--output", output.to_str().unwrap()]);
        arguments.extend(more);
        ultraep(&arguments)
    };
    let output = run(&first, &["--svg", svg.to_str().unwrap(), "--spot-check", "3"]);
    assert!(output.status.success(), "{output:?}");
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(table.contains("│ ultraep ") && table.contains("counts of 12 layers equal"), "{table}");
    assert!(fs::read_to_string(svg).unwrap().contains("</svg>"));
    let again = run(&second, &["--costs", first.to_str().unwrap()]);
    assert!(again.status.success(), "{again:?}");
    let read = |path: &Path| -> Value { serde_json::from_slice(&fs::read(path).unwrap()).unwrap() };
    let (first_result, second_result) = (read(&first), read(&second));
    assert_eq!(first_result["policies"], second_result["policies"]);
    assert_eq!(first_result["costs"], second_result["costs"]);
    let policies = first_result["policies"].as_array().unwrap();
    assert_eq!(policies.len(), 5);
    assert_eq!(policies[4]["share_of_ideal"], 1.0);
    // Costs belong to a model and a number of ranks.
    let other = run(&second, &["--costs", first.to_str().unwrap(), "--ranks", "2", "--chunk", "64"]);
    assert!(!other.status.success());
}

#[test]
fn wrong_input_is_one_line_and_exit_code_2() {
    let trained = trained();
    let run = trained.run.display().to_string();
    let cases: [(&[&str], &str); 7] = [
        (&["serve", "--checkpoint", "/nowhere"], "/nowhere"),
        (&["serve", "--checkpoint", &run, "--chunk", "3"], "chunk budget"),
        (&["serve", "--checkpoint", &run, "--policy", "ideal"], "ideal"),
        (&["serve", "--checkpoint", &run, "--ranks", "9"], "9"),
        (&["prefill-bench", "--checkpoint", &run, "--prompt-tokens", "9..3"], "9 to 3"),
        (&["loadtest", "--url", "ftp://here", "--rps", "1"], "ftp://here"),
        (&["loadtest", "--url", "http://here", "--rps", "0"], "allowed"),
    ];
    for (arguments, word) in cases {
        let error = failure(&ultraep(arguments), 2);
        assert!(error.contains(word), "{arguments:?}: {error}");
    }
}
