//! Load on the server: `ultraep loadtest`, a process for each window.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::Deserialize;

/// Requests in a thousand seconds, the unit of `ultraep loadtest`.
#[derive(Clone, Copy)]
pub(super) struct Rate(u64);

impl Rate {
    fn of(per_s: f64) -> Self {
        Self(((per_s * 1e3) as u64).max(1))
    }

    pub(super) fn per_s(self) -> f64 {
        self.0 as f64 * 1e-3
    }

    pub(super) fn times(self, share: f64) -> Self {
        Self::of(self.per_s() * share)
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.3}", self.per_s())
    }
}

/// What `ultraep loadtest` says of one rate.
#[derive(Deserialize)]
pub(super) struct Sum {
    pub(super) requests: u64,
    pub(super) finished: u64,
    pub(super) errors: BTreeMap<String, Failed>,
    pub(super) ttft: Ttft,
    pub(super) tokens_per_s: f64,
    answered_ns: u64,
    #[serde(skip)]
    mean_tokens: f64,
}

/// Requests that failed in one way.
#[derive(Debug, Deserialize)]
pub(super) struct Failed {
    pub(super) count: u64,
}

/// Time to the first token, in nanoseconds.
#[derive(Deserialize)]
pub(super) struct Ttft {
    pub(super) p50_ns: u64,
    pub(super) p95_ns: u64,
}

#[derive(Deserialize)]
struct Document {
    pool: Pool,
    rates: Vec<Sum>,
}

/// The prompts that were drawn from.
#[derive(Deserialize)]
struct Pool {
    prompts: u64,
    tokens: u64,
}

/// Lengths of prompts. Many prompts, so that every window has about the same work.
const PROMPTS: [&str; 4] = ["--prompts", "1000", "--prompt-tokens", "128..4096"];
/// Most requests that are sent at once: each takes a file descriptor here and there.
const BURST_MAX: u64 = 512;

/// Sends load.
pub(super) struct Load {
    pub(super) program: PathBuf,
    pub(super) url: String,
    pub(super) key: String,
}

/// A window that is being sent.
pub(super) struct Running {
    child: Child,
    output: JoinHandle<std::io::Result<Vec<u8>>>,
}

impl Load {
    /// Requests that are answered in a second while others wait: of bursts, each twice as large, the first whose answers take
    /// `least` or more. Long prompts are rare and are much of the work, so a burst's tokens are counted, not its requests.
    pub(super) fn capacity(&self, least: Duration) -> Result<Rate, String> {
        let mut burst = 8;
        loop {
            let sum = self.start(Rate(burst * 1000), Duration::from_secs(1), 0)?.finish()?;
            if sum.finished < sum.requests {
                return Err(format!("{} of {burst} requests at once: {:?}", sum.requests - sum.finished, sum.errors));
            }
            let seconds = sum.answered_ns as f64 * 1e-9;
            eprintln!("{burst} requests at once: {seconds:.1} s");
            if seconds >= least.as_secs_f64() || burst == BURST_MAX {
                return Ok(Rate::of(sum.tokens_per_s / sum.mean_tokens));
            }
            burst *= 2;
        }
    }

    /// Starts to send `rate` for `length`, in whole seconds; `seed` names prompts and arrivals.
    pub(super) fn start(&self, rate: Rate, length: Duration, seed: u64) -> Result<Running, String> {
        let (rate, seconds) = (rate.to_string(), length.as_secs().max(1).to_string());
        let mut command = Command::new(&self.program);
        command.args(["loadtest", "--url", &self.url, "--rps", &rate, "--seconds", &seconds, "--json"]);
        command.env("ULTRAEP_API_KEY", &self.key);
        command.args(PROMPTS).args(["--seed", &seed.to_string()]);
        let spawned = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
        let mut child = spawned.map_err(|error| format!("{}: {error}", self.program.display()))?;
        let stdout = child.stdout.take();
        let output = std::thread::spawn(move || {
            let mut text = Vec::new();
            stdout.map_or(Ok(0), |mut stdout| stdout.read_to_end(&mut text)).map(|_| text)
        });
        Ok(Running { child, output })
    }
}

impl Running {
    /// Whether all is answered.
    pub(super) fn is_over(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for the answers.
    pub(super) fn finish(mut self) -> Result<Sum, String> {
        let status = self.child.wait().map_err(|error| format!("ultraep loadtest: {error}"))?;
        let text = self.output.join().map_err(|_| "ultraep loadtest: its output is lost".to_string())?;
        let text = text.map_err(|error| format!("ultraep loadtest: {error}"))?;
        // One that had no answer at all says so and fails, but counts all the same.
        let document: Document =
            serde_json::from_slice(&text).map_err(|error| format!("ultraep loadtest: {status}: {error}"))?;
        let mean_tokens = document.pool.tokens as f64 / document.pool.prompts as f64;
        let sum = document.rates.into_iter().next().ok_or("ultraep loadtest: it names no rate")?;
        Ok(Sum { mean_tokens, ..sum })
    }
}
