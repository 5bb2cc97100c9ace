//! Slow ranks, stale counts, late plans, jitter, pipelines with uneven stages: each costs what it must.

mod common;

use std::sync::Arc;

use common::{step, system};
use ultraep_baselines::PolicyKind;
use ultraep_plan::FULL_SPEED;
use ultraep_sim::{
    Fidelity, FitTarget, Jitter, LoadProcess, Mistake, Pipeline, Recompute, RecordedLoads, SimError, StepSpec,
    fit_process, recovery_ps, simulate_step,
};

fn run(spec: &StepSpec, policy: PolicyKind) -> u64 {
    simulate_step(spec, &system(policy), Fidelity::ClosedForm, false).expect("runs").system.step_ps
}

#[test]
fn a_planner_that_knows_of_a_slow_rank_loses_less() {
    let mut slow = step();
    slow.speeds = vec![FULL_SPEED; 8];
    slow.speeds[3] = FULL_SPEED / 2;
    let unknown = StepSpec { speeds_known: false, ..slow.clone() };
    let (healthy, known, blind) =
        (run(&step(), PolicyKind::Ultraep), run(&slow, PolicyKind::Ultraep), run(&unknown, PolicyKind::Ultraep));
    assert!(healthy < known && known < blind, "{healthy} {known} {blind}");
}

#[test]
fn mistakes_of_the_planner_cost_time() {
    let exact = run(&step(), PolicyKind::Ultraep);
    let stale = run(&StepSpec { mistake: Mistake::StaleCounts, ..step() }, PolicyKind::Ultraep);
    let late = run(&StepSpec { mistake: Mistake::LatePlan { late_ns: 500_000 }, ..step() }, PolicyKind::Ultraep);
    assert!(exact < stale, "{exact} {stale}");
    // Five layers, two microbatches, half a millisecond each.
    assert_eq!(late - exact, 5 * 2 * 500_000_000);
    let none = |mistake| run(&StepSpec { mistake, ..step() }, PolicyKind::None);
    assert_eq!(none(Mistake::StaleCounts), none(Mistake::None), "nothing is planned");
    assert!(run(&StepSpec { jitter: Jitter { percent: 20 }, ..step() }, PolicyKind::Ultraep) > exact);
}

#[test]
fn recomputing_and_waiting_stages_cost_time() {
    let plain = run(&step(), PolicyKind::Ultraep);
    let again = [Recompute::Attention, Recompute::Layer];
    let [attention, layer] = again.map(|recompute| run(&StepSpec { recompute, ..step() }, PolicyKind::Ultraep));
    assert!(plain < attention && attention < layer, "{plain} {attention} {layer}");
    let staged = StepSpec { pipeline: Pipeline { stages: 3, chunks: 1, microbatches: 6 }, ..step() };
    let report = simulate_step(&staged, &system(PolicyKind::None), Fidelity::ClosedForm, false).expect("runs");
    let bubble = report.system.bubble_fraction;
    // (p - 1) / (m + p - 1) of even stages is 0.25; these are not even.
    assert!((0.2..0.6).contains(&bubble), "{bubble}");
    let busiest = report.ops.iter().filter(|(op, ..)| op.stage == 2).map(|(_, start, end)| end - start).sum::<u64>();
    assert!(busiest <= report.system.step_ps);
}

#[test]
fn recovery_moves_state_of_all_layers() {
    let spec = step();
    let per_rank = 4 * 5 * spec.model.expert_parameters() * 16;
    let least = u128::from(per_rank / 7) * 1_000_000_000_000 / 50_000_000_000;
    let got = u128::from(recovery_ps(&spec.machine, &spec.model, 8));
    assert!(got >= least && got < least * 11 / 10, "{got} {least}");
}

