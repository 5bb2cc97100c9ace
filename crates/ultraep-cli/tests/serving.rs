//! `serve`, `loadtest` and `prefill-bench` as a user runs them, on a checkpoint of `train`.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
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
        Self::with(trained, &["--runs", runs.to_str().unwrap()], &[])
    }

    fn with(trained: &Trained, options: &[&str], variables: &[(&str, &str)]) -> Self {
        let mut command = Command::new(cargo_bin("ultraep"));
        command.args(["serve", "--ranks", "4", "--port", "0", "--context", "600", "--min-quota", "1", "--checked"]);
        command.arg("--checkpoint").arg(&trained.run).args(options).envs(variables.iter().copied());
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let url = line.split(' ').next().unwrap_or_default().to_string();
        assert!(url.starts_with("http://127.0.0.1:") || url.starts_with("http://[::1]:"), "{line:?}");
        Self { child, url }
    }

    /// Head and body of an answer to a request with these lines in its head.
    fn ask(&self, path: &str, lines: &str) -> String {
        let authority = self.url.trim_start_matches("http://").trim_end_matches("/v1");
        let mut stream = TcpStream::connect(authority).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nConnection: close\r\n{lines}\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    fn signal(&self, name: &str) {
        let told = Command::new("kill").args([name, &self.child.id().to_string()]).status().unwrap();
        assert!(told.success());
    }

    /// Status and body of a GET.
    fn get(&self, path: &str) -> (u16, String) {
        let address = self.url.trim_start_matches("http://").split('/').next().unwrap();
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        (answer.split(' ').nth(1).unwrap().parse().unwrap(), answer)
    }

    fn stop(mut self) -> Output {
        self.signal("-TERM");
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
    assert_eq!(document["schema"], "ultraep.loadtest/2");
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

/// The key of a file or of the environment, names beside the host's, and a line for every request where it was asked for.
#[test]
fn keys_hosts_and_the_access_log_are_as_told() {
    let trained = trained();
    let folder = trained.folder.path();
    let (key, log) = (folder.join("key"), folder.join("access.log"));
    fs::write(&key, "of-the-file\n").unwrap();
    let of_file = ["--api-key-file", key.to_str().unwrap(), "--access-log", log.to_str().unwrap()];
    let more = ["--host", "localhost", "--allow-host", "gpu7,balancer.example"];
    let server = Server::with(&trained, &[&of_file[..], &more].concat(), &[("ULTRAEP_API_KEY", "of-the-environment")]);
    for (host, key, status) in [
        ("localhost", "of-the-file", "200"),
        ("balancer.example:80", "of-the-file", "200"),
        ("evil.example", "of-the-file", "421"),
        ("localhost", "of-the-environment", "401"),
    ] {
        let answer = server.ask(
            "/v1/models",
            &format!("Host: {host}\r\nAuthorization: bearer {key}\r\nX-Request-Id: {host}-{key}\r\n"),
        );
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{host} {key}: {answer}");
    }
    let page = server.ask("/", "Host: gpu7\r\n");
    assert!(page.contains("up to 600 tokens") && page.contains("curl http://gpu7/v1/completions"), "{page}");
    let output = server.stop();
    assert!(output.status.success(), "{output:?}");
    let lines = fs::read_to_string(&log).unwrap();
    assert_eq!(lines.lines().count(), 5, "{lines}");
    assert!(lines.contains(" id=evil.example-of-the-file ") && lines.contains(" path=/ status=200 "), "{lines}");
    assert!(!String::from_utf8_lossy(&output.stderr).contains("status="), "{output:?}");

    let server = Server::with(&trained, &[], &[("ULTRAEP_API_KEY", "of-the-environment")]);
    assert!(server.ask("/v1/models", "Host: localhost\r\n").starts_with("HTTP/1.1 401 "));
    let output = server.stop();
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(told.contains(" path=/v1/models status=401 "), "{told}");

    let server = Server::with(&trained, &["--quiet", "--api-key", "seen"], &[]);
    assert!(server.ask("/v1/models", "Host: localhost\r\nAuthorization: Bearer seen\r\n").starts_with("HTTP/1.1 200 "));
    let told = String::from_utf8(server.stop().stderr).unwrap();
    assert!(told.contains("--api-key-file") && !told.contains("status="), "{told}");
}

#[test]
fn an_empty_or_unreadable_key_is_refused_at_the_start() {
    let trained = trained();
    let folder = trained.folder.path();
    let (empty, long, none) = (folder.join("empty"), folder.join("long"), folder.join("none"));
    fs::write(&empty, " \n").unwrap();
    fs::write(&long, "k".repeat(5000)).unwrap();
    let run = |arguments: &[&str], variables: &[(&str, &str)]| {
        let mut command = Command::new(cargo_bin("ultraep"));
        command.args(["serve", "--port", "0", "--checkpoint"]).arg(&trained.run).args(arguments);
        command.envs(variables.iter().copied()).stdin(Stdio::null()).output().unwrap()
    };
    let file = |path: &Path| run(&["--api-key-file", path.to_str().unwrap()], &[]);
    for (output, words) in [
        (file(&empty), ["empty", "API key is empty"]),
        (file(&long), ["long", "4096 bytes"]),
        (file(&none), ["none", "No such file"]),
        (run(&["--api-key", ""], &[]), ["--api-key", "API key is empty"]),
        (run(&["--api-key", "a b"], &[]), ["--api-key", "visible ASCII"]),
        (run(&[], &[("ULTRAEP_API_KEY", "")]), ["ULTRAEP_API_KEY", "API key is empty"]),
    ] {
        let error = failure(&output, 2);
        assert!(words.iter().all(|word| error.contains(word)), "{words:?}: {error}");
    }
    let both = run(&["--api-key", "a", "--api-key-file", "b"], &[]);
    assert_eq!(both.status.code(), Some(2));
    let nowhere = run(&["--host", "no.such.host.invalid"], &[]);
    assert!(failure(&nowhere, 2).contains("no.such.host.invalid"));
}

/// A request is under way, for which the first signal waits; the second does not.
#[test]
fn a_second_signal_ends_the_server_at_once() {
    let trained = trained();
    let mut server = Server::with(&trained, &["--quiet"], &[]);
    let authority = server.url.trim_start_matches("http://").trim_end_matches("/v1").to_string();
    // A body that does not come keeps a connection busy for 30 s.
    let mut stream = TcpStream::connect(&authority).unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n";
    write!(stream, "{head}Content-Length: 100\r\nExpect: 100-continue\r\n\r\n").unwrap();
    let mut told = [0; 25];
    stream.read_exact(&mut told).unwrap();
    assert!(told.starts_with(b"HTTP/1.1 100 "));
    let signal = |name: &str, server: &Server| {
        assert!(Command::new("kill").args([name, &server.child.id().to_string()]).status().unwrap().success());
    };
    signal("-INT", &server);
    // It has heard the first when it takes no connection any more.
    let since = Instant::now();
    while TcpStream::connect(&authority).is_ok() {
        assert!(since.elapsed() < Duration::from_secs(20), "it still listens");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(server.child.try_wait().unwrap().is_none(), "it did not wait for the request");
    signal("-TERM", &server);
    let since = Instant::now();
    let status = loop {
        if let Some(status) = server.child.try_wait().unwrap() {
            break status;
        }
        // Far less than the 30 s that the body may take, also on a busy machine.
        assert!(since.elapsed() < Duration::from_secs(15), "it does not end");
        std::thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(status.code(), Some(1));
}

#[test]
fn a_server_that_was_suspended_says_so_and_loses_no_rank() {
    let trained = trained();
    let runs = trained.folder.path().join("suspended");
    let server = Server::with(&trained, &["--runs", runs.to_str().unwrap(), "--timeout-s", "3"], &[]);
    let since = Instant::now();
    while server.get("/health").0 != 200 {
        assert!(since.elapsed() < Duration::from_secs(60), "it does not start");
        std::thread::sleep(Duration::from_millis(20));
    }
    // As by Ctrl-Z, for longer than any rank may be silent.
    server.signal("-STOP");
    std::thread::sleep(Duration::from_secs(7));
    server.signal("-CONT");
    for _ in 0..40 {
        let (status, answer) = server.get("/health");
        assert_eq!(status, 200, "{answer}");
        std::thread::sleep(Duration::from_millis(50));
    }
    let (_, metrics) = server.get("/metrics");
    assert!(metrics.contains("ultraep_restarts_total 0\n"), "{metrics}");
    let output = server.stop();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && error.contains("was suspended for") && !error.contains("lost"), "{error}");
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
    // 40 requests do not fill the queue: bounds, and nothing made of them.
    for policy in policies {
        assert!(policy["bound"] == "found" || policy["share_of_ideal"].is_null(), "{policy}");
    }
    assert_eq!(policies[4]["bound"], "at_least");
    assert!(policies.iter().all(|p| p["share_of_ideal"].is_null()), "{policies:?}");
    assert!(table.contains("ideal: not saturated: at least ") && !table.contains("100.0%"), "{table}");
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
