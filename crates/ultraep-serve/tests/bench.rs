//! The offline benchmark: recorded routing is that of the real engine in any batch, and the sweep is a function of its inputs.

mod common;

use std::sync::Arc;

use common::model;
use ultraep_baselines::{EplbParams, HistoryParams, PolicyKind, PolicyParams};
use ultraep_plan::{Topology, TopologySpec};
use ultraep_runtime::Link;
use ultraep_schedule::{Lengths, Limits};
use ultraep_serve::bench::{
    Bound, COSTS_SCHEMA, Costs, Curve, Mix, PolicySettings, Prompt, PromptSpec, RecordedPrompt, SweepSpec, World,
    prompts, record, sample_loads, spot_check, sweep,
};
use ultraep_text::{Corpus, TextDomain};

const LIMITS: Limits = Limits {
    ranks: 4,
    chunk_tokens: 128,
    context_per_token: 0,
    kv_tokens_per_rank: 4096,
    sequences_per_rank: 16,
    queue_max: 400,
};

fn corpus() -> Arc<Corpus> {
    let domain = |name: &str, text: &str| TextDomain {
        name: name.into(),
        bytes: text.bytes().cycle().take(20_000).collect(),
        files: 1,
        origin: "a test".into(),
    };
    let domains = vec![
        domain("rust", "fn main() { let x = 1; }\n"),
        domain("prose", "It was a dark and stormy night. "),
        domain("data", "17,0.25,-3\n"),
    ];
    Arc::new(Corpus { domains, ..Corpus::default() })
}

fn pool(count: usize) -> Vec<Prompt> {
    let spec = PromptSpec { mix: Mix::Mixed, lengths: Lengths::new(16, 400).unwrap(), count, seed: 4 };
    prompts(&corpus(), &spec).unwrap()
}

fn settings() -> PolicySettings {
    let group = TopologySpec { ranks: 4, experts: 8, domain_ranks: 4, slots_per_rank: 2 };
    let history = HistoryParams { window: 5, interval: 5 };
    let params = PolicyParams { min_quota: 4, ..PolicyParams::default() };
    PolicySettings {
        topology: Topology::new(group).unwrap(),
        policies: vec![PolicyKind::None, PolicyKind::Eplb, PolicyKind::Ultraep, PolicyKind::Ideal],
        params: PolicyParams { eplb: EplbParams { history, ..EplbParams::default() }, ..params },
        link: Link::default(),
    }
}

/// Costs of no machine, so that no time decides anything here.
fn costs(settings: &PolicySettings) -> Costs {
    let per = |ns: u64| Curve::new(vec![(32, 32 * ns)]);
    Costs {
        schema: COSTS_SCHEMA.into(),
        machine: "none".into(),
        model: [32, 2, 2, 8, 2, 16],
        dense: per(4000),
        router: per(200),
        reroute: per(200),
        rows: per(100),
        combine: per(50),
        expert: per(2000),
        attention_pairs: Curve::new(vec![(1, 9000), (1000, 9000)]),
        attention_tokens: per(100),
        head: per(1000),
        plan_ns: settings.policies.iter().map(|kind| (kind.name().to_string(), 1000)).collect(),
        plan_ranks: 4,
    }
}

fn world(recorded: Vec<RecordedPrompt>) -> World {
    let settings = settings();
    let costs = costs(&settings);
    costs.check(&model()).unwrap();
    World::new(settings, costs, Arc::new(recorded), &model()).unwrap()
}

fn recorded(pool: &[Prompt], cores: usize) -> Vec<RecordedPrompt> {
    record(&model(), pool, cores, &|_| ()).unwrap()
}

#[test]
fn prompts_take_turns_over_domains_and_stem_is_code() {
    let pool = pool(9);
    let of = |name: &str| pool.iter().filter(|p| p.domain == name).count();
    assert_eq!([of("rust"), of("prose"), of("data")], [3, 3, 3]);
    assert!(pool.iter().all(|p| (16..=400).contains(&p.tokens.len())));
    let lengths = Lengths::new(16, 400).unwrap();
    let stem = prompts(&corpus(), &PromptSpec { mix: Mix::Stem, lengths, count: 5, seed: 4 }).unwrap();
    assert!(stem.iter().all(|p| p.domain == "rust"));
    let long = Lengths::new(30_000, 30_000).unwrap();
    let error = prompts(&corpus(), &PromptSpec { mix: Mix::Mixed, lengths: long, count: 1, seed: 4 }).unwrap_err();
    assert!(error.to_string().contains("20000 bytes"), "{error}");
}

#[test]
fn the_replay_counts_what_the_real_engine_counts() {
    let pool = pool(24);
    let recorded = recorded(&pool, 2);
    assert!(recorded.iter().zip(&pool).all(|(r, p)| r.tokens as usize == p.tokens.len()));
    assert!(recorded.iter().all(|r| r.choices.iter().all(|layer| layer.len() == r.tokens as usize * 2)));
    let world = world(recorded);
    // Fails when any layer's counts differ.
    let check = spot_check(&world, &model(), &pool, LIMITS, 12, 2).unwrap();
    assert_eq!((check.batches, check.layers), (12, 12 * 2 * 3));
    assert_eq!(check.times_ns.len(), 3);
    assert!(check.times_ns.iter().all(|(_, replayed, real)| *replayed > 0 && *real > 0));
}

#[test]
fn recording_does_not_depend_on_how_many_ranks_record() {
    let pool = pool(5);
    assert_eq!(recorded(&pool, 1), recorded(&pool, 4));
}

