//! The sweep over rates and policies, and the search for the throughput at a TTFT limit.

use serde::{Deserialize, Serialize};
use ultraep_baselines::PolicyKind;
use ultraep_schedule::{ArrivalSpec, Limits, Served, TtftSummary, arrivals, simulate};

use super::replay::{Balance, Replay, World};
use super::result::{Bound, PolicyResult, RatePoint};
use crate::ServeError;

/// What is simulated.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SweepSpec {
    /// Requests at every rate.
    pub requests: usize,
    /// Names the arrivals.
    pub seed: u64,
    /// Rates of the curves, in percent of the ideal's (the first policy's without one) capacity.
    pub rates_percent: Vec<u32>,
    /// 95th percentile of TTFT at which throughputs are compared, in nanoseconds. None: twice the ideal's at a tenth of its
    /// capacity, which is where the curve bends.
    pub ttft_limit_ns: Option<u64>,
}

/// Rates are whole numbers of requests in a thousand seconds.
type Rate = u64;

struct Run {
    point: RatePoint,
    balance: Balance,
    busy_ns: u64,
}

struct Sweep<'w> {
    world: &'w World,
    limits: Limits,
    spec: &'w SweepSpec,
    pool: Vec<u32>,
}

impl Sweep<'_> {
    fn run(&self, kind: PolicyKind, rate: Rate) -> Result<Run, ServeError> {
        let spec = ArrivalSpec {
            requests: self.spec.requests,
            mean_gap_ns: ArrivalSpec::mean_gap_ns(rate),
            new_tokens: 1,
            seed: self.spec.seed,
        };
        let list = arrivals(&spec, &self.pool);
        let prompt_of = list.iter().map(|a| a.prompt as u32).collect();
        let mut replay = Replay::new(self.world, kind, prompt_of, u64::from(self.limits.chunk_tokens / 8))?;
        let simulation = simulate(self.limits, &list, &mut replay)?;
        let balance = replay.finish()?;
        let ttft = TtftSummary::of(simulation.served.iter().filter_map(Served::ttft_ns).collect());
        if ttft.served < list.len() {
            let lost = list.len() - ttft.served;
            return Err(ServeError::Setting(format!(
                "{lost} requests were refused: the queue or the KV budget is too small"
            )));
        }
        let tokens: u64 = list.iter().map(|a| u64::from(a.prompt_tokens)).sum();
        let seconds = simulation.end_ns as f64 * 1e-9;
        let point = RatePoint {
            rps: rate as f64 * 1e-3,
            ttft,
            tokens_per_s: tokens as f64 / seconds,
            busy: simulation.busy_ns as f64 / simulation.end_ns.max(1) as f64,
        };
        Ok(Run { point, balance, busy_ns: simulation.busy_ns })
    }

    /// All requests at once.
    fn saturated(&self, kind: PolicyKind) -> Result<Run, ServeError> {
        self.run(kind, Rate::MAX)
    }

    /// Requests in a thousand seconds that are served when all arrive at once.
    fn capacity(&self, saturated: &Run) -> Rate {
        let seconds = saturated.busy_ns as f64 * 1e-9;
        (self.spec.requests as f64 / seconds * 1e3).max(1.0) as Rate
    }

    /// Largest rate whose 95th percentile is within the limit, to half a percent; bisection, on the same arrivals scaled, up to
    /// the capacity: nothing serves more for long, and where even that is within the limit the queue never filled.
    fn throughput(&self, kind: PolicyKind, limit_ns: u64, capacity: Rate) -> Result<(Run, Bound), ServeError> {
        let within = |run: &Run| run.point.ttft.p95_ns <= limit_ns;
        let most = self.run(kind, capacity)?;
        if within(&most) {
            return Ok((most, Bound::AtLeast));
        }
        let (mut low, mut high) = (1, capacity);
        let mut best = self.run(kind, low)?;
        if !within(&best) {
            return Ok((best, Bound::AtMost));
        }
        while (high - low) * 200 > low {
            let middle = low + (high - low) / 2;
            if middle == low {
                break;
            }
            let run = self.run(kind, middle)?;
            if within(&run) {
                (low, best) = (middle, run);
            } else {
                high = middle;
            }
        }
        Ok((best, Bound::Found))
    }
}

