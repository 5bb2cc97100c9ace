//! Seeded schedules with faults, real processes, ranks that hang, and bugs planted under the runtime.

mod saboteur;

use std::path::Path;
use std::thread;
use std::time::Duration;

use saboteur::{Bug, Saboteur};
use ultraep_fabric::OperationKind;
use ultraep_fabric::simulated::{Fault, FaultKind, Moment, Simulation, run_simulated};
use ultraep_faults::seeds::check_seed;
use ultraep_faults::{Ending, Ground, Profile, RankEnd, Scenario, run, run_and_kill};
use ultraep_plan::Rank;

fn profiled(scenario: Scenario) -> (Scenario, Profile) {
    let profile = scenario.profile().expect("a healthy group");
    (scenario, profile)
}

/// `cargo xtask simulate` runs as many seeds as one likes.
#[test]
fn under_every_seed_results_are_those_of_threads_or_all_name_the_cause() {
    let (scenario, profile) = profiled(Scenario { microbatches: 3, ..Scenario::small(4) });
    let streams = profile.operations.iter().flatten().filter(|&&kind| kind == OperationKind::Stream).count();
    assert!(streams > 10, "the scenario must make replicas: {streams} streams");
    let (mut well, mut badly) = (0, 0);
    for seed in 0..250 {
        let end = check_seed(seed, &scenario, &profile).unwrap_or_else(|why| panic!("{why}"));
        *(if end.ending.failure.is_none() { &mut well } else { &mut badly }) += 1;
        if seed % 50 == 0 {
            assert_eq!(check_seed(seed, &scenario, &profile), Ok(end), "seed {seed} does not reproduce");
        }
    }
    assert!(well > 100 && badly > 60, "{well} seeds ended well, {badly} badly");
}

/// Runs the same points at once, each on a thread of its own: they mostly wait.
fn all_at_once(scenario: &Scenario, ground: Ground<'_>, profile: &Profile, faults: &[Fault]) {
    let one = |fault: &Fault| -> Result<Ending, String> {
        let ending = run(scenario, ground, &[*fault]).map_err(|error| error.to_string())?;
        ending.check(profile, fault).map(|()| ending)
    };
    thread::scope(|scope| {
        let running: Vec<_> = faults.iter().map(|fault| scope.spawn(move || one(fault))).collect();
        for run in running {
            run.join().expect("no check panics").unwrap_or_else(|why| panic!("{ground:?}: {why}"));
        }
    });
}

fn spread(profile: &Profile, kind: FaultKind, count: u64) -> Vec<Fault> {
    let ranks = profile.operations.len() as u64;
    let fault = |number: u64| {
        let rank = Rank::new((number % ranks) as usize);
        let operation = number * (profile.last_collective(rank) - 1) / count;
        let moment = if number.is_multiple_of(2) { Moment::Before(operation) } else { Moment::InFlight(operation) };
        Fault { rank, moment, kind }
    };
    (0..count).map(fault).collect()
}

#[test]
fn a_thread_that_hangs_is_named_after_the_timeout() {
    let (scenario, profile) = profiled(Scenario { timeout: Duration::from_secs(2), ..Scenario::small(3) });
    all_at_once(&scenario, Ground::Threads, &profile, &spread(&profile, FaultKind::Hangs, 6));
}

/// By `SIGKILL`, at exactly that operation.
#[test]
fn processes_that_are_killed_are_named() {
    let (scenario, profile) = profiled(Scenario::small(3));
    let program = Path::new(env!("CARGO_BIN_EXE_ultraep-faults"));
    for fault in spread(&profile, FaultKind::Killed, 16) {
        all_at_once(&scenario, Ground::Processes(program), &profile, &[fault]);
    }
    let healthy = run(&scenario, Ground::Processes(program), &[]).expect("the group starts");
    healthy.check_healthy(&profile).expect("processes compute what threads compute");
}

/// At whatever instruction: in the fabric's code, before it has joined, after it has left.
#[test]
fn processes_that_are_killed_at_any_time_are_named() {
    let (scenario, profile) = profiled(Scenario { microbatches: 6, ..Scenario::small(3) });
    let program = Path::new(env!("CARGO_BIN_EXE_ultraep-faults"));
    let mut noticed = 0;
    for round in 0..40 {
        let (victim, delay) = (Rank::new(round % 3), Duration::from_micros(round as u64 * 700));
        let ending = run_and_kill(&scenario, program, victim, delay).expect("the group starts");
        let result = ending.check_killed(&profile, victim).unwrap_or_else(|why| panic!("after {delay:?}: {why}"));
        noticed += usize::from(result);
    }
    println!("{noticed} of 40 kills came before the rank had ended");
}

/// By `SIGSTOP`: it never exits by itself, and the supervisor ends it.
#[test]
fn processes_that_stop_are_named_after_the_timeout() {
    let (scenario, profile) = profiled(Scenario { timeout: Duration::from_secs(2), ..Scenario::small(3) });
    let program = Path::new(env!("CARGO_BIN_EXE_ultraep-faults"));
    let mut faults = spread(&profile, FaultKind::Hangs, 3);
    // And when nobody needs it any more: only the supervisor waits for it to leave.
    let leaving = profile.operations[2].len() as u64 - 1;
    faults.push(Fault { rank: Rank::new(2), moment: Moment::Before(leaving), kind: FaultKind::Hangs });
    all_at_once(&scenario, Ground::Processes(program), &profile, &faults);
}

/// The runtime as it is, with one operation of one rank done wrong: it shows at once.
#[test]
fn bugs_planted_under_the_runtime_are_found() {
    let (scenario, profile) = profiled(Scenario::small(3));
    let (config, group) = (scenario.config().expect("valid"), scenario.group().expect("valid"));
    for bug in [
        None,
        Some(Bug::LosesAPut),
        Some(Bug::MisplacesAPut),
        Some(Bug::PutsAfterClose),
        Some(Bug::LosesAGet),
        Some(Bug::OtherCollective),
    ] {
        for seed in 0..3 {
            let run = run_simulated(&group, &Simulation::new(seed), |fabric| {
                let rank = fabric.rank();
                let planted = bug.filter(|_| rank == Rank::new(1));
                let result = scenario.run_rank(config.clone(), Box::new(Saboteur::new(fabric, planted)));
                match RankEnd::of(&result) {
                    RankEnd::Finished(digest) if digest == profile.digests[rank.index()] => Ok(()),
                    end => Err(end.to_string()),
                }
            });
            let result = run.expect("the group starts").result;
            assert_eq!(result.is_ok(), bug.is_none(), "{bug:?} under schedule {seed}: {result:?}");
        }
    }
}
