//! A server under test: a process of its own.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::memory::absent;

/// Longest wait for an answer to /health and /metrics.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// Longest wait for its end: the server itself gives what it admitted 30 s.
const END_MAX: Duration = Duration::from_secs(60);

/// What clients must show.
const KEY: &str = "a-key-of-this-check";
/// `ultraep serve` on a free port. It is killed when this is dropped before its end.
pub(crate) struct Server {
    child: Child,
    url: String,
    model: String,
    /// Its access log.
    log: PathBuf,
}

/// What the server counted of itself.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Counted {
    /// Times the ranks were lost.
    pub(crate) restarts: u64,
    /// Requests that ended with them.
    pub(crate) lost: u64,
}

impl Server {
    /// Starts it with these options beside its own, and waits until it is healthy. Its access log goes to `log`.
    pub(crate) fn start(program: &Path, checkpoint: &Path, log: &Path, options: &[&str]) -> Result<Self, String> {
        std::fs::remove_file(log).or_else(absent).map_err(|error| format!("{}: {error}", log.display()))?;
        let mut command = Command::new(program);
        command.args(["serve", "--port", "0", "--checkpoint"]).arg(checkpoint).arg("--access-log").arg(log);
        command.args(options).env("ULTRAEP_API_KEY", KEY);
        let spawned = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
        let mut child = spawned.map_err(|error| format!("{}: {error}", program.display()))?;
        let stdout = child.stdout.take();
        let mut server = Self { child, url: String::new(), model: String::new(), log: log.into() };
        let mut line = String::new();
        if let Some(stdout) = stdout {
            BufReader::new(stdout).read_line(&mut line).map_err(|error| format!("the server's output: {error}"))?;
        }
        match line.split_once("/v1 ") {
            Some((url, rest)) => {
                server.url = url.into();
                server.model = rest.split_whitespace().nth(1).unwrap_or_default().into();
            }
            None => return Err("the server did not start".into()),
        }
        let since = Instant::now();
        while let Err(error) = server.ask("/health") {
            server.check_runs()?;
            if since.elapsed() > END_MAX {
                return Err(format!("/health: {error}"));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(server)
    }

    /// Where it listens, `http://HOST:PORT`.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// The model's name.
    pub(crate) fn model(&self) -> &str {
        &self.model
    }

    /// Its key.
    pub(crate) fn key(&self) -> &'static str {
        KEY
    }

    /// Its access log.
    pub(crate) fn log(&self) -> &Path {
        &self.log
    }

    /// `HOST:PORT`.
    pub(crate) fn address(&self) -> &str {
        self.url.trim_start_matches("http://")
    }

    /// Its process.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// An error when it has ended.
    pub(crate) fn check_runs(&mut self) -> Result<(), String> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => Err(format!("the server has ended: {status}")),
            Err(error) => Err(format!("the server: {error}")),
        }
    }

    /// Asks for `path`; an error unless the answer is 200.
    pub(crate) fn ask(&self, path: &str) -> Result<(), String> {
        let answer = self.get(path).map_err(|error| error.to_string())?;
        let status = answer.split(|&byte| byte == b' ').nth(1).unwrap_or_default();
        if status == b"200" { Ok(()) } else { Err(format!("status {:?}", String::from_utf8_lossy(status))) }
    }

    /// Its metrics in Prometheus' text format.
    pub(crate) fn metrics(&self) -> Result<String, String> {
        let answer = self.get("/metrics").map_err(|error| format!("/metrics: {error}"))?;
        let end = answer.windows(4).position(|w| w == b"\r\n\r\n").ok_or("/metrics: no answer")?;
        Ok(String::from_utf8_lossy(&answer[end + 4..]).into_owned())
    }

    /// What it counted of itself so far.
    pub(crate) fn counted(&self) -> Result<Counted, String> {
        let text = self.metrics()?;
        let value = |series: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(series)?.trim().parse::<f64>().ok());
            line.map(|value| value as u64).ok_or_else(|| format!("/metrics: there is no {series}"))
        };
        let lost = value("ultraep_requests_total{outcome=\"Lost\"}")?;
        Ok(Counted { restarts: value("ultraep_restarts_total")?, lost })
    }

    fn get(&self, path: &str) -> std::io::Result<Vec<u8>> {
        let mut stream = TcpStream::connect(self.address())?;
        stream.set_read_timeout(Some(ANSWER_MAX))?;
        stream.set_write_timeout(Some(ANSWER_MAX))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        Ok(answer)
    }

    /// SIGTERM, after which it must end with exit code 0.
    pub(crate) fn stop(mut self) -> Result<(), String> {
        crate::run(Command::new("kill").args(["-TERM", &self.id().to_string()]))?;
        let since = Instant::now();
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) if status.success() => return Ok(()),
                Ok(Some(status)) => return Err(format!("after SIGTERM the server ended with {status}")),
                Ok(None) if since.elapsed() > END_MAX => {
                    return Err(format!("{} s after SIGTERM the server still ran", END_MAX.as_secs()));
                }
                Ok(None) => std::thread::sleep(Duration::from_millis(50)),
                Err(error) => return Err(format!("the server: {error}")),
            }
        }
    }
}

/// Lines of an access log that tell of a 5xx; what /health says is judged by who asks for it.
pub(crate) fn failed(log: &Path) -> Result<Vec<String>, String> {
    let text = std::fs::read_to_string(log).map_err(|error| format!("{}: {error}", log.display()))?;
    let is_failure = |line: &&str| line.contains(" status=5") && !line.contains(" path=/health ");
    Ok(text.lines().filter(is_failure).map(str::to_string).collect())
}

impl Drop for Server {
    fn drop(&mut self) {
        // Nothing happens to one that has ended and was waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
