//! A server under load for a long time, hostile clients beside ordinary ones: no error, no restart, no growth of memory, and a
//! good end.
//!
//! ```text
//! capacity   requests that all come at once, until answering them takes long enough: prompt tokens that were answered in a
//!            second, over the tokens of a mean prompt
//! load       `share` of it, open loop, in windows; a window starts on time, whatever is left of the one before. For `hostile` of the
//!            load there are acts of other clients instead ([`hostile`]): malformed, beyond limits, slow, gone, ordinary
//! meanwhile  resident memory four times a second, /health and /metrics once a second
//! judged     every answer complete; every act answered as it may be; no 5xx in the access log; every /health and /metrics 200;
//!            no restart and no request lost, by the metrics; memory of the last third against the second third
//!            ([`GROWTH_PERCENT_MAX`], [`GROWTH_KIB_MAX`]) from three minutes on; SIGTERM while clients still hold connections,
//!            and exit code 0
//! ```
//!
//! The drift of p95 TTFT is shown, not judged: the other work of a machine moves it.

mod acts;
mod hostile;
mod load;
mod verdict;
mod wire;

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::memory::{absent, status_kib};
use crate::root;
use crate::server::{Server, failed};
use hostile::{Crowd, Tally};
use load::{Load, Rate, Sum};
use wire::Ground;

/// Arguments of the check.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// How long the load lasts
    #[arg(long, default_value_t = 30.0, value_parser = minutes)]
    minutes: f64,
    /// The load, as a share of the capacity that is measured first; on a machine with other work take little
    #[arg(long, default_value_t = 0.6, value_parser = share)]
    share: f64,
    /// Of the load, the share that is acts of hostile and odd clients; 0 for ordinary load alone
    #[arg(long, default_value_t = 0.4, value_parser = hostile)]
    hostile: f64,
    /// Names the acts
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// A run folder of `ultraep train`; a small model is trained when there is none
    #[arg(long, value_name = "RUN")]
    checkpoint: Option<PathBuf>,
    /// Use a build of this profile: `dev` is for trying this check
    #[arg(long, default_value = "release", value_parser = ["release", "dev"])]
    profile: String,
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

fn hostile(text: &str) -> Result<f64, String> {
    within(text, 0.0, 0.9)
}

/// Acts that are about as much work as a request of the load: most are refused at once.
const ACTS_PER_REQUEST: f64 = 3.0;
/// Time between two looks at memory.
const TICK: Duration = Duration::from_millis(250);
/// Ticks from one question for /health and /metrics to the next.
const ASK_TICKS: u64 = 4;

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
    crate::cargo(["build", "--quiet", "--profile", &args.profile, "--locked", "-p", "ultraep-cli"])?;
    let folder = if args.profile == "dev" { "debug" } else { "release" };
    let program = root().join("target").join(folder).join("ultraep");
    let checkpoint = match &args.checkpoint {
        Some(run) => run.clone(),
        None => train(&program)?,
    };
    let log = root().join("target/serve-soak.log");
    let mut server = Server::start(&program, &checkpoint, &log, &options())?;
    eprintln!("{} serves {}", server.url(), checkpoint.display());
    let asked = Duration::from_secs_f64(args.minutes * 60.0);
    let length = Duration::from_secs((asked / 4).as_secs().clamp(1, 60));
    // In whole windows.
    let windows = asked.div_duration_f64(length).round() as u32;
    let total = length * windows;
    let load = Load { program, url: server.url().into(), key: server.key().into() };
    let capacity = load.capacity((total / 20).clamp(Duration::from_secs(2), Duration::from_secs(30)))?;
    let rate = capacity.times(args.share * (1.0 - args.hostile));
    let acts = capacity.per_s() * args.share * args.hostile * ACTS_PER_REQUEST;
    let seconds = total.as_secs_f64();
    eprintln!("capacity: {capacity} requests/s; the load is {rate} and {acts:.2} acts a second for {seconds:.0} s");
    let mut crowd = Crowd::new(ground(&server)?, acts, args.seed);
    let (seen, windows) = drive(&mut server, &load, &mut crowd, rate, length, windows)?;
    let tally = crowd.finish();
    let counted = server.counted()?;
    let held = if args.hostile > 0.0 { acts::held(&ground(&server)?)? } else { Vec::new() };
    let log = server.log().to_path_buf();
    let ended = server.stop();
    drop(held);
    let failed = failed(&log)?;
    let watched = verdict::Watched { seen, windows, tally, counted, failed, ended };
    let outcome = verdict::judge(args, checkpoint, [capacity, rate], total, watched);
    verdict::report(args, &outcome)
}

/// Bounds of sequences: prompts of the load have up to 4096 tokens.
const CONTEXT: &str = "6144";
const NEW_TOKENS_MAX: &str = "32";

/// Room and time to wait for all that the measurement of capacity sends at once: as long as a request may take at all.
fn options() -> [&'static str; 8] {
    ["--queue", "4096", "--queue-timeout-s", "120", "--context", CONTEXT, "--max-tokens", NEW_TOKENS_MAX]
}

/// What clients must know of the server.
fn ground(server: &Server) -> Result<Ground, String> {
    let number = |text: &str| text.parse().map_err(|error| format!("{text}: {error}"));
    Ok(Ground {
        address: server.address().into(),
        key: server.key().into(),
        context: number(CONTEXT)?,
        new_tokens_max: number(NEW_TOKENS_MAX)?,
        stop: AtomicBool::new(false),
    })
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
    crowd: &mut Crowd,
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
        if now < length * count {
            crowd.go_on(now)?;
        }
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
        let errors = errors.into_iter().map(|(kind, failed)| (kind, failed.count)).collect();
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
