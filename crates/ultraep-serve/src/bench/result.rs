//! What the benchmark gives: the JSON document.

use serde::{Deserialize, Serialize};
use ultraep_schedule::{Limits, TtftSummary};

use super::check::SpotCheck;
use super::costs::Costs;
use super::prompts::{Prompt, PromptSpec};
use super::sweep::SweepSpec;

/// Name and version of the document.
pub const BENCH_SCHEMA: &str = "ultraep.prefill-bench/2";

/// The whole result. Everything it depends on is in it, so that it can be made again.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PrefillBench {
    /// [`BENCH_SCHEMA`].
    pub schema: String,
    /// The model's name.
    pub model: String,
    /// Slots of a rank.
    pub slots: usize,
    /// Bandwidth of a rank's link, in words.
    pub link: String,
    /// Bounds of the scheduler.
    pub limits: Limits,
    /// How prompts were cut.
    pub prompts: PromptSpec,
    /// What was cut.
    pub pool: PoolSummary,
    /// Arrivals and rates.
    pub sweep: SweepSpec,
    /// Time to the first token, 95th percentile, at which throughputs are compared.
    pub ttft_limit_ns: u64,
    /// One a policy.
    pub policies: Vec<PolicyResult>,
    /// The same batches on the real engine, if that was asked for.
    pub spot_check: Option<SpotCheck>,
    /// What work costs a rank.
    pub costs: Costs,
}

/// The prompts in figures.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct PoolSummary {
    /// Distinct prompts.
    pub prompts: usize,
    /// Their tokens.
    pub tokens: u64,
    /// The shortest and the longest, in tokens.
    pub shortest_tokens: u32,
    /// The longest, in tokens.
    pub longest_tokens: u32,
    /// Prompts by domain.
    pub domains: std::collections::BTreeMap<String, usize>,
}

impl PoolSummary {
    /// Of these prompts.
    pub fn of(pool: &[Prompt]) -> Self {
        let lengths = || pool.iter().map(|p| p.tokens.len() as u32);
        let mut summary = Self {
            prompts: pool.len(),
            tokens: lengths().map(u64::from).sum(),
            shortest_tokens: lengths().min().unwrap_or(0),
            longest_tokens: lengths().max().unwrap_or(0),
            ..Self::default()
        };
        pool.iter().for_each(|p| *summary.domains.entry(p.domain.clone()).or_default() += 1);
        summary
    }
}

/// What the search for a throughput found out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// The throughput: a little more breaks the limit.
    #[default]
    Found,
    /// Not saturated: the limit holds even at the rate that the policy serves when all requests come at once, and more than that
    /// nothing could serve for long. There are too few requests to fill the queue, so the throughput is at least that rate.
    AtLeast,
    /// The limit does not hold even with hours between requests, so the throughput is less than the least rate.
    AtMost,
}

/// One policy.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PolicyResult {
    /// Its name.
    pub policy: String,
    /// Largest rate whose 95th percentile stays within the limit, in requests per second; where the search was bounded, its bound.
    pub throughput_rps: f64,
    /// What `throughput_rps` is.
    pub bound: Bound,
    /// Prompt tokens per second at that rate.
    pub throughput_tokens_per_s: f64,
    /// Throughput over the ideal's; none without an ideal, and where one of the two was not found.
    pub share_of_ideal: Option<f64>,
    /// At the knee: at the largest rate that every policy but the unbalanced one serves, the figures below are taken.
    pub knee: RatePoint,
    /// Imbalance of layers as routed, weighted by tokens.
    pub imbalance_before: f64,
    /// Imbalance of layers after balancing, weighted by tokens.
    pub imbalance_after: f64,
    /// Worst imbalance after balancing of a layer, among batches of an eighth of the chunk budget and more.
    pub imbalance_worst: f64,
    /// Most tokens (choices) on a rank in one layer.
    pub peak_tokens: u64,
    /// The same in the same batches with perfect balance. Which batches a rate gives depends on how long they take, so peaks at
    /// the knee compare with this and not with each other.
    pub even_peak_tokens: u64,
    /// Most tokens (choices) on a rank in one layer when all requests come at once. Nothing depends on time then, so all policies
    /// have the same batches, and the fullest: these peaks compare with each other, and are what memory must be there for.
    pub saturated_peak_tokens: u64,
    /// Replicas in a layer, mean.
    pub replicas_per_layer: f64,
    /// Weight sync that was not hidden, of the time in which batches ran.
    pub exposed_sync_share: f64,
    /// TTFT by rate.
    pub points: Vec<RatePoint>,
}

/// One rate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RatePoint {
    /// Requests per second that arrived.
    pub rps: f64,
    /// Time to the first token.
    pub ttft: TtftSummary,
    /// Prompt tokens per second that were served.
    pub tokens_per_s: f64,
    /// Share of the time in which a batch ran.
    pub busy: f64,
}
