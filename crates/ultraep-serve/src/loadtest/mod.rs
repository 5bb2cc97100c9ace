//! A load test against a server of completions: open-loop Poisson arrivals, time to the first token, errors, goodput.
//!
//! Open loop: requests are sent when they arrive, whatever became of those before, and their time counts from the arrival that
//! was drawn. A client that cannot keep up shows in the times; it does not hide them.
//!
//! Throughput is what was answered over the time that it really took, not the time that was planned: from the first arrival drawn to
//! the last whole answer. Requests that failed are counted apart, by kind and with their own times; they are in no figure of the
//! answers.

mod client;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use ultraep_schedule::{ArrivalSpec, TtftSummary, arrivals};

pub use client::{Target, TargetError};

use crate::bench::Prompt;
use client::{Failure, ask};

/// Name and version of the document.
pub const LOADTEST_SCHEMA: &str = "ultraep.loadtest/2";

/// One rate of a load test.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadSpec {
    /// Requests in a thousand seconds.
    pub requests_per_1000_s: u64,
    /// How many requests.
    pub requests: usize,
    /// Tokens that each asks for; at least 1, or there is no first token.
    pub new_tokens: u32,
    /// Time to the first token that is good enough, in milliseconds.
    pub ttft_limit_ms: u64,
    /// After this long a request is given up, in milliseconds.
    pub timeout_ms: u64,
    /// Names the arrivals.
    pub seed: u64,
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LoadResult {
    /// Requests per second that were planned.
    pub rps: f64,
    /// Requests per second that were really sent: all of them, over `sending_ns`.
    pub sent_rps: f64,
    /// Requests sent.
    pub requests: usize,
    /// Requests answered to the end.
    pub finished: usize,
    /// Requests that failed, by kind: `429`, `503`, other statuses, `timeout`, `connection`, `error in the stream`,
    /// `broken answer`.
    pub errors: BTreeMap<String, Failed>,
    /// Time to the first token of finished requests.
    pub ttft: TtftSummary,
    /// Finished requests per second, over `answered_ns`.
    pub finished_rps: f64,
    /// Prompt tokens per second of finished requests, over `answered_ns`.
    pub tokens_per_s: f64,
    /// Finished requests per second whose first token came within the limit, over `answered_ns`.
    pub goodput_rps: f64,
    /// Time that the arrivals were planned to take, in nanoseconds.
    pub planned_ns: u64,
    /// From the start to the last request sent, in nanoseconds.
    pub sending_ns: u64,
    /// From the start to the last whole answer, in nanoseconds.
    pub answered_ns: u64,
    /// From the start until nothing was open any more, failures too, in nanoseconds.
    pub elapsed_ns: u64,
}

/// Failures of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failed {
    /// How many.
    pub count: usize,
    /// Mean time from arrival to failure, in nanoseconds.
    pub mean_ns: u64,
    /// Longest, in nanoseconds.
    pub longest_ns: u64,
}

impl Failed {
    fn add(&mut self, ns: u64) {
        let sum = u128::from(self.mean_ns) * self.count as u128 + u128::from(ns);
        self.count += 1;
        // A mean of 64-bit numbers has 64 bits.
        self.mean_ns = (sum / self.count as u128) as u64;
        self.longest_ns = self.longest_ns.max(ns);
    }
}

impl LoadResult {
    /// Requests that failed.
    pub fn failed(&self) -> usize {
        self.errors.values().map(|failed| failed.count).sum()
    }
}

/// A request that is over.
struct Over {
    outcome: Result<Finished, Failure>,
    /// From arrival to the end of it.
    took: Duration,
    at: Instant,
}

struct Finished {
    ttft_ns: u64,
    prompt_tokens: usize,
}