#[test]
fn the_sweep_ranks_policies_and_repeats_itself() {
    let world = world(recorded(&pool(24), 2));
    let spec = SweepSpec { requests: 300, seed: 2, rates_percent: vec![20, 90], ttft_limit_ns: None };
    let (limit_ns, results) = sweep(&world, LIMITS, &spec, &mut |_| ()).unwrap();
    let (again_ns, again) = sweep(&world, LIMITS, &spec, &mut |_| ()).unwrap();
    assert_eq!(again_ns, limit_ns);
    assert_eq!(serde_json::to_value(&again).unwrap(), serde_json::to_value(&results).unwrap());
    let of = |kind: PolicyKind| results.iter().find(|r| r.policy == kind.name()).unwrap();
    let (none, ultraep, ideal) = (of(PolicyKind::None), of(PolicyKind::Ultraep), of(PolicyKind::Ideal));
    assert!(none.imbalance_after > ultraep.imbalance_after && none.imbalance_after > ideal.imbalance_after);
    assert!((none.imbalance_before - none.imbalance_after).abs() < 1e-9);
    assert!(none.throughput_rps < ultraep.throughput_rps, "{none:?} {ultraep:?}");
    assert!(results.iter().all(|r| r.peak_tokens >= r.even_peak_tokens && r.even_peak_tokens > 0));
    // With everything at once all policies have the same batches.
    let even = LIMITS.chunk_tokens as u64 * 2 / 4;
    let saturated = [ideal, ultraep, none].map(|r| r.saturated_peak_tokens);
    assert!(saturated.is_sorted() && saturated[0] >= even && saturated[1] * 100 <= saturated[0] * 105, "{saturated:?}");
    assert!(ultraep.peak_tokens < none.peak_tokens && ultraep.replicas_per_layer > 0.0);
    assert_eq!((ideal.replicas_per_layer, ideal.share_of_ideal), (0.0, Some(1.0)));
    assert!(results.iter().all(|r| r.bound == Bound::Found && r.share_of_ideal <= Some(1.02)), "{results:?}");
    for result in &results {
        assert_eq!(result.points.len(), 2);
        assert!(result.points[0].ttft.p95_ns <= result.points[1].ttft.p95_ns, "{}", result.policy);
        assert!(result.throughput_rps > 0.0 && result.knee.ttft.served == 300);
    }
}

/// A dozen requests never fill the queue: at every rate that can be served at all the limit holds, and that is no throughput.
#[test]
fn a_search_that_hits_its_ceiling_says_so_and_gives_no_share() {
    let world = world(recorded(&pool(24), 2));
    let spec = SweepSpec { requests: 12, seed: 2, rates_percent: vec![50], ttft_limit_ns: None };
    let (_, results) = sweep(&world, LIMITS, &spec, &mut |_| ()).unwrap();
    assert!(results.iter().any(|r| r.bound == Bound::AtLeast), "{results:?}");
    for result in &results {
        // All at once is a rate, too: nothing is said to be served that was not.
        assert!(result.throughput_rps > 0.0 && result.throughput_rps.is_finite());
        assert!(result.bound == Bound::Found || result.share_of_ideal.is_none(), "{result:?}");
    }
    let ideal = results.iter().find(|r| r.policy == "ideal").unwrap();
    assert!(ideal.bound == Bound::Found || results.iter().all(|r| r.share_of_ideal.is_none()), "{results:?}");
    // A limit that nothing meets, and one that everything does.
    let of = |limit_ns| SweepSpec { ttft_limit_ns: Some(limit_ns), ..spec.clone() };
    let (_, never) = sweep(&world, LIMITS, &of(1), &mut |_| ()).unwrap();
    assert!(never.iter().all(|r| r.bound == Bound::AtMost && r.share_of_ideal.is_none()), "{never:?}");
    let (_, always) = sweep(&world, LIMITS, &of(u64::MAX), &mut |_| ()).unwrap();
    assert!(always.iter().all(|r| r.bound == Bound::AtLeast && r.share_of_ideal.is_none()), "{always:?}");
    let json = serde_json::to_value(&always[0]).unwrap();
    assert_eq!((&json["bound"], &json["share_of_ideal"]), (&"at_least".into(), &serde_json::Value::Null));
}

#[test]
fn costs_are_measured_for_one_model_and_refused_for_another() {
    let mut costs = Costs::measure(&model(), 8, 600, "a test".into()).unwrap();
    let settings = settings();
    let loads = sample_loads(&recorded(&pool(6), 1), &LIMITS, &settings.topology, &model()).unwrap();
    assert!(!loads.is_empty() && loads.iter().all(|l| l.iter().sum::<u32>() > 0));
    costs.measure_plans(&settings, &model(), &loads).unwrap();
    assert!(settings.policies.iter().all(|kind| costs.plan_ns[kind.name()] > 0) && costs.plan_ranks == 4);
    costs.check(&model()).unwrap();
    assert!(costs.expert.ns(64) > 0 && costs.attention(8, 300) > costs.attention(8, 0));
    let short = Costs::measure(&model(), 64, 20, "a test".into()).unwrap();
    assert!(short.attention(4, 10) > short.attention(4, 0));
    costs.model[0] += 1;
    assert!(costs.check(&model()).unwrap_err().to_string().contains("measured for a model of"));
    let text = serde_json::to_string(&costs).unwrap();
    assert_eq!(serde_json::from_str::<Costs>(&text).unwrap(), costs);
}
