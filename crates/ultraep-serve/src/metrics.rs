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

impl Outcome {
    /// All of them.
    const ALL: [Self; 6] = [Self::Finished, Self::Cancelled, Self::Lost, Self::Failed, Self::Refused, Self::Rejected];
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

/// How metrics are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// Prometheus' text format, version 0.0.4.
    #[default]
    Prometheus,
    /// OpenMetrics, version 1.0.0.
    OpenMetrics,
}

impl Format {
    /// The better of the two by the values of `Accept` (RFC 9110, 12.5.1). Prometheus' text format when OpenMetrics is not named
    /// or is not preferred.
    pub fn asked_for<'a>(accepts: impl Iterator<Item = &'a str>) -> Self {
        let (mut open, mut text) = (0.0, 0.0_f32);
        for range in accepts.flat_map(|value| value.split(',')) {
            let mut parts = range.split(';').map(|part| part.trim().to_ascii_lowercase());
            let media_type = parts.next().unwrap_or_default();
            let quality = parts.find_map(|part| part.strip_prefix("q=")?.trim().parse().ok()).unwrap_or(1.0_f32);
            match media_type.as_str() {
                "application/openmetrics-text" => open = quality.max(open),
                "text/plain" => text = quality.max(text),
                _ => {}
            }
        }
        // Who names both alike has OpenMetrics first in mind: nobody else asks for it at all.
        if open > 0.0 && open >= text { Self::OpenMetrics } else { Self::Prometheus }
    }

    /// What `Content-Type` says.
    pub fn media_type(self) -> &'static str {
        match self {
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
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
        let (requests, tokens) = (Family::<OutcomeLabel, Counter>::default(), Family::<TokenLabel, Counter>::default());
        // A series is there from the start: a rate over one that appears with its first event misses that event.
        for outcome in Outcome::ALL {
            drop(requests.get_or_create(&OutcomeLabel { outcome }));
        }
        for kind in [TokenKind::Prompt, TokenKind::New] {
            drop(tokens.get_or_create(&TokenLabel { kind }));
        }
        Self {
            requests,
            tokens,
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

    /// All of them as text.
    pub fn encode(&self, format: Format) -> Result<String, std::fmt::Error> {
        let text = self.encode_open()?;
        Ok(match format {
            Format::OpenMetrics => text,
            Format::Prometheus => prometheus_text(&text),
        })
    }

    fn encode_open(&self) -> Result<String, std::fmt::Error> {
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

/// OpenMetrics as Prometheus' text format: a counter is described under the name of its series, and there are neither units nor
/// an end mark.
fn prometheus_text(open: &str) -> String {
    let counters: Vec<&str> =
        open.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter")).collect();
    let mut text = String::with_capacity(open.len());
    for line in open.lines() {
        let mut words = line.splitn(4, ' ');
        let (mark, what, name, rest) = (words.next(), words.next(), words.next(), words.next());
        match (mark, what, name, rest) {
            (Some("#"), Some("UNIT" | "EOF"), ..) => continue,
            (Some("#"), Some(what), Some(name), Some(rest)) if counters.contains(&name) => {
                text.push_str(&format!("# {what} {name}_total {rest}"));
            }
            _ => text.push_str(line),
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_format_is_negotiated() {
        let asked = |accept: &'static str| Format::asked_for(std::iter::once(accept));
        // What Prometheus sends.
        let scraper = "application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,\
                       text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
        for open in [scraper, "application/openmetrics-text", "APPLICATION/openmetrics-text; q=1, text/plain"] {
            assert_eq!(asked(open), Format::OpenMetrics, "{open}");
        }
        for text in [
            "",
            "*/*",
            "text/plain",
            "text/html, application/json",
            "application/openmetrics-text;q=0",
            "text/plain;q=0.9, application/openmetrics-text;q=0.1",
        ] {
            assert_eq!(asked(text), Format::Prometheus, "{text}");
        }
    }

    #[test]
    fn all_series_exist_from_the_start_in_both_formats() {
        let metrics = Metrics::default();
        let series = |text: &str| -> Vec<String> {
            text.lines()
                .filter(|line| !line.starts_with('#'))
                .map(|line| line.split(' ').next().unwrap().into())
                .collect()
        };
        let (open, text) = (metrics.encode(Format::OpenMetrics).unwrap(), metrics.encode(Format::Prometheus).unwrap());
        assert_eq!(series(&open), series(&text));
        for outcome in ["Finished", "Cancelled", "Lost", "Failed", "Refused", "Rejected"] {
            let line = format!("ultraep_requests_total{{outcome=\"{outcome}\"}} 0\n");
            assert!(text.contains(&line) && open.contains(&line), "{text}");
        }
        metrics.request(Outcome::Lost);
        metrics.tokens(Phase::Prefill, 3);
        assert_eq!(series(&metrics.encode(Format::Prometheus).unwrap()), series(&text));
        assert!(open.ends_with("# EOF\n") && !text.contains("EOF") && !text.contains("# UNIT"));
        assert!(
            text.contains("# TYPE ultraep_requests_total counter\n") && text.contains("# HELP ultraep_requests_total ")
        );
        assert!(
            text.contains("# TYPE ultraep_batch_seconds_total counter\n")
                && text.contains("# TYPE ultraep_queued_requests gauge\n")
        );
        assert!(open.contains("# TYPE ultraep_requests counter\n"));
    }
}
