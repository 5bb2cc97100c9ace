//! The simulated fabric: a seed reproduces its schedule, lost ranks are named wherever they are lost, and planted bugs of a
//! protocol are found within few seeds.

use core::time::Duration;
use std::collections::HashSet;
use std::sync::Mutex;
use ultraep_fabric::simulated::{Fault, FaultKind, Moment, Schedule, Simulation, run_simulated};
use ultraep_fabric::{
    Fabric, FabricError, GroupError, GroupSpec, Loss, Operation, Region, RemoteSpan, Span, WindowId, run_threads,
};
use ultraep_plan::Rank;

const RANKS: usize = 4;
const CHUNKS: usize = 4;
const CHUNK_BYTES: usize = 64;
const WINDOW: WindowId = WindowId::new(0);

fn spec() -> GroupSpec {
    let mut spec = GroupSpec::new(RANKS);
    spec.add_window("window", CHUNKS * CHUNK_BYTES);
    spec
}

/// What is wrong with the relay below.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bug {
    None,
    /// A relay sends on without waiting for the chunk.
    MissingAwait,
    /// A relay tells the next rank before it sends.
    SignalBeforePut,
    /// A relay waits for one signal less than there are chunks.
    WaitsForTheLastButOne,
    /// The last chunk is put once the window is being closed.
    PutAfterClose,
    /// A rank looks at a peer's part when it has opened the window, without waiting for that peer.
    LooksTooEarly,
    /// One rank closes the window, the others meet at a barrier.
    OtherCollective,
}

fn pattern(chunk: usize) -> [u8; CHUNK_BYTES] {
    core::array::from_fn(|at| (chunk * 37 + at * 11 + 1) as u8)
}

/// Rank 0's chunks travel from rank to rank inside one epoch: await, put on, signal. Then all gather what they have.
fn relay(mut fabric: Box<dyn Fabric>, bug: Bug) -> Result<Vec<u8>, FabricError> {
    let (me, ranks) = (fabric.rank().index(), fabric.ranks());
    let window = fabric.window(WINDOW).expect("the group has it");
    if me == 0 {
        let content: Vec<u8> = (0..CHUNKS).flat_map(pattern).collect();
        window.write::<u8>().expect("closed").copy_from_slice(&content);
    }
    fabric.run(Operation::Open { window: WINDOW })?;
    let planted = me == 1;
    let mut seen = vec![0; CHUNK_BYTES];
    for chunk in 0..CHUNKS {
        let offset = chunk * CHUNK_BYTES;
        if me > 0 && !(planted && bug == Bug::MissingAwait) {
            let few = planted && bug == Bug::WaitsForTheLastButOne && chunk + 1 == CHUNKS;
            let at_least = (chunk + 1 - usize::from(few)) as u64;
            fabric.run(Operation::AwaitSignal { signal: 0, at_least })?;
        }
        if me + 1 < ranks {
            let next = Rank::new(me + 1);
            let to = [RemoteSpan { rank: next, window: WINDOW, offset }];
            let from = Span::part(&window, offset, CHUNK_BYTES);
            let signal = Operation::Signal { rank: next, signal: 0, add: 1 };
            if planted && bug == Bug::SignalBeforePut {
                fabric.run(signal)?;
                fabric.run(Operation::Put { from, to: &to })?;
            } else {
                fabric.run(Operation::Put { from, to: &to })?;
                fabric.run(signal)?;
            }
        }
        if bug == Bug::LooksTooEarly && me + 1 == ranks && chunk == 0 {
            let target = Region::zeroed(CHUNK_BYTES);
            let from = RemoteSpan { rank: Rank::new(1), window: WINDOW, offset: (CHUNKS - 1) * CHUNK_BYTES };
            fabric.run(Operation::Get { from, to: Span::whole(&target) })?;
            seen.copy_from_slice(&target.read::<u8>().expect("complete"));
        }
    }
    if planted && bug == Bug::OtherCollective {
        fabric.run(Operation::Barrier)?;
    }
    let closing = fabric.submit(Operation::Close { window: WINDOW })?;
    if planted && bug == Bug::PutAfterClose {
        let to = [RemoteSpan { rank: Rank::new(2), window: WINDOW, offset: 0 }];
        fabric.run(Operation::Put { from: Span::part(&window, 0, 1), to: &to })?;
    }
    fabric.wait(closing)?;
    if bug == Bug::LooksTooEarly && me + 1 == ranks {
        window.write::<u8>().expect("closed")[(CHUNKS - 1) * CHUNK_BYTES..].copy_from_slice(&seen);
    }
    let all = Region::zeroed(ranks * window.bytes());
    fabric.run(Operation::AllGather { send: Span::whole(&window), recv: Span::whole(&all) })?;
    fabric.leave()?;
    Ok(all.read::<u8>().expect("complete").to_vec())
}

