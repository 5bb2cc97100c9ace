//! What work costs a rank, measured once on this machine's kernels: a rank is one core.
//!
//! Curves give the time of so many tokens or rows; between measured points they are straight, and beyond the last they go on
//! with its slope. Whole nanoseconds, so that a file of costs gives the same result everywhere.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use ultraep_baselines::{PolicyKind, build};
use ultraep_device::attention::Rotary;
use ultraep_device::cache::{CacheWorkspace, KvCache};
use ultraep_device::{ExpertWorkspace, math};
use ultraep_fabric::{Fabric, run_threads};
use ultraep_model::Wanted;
use ultraep_plan::{Plan, PlannedTransfers, Problem, SplitWorkspace, split_all};
use ultraep_runtime::{Part, VirtualClock};
use ultraep_schedule::{Batch, Limits, Request, RequestId, Scheduler};

use super::replay::PolicySettings;
use crate::rank::{ChunkInput, GroupConfig, RankEngine};
use crate::{ServeError, ServedModel};

/// Name and version of the file.
pub const COSTS_SCHEMA: &str = "ultraep.costs/1";

/// Time by amount of work: points by increasing amount.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Curve(Vec<(u64, u64)>);

impl Curve {
    /// Through these points (amount, nanoseconds), in increasing order of amount.
    pub fn new(points: Vec<(u64, u64)>) -> Self {
        Self(points)
    }

    /// Time of `amount`; nothing takes no time.
    pub fn ns(&self, amount: u64) -> u64 {
        if amount == 0 {
            return 0;
        }
        let after = self.0.iter().position(|&(x, _)| x >= amount);
        let (low, high) = match (after, self.0.as_slice()) {
            (_, []) => return 0,
            (Some(0), all) => ((0, 0), all[0]),
            (Some(i), all) => (all[i - 1], all[i]),
            (None, [only]) => ((0, 0), *only),
            (None, all) => (all[all.len() - 2], all[all.len() - 1]),
        };
        let (dx, dy) = (i128::from(high.0) - i128::from(low.0), i128::from(high.1) - i128::from(low.1));
        let along = i128::from(amount) - i128::from(low.0);
        u64::try_from(i128::from(low.1) + dy * along / dx.max(1)).unwrap_or(0)
    }
}

/// Costs of one model on one machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Costs {
    /// [`COSTS_SCHEMA`].
    pub schema: String,
    /// Where they were measured, in words.
    pub machine: String,
    /// The model's sizes: hidden, heads, layers, experts, top-k, intermediate.
    pub model: [usize; 6],
    /// Embedding, norms and projections of all layers, by tokens: everything dense but attention and head.
    pub dense: Curve,
    /// Router of one layer, by tokens.
    pub router: Curve,
    /// Assignment and packing of one layer, by tokens.
    pub reroute: Curve,
    /// Handling of arrived rows of one layer, there and back, by rows.
    pub rows: Curve,
    /// Weighted sum of returned rows of one layer, by tokens.
    pub combine: Curve,
    /// One expert, by rows.
    pub expert: Curve,
    /// A thousand (query, key) pairs of all heads of one layer, by keys before the chunk.
    pub attention_pairs: Curve,
    /// Attention of one layer beside the pairs, by tokens.
    pub attention_tokens: Curve,
    /// Final norm and head, by tokens produced.
    pub head: Curve,
    /// Planning one layer, its split and its transfers, by policy, at `plan_ranks` ranks.
    pub plan_ns: BTreeMap<String, u64>,
    /// Ranks of the plans.
    pub plan_ranks: usize,
}

/// How often everything is measured; the fastest counts, as other work on the machine only ever adds time.
const REPEATS: usize = 9;

/// CPU time of `work`, the least of several.
fn cpu_ns(mut work: impl FnMut()) -> u64 {
    let mut clock = VirtualClock::new();
    let mut time = || {
        let before = clock.now_ns();
        clock.enter(Part::Dense);
        work();
        clock.pause();
        clock.now_ns() - before
    };
    time();
    (0..REPEATS).map(|_| time()).min().unwrap_or(0)
}

