//! The event level against the closed form on random cases, and what both must keep.

mod common;

use common::{rack, step, system};
use proptest::prelude::*;
use ultraep_baselines::PolicyKind;
use ultraep_sim::{
    Balancer, ClosedForm, Direction, EventLevel, Fidelity, LayerLoad, LayerModel, LayerTimes, LayerWork, LoadProcess,
    Pipeline, StepSpec, simulate_step,
};

fn step_ps(spec: &StepSpec, policy: PolicyKind, fidelity: Fidelity) -> u64 {
    simulate_step(spec, &system(policy), fidelity, false).expect("runs").system.step_ps
}

fn layer(spec: &StepSpec, policy: PolicyKind) -> (LayerWork, LayerLoad) {
    let topology = spec.topology().expect("valid");
    let system = system(policy);
    let work = LayerWork::new(&spec.machine, &spec.model, spec.batch, &system, &topology);
    let mut balancer = Balancer::new(&system, &topology, spec.machine.transfer_model(&spec.model)).expect("builds");
    let mut counts = Vec::new();
    LoadProcess::new(spec.process).expect("valid").counts(0, 0, 0, &mut counts);
    let mut load = LayerLoad::default();
    balancer.microbatch(&counts, &mut load).expect("plans");
    (work, load)
}

fn any_step() -> impl Strategy<Value = (StepSpec, PolicyKind)> {
    let shape = (0..1500u32, 0..500u32, 0..900u32, 1..4u32, 0..3u32, 0..1000u64);
    (policies(), shape).prop_map(|(policy, (skew, drift, spread, stages, slots, seed))| {
        let mut spec = step();
        spec.process.skew_milli = skew;
        spec.process.drift_milli = drift;
        spec.process.spread_milli = spread;
        spec.process.seed = seed;
        spec.slots = slots;
        spec.pipeline = Pipeline { stages, chunks: 1, microbatches: 2 };
        (spec, policy)
    })
}

fn policies() -> impl Strategy<Value = PolicyKind> {
    use PolicyKind::{EplbExact, Ideal, None, Ultraep, UltraepV1};
    prop_oneof![Just(None), Just(Ideal), Just(EplbExact), Just(UltraepV1), Just(Ultraep)]
}

/// Domains of all, a half or a quarter of the ranks.
fn domains(ranks: u32) -> impl Strategy<Value = u32> {
    (0..3u32).prop_map(move |halvings| ranks >> halvings)
}