fn simulate(simulation: &Simulation, bug: Bug) -> (Result<Vec<Vec<u8>>, GroupError<FabricError>>, Schedule) {
    let run = run_simulated(&spec(), simulation, |fabric| relay(fabric, bug)).expect("a small group starts");
    (run.result, run.schedule)
}

fn expected() -> Vec<Vec<u8>> {
    run_threads(&spec(), |fabric| relay(fabric, Bug::None)).expect("threads relay")
}

#[test]
fn every_seed_gives_what_threads_give_and_seeds_differ() {
    let expected = expected();
    let mut digests = HashSet::new();
    let mut late = 0;
    for seed in 0..200 {
        let (result, schedule) = simulate(&Simulation::new(seed), Bug::None);
        let result = result.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        assert!(result == expected, "seed {seed}: other bytes than on threads");
        digests.insert(schedule.digest);
        late += schedule.landed_late;
    }
    assert!(digests.len() > 190, "only {} schedules in 200 seeds", digests.len());
    assert!(late > 200, "only {late} messages landed late: nothing was reordered");
}

#[test]
fn a_seed_reproduces_its_schedule() {
    for seed in 0..20 {
        let fault = Fault { rank: Rank::new(2), moment: Moment::Turn(seed), kind: FaultKind::Killed };
        for simulation in [Simulation::new(seed), Simulation::with_fault(seed, fault)] {
            let (result, schedule) = simulate(&simulation, Bug::None);
            let again = simulate(&simulation, Bug::None);
            assert_eq!((&result, schedule), (&again.0, again.1), "{simulation:?}");
        }
    }
}

/// What the other ranks made of a fault, by rank; `None` for a rank that did not return.
type Ends = Vec<Option<Result<(), FabricError>>>;

fn strike(simulation: &Simulation) -> (Ends, Option<Rank>, Schedule) {
    let ends = Mutex::new(vec![None; RANKS]);
    let main = |fabric: Box<dyn Fabric>| {
        let rank = fabric.rank().index();
        let result = relay(fabric, Bug::None);
        ends.lock().expect("no rank panics while it reports")[rank] =
            Some(result.as_ref().map(drop).map_err(Clone::clone));
        result
    };
    let run = run_simulated(&spec(), simulation, main).expect("a small group starts");
    let blamed = run.result.err().and_then(|error| error.rank());
    (ends.into_inner().expect("as above"), blamed, run.schedule)
}