fn ns(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Takes in what is over.
struct Sum {
    start: Instant,
    limit_ns: u64,
    result: LoadResult,
    times: Vec<u64>,
    tokens: usize,
    good: usize,
}

impl Sum {
    fn take(&mut self, over: Over) {
        match over.outcome {
            Ok(Finished { ttft_ns, prompt_tokens }) => {
                self.result.finished += 1;
                self.result.answered_ns = self.result.answered_ns.max(ns(over.at - self.start));
                self.tokens += prompt_tokens;
                self.good += usize::from(ttft_ns <= self.limit_ns);
                self.times.push(ttft_ns);
            }
            Err(failure) => self.result.errors.entry(failure.to_string()).or_default().add(ns(over.took)),
        }
    }

    fn finish(self) -> LoadResult {
        let mut result = self.result;
        result.elapsed_ns = ns(self.start.elapsed());
        let per_s = |count: usize, ns: u64| if ns > 0 { count as f64 / (ns as f64 * 1e-9) } else { 0.0 };
        result.sent_rps = per_s(result.requests, result.sending_ns);
        result.finished_rps = per_s(result.finished, result.answered_ns);
        result.tokens_per_s = per_s(self.tokens, result.answered_ns);
        result.goodput_rps = per_s(self.good, result.answered_ns);
        result.ttft = TtftSummary::of(self.times);
        result
    }
}

/// Sends the requests of `spec`, with prompts of `pool`, to `target`. Runs on the current runtime. `done` hears how many
/// requests are over.
pub async fn run(target: &Target, pool: &Arc<Vec<Prompt>>, spec: &LoadSpec, done: &dyn Fn(usize)) -> LoadResult {
    let lengths: Vec<u32> = pool.iter().map(|p| p.tokens.len() as u32).collect();
    let process = ArrivalSpec {
        requests: spec.requests,
        mean_gap_ns: ArrivalSpec::mean_gap_ns(spec.requests_per_1000_s),
        new_tokens: spec.new_tokens.max(1),
        seed: spec.seed,
    };
    let start = Instant::now();
    let result = LoadResult {
        rps: spec.requests_per_1000_s as f64 * 1e-3,
        planned_ns: process.mean_gap_ns.saturating_mul(spec.requests as u64),
        ..LoadResult::default()
    };
    let limit_ns = spec.ttft_limit_ms.saturating_mul(1_000_000);
    let mut sum = Sum { start, limit_ns, result, times: Vec::new(), tokens: 0, good: 0 };
    let mut tasks = tokio::task::JoinSet::new();
    let mut over = 0;
    let mut take = |sum: &mut Sum, joined: Result<Over, tokio::task::JoinError>| {
        // A task that panicked has no answer.
        let lost = |_| Over { outcome: Err(Failure::Broken), took: Duration::ZERO, at: Instant::now() };
        sum.take(joined.unwrap_or_else(lost));
        over += 1;
        done(over);
    };
    for arrival in arrivals(&process, &lengths) {
        let due = start + Duration::from_nanos(arrival.at_ns);
        tokio::time::sleep_until(due.into()).await;
        let (target, pool, limit) = (target.clone(), pool.clone(), Duration::from_millis(spec.timeout_ms));
        sum.result.requests += 1;
        sum.result.sending_ns = ns(start.elapsed());
        tasks.spawn(async move {
            let prompt = &pool[arrival.prompt].tokens;
            let answer = tokio::time::timeout(limit, ask(&target, prompt, arrival.new_tokens)).await;
            let finished = |first: Instant| Finished {
                ttft_ns: ns(first.saturating_duration_since(due)),
                prompt_tokens: prompt.len(),
            };
            let outcome = answer.unwrap_or(Err(Failure::Timeout)).map(finished);
            let at = Instant::now();
            Over { outcome, took: at.saturating_duration_since(due), at }
        });
        while let Some(joined) = tasks.try_join_next() {
            take(&mut sum, joined);
        }
    }
    while let Some(joined) = tasks.join_next().await {
        take(&mut sum, joined);
    }
    sum.finish()
}