/// Every policy of the world's settings at every rate. `done` hears how many of the policies are through. Gives the TTFT limit
/// and the results, in the order of the settings.
pub fn sweep(
    world: &World,
    limits: Limits,
    spec: &SweepSpec,
    done: &mut dyn FnMut(usize),
) -> Result<(u64, Vec<PolicyResult>), ServeError> {
    let pool = world.pool.iter().map(|p| p.tokens).collect();
    let sweep = Sweep { world, limits, spec, pool };
    let kinds = &world.settings.policies;
    let yardstick = kinds.iter().copied().find(|kind| kind.forces_routing()).or(kinds.first().copied());
    let Some(yardstick) = yardstick else { return Ok((0, Vec::new())) };
    let capacity = sweep.capacity(&sweep.saturated(yardstick)?);
    let limit_ns = match spec.ttft_limit_ns {
        Some(limit_ns) => limit_ns,
        None => 2 * sweep.run(yardstick, (capacity / 10).max(1))?.point.ttft.p95_ns,
    };
    let mut searched = Vec::new();
    for &kind in kinds {
        let saturated = sweep.saturated(kind)?;
        let (throughput, bound) = sweep.throughput(kind, limit_ns, sweep.capacity(&saturated))?;
        searched.push((throughput, bound, saturated));
        done(searched.len());
    }
    let found = |kind: PolicyKind| {
        let (run, bound, _) = &searched[kinds.iter().position(|k| *k == kind)?];
        (*bound == Bound::Found).then_some(run.point.rps)
    };
    let ideal_rps = kinds.iter().find(|k| k.forces_routing()).and_then(|k| found(*k));
    // The knee: what the unbalanced policy can just not serve any more, and the balanced ones can.
    let balanced = kinds.iter().zip(&searched).filter(|(kind, _)| **kind != PolicyKind::None);
    let knee = balanced.map(|(_, (run, ..))| run.point.rps).fold(f64::INFINITY, f64::min);
    let knee = if knee.is_finite() { (knee * 1e3) as Rate } else { capacity };
    let mut results = Vec::new();
    for (&kind, (throughput, bound, saturated)) in kinds.iter().zip(&searched) {
        let at_knee = sweep.run(kind, knee)?;
        let points = spec
            .rates_percent
            .iter()
            .map(|&percent| Ok(sweep.run(kind, (capacity * u64::from(percent) / 100).max(1))?.point));
        let points = points.collect::<Result<_, ServeError>>()?;
        let runs = PolicyRuns { throughput, bound: *bound, at_knee: &at_knee, saturated };
        results.push(result(kind, &runs, ideal_rps, points));
        done(kinds.len() + results.len());
    }
    Ok((limit_ns, results))
}

/// One policy's runs that figures are taken from.
struct PolicyRuns<'a> {
    /// At its largest rate within the limit.
    throughput: &'a Run,
    bound: Bound,
    at_knee: &'a Run,
    /// All requests at once.
    saturated: &'a Run,
}

fn result(kind: PolicyKind, runs: &PolicyRuns<'_>, ideal_rps: Option<f64>, points: Vec<RatePoint>) -> PolicyResult {
    let PolicyRuns { throughput, bound, at_knee, saturated } = runs;
    let b = &at_knee.balance;
    let tokens = b.tokens.max(1) as f64;
    PolicyResult {
        policy: kind.name().into(),
        throughput_rps: throughput.point.rps,
        throughput_tokens_per_s: throughput.point.tokens_per_s,
        bound: *bound,
        share_of_ideal: ideal_rps.filter(|_| *bound == Bound::Found).map(|ideal| throughput.point.rps / ideal),
        knee: at_knee.point,
        imbalance_before: b.weighted_before / tokens,
        imbalance_after: b.weighted_after / tokens,
        imbalance_worst: b.worst_after,
        peak_tokens: b.peak_tokens,
        even_peak_tokens: b.even_peak_tokens,
        saturated_peak_tokens: saturated.balance.peak_tokens,
        replicas_per_layer: b.replicas as f64 / b.layers.max(1) as f64,
        exposed_sync_share: b.exposed_sync_ns as f64 / at_knee.busy_ns.max(1) as f64,
        points,
    }
}