impl Costs {
    /// Refuses costs of another model or schema.
    pub fn check(&self, model: &ServedModel) -> Result<(), ServeError> {
        if self.schema != COSTS_SCHEMA {
            let reason = format!("costs: schema {:?}, this program reads {COSTS_SCHEMA:?}", self.schema);
            return Err(ServeError::Setting(reason));
        }
        let ours = sizes(model);
        if self.model != ours {
            let reason = format!("costs: measured for a model of {:?}, this one has {ours:?}", self.model);
            return Err(ServeError::Setting(reason));
        }
        Ok(())
    }

    /// Measures all but plans (see [`Costs::measure_plans`]), for batches of up to `tokens` tokens on a rank and contexts of up
    /// to `context` tokens. Takes seconds.
    pub fn measure(model: &ServedModel, tokens: usize, context: usize, machine: String) -> Result<Self, ServeError> {
        let tokens = tokens.min(model.context_tokens()).max(1);
        let single = single_rank(model, tokens)?;
        let pairs = attention_pairs(model, tokens, context);
        let combine = combine(model, tokens);
        let config = model.config();
        let layers = config.layers as u64;
        let of =
            |part: Part| -> Curve { Curve(single.iter().map(|(n, ns)| (*n, ns[part as usize] / layers)).collect()) };
        // The weighted sum was measured alone; what is left of a single rank's all-to-all is the handling of rows.
        let rows = |&(n, ns): &(u64, [u64; ultraep_runtime::PARTS])| {
            (n * config.top_k as u64, (ns[Part::AllToAll as usize] / layers).saturating_sub(combine.ns(n)))
        };
        let small = attention_tokens(model, tokens, &pairs);
        // Attention of a prompt's first chunk is in the dense part.
        let dense = |&(n, ns): &(u64, [u64; ultraep_runtime::PARTS])| {
            let attention = layers * attention_ns(&pairs, &small, n, 0);
            (n, ns[Part::Dense as usize].saturating_sub(attention))
        };
        Ok(Self {
            schema: COSTS_SCHEMA.into(),
            machine,
            model: sizes(model),
            dense: Curve(single.iter().map(dense).collect()),
            router: of(Part::Router),
            reroute: of(Part::Reroute),
            rows: Curve(single.iter().map(rows).collect()),
            combine: combine.clone(),
            expert: expert(model, tokens * config.top_k),
            attention_pairs: pairs,
            attention_tokens: small,
            head: head(model),
            plan_ns: BTreeMap::new(),
            plan_ranks: 0,
        })
    }

    /// Measures how long each policy plans, splits and plans transfers for `loads` (`[N, E]` each): the median over them.
    pub fn measure_plans(
        &mut self,
        settings: &PolicySettings,
        model: &ServedModel,
        loads: &[Vec<u32>],
    ) -> Result<(), ServeError> {
        self.plan_ranks = settings.topology.ranks();
        let mut sync = settings.runtime(model)?.sync_planner()?;
        let mut transfers = PlannedTransfers::new(&settings.topology);
        for &kind in &settings.policies {
            let mut policy = build(kind, &settings.topology, &settings.params)?;
            let mut plan = Plan::default();
            let mut workspace = SplitWorkspace::new(&settings.topology);
            let mut split = Vec::new();
            let mut times = Vec::with_capacity(loads.len());
            for counts in loads {
                let problem =
                    Problem::new(&settings.topology, counts).map_err(|e| ServeError::Setting(e.to_string()))?;
                let mut failed = None;
                times.push(cpu_ns(|| {
                    let solved = policy.solve(&problem, &mut plan).map_err(|e| e.to_string());
                    split.resize(settings.topology.ranks() * plan.instances().len(), 0);
                    let done = solved.and_then(|()| {
                        split_all(&problem, &plan, &mut workspace, &mut split).map_err(|e| e.to_string())
                    });
                    sync.plan(&plan, &mut transfers);
                    failed = done.err();
                }));
                if let Some(reason) = failed {
                    return Err(ServeError::Setting(format!("policy {kind}: {reason}")));
                }
                policy.observe(&problem);
            }
            times.sort_unstable();
            self.plan_ns.insert(kind.name().into(), times.get(times.len() / 2).copied().unwrap_or(0));
        }
        Ok(())
    }

