//! What is judged, and how it is told.

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use super::{Args, Rate, Seen, Tally, Window, median, mib};
use crate::server::Counted;

/// Growth of memory that is allowed from the second third to the last: 2% and 8 MiB. Every thread has an arena of its own, and
/// buffers for activations stay as large as the largest batch seen, so a rare batch may still add a little late. What is kept of
/// each request goes far beyond it: with the default model, the KV caches of three mean prompts do.
const GROWTH_PERCENT_MAX: u64 = 2;
/// See [`GROWTH_PERCENT_MAX`].
const GROWTH_KIB_MAX: u64 = 8 << 10;
/// Shorter runs show memory and do not judge it: buffers have not met all sizes yet.
const GROWTH_FROM: Duration = Duration::from_secs(180);

/// All that was seen.
pub(super) struct Watched {
    pub(super) seen: Seen,
    pub(super) windows: Vec<Window>,
    pub(super) tally: Tally,
    pub(super) counted: Counted,
    /// Lines of the access log that tell of a 5xx.
    pub(super) failed: Vec<String>,
    /// How the server ended.
    pub(super) ended: Result<(), String>,
}

/// What came of it; the JSON document.
#[derive(Serialize)]
pub(super) struct Outcome {
    schema: &'static str,
    checkpoint: PathBuf,
    share: f64,
    hostile_share: f64,
    capacity_rps: f64,
    rps: f64,
    seconds: f64,
    requests: u64,
    errors: u64,
    /// Questions for /health and /metrics, and those that were not answered with 200.
    asked: u64,
    unanswered: u64,
    /// Acts of hostile and odd clients.
    hostile: Tally,
    /// Times the ranks were lost, and requests that ended with them, by the server's metrics.
    restarts: u64,
    lost: u64,
    /// Answers with a 5xx, by the server's access log.
    failed: usize,
    /// Median resident memory of each third, KiB.
    rss_kib: [u64; 3],
    rss_kib_most: u64,
    /// Slope of resident memory over the last two thirds, by least squares, in KiB a minute.
    rss_kib_per_minute: f64,
    /// What the last third may have, KiB; none for a run that is too short to tell ([`GROWTH_FROM`]).
    rss_kib_allowed: Option<u64>,
    /// Median of the windows' p95 TTFT, of the second and the last third, in nanoseconds.
    ttft_p95_ns: [u64; 2],
    windows: Vec<Window>,
    /// What was not as it must be; empty when all was well.
    failures: Vec<String>,
}

/// Slope of the line of least squares through points; 0 for fewer than two.
fn slope(points: &[(f64, f64)]) -> f64 {
    let count = points.len().max(1) as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
    let (x, y) = (mean(|p| p.0), mean(|p| p.1));
    let (xy, xx) = points.iter().fold((0.0, 0.0), |(xy, xx), p| (xy + (p.0 - x) * (p.1 - y), xx + (p.0 - x).powi(2)));
    if xx > 0.0 { xy / xx } else { 0.0 }
}

pub(super) fn judge(
    args: &Args,
    checkpoint: PathBuf,
    [capacity, rate]: [Rate; 2],
    total: Duration,
    watched: Watched,
) -> Outcome {
    let Watched { seen, windows, tally, counted, failed, ended } = watched;
    let third = total / 3;
    let rss_kib = [0, 1, 2].map(|i| seen.rss_kib(third * i, third * (i + 1)));
    let late = seen.rss.iter().filter(|(at, _)| *at >= third).map(|&(at, kib)| (at.as_secs_f64() / 60.0, kib as f64));
    let late: Vec<_> = late.collect();
    let p95 = |third: usize| {
        let range = windows.len() * third / 3..windows.len() * (third + 1) / 3;
        median(windows[range].iter().map(|w| w.ttft_p95_ns).collect())
    };
    let mut outcome = Outcome {
        schema: "ultraep.serve-soak/2",
        checkpoint,
        share: args.share,
        hostile_share: args.hostile,
        capacity_rps: capacity.per_s(),
        rps: rate.per_s(),
        seconds: total.as_secs_f64(),
        requests: windows.iter().map(|w| w.requests).sum(),
        errors: windows.iter().map(|w| w.requests - w.finished).sum(),
        asked: seen.asked,
        unanswered: seen.unanswered,
        hostile: tally,
        restarts: counted.restarts,
        lost: counted.lost,
        failed: failed.len(),
        rss_kib,
        rss_kib_most: seen.rss.iter().map(|&(_, kib)| kib).max().unwrap_or(0),
        rss_kib_per_minute: slope(&late),
        rss_kib_allowed: (total >= GROWTH_FROM)
            .then_some(rss_kib[1] + rss_kib[1] * GROWTH_PERCENT_MAX / 100 + GROWTH_KIB_MAX),
        ttft_p95_ns: [p95(1), p95(2)],
        windows,
        failures: Vec::new(),
    };
    outcome.failures = failures(&outcome, &failed, ended);
    outcome
}