/// Both ways of one layer that all ranks begin at once: equal in every part that is no queue, near in the all-to-all. Groups of a
/// few ranks may differ more: one rank's dispatch hides behind another's experts.
fn parts_agree(spec: &StepSpec, policy: PolicyKind) -> Result<(), TestCaseError> {
    let (work, load) = layer(spec, policy);
    for direction in [Direction::Forward, Direction::Backward] {
        let closed = ClosedForm::times(&work, &load, direction);
        let events = EventLevel::default().pass(&work, &load, direction, &mut vec![0; load.ranks()]);
        let others = |t: &LayerTimes| (t.rest_ps, t.plan_ps, t.sync_ps, t.experts_ps);
        prop_assert_eq!(others(&closed), others(&events), "{} {:?}", policy, direction);
        let ratio = events.all_to_all_ps as f64 / closed.all_to_all_ps.max(1) as f64;
        prop_assert!((ratio - 1.0).abs() < 0.05, "{policy} {direction:?}: {ratio} of the closed form");
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_part_of_a_layer_agrees_on_64_ranks(
        policy in policies(),
        (skew, drift, spread) in (0..900u32, 0..400u32, 0..900u32),
        (domain, slots, seed) in (domains(64), 0..3u32, 0..1000u64),
    ) {
        let mut spec = rack();
        (spec.domain_ranks, spec.slots) = (domain, slots);
        (spec.process.skew_milli, spec.process.drift_milli, spec.process.spread_milli) = (skew, drift, spread);
        spec.process.seed = seed;
        parts_agree(&spec, policy)?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn events_and_closed_form_agree_within_five_percent((spec, policy) in any_step()) {
        let closed = step_ps(&spec, policy, Fidelity::ClosedForm) as f64;
        let events = step_ps(&spec, policy, Fidelity::Events) as f64;
        prop_assert!((events / closed - 1.0).abs() < 0.05, "{policy}: events {events}, closed {closed}");
    }

    #[test]
    fn rows_are_conserved((spec, policy) in any_step()) {
        let (_, load) = layer(&spec, policy);
        let total = 8 * 4096 * 4;
        prop_assert_eq!(load.total, total);
        prop_assert_eq!((0..8).map(|r| load.rank_rows(r)).sum::<u64>(), total);
        prop_assert_eq!(load.flows.iter().map(|&f| u64::from(f)).sum::<u64>(), total);
        let (sent, received) = (load.sent.iter().sum::<u64>(), load.received.iter().sum::<u64>());
        prop_assert_eq!(sent, received, "what is sent arrives");
        for rank in 0..8 {
            let from: u64 = load.flows[rank * 8..][..8].iter().map(|&f| u64::from(f)).sum();
            prop_assert_eq!(from, 4096 * 4, "a source's rows");
            let to: u64 = (0..8).map(|from| u64::from(load.flows[from * 8 + rank])).sum();
            prop_assert_eq!(to, load.rank_rows(rank), "a rank processes what comes to it");
        }
    }

    #[test]
    fn no_rank_ends_before_it_begins_nor_before_its_own_work((spec, policy) in any_step(), late in 0..8usize) {
        let (work, load) = layer(&spec, policy);
        for direction in [Direction::Forward, Direction::Backward] {
            let mut ready = vec![1_000_000; 8];
            ready[late] = 5_000_000_000;
            let begun = ready.clone();
            let times = EventLevel::default().pass(&work, &load, direction, &mut ready);
            for rank in 0..8 {
                let own = work.rest_ps(rank, direction) + work.experts_ps(&load, rank, direction);
                prop_assert!(ready[rank] >= begun[rank] + own, "rank {rank}");
            }
            let last = ready.iter().max().expect("ranks");
            prop_assert_eq!(begun[late] + times.total_ps(), *last, "parts add up to the pass");
        }
    }

    #[test]
    fn more_bandwidth_is_never_slower((spec, policy) in any_step(), percent in 100..400u32) {
        for fidelity in [Fidelity::ClosedForm, Fidelity::Events] {
            let faster = StepSpec { machine: spec.machine.with_bandwidth_percent(percent), ..spec.clone() };
            let (before, after) = (step_ps(&spec, policy, fidelity), step_ps(&faster, policy, fidelity));
            // Chunks that come in another order may meet another queue: a thousandth.
            prop_assert!(after <= before + before / 1000, "{policy} {fidelity:?}: {before} then {after}");
        }
    }
}

#[test]
fn equal_loads_make_all_policies_equal() {
    let mut spec = step();
    (spec.process.skew_milli, spec.process.drift_milli, spec.process.spread_milli) = (0, 0, 0);
    for fidelity in [Fidelity::ClosedForm, Fidelity::Events] {
        let none = step_ps(&spec, PolicyKind::None, fidelity) as f64;
        for policy in [PolicyKind::Ideal, PolicyKind::Ultraep, PolicyKind::UltraepV1, PolicyKind::Greedy] {
            let mut system = system(policy);
            system.plan_ns = 0;
            let got = simulate_step(&spec, &system, fidelity, false).expect("runs").system;
            assert!(got.replicas == 0.0, "{policy} made replicas of an even load");
            assert!(
                (got.step_ps as f64 / none - 1.0).abs() < 0.002,
                "{policy} {fidelity:?}: {} of {none}",
                got.step_ps
            );
        }
    }
}

#[test]
fn two_runs_are_one_run() {
    for fidelity in [Fidelity::ClosedForm, Fidelity::Events] {
        let run = |seed| {
            let mut spec = step();
            spec.process.seed = seed;
            simulate_step(&spec, &system(PolicyKind::Ultraep), fidelity, false).expect("runs").system
        };
        assert_eq!(run(7), run(7));
        assert_ne!(run(7).digest, run(8).digest);
    }
}

#[test]
fn the_digest_of_a_small_run_is_kept() {
    let report = simulate_step(&step(), &system(PolicyKind::Ultraep), Fidelity::Events, false).expect("runs").system;
    let closed =
        simulate_step(&step(), &system(PolicyKind::Ultraep), Fidelity::ClosedForm, false).expect("runs").system;
    assert_eq!((report.digest, closed.digest), (12761011705243606781, 3798407697084520685), "the simulation changed");
}

#[test]
fn closed_form_parts_are_the_busiest_rank() {
    let (work, load) = layer(&step(), PolicyKind::None);
    let times = ClosedForm::times(&work, &load, Direction::Forward);
    assert_eq!((times.plan_ps, times.sync_ps), (0, 0), "nothing to plan");
    let busiest = (0..8).max_by_key(|&rank| load.rank_rows(rank)).expect("ranks");
    assert_eq!(times.experts_ps, work.experts_ps(&load, busiest, Direction::Forward));
    let incoming = load.received[busiest] * work.forward.link_row_ps;
    assert!(times.all_to_all_ps >= 2 * incoming, "dispatch and combine");
}