    /// Attention of one layer for a chunk of `tokens` tokens after `start` others.
    pub fn attention(&self, tokens: u64, start: u64) -> u64 {
        attention_ns(&self.attention_pairs, &self.attention_tokens, tokens, start)
    }
}

fn attention_ns(pairs: &Curve, small: &Curve, tokens: u64, start: u64) -> u64 {
    let count = tokens * start + tokens * (tokens + 1) / 2;
    small.ns(tokens) + count * pairs.ns(start.max(1)) / 1000
}

fn sizes(model: &ServedModel) -> [usize; 6] {
    let c = model.config();
    [c.hidden, c.heads, c.layers, c.experts, c.top_k, c.intermediate]
}

fn noise(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7919 % 1009) as f32 - 504.0) / 504.0).collect()
}

/// Amounts at which curves are measured: doubling up to `most`.
fn amounts(most: usize) -> Vec<usize> {
    let mut amounts: Vec<usize> = (3..).map(|i| 1 << i).take_while(|&n| n < most).collect();
    amounts.push(most.max(1));
    amounts
}

fn expert(model: &ServedModel, rows: usize) -> Curve {
    let config = model.config();
    let shape = config.expert_shape();
    // As many experts in turn as a rank has around: their weights are not all in the nearest cache.
    let around = config.experts.min(12);
    let point = |rows: usize| {
        let input = noise(rows * shape.hidden);
        let (mut fc1, mut out) = (vec![0.0; rows * 2 * shape.intermediate], vec![0.0; rows * shape.hidden]);
        let mut ws = ExpertWorkspace::default();
        let all = cpu_ns(|| {
            for expert in 0..around {
                shape.forward(model.experts(0, expert..expert + 1), &input, &mut fc1, &mut out, &mut ws);
            }
        });
        (rows as u64, all / around as u64)
    };
    Curve(amounts(rows.next_multiple_of(8)).into_iter().map(point).collect())
}

fn combine(model: &ServedModel, tokens: usize) -> Curve {
    let (d, k) = (model.config().hidden, model.config().top_k);
    let point = |tokens: usize| {
        let rows = noise(tokens * k * d);
        let mut y = vec![0.0; tokens * d];
        let ns = cpu_ns(|| {
            for (token, y) in y.chunks_exact_mut(d).enumerate() {
                y.fill(0.0);
                // Rows of a token lie apart.
                (0..k).for_each(|i| math::add_scaled(y, 0.25, &rows[(i * tokens + token) * d..][..d]));
            }
        });
        (tokens as u64, ns)
    };
    Curve(amounts(tokens).into_iter().map(point).collect())
}

fn head(model: &ServedModel) -> Curve {
    let config = model.config();
    // Final norm and projection of a few rows: as the projection of queries, keys and values, a third as wide.
    let (d, n) = (config.hidden, ultraep_model::VOCABULARY);
    let (w, x) = (noise(d * n), noise(8 * d));
    let mut out = vec![0.0; 8 * n];
    let ns = cpu_ns(|| {
        use ultraep_device::matmul::{Matrix, MatrixMut, multiply_independent_rows};
        multiply_independent_rows(Matrix::new(&x, 8, d), Matrix::new(&w, d, n), MatrixMut::new(&mut out, 8, n));
    });
    Curve(vec![(8, ns)])
}

/// One layer's cache with `start` tokens in it, and `tokens` more to attend.
fn attend_ns(model: &ServedModel, rotary: &Arc<Rotary>, start: usize, tokens: usize) -> u64 {
    let config = model.config();
    let (heads, width) = (config.heads, config.hidden);
    let mut cache = KvCache::new(heads, width / heads, start + tokens);
    let mut ws = CacheWorkspace::default();
    let fill = noise(256 * 3 * width);
    let mut out = vec![0.0; 256 * width];
    while cache.len() < start {
        let rows = 256.min(start - cache.len());
        cache.append_only(rotary, &fill[..rows * 3 * width], &mut ws);
    }
    let qkv = noise(tokens * 3 * width);
    out.resize(tokens * width, 0.0);
    cpu_ns(|| {
        cache.truncate(start);
        cache.attend(rotary, &qkv, &mut out, &mut ws);
    })
}