#[test]
fn a_fit_meets_its_target_and_says_when_it_cannot() {
    let spec = step();
    let target = |none_permille| FitTarget {
        none_permille,
        historical_permille: None,
        drift_permille: 0,
        layers: 4,
        microbatches: 2,
    };
    let fit = fit_process(spec.process, &target(1800), None).expect("within reach");
    assert!(fit.none_permille.abs_diff(1800) < 40, "{fit:?}");
    assert!(matches!(fit_process(spec.process, &target(8500), None), Err(SimError::Fit { .. })));
}

#[test]
fn a_bad_step_is_refused() {
    let refused = |change: fn(&mut StepSpec)| {
        let mut spec = step();
        change(&mut spec);
        simulate_step(&spec, &system(PolicyKind::None), Fidelity::ClosedForm, false).expect_err("refused").to_string()
    };
    assert!(refused(|s| s.pipeline.stages = 7).contains("7 pipeline parts for 6 layers"));
    assert!(refused(|s| s.speeds = vec![1]).contains("speeds: 1 values where 8 belong"));
    assert!(refused(|s| s.domain_ranks = 3).contains("domains of 3"));
    assert!(refused(|s| s.model.dense_layers = 6).contains("layers with experts 0"));
    assert!(refused(|s| s.slots = 65).contains("65 slots"));
}

#[test]
fn recorded_counts_take_the_place_of_generated_ones() {
    let spec = step();
    let mut process = LoadProcess::new(spec.process).expect("valid");
    let mut matrix = |layer, step, microbatch| {
        let mut counts = Vec::new();
        process.counts(layer, step, microbatch, &mut counts);
        counts
    };
    // Three steps of history and the one that counts.
    let mut layer = |l| (0..4).flat_map(|s| [matrix(l, s, 0), matrix(l, s, 1)]).collect::<Vec<_>>();
    let layers = (0..5).map(&mut layer).collect();
    let recorded = RecordedLoads::new((8, 32), 2, layers).expect("valid");
    let replayed = StepSpec { recorded: Some(Arc::new(recorded)), ..step() };
    for policy in [PolicyKind::None, PolicyKind::Eplb, PolicyKind::Ultraep] {
        assert_eq!(run(&replayed, policy), run(&spec, policy), "{policy}");
    }
}

#[test]
fn memory_decides_what_is_recomputed_and_what_fits() {
    let with = |memory_bytes, recompute| {
        let mut spec = StepSpec { recompute, ..step() };
        spec.machine.memory_bytes = memory_bytes;
        spec
    };
    let needs = |recompute, policy| {
        let spec = with(1 << 50, recompute);
        simulate_step(&spec, &system(policy), Fidelity::ClosedForm, false).expect("runs").system.memory.total_bytes()
    };
    let [nothing, attention, layer] = Recompute::ALL.map(|recompute| needs(recompute, PolicyKind::Ideal));
    assert!(nothing > attention && attention > layer, "{nothing} {attention} {layer}");
    assert!(needs(Recompute::Nothing, PolicyKind::None) > nothing, "hot ranks keep more");
    // Forced-even routing rounds each source's tokens, so a rank may have a few rows more than the mean.
    let near = |bytes: u64| bytes + bytes / 1000;
    for (memory, least) in [
        (near(nothing), Recompute::Nothing),
        (near(attention), Recompute::Attention),
        (near(layer), Recompute::Layer),
        (1, Recompute::Layer),
    ] {
        assert_eq!(with(memory, Recompute::Nothing).least_recompute(), Ok(least), "{memory} bytes");
    }
    let small = with(attention - 1, Recompute::Attention);
    let report = simulate_step(&small, &system(PolicyKind::Ideal), Fidelity::ClosedForm, false).expect("runs");
    let refused = report.system.memory.check(&small.machine).expect_err("too little").to_string();
    assert!(refused.starts_with("does not fit: ") && refused.contains("needed on a rank, which has"), "{refused}");
    // Replicas of a placement have buffers in every layer.
    assert!(needs(Recompute::Nothing, PolicyKind::Eplb) > needs(Recompute::Nothing, PolicyKind::Ultraep));
}
