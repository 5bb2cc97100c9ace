//! A server under load for a long time: no error, no growth of memory, and a good end.
//!
//! ```text
//! capacity   requests that all come at once, until answering them takes long enough: prompt tokens that were answered in a
//!            second, over the tokens of a mean prompt
//! load       `share` of it, open loop, in windows; a window starts on time, whatever is left of the one before
//! meanwhile  resident memory four times a second, /health and /metrics once a second
//! judged     every answer complete; every /health and /metrics 200; memory of the last third against the second third
//!            ([`GROWTH_PERCENT_MAX`], [`GROWTH_KIB_MAX`]) from three minutes on; SIGTERM, and exit code 0
//! ```
//!
//! The drift of p95 TTFT is shown, not judged: the other work of a machine moves it.

mod load;
mod server;

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::memory::{absent, status_kib};
use crate::root;
use load::{Load, Rate, Sum};
use server::Server;

/// Arguments of the check.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// How long the load lasts
    #[arg(long, default_value_t = 30.0, value_parser = minutes)]
    minutes: f64,
    /// The load, as a share of the capacity that is measured first
    #[arg(long, default_value_t = 0.9, value_parser = share)]
    share: f64,
    /// A run folder of `ultraep train`; a small model is trained when there is none
    #[arg(long, value_name = "RUN")]
    checkpoint: Option<PathBuf>,
    /// The result as JSON on stdout
    #[arg(long)]
    json: bool,
}

fn within(text: &str, least: f64, most: f64) -> Result<f64, String> {
    let refuse = |_| format!("it must be a number from {least} to {most}");
    let number: f64 = text.parse().map_err(refuse)?;
    if (least..=most).contains(&number) { Ok(number) } else { Err(format!("allowed is {least} to {most}")) }
}

fn minutes(text: &str) -> Result<f64, String> {
    within(text, 0.25, 10_000.0)
}

fn share(text: &str) -> Result<f64, String> {
    within(text, 0.01, 1.0)
}

/// Growth of memory that is allowed from the second third to the last: 2% and 8 MiB. Every thread has an arena of its own, and
/// buffers for activations stay as large as the largest batch seen, so a rare batch may still add a little late. What is kept of
/// each request goes far beyond it: with the default model, the KV caches of three mean prompts do.
const GROWTH_PERCENT_MAX: u64 = 2;
/// See [`GROWTH_PERCENT_MAX`].
const GROWTH_KIB_MAX: u64 = 8 << 10;
/// Shorter runs show memory and do not judge it: buffers have not met all sizes yet.
const GROWTH_FROM: Duration = Duration::from_secs(180);
/// Time between two looks at memory.
const TICK: Duration = Duration::from_millis(250);
/// Ticks from one question for /health and /metrics to the next.
const ASK_TICKS: u64 = 4;

/// What came of it; the JSON document.
#[derive(Serialize)]
struct Outcome {
    schema: &'static str,
    checkpoint: PathBuf,
    share: f64,
    capacity_rps: f64,
    rps: f64,
    seconds: f64,
    requests: u64,
    errors: u64,
    /// Questions for /health and /metrics, and those that were not answered with 200.
    asked: u64,
    unanswered: u64,
    /// Median resident memory of each third, KiB.
    rss_kib: [u64; 3],
    rss_kib_most: u64,
    /// What the last third may have, KiB; none for a run that is too short to tell ([`GROWTH_FROM`]).
    rss_kib_allowed: Option<u64>,
    /// Median of the windows' p95 TTFT, of the second and the last third, in nanoseconds.
    ttft_p95_ns: [u64; 2],
    windows: Vec<Window>,
    /// What was not as it must be; empty when all was well.
    failures: Vec<String>,
}

#[derive(Serialize)]
struct Window {
    from_s: f64,
    requests: u64,
    finished: u64,
    errors: BTreeMap<String, u64>,
    ttft_p50_ns: u64,
    ttft_p95_ns: u64,
    tokens_per_s: f64,
    /// Median resident memory while it was sent, KiB.
    rss_kib: u64,
}

/// What was seen from outside while the load ran.
#[derive(Default)]
struct Seen {
    /// Time since the start of the load, and KiB.
    rss: Vec<(Duration, u64)>,
    asked: u64,
    unanswered: u64,
}