fn failures(outcome: &Outcome, failed: &[String], ended: Result<(), String>) -> Vec<String> {
    let mut failures = Vec::new();
    if outcome.errors > 0 {
        failures.push(format!("{} of {} requests were not answered to the end", outcome.errors, outcome.requests));
    }
    if outcome.unanswered > 0 {
        failures.push(format!("{} of {} questions for /health and /metrics failed", outcome.unanswered, outcome.asked));
    }
    if outcome.hostile.wrong > 0 {
        let first = outcome.hostile.examples.first().map_or("", String::as_str);
        failures.push(format!("{} of {} acts went wrong, first {first}", outcome.hostile.wrong, outcome.hostile.acts));
    }
    if outcome.restarts > 0 || outcome.lost > 0 {
        failures
            .push(format!("the ranks were lost {} times, and {} requests with them", outcome.restarts, outcome.lost));
    }
    if let Some(first) = failed.first() {
        failures.push(format!("{} answers with a 5xx, first {first}", failed.len()));
    }
    if let Some(allowed) = outcome.rss_kib_allowed.filter(|allowed| outcome.rss_kib[2] > *allowed) {
        let [_, second, last] = outcome.rss_kib.map(mib);
        failures.push(format!("memory grew from {second:.1} to {last:.1} MiB: allowed are {:.1}", mib(allowed)));
    }
    failures.extend(ended.err());
    failures
}

pub(super) fn report(args: &Args, outcome: &Outcome) -> Result<(), String> {
    if args.json {
        println!("{}", serde_json::to_string_pretty(outcome).map_err(|error| error.to_string())?);
    } else {
        print(outcome);
    }
    if outcome.failures.is_empty() { Ok(()) } else { Err(outcome.failures.join("; ")) }
}

fn print(outcome: &Outcome) {
    let [first, second, last] = outcome.rss_kib.map(mib);
    let allowed =
        outcome.rss_kib_allowed.map_or("not judged in so short a run".into(), |kib| format!("{:.1}", mib(kib)));
    let [p95, p95_last] = outcome.ttft_p95_ns.map(|ns| ns as f64 * 1e-6);
    for (act, outcomes) in &outcome.hostile.outcomes {
        let outcomes: Vec<_> = outcomes.iter().map(|(word, count)| format!("{count} x {word}")).collect();
        println!("{act:>32}  {}", outcomes.join(", "));
    }
    println!(
        "{} requests in {:.0} s at {:.2} requests/s ({:.0}% of {:.2}): {} errors; {} of {} questions failed\n\
         {} acts of hostile and odd clients: {} wrong, {} left out; {} restarts, {} requests lost, {} answers with a 5xx\n\
         resident memory by thirds: {first:.1}, {second:.1}, {last:.1} MiB, at most {:.1}; allowed for the last: {allowed}\n\
         slope over the last two thirds: {:+.1} KiB a minute\n\
         p95 TTFT, median of windows: {p95:.0} ms in the second third, {p95_last:.0} ms in the last",
        outcome.requests,
        outcome.seconds,
        outcome.rps,
        outcome.share * (1.0 - outcome.hostile_share) * 100.0,
        outcome.capacity_rps,
        outcome.errors,
        outcome.unanswered,
        outcome.asked,
        outcome.hostile.acts,
        outcome.hostile.wrong,
        outcome.hostile.left_out,
        outcome.restarts,
        outcome.lost,
        outcome.failed,
        mib(outcome.rss_kib_most),
        outcome.rss_kib_per_minute,
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slope_is_that_of_a_line() {
        let line: Vec<_> = (0..10).map(|i| (f64::from(i), 7.0 - 3.0 * f64::from(i))).collect();
        assert!((slope(&line) + 3.0).abs() < 1e-9);
        assert_eq!((slope(&line[..1]), slope(&[])), (0.0, 0.0));
    }
}