fn attention_pairs(model: &ServedModel, tokens: usize, context: usize) -> Curve {
    let rotary = model.rotary();
    let positions = context.min(rotary.positions());
    let tokens = tokens.min(positions / 2).max(1);
    let last = positions.saturating_sub(tokens).max(1);
    let starts = (8..).map(|i| 1usize << i).take_while(|&start| start < last).chain([last]);
    let point = |start: usize| {
        let count = (tokens * start + tokens * (tokens + 1) / 2) as u64;
        (start as u64, attend_ns(model, &rotary, start, tokens) * 1000 / count.max(1))
    };
    let mut points: Vec<_> = starts.map(point).collect();
    if let Some(&(_, first)) = points.first() {
        // The slope from nothing would be steep: the price of a pair is near constant.
        points.insert(0, (1, first));
    }
    Curve(points)
}

fn attention_tokens(model: &ServedModel, tokens: usize, pairs: &Curve) -> Curve {
    let rotary = model.rotary();
    let point = |tokens: usize| {
        let ns = attend_ns(model, &rotary, 0, tokens);
        let n = tokens as u64;
        (n, ns.saturating_sub(n * (n + 1) / 2 * pairs.ns(1) / 1000))
    };
    Curve(amounts(tokens).into_iter().map(point).collect())
}

type SingleRank = Vec<(u64, [u64; ultraep_runtime::PARTS])>;

/// Parts of the first chunk of a prompt on a group of one, by tokens of the chunk: the real engine's own clock.
fn single_rank(model: &ServedModel, tokens: usize) -> Result<SingleRank, ServeError> {
    let group = GroupConfig {
        ranks: 1,
        slots: 0,
        policies: vec![PolicyKind::None],
        params: Default::default(),
        tokens_per_rank: tokens,
        link: Default::default(),
        checked: false,
        timeout: std::time::Duration::from_secs(600),
        cores: 1,
    };
    let runtime = group.runtime(model)?;
    let run = |fabric: Box<dyn Fabric>| -> Result<SingleRank, ServeError> {
        let mut engine = RankEngine::new(fabric, model, &runtime)?;
        let mut points = Vec::new();
        for amount in amounts(tokens) {
            let mut least: Option<[u64; ultraep_runtime::PARTS]> = None;
            for _ in 0..=REPEATS {
                let parts = first_chunk(&mut engine, amount)?;
                let best = least.get_or_insert(parts);
                best.iter_mut().zip(parts).for_each(|(best, ns)| *best = ns.min(*best));
            }
            points.push((amount as u64, least.unwrap_or_default()));
        }
        engine.leave()?;
        Ok(points)
    };
    let results = run_threads(&group.group(&runtime), run).map_err(|error| ServeError::Ranks(error.to_string()))?;
    Ok(results.into_iter().next().unwrap_or_default())
}

fn first_chunk(engine: &mut RankEngine, tokens: usize) -> Result<[u64; ultraep_runtime::PARTS], ServeError> {
    let limits = Limits {
        ranks: 1,
        chunk_tokens: tokens as u32,
        context_per_token: 0,
        kv_tokens_per_rank: tokens as u32,
        sequences_per_rank: 1,
        queue_max: 1,
    };
    let mut scheduler = Scheduler::new(limits)?;
    scheduler.admit(Request { id: RequestId(0), prompt_tokens: tokens as u32, new_tokens: 0 })?;
    let mut batch = Batch::default();
    scheduler.compose(&mut batch);
    let text: Vec<u8> = (0..tokens).map(|i| (i * i % 251) as u8).collect();
    engine.run(&batch, &[ChunkInput { tokens: &text, wanted: Wanted::Nothing }], PolicyKind::None)?.whole()?;
    Ok(engine.finish_batch()?.0.parts_ns)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_are_straight_between_points_and_go_on_beyond() {
        let curve = Curve(vec![(10, 100), (20, 150), (40, 190)]);
        assert_eq!([0, 5, 10, 15, 20, 30, 40, 60].map(|n| curve.ns(n)), [0, 50, 100, 125, 150, 170, 190, 230]);
        assert_eq!(Curve(vec![(4, 8)]).ns(6), 12);
        assert_eq!(Curve::default().ns(6), 0);
    }
}