impl Seen {
    /// Median of what was seen between two times.
    fn rss_kib(&self, from: Duration, until: Duration) -> u64 {
        median(self.rss.iter().filter(|(at, _)| (from..until).contains(at)).map(|&(_, kib)| kib).collect())
    }
}

fn median(mut values: Vec<u64>) -> u64 {
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or(0)
}

/// Runs the check.
pub(crate) fn check(args: &Args) -> Result<(), String> {
    crate::cargo(["build", "--quiet", "--release", "--locked", "-p", "ultraep-cli"])?;
    let program = root().join("target/release/ultraep");
    let checkpoint = match &args.checkpoint {
        Some(run) => run.clone(),
        None => train(&program)?,
    };
    let mut server = Server::start(&program, &checkpoint)?;
    eprintln!("{} serves {}", server.url(), checkpoint.display());
    let asked = Duration::from_secs_f64(args.minutes * 60.0);
    let length = Duration::from_secs((asked / 4).as_secs().clamp(1, 60));
    // In whole windows.
    let windows = asked.div_duration_f64(length).round() as u32;
    let total = length * windows;
    let load = Load { program, url: server.url().into() };
    let capacity = load.capacity((total / 20).clamp(Duration::from_secs(2), Duration::from_secs(30)))?;
    let rate = capacity.times(args.share);
    eprintln!("capacity: {capacity} requests/s; the load is {rate} for {:.0} s", total.as_secs_f64());
    let watched = drive(&mut server, &load, rate, length, windows)?;
    let ended = server.stop();
    let outcome = judge(args, checkpoint, [capacity, rate], total, watched, ended);
    report(args, &outcome)
}

/// A model of the default size, trained for a few steps.
fn train(program: &Path) -> Result<PathBuf, String> {
    let runs = root().join("target/serve-soak");
    std::fs::remove_dir_all(&runs).or_else(absent).map_err(|error| format!("{}: {error}", runs.display()))?;
    eprintln!("training a model of a few steps");
    let mut command = Command::new(program);
    command.args(["train", "--ranks", "4", "--steps", "4", "--compare-every", "0", "--no-reference", "--runs"]);
    crate::run(command.arg(&runs).stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()))?;
    let mut made = std::fs::read_dir(&runs).map_err(|error| format!("{}: {error}", runs.display()))?;
    made.find_map(|entry| Some(entry.ok()?.path())).ok_or_else(|| format!("{}: no run in it", runs.display()))
}

/// Sends window after window, each on time, and watches the server.
fn drive(
    server: &mut Server,
    load: &Load,
    rate: Rate,
    length: Duration,
    count: u32,
) -> Result<(Seen, Vec<Window>), String> {
    let mut seen = Seen::default();
    let (mut running, mut windows) = (VecDeque::new(), Vec::new());
    let start = Instant::now();
    eprintln!("  from s    sent  finished  errors  TTFT p50 / p95 ms  tokens/s  RSS MiB");
    for tick in 0.. {
        let now = start.elapsed();
        let started = (windows.len() + running.len()) as u32;
        if started < count && now >= length * started {
            running.push_back(load.start(rate, length, u64::from(started) + 1)?);
        }
        while running.front_mut().is_some_and(load::Running::is_over) {
            let Some(over) = running.pop_front() else { break };
            let from = length * windows.len() as u32;
            let window = Window::of(from, over.finish()?, seen.rss_kib(from, from + length));
            window.show();
            windows.push(window);
        }
        if windows.len() as u32 == count {
            break;
        }
        let rss_kib = status_kib(server.id(), "VmRSS:").ok_or("the server's memory could not be read from /proc")?;
        if now < length * count {
            seen.rss.push((now, rss_kib));
        }
        server.check_runs()?;
        if tick % ASK_TICKS == 0 {
            for path in ["/health", "/metrics"] {
                seen.asked += 1;
                if let Err(error) = server.ask(path) {
                    eprintln!("{path}: {error}");
                    seen.unanswered += 1;
                }
            }
        }
        std::thread::sleep((TICK * (tick as u32 + 1)).saturating_sub(start.elapsed()).min(TICK));
    }
    Ok((seen, windows))
}

