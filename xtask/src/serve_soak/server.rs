//! The server under test: a process of its own.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Longest wait for an answer to /health and /metrics.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// Longest wait for its end: the server itself gives what it admitted 30 s.
const END_MAX: Duration = Duration::from_secs(60);

/// `ultraep serve` on a free port. It is killed when this is dropped before its end.
pub(super) struct Server {
    child: Child,
    url: String,
}

impl Server {
    /// Starts it, and waits until it says where it listens.
    pub(super) fn start(program: &Path, checkpoint: &Path) -> Result<Self, String> {
        let mut command = Command::new(program);
        // Room and time to wait for all that the measurement of capacity sends at once: as long as a request may take at all.
        command
            .args(["serve", "--port", "0", "--queue", "4096", "--queue-timeout-s", "120", "--checkpoint"])
            .arg(checkpoint);
        let spawned = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
        let mut child = spawned.map_err(|error| format!("{}: {error}", program.display()))?;
        let stdout = child.stdout.take();
        let mut server = Self { child, url: String::new() };
        let mut line = String::new();
        if let Some(stdout) = stdout {
            BufReader::new(stdout).read_line(&mut line).map_err(|error| format!("the server's output: {error}"))?;
        }
        match line.split_once("/v1 ") {
            Some((url, _)) => server.url = url.into(),
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
    pub(super) fn url(&self) -> &str {
        &self.url
    }

    /// Its process.
    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    /// An error when it has ended.
    pub(super) fn check_runs(&mut self) -> Result<(), String> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => Err(format!("the server has ended: {status}")),
            Err(error) => Err(format!("the server: {error}")),
        }
    }

    /// Asks for `path`; an error unless the answer is 200.
    pub(super) fn ask(&self, path: &str) -> Result<(), String> {
        let answer = self.get(path).map_err(|error| error.to_string())?;
        let status = answer.split(|&byte| byte == b' ').nth(1).unwrap_or_default();
        if status == b"200" { Ok(()) } else { Err(format!("status {:?}", String::from_utf8_lossy(status))) }
    }

    fn get(&self, path: &str) -> std::io::Result<Vec<u8>> {
        let mut stream = TcpStream::connect(self.url.trim_start_matches("http://"))?;
        stream.set_read_timeout(Some(ANSWER_MAX))?;
        stream.set_write_timeout(Some(ANSWER_MAX))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        Ok(answer)
    }

    /// SIGTERM, after which it must end with exit code 0.
    pub(super) fn stop(mut self) -> Result<(), String> {
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

impl Drop for Server {
    fn drop(&mut self) {
        // Nothing happens to one that has ended and was waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
