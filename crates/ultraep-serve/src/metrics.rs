//! What the server counts, for Prometheus. A fixed number of series: labels have closed lists of values.

use std::sync::atomic::{AtomicI64, AtomicU64};
use std::time::Duration;

use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use ultraep_runtime::{LayerRecord, Part, StepTime};
use ultraep_schedule::Phase;

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Outcome {
    /// Complete.
    Finished,
    /// Its client went away or its time ran out.
    Cancelled,
    /// A rank was lost, or the server stopped.
    Lost,
    /// Something was wrong with this request alone, on its rank.
    Failed,
    /// Never admitted: malformed, too long, or not authorised.
    Refused,
    /// Not admitted because the queue was full or the ranks down.
    Rejected,
}

/// What a token was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
enum TokenKind {
    Prompt,
    New,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: Outcome,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TokenLabel {
    kind: TokenKind,
}

/// Counters, gauges and histograms. Cheap to clone; clones are the same.
#[derive(Clone, Debug)]
pub struct Metrics {
    requests: Family<OutcomeLabel, Counter>,
    tokens: Family<TokenLabel, Counter>,
    queued: Gauge<i64, AtomicI64>,
    running: Gauge<i64, AtomicI64>,
    kv_tokens: Gauge<i64, AtomicI64>,
    ttft: Histogram,
    imbalance_before: Histogram,
    imbalance_after: Histogram,
    batches: Counter,
    restarts: Counter,
    plan_seconds: Counter<f64, AtomicU64>,
    sync_seconds: Counter<f64, AtomicU64>,
    parallel_seconds: Counter<f64, AtomicU64>,
}

impl Default for Metrics {
    fn default() -> Self {
        let imbalance = || Histogram::new([1.01, 1.02, 1.05, 1.1, 1.25, 1.5, 2.0, 3.0, 4.0, 8.0]);
        Self {
            requests: Family::default(),
            tokens: Family::default(),
            queued: Gauge::default(),
            running: Gauge::default(),
            kv_tokens: Gauge::default(),
            ttft: Histogram::new([0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]),
            imbalance_before: imbalance(),
            imbalance_after: imbalance(),
            batches: Counter::default(),
            restarts: Counter::default(),
            plan_seconds: Counter::default(),
            sync_seconds: Counter::default(),
            parallel_seconds: Counter::default(),
        }
    }
}

impl Metrics {
    pub(crate) fn request(&self, outcome: Outcome) {
        self.requests.get_or_create(&OutcomeLabel { outcome }).inc();
    }

    pub(crate) fn tokens(&self, phase: Phase, tokens: u32) {
        let kind = match phase {
            Phase::Prefill => TokenKind::Prompt,
            Phase::Decode => TokenKind::New,
        };
        self.tokens.get_or_create(&TokenLabel { kind }).inc_by(u64::from(tokens));
    }

    pub(crate) fn queue(&self, queued: usize, running: usize, kv_tokens: u64) {
        self.queued.set(i64::try_from(queued).unwrap_or(i64::MAX));
        self.running.set(i64::try_from(running).unwrap_or(i64::MAX));
        self.kv_tokens.set(i64::try_from(kv_tokens).unwrap_or(i64::MAX));
    }

    pub(crate) fn ttft(&self, time: Duration) {
        self.ttft.observe(time.as_secs_f64());
    }

    pub(crate) fn restart(&self) {
        self.restarts.inc();
    }

    /// Batches run so far.
    pub fn batches(&self) -> u64 {
        self.batches.get()
    }

    pub(crate) fn batch(&self, time: &StepTime, synced_ns: u64, records: &[LayerRecord]) {
        let seconds = |ns: u64| ns as f64 * 1e-9;
        self.batches.inc();
        self.plan_seconds.inc_by(seconds(time.part_ns(Part::Plan)));
        self.sync_seconds.inc_by(seconds(synced_ns));
        self.parallel_seconds.inc_by(seconds(time.total_ns));
        for record in records {
            self.imbalance_before.observe(record.imbalance_before());
            self.imbalance_after.observe(record.imbalance_after());
        }
    }

    /// All of them in the text format that Prometheus scrapes.
    pub fn encode(&self) -> Result<String, std::fmt::Error> {
        let mut registry = Registry::with_prefix("ultraep");
        registry.register("requests", "Requests that ended", self.requests.clone());
        registry.register("tokens", "Tokens computed", self.tokens.clone());
        registry.register("queued_requests", "Requests that wait", self.queued.clone());
        registry.register("running_requests", "Requests on the ranks", self.running.clone());
        registry.register("kv_tokens", "KV taken, in tokens over all ranks", self.kv_tokens.clone());
        let ttft = "From arrival to the end of prefill";
        registry.register_with_unit("time_to_first_token", ttft, Unit::Seconds, self.ttft.clone());
        let before = "Largest over mean rank load of a layer as routed";
        registry.register("imbalance_before", before, self.imbalance_before.clone());
        let after = "Largest over mean rank load of a layer after balancing";
        registry.register("imbalance_after", after, self.imbalance_after.clone());
        registry.register("batches", "Batches run", self.batches.clone());
        registry.register("restarts", "Times the ranks were lost", self.restarts.clone());
        let plan = "Gathering counts and planning, in parallel time";
        registry.register_with_unit("plan", plan, Unit::Seconds, self.plan_seconds.clone());
        let sync = "Weight sync from start to end, hidden or not, in parallel time";
        registry.register_with_unit("weight_sync", sync, Unit::Seconds, self.sync_seconds.clone());
        let parallel = "Batches, in parallel time";
        registry.register_with_unit("batch", parallel, Unit::Seconds, self.parallel_seconds.clone());
        let mut text = String::new();
        encode(&mut text, &registry)?;
        Ok(text)
    }
}