impl Window {
    fn of(from: Duration, sum: Sum, rss_kib: u64) -> Self {
        let Sum { requests, finished, errors, ttft, tokens_per_s, .. } = sum;
        let (ttft_p50_ns, ttft_p95_ns) = (ttft.p50_ns, ttft.p95_ns);
        let from_s = from.as_secs_f64();
        Self { from_s, requests, finished, errors, ttft_p50_ns, ttft_p95_ns, tokens_per_s, rss_kib }
    }

    fn show(&self) {
        eprintln!(
            "{:>8.0} {:>7} {:>9} {:>7} {:>9.0} / {:>5.0} {:>9.0} {:>8.1}",
            self.from_s,
            self.requests,
            self.finished,
            self.requests - self.finished,
            self.ttft_p50_ns as f64 * 1e-6,
            self.ttft_p95_ns as f64 * 1e-6,
            self.tokens_per_s,
            mib(self.rss_kib),
        );
    }
}

fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

fn judge(
    args: &Args,
    checkpoint: PathBuf,
    [capacity, rate]: [Rate; 2],
    total: Duration,
    (seen, windows): (Seen, Vec<Window>),
    ended: Result<(), String>,
) -> Outcome {
    let third = total / 3;
    let rss_kib = [0, 1, 2].map(|i| seen.rss_kib(third * i, third * (i + 1)));
    let p95 = |third: usize| {
        let range = windows.len() * third / 3..windows.len() * (third + 1) / 3;
        median(windows[range].iter().map(|w| w.ttft_p95_ns).collect())
    };
    let mut outcome = Outcome {
        schema: "ultraep.serve-soak/1",
        checkpoint,
        share: args.share,
        capacity_rps: capacity.per_s(),
        rps: rate.per_s(),
        seconds: total.as_secs_f64(),
        requests: windows.iter().map(|w| w.requests).sum(),
        errors: windows.iter().map(|w| w.requests - w.finished).sum(),
        asked: seen.asked,
        unanswered: seen.unanswered,
        rss_kib,
        rss_kib_most: seen.rss.iter().map(|&(_, kib)| kib).max().unwrap_or(0),
        rss_kib_allowed: (total >= GROWTH_FROM)
            .then_some(rss_kib[1] + rss_kib[1] * GROWTH_PERCENT_MAX / 100 + GROWTH_KIB_MAX),
        ttft_p95_ns: [p95(1), p95(2)],
        windows,
        failures: Vec::new(),
    };
    let failures = &mut outcome.failures;
    if outcome.errors > 0 {
        failures.push(format!("{} of {} requests were not answered to the end", outcome.errors, outcome.requests));
    }
    if outcome.unanswered > 0 {
        failures.push(format!("{} of {} questions for /health and /metrics failed", outcome.unanswered, outcome.asked));
    }
    if let Some(allowed) = outcome.rss_kib_allowed.filter(|allowed| outcome.rss_kib[2] > *allowed) {
        let [_, second, last] = outcome.rss_kib.map(mib);
        failures.push(format!("memory grew from {second:.1} to {last:.1} MiB: allowed are {:.1}", mib(allowed)));
    }
    failures.extend(ended.err());
    outcome
}

fn report(args: &Args, outcome: &Outcome) -> Result<(), String> {
    if args.json {
        println!("{}", serde_json::to_string_pretty(outcome).map_err(|error| error.to_string())?);
    } else {
        let [first, second, last] = outcome.rss_kib.map(mib);
        let allowed =
            outcome.rss_kib_allowed.map_or("not judged in so short a run".into(), |kib| format!("{:.1}", mib(kib)));
        let [p95, p95_last] = outcome.ttft_p95_ns.map(|ns| ns as f64 * 1e-6);
        println!(
            "{} requests in {:.0} s at {:.2} requests/s ({:.0}% of {:.2}): {} errors; {} of {} questions failed\n\
             resident memory by thirds: {first:.1}, {second:.1}, {last:.1} MiB, at most {:.1}; allowed for the last: {allowed}\n\
             p95 TTFT, median of windows: {p95:.0} ms in the second third, {p95_last:.0} ms in the last",
            outcome.requests,
            outcome.seconds,
            outcome.rps,
            outcome.share * 100.0,
            outcome.capacity_rps,
            outcome.errors,
            outcome.unanswered,
            outcome.asked,
            mib(outcome.rss_kib_most),
        );
    }
    if outcome.failures.is_empty() { Ok(()) } else { Err(outcome.failures.join("; ")) }
}
