//! A load test against a server of completions: open-loop Poisson arrivals, time to the first token, errors, goodput.
//!
//! Open loop: requests are sent when they arrive, whatever became of those before, and their time counts from the arrival that
//! was drawn. A client that cannot keep up shows in the times; it does not hide them.

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
pub const LOADTEST_SCHEMA: &str = "ultraep.loadtest/1";

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
    /// Requests per second that were sent.
    pub rps: f64,
    /// Requests sent.
    pub requests: usize,
    /// Requests answered to the end.
    pub finished: usize,
    /// Errors by kind: `429`, `503`, other statuses, `timeout`, `connection`, `broken answer`.
    pub errors: BTreeMap<String, usize>,
    /// Time to the first token of finished requests.
    pub ttft: TtftSummary,
    /// Prompt tokens per second of finished requests.
    pub tokens_per_s: f64,
    /// Finished requests per second whose first token came within the limit.
    pub goodput_rps: f64,
    /// From the first arrival drawn to the last answer, in nanoseconds.
    pub elapsed_ns: u64,
}

struct Finished {
    ttft_ns: u64,
    prompt_tokens: usize,
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
    let mut tasks = tokio::task::JoinSet::new();
    let mut result = LoadResult { rps: spec.requests_per_1000_s as f64 * 1e-3, ..LoadResult::default() };
    let (mut times, mut tokens, mut good) = (Vec::new(), 0, 0);
    let mut take = |result: &mut LoadResult, outcome: Result<Finished, Failure>| match outcome {
        Ok(Finished { ttft_ns, prompt_tokens }) => {
            result.finished += 1;
            tokens += prompt_tokens;
            good += usize::from(ttft_ns <= spec.ttft_limit_ms.saturating_mul(1_000_000));
            times.push(ttft_ns);
        }
        Err(failure) => *result.errors.entry(failure.to_string()).or_default() += 1,
    };
    let mut over = 0;
    for arrival in arrivals(&process, &lengths) {
        tokio::time::sleep_until((start + Duration::from_nanos(arrival.at_ns)).into()).await;
        let (target, pool, limit) = (target.clone(), pool.clone(), Duration::from_millis(spec.timeout_ms));
        result.requests += 1;
        tasks.spawn(async move {
            let due = start + Duration::from_nanos(arrival.at_ns);
            let prompt = &pool[arrival.prompt].tokens;
            let answer = tokio::time::timeout(limit, ask(&target, prompt, arrival.new_tokens)).await;
            let first = answer.unwrap_or(Err(Failure::Timeout))?;
            let ttft_ns = first.saturating_duration_since(due).as_nanos() as u64;
            Ok(Finished { ttft_ns, prompt_tokens: prompt.len() })
        });
        while let Some(joined) = tasks.try_join_next() {
            take(&mut result, joined.unwrap_or(Err(Failure::Broken)));
            over += 1;
            done(over);
        }
    }
    while let Some(joined) = tasks.join_next().await {
        take(&mut result, joined.unwrap_or(Err(Failure::Broken)));
        over += 1;
        done(over);
    }
    let elapsed = start.elapsed();
    result.elapsed_ns = elapsed.as_nanos() as u64;
    result.tokens_per_s = tokens as f64 / elapsed.as_secs_f64();
    result.goodput_rps = good as f64 / elapsed.as_secs_f64();
    result.ttft = TtftSummary::of(times);
    result
}
