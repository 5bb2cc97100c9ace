//! Prefill serving in virtual time.

mod common;

use std::sync::Arc;

use common::{step, system};
use ultraep_baselines::PolicyKind;
use ultraep_schedule::{Arrival, ArrivalSpec, Lengths, Limits, arrivals};
use ultraep_sim::{Footprint, LoadProcess, PrefillReport, PrefillSpec, RecordedLoads, simulate_prefill};

fn spec() -> PrefillSpec {
    let step = step();
    PrefillSpec {
        model: step.model,
        machine: step.machine,
        domain_ranks: 8,
        slots: 2,
        limits: Limits {
            ranks: 8,
            chunk_tokens: 65_536,
            context_per_token: 0,
            kv_tokens_per_rank: 262_144,
            sequences_per_rank: 16,
            queue_max: 64,
        },
        layers_sampled: 2,
        process: step.process,
        recorded: None,
    }
}

fn requests(mean_gap_ns: u64) -> Vec<Arrival> {
    let pool = Lengths::new(1024, 16_384).expect("bounds").draw(50, 1);
    arrivals(&ArrivalSpec { requests: 50, mean_gap_ns, new_tokens: 1, seed: 1 }, &pool)
}

fn serve(policy: PolicyKind, mean_gap_ns: u64) -> PrefillReport {
    simulate_prefill(&spec(), &system(policy), &requests(mean_gap_ns)).expect("serves")
}

#[test]
fn balance_shows_in_throughput_and_time_to_the_first_token() {
    let [none, ours, ideal] = [PolicyKind::None, PolicyKind::Ultraep, PolicyKind::Ideal].map(|p| serve(p, 0));
    assert!(none.tokens_per_s < ours.tokens_per_s && ours.tokens_per_s < ideal.tokens_per_s);
    assert!(none.ttft.mean_ns > ours.ttft.mean_ns && ours.ttft.mean_ns > ideal.ttft.mean_ns);
    assert!(none.imbalance > 1.2 && ours.imbalance < none.imbalance && ideal.imbalance < 1.05, "{}", ours.imbalance);
    assert_eq!((none.refused, none.ttft.served), (0, 50));
    let tokens: u64 = requests(0).iter().map(|a| u64::from(a.prompt_tokens)).sum();
    assert!(none.batches >= tokens / 65_536, "batches are bounded by the chunk budget");
}

#[test]
fn more_time_between_arrivals_means_less_waiting() {
    assert!(serve(PolicyKind::None, 100_000_000).ttft.mean_ns < serve(PolicyKind::None, 100_000).ttft.mean_ns);
}

#[test]
fn two_runs_are_one_run_and_history_helps_a_lasting_skew() {
    assert_eq!(serve(PolicyKind::Eplb, 0), serve(PolicyKind::Eplb, 0));
    let (eplb, none) = (serve(PolicyKind::Eplb, 0), serve(PolicyKind::None, 0));
    assert!(eplb.imbalance < none.imbalance, "{} {}", eplb.imbalance, none.imbalance);
}

#[test]
fn bad_limits_are_refused() {
    let mut bad = spec();
    bad.limits.chunk_tokens = 4;
    let error = simulate_prefill(&bad, &system(PolicyKind::None), &requests(0)).expect_err("refused").to_string();
    assert!(error.contains("chunk budget of 4"), "{error}");
}

#[test]
fn a_group_without_room_for_the_kv_cache_is_refused() {
    let mut small = spec();
    let system = system(PolicyKind::None);
    let room = Footprint::kv_room_tokens(&small, system.sync);
    assert!(room > 262_144, "{room}");
    assert!(Footprint::prefill(&small, system.sync, room).check(&small.machine).is_ok());
    assert!(Footprint::prefill(&small, system.sync, room + 1).check(&small.machine).is_err());
    small.machine.memory_bytes = Footprint::prefill(&small, system.sync, 262_144).total_bytes();
    assert!(simulate_prefill(&small, &system, &requests(0)).is_ok());
    small.machine.memory_bytes -= 1;
    let error = simulate_prefill(&small, &system, &requests(0)).expect_err("refused").to_string();
    assert!(error.starts_with("does not fit: "), "{error}");
}

#[test]
fn recorded_counts_serve_batches_of_any_size() {
    let generated = spec();
    let mut process = LoadProcess::new(generated.process).expect("valid");
    let mut layer = |layer| {
        let mut matrix = |batch| {
            let mut counts = Vec::new();
            process.counts(layer, 0, batch, &mut counts);
            counts
        };
        (0..4).map(&mut matrix).collect()
    };
    let layers = (0..2).map(&mut layer).collect();
    let loads = RecordedLoads::new((8, 32), 2, layers).expect("valid");
    let recorded = PrefillSpec { recorded: Some(Arc::new(loads)), ..generated };
    let replay = |policy| simulate_prefill(&recorded, &system(policy), &requests(0)).expect("serves");
    let (none, ours) = (replay(PolicyKind::None), replay(PolicyKind::Ultraep));
    let generated = serve(PolicyKind::None, 0);
    assert!((none.imbalance / generated.imbalance - 1.0).abs() < 0.2, "as skewed as the process it is from");
    assert!(none.tokens_per_s < ours.tokens_per_s);
}