#[test]
fn whatever_strikes_a_rank_at_whatever_turn_the_others_name_it() {
    let victim = Rank::new(1);
    let kinds = [FaultKind::Fails, FaultKind::Panics, FaultKind::Killed, FaultKind::Hangs];
    let mut struck = 0;
    for kind in kinds {
        for turn in 0..60 {
            let fault = Fault { rank: victim, moment: Moment::Turn(turn), kind };
            let (ends, blamed, schedule) = strike(&Simulation::with_fault(turn, fault));
            if ends.iter().all(|end| matches!(end, Some(Ok(())))) {
                continue; // The rank had left before.
            }
            struck += 1;
            assert_eq!(blamed, Some(victim), "{fault:?}");
            for (rank, end) in ends.iter().enumerate().filter(|&(rank, _)| rank != victim.index()) {
                let end = end.as_ref().unwrap_or_else(|| panic!("{fault:?}: rank {rank} did not return"));
                let Err(error) = end else { continue };
                let as_expected = match (kind, error) {
                    (FaultKind::Hangs, FabricError::Timeout { missing, .. }) => missing.contains(&victim),
                    (FaultKind::Killed, FabricError::PeerLost { rank, reason, .. }) => {
                        (*rank, *reason) == (victim, Loss::Killed { signal: 9 })
                    }
                    (FaultKind::Fails | FaultKind::Panics, FabricError::PeerLost { rank, .. }) => *rank == victim,
                    _ => false,
                };
                assert!(as_expected, "{fault:?}: rank {rank} says {error}");
            }
            let limit = spec().timeout * 2;
            assert!(schedule.time < limit, "{fault:?}: it took {:?} of virtual time", schedule.time);
        }
    }
    assert!(struck > 150, "only {struck} faults struck");
}

/// Rank 0 waits for tiles of rank 1, that one for those of a rank that hangs, and rank 2 for all of them: whoever's patience ends
/// first, they name the one that hangs.
#[test]
fn who_waits_for_tiles_of_a_hanging_rank_is_not_blamed() {
    let victim = Rank::new(3);
    for seed in 0..50 {
        let fault = Fault { rank: victim, moment: Moment::Before(0), kind: FaultKind::Hangs };
        let simulation = Simulation { direct: true, ..Simulation::with_fault(seed, fault) };
        let errors = Mutex::new(Vec::new());
        let run = run_simulated(&spec(), &simulation, |mut fabric| {
            let result = match fabric.rank().index() {
                0 => fabric.direct().expect("it is asked for").wait_until(Rank::new(1), &|| false),
                1 => fabric.direct().expect("it is asked for").wait_until(victim, &|| false),
                _ => fabric.run(Operation::Barrier).map(drop),
            };
            errors.lock().expect("no rank panics while it reports").extend(result.clone().err());
            result
        });
        let result = run.expect("a small group starts").result;
        assert_eq!(result.err().and_then(|error| error.rank()), Some(victim), "seed {seed}");
        let errors = errors.into_inner().expect("as above");
        let named =
            |error: &FabricError| matches!(error, FabricError::Timeout { missing, .. } if missing[..] == [victim]);
        assert!(errors.len() == RANKS - 1 && errors.iter().all(named), "seed {seed}: {errors:?}");
    }
}

#[test]
fn a_stall_within_the_timeout_harms_nobody_and_a_longer_one_is_named() {
    let expected = expected();
    let victim = Rank::new(2);
    for (seconds, seed) in [(30, 1), (30, 2), (200, 3), (200, 4)] {
        let kind = FaultKind::Stalls(Duration::from_secs(seconds));
        let fault = Fault { rank: victim, moment: Moment::Before(1), kind };
        let (result, _) = simulate(&Simulation::with_fault(seed, fault), Bug::None);
        match result {
            Ok(result) => assert!(seconds == 30 && result == expected),
            Err(error) => assert!(seconds == 200 && matches!(error, GroupError::Fabric { .. }), "{error}"),
        }
    }
}

/// The simulator's worth: how many seeds until a bug shows, by a wrong result or an error.
#[test]
fn planted_bugs_are_found_within_few_seeds() {
    let expected = expected();
    let bugs = [
        (Bug::MissingAwait, 8),
        (Bug::SignalBeforePut, 8),
        (Bug::WaitsForTheLastButOne, 16),
        (Bug::PutAfterClose, 1),
        (Bug::LooksTooEarly, 8),
        (Bug::OtherCollective, 1),
    ];
    for (bug, within) in bugs {
        let shows = |seed: &u64| simulate(&Simulation::new(*seed), bug).0.as_ref() != Ok(&expected);
        let first = (0..200).find(shows);
        let shown = (0..200).filter(shows).count();
        println!("{bug:?}: first shown by seed {first:?}, by {shown} of 200");
        assert!(first.is_some_and(|first| first < within), "{bug:?} is first shown by seed {first:?}");
    }
}
