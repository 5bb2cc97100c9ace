//! What only process groups have: joining, supervision, orphans.

use crate::launchers::text;
use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};
use ultraep_conformance::{Leftovers, Test};
use ultraep_fabric::processes::{self, Group, JoinInfo};
use ultraep_fabric::{Fabric, FabricError, GroupError, GroupSpec, JoinError, Operation, OperationKind, ProcessEnd};
use ultraep_plan::Rank;

type Outcome = Result<(), String>;

pub(crate) const TESTS: &[Test] = &[
    ("join_is_refused", join_is_refused),
    ("program_is_missing", program_is_missing),
    ("supervisor_kills_a_rank", supervisor_kills_a_rank),
    ("stopped_rank_is_killed_in_the_end", stopped_rank_is_killed_in_the_end),
    ("stopped_rank_that_nobody_needs_is_killed_in_the_end", stopped_rank_that_nobody_needs),
    ("dropped_group_leaves_nothing", dropped_group_leaves_nothing),
    ("ranks_die_with_their_launcher", ranks_die_with_their_launcher),
    ("rank_never_joins", rank_never_joins),
    ("group_that_was_suspended_goes_on", group_that_was_suspended_goes_on),
];

/// Exit code of a rank that was refused as it should be.
const REFUSED: i32 = 42;
const CULPRIT: Rank = Rank::new(1);

fn spec() -> GroupSpec {
    let mut spec = GroupSpec::new(3);
    spec.timeout = Duration::from_millis(800);
    spec.add_window("window", 100);
    spec.config_digest = 7;
    spec
}

fn ensure(condition: bool, otherwise: impl FnOnce() -> String) -> Outcome {
    if condition { Ok(()) } else { Err(otherwise()) }
}

/// Starts a group of three in which each rank does what `role` says for it.
fn launch(role: impl Fn(Rank) -> &'static str) -> Result<Group, String> {
    let myself = std::env::current_exe().map_err(text)?;
    let start = |rank, info: JoinInfo| {
        let mut command = Command::new(&myself);
        command.args(["--as-member", &info.to_string(), role(rank)]);
        command
    };
    processes::launch(&spec(), start).map_err(text)
}

fn culprit_does(what: &'static str) -> impl Fn(Rank) -> &'static str {
    move |rank| if rank == CULPRIT { what } else { "barriers" }
}

/// This process is a rank, or a launcher to be killed.
pub(crate) fn run_child(arguments: &[String]) -> Option<ExitCode> {
    match arguments {
        [flag, info, role] if flag == "--as-member" => {
            let code = info.parse().map_err(text).and_then(|info| member(info, role));
            Some(code.unwrap_or_else(|why| {
                eprintln!("rank {info} as {role}: {why}");
                ExitCode::FAILURE
            }))
        }
        [flag] if flag == "--as-launcher" => {
            let group = launch(|_| "sleeps").expect("a group starts");
            (0..3).for_each(|rank| println!("{}", group.process_id(Rank::new(rank)).expect("three ranks")));
            std::thread::sleep(Duration::from_secs(60));
            Some(ExitCode::FAILURE)
        }
        _ => None,
    }
}

/// The same segment, but another rank.
fn as_rank(info: JoinInfo, rank: usize) -> Result<JoinInfo, String> {
    let info = info.to_string();
    let (segment, _) = info.rsplit_once(':').ok_or("no colon")?;
    format!("{segment}:{rank}").parse().map_err(text)
}

fn member(info: JoinInfo, role: &str) -> Result<ExitCode, String> {
    let mut spec = spec();
    let refused = |expected: fn(&JoinError) -> bool, spec: &GroupSpec, info| match processes::join(spec, info) {
        Err(FabricError::Join { reason, .. }) if expected(&reason) => Ok(ExitCode::from(REFUSED as u8)),
        Err(other) => Err(text(other)),
        Ok(_) => Err("joined".to_owned()),
    };
    match role {
        "other digest" => {
            spec.config_digest = 8;
            return refused(|e| matches!(e, JoinError::ConfigDigest { expected: 7, got: 8 }), &spec, info);
        }
        "other ranks" => {
            spec.ranks = 4;
            return refused(|e| matches!(e, JoinError::Ranks { expected: 3, got: 4 }), &spec, info);
        }
        "other windows" => {
            spec.windows[0].bytes = 10_000;
            return refused(|e| matches!(e, JoinError::Layout { .. }), &spec, info);
        }
        "bad descriptor" => {
            // Of its own descriptors none is taken or closed, whatever is said.
            let (own, file) = (std::process::id(), std::fs::File::open("/proc/self/exe").map_err(text)?);
            let info = format!("{own}:{}:{}", file.as_raw_fd(), info.rank()).parse().map_err(text)?;
            let code = refused(|e| matches!(e, JoinError::NotASegment { .. }), &spec, info)?;
            file.metadata().map_err(text)?;
            return Ok(code);
        }
        "no such rank" => {
            let info = as_rank(info, 3)?;
            return refused(|e| matches!(e, JoinError::NoSuchRank { ranks: 3 }), &spec, info);
        }
        "rank taken" => {
            // Rank 0 joins as itself; this one tries to be rank 0 as well until it is taken.
            std::thread::sleep(Duration::from_millis(200));
            let info = as_rank(info, 0)?;
            return refused(|e| matches!(e, JoinError::Taken), &spec, info);
        }
        "never joins" => {
            std::thread::sleep(Duration::from_secs(60));
            return Ok(ExitCode::FAILURE);
        }
        _ => {}
    }
    let mut fabric = processes::join(&spec, info).map_err(text)?;
    match role {
        "sleeps" => std::thread::sleep(Duration::from_secs(60)),
        "one barrier" | "one barrier and stops" => {
            fabric.run(Operation::Barrier).map_err(text)?;
            if role == "one barrier" {
                fabric.leave().map_err(text)?;
                return Ok(ExitCode::SUCCESS);
            }
            let signal = rustix::process::Signal::STOP;
            rustix::process::kill_process(rustix::process::getpid(), signal).map_err(text)?;
        }
        "stops" => {
            let signal = rustix::process::Signal::STOP;
            rustix::process::kill_process(rustix::process::getpid(), signal).map_err(text)?;
        }
        "many barriers" => {
            for _ in 0..2000 {
                std::thread::sleep(Duration::from_millis(1));
                fabric.run(Operation::Barrier).map_err(text)?;
            }
            fabric.leave().map_err(text)?;
        }
        _ => return barriers(&mut fabric),
    }
    Ok(ExitCode::SUCCESS)
}

/// Barriers until the culprit is named; anything else is code 1.
fn barriers(fabric: &mut Box<dyn Fabric>) -> Result<ExitCode, String> {
    let error = (0..10_000).find_map(|_| {
        std::thread::sleep(Duration::from_millis(1));
        fabric.run(Operation::Barrier).err()
    });
    match error {
        Some(error) if error.culprit() == Some(CULPRIT) => Ok(ExitCode::SUCCESS),
        other => Err(format!("{other:?}")),
    }
}

fn join_is_refused() -> Outcome {
    let roles = ["other digest", "other ranks", "other windows", "bad descriptor", "no such rank", "rank taken"];
    for role in roles {
        let before = Leftovers::now();
        let error = launch(culprit_does(role))?.wait();
        let expected = GroupError::Failed { rank: CULPRIT, error: ProcessEnd::Exited(REFUSED) };
        ensure(error == Err(expected), || format!("{role}: {error:?}"))?;
        before.compare()?;
    }
    for text in ["", "3", "3:1", "x:1:0", "1:-1:0", "1:3:70000", "3:1:2:4"] {
        ensure(text.parse::<JoinInfo>().is_err(), || format!("`{text}` is no join info"))?;
    }
    Ok(())
}

fn program_is_missing() -> Outcome {
    let before = Leftovers::now();
    let myself = std::env::current_exe().map_err(text)?;
    // The first ranks start, the last cannot: they must not stay.
    let start = |rank, info: JoinInfo| {
        let mut command = Command::new(if rank == Rank::new(2) { "/no/such/program".into() } else { myself.clone() });
        command.args(["--as-member", &info.to_string(), "sleeps"]);
        command
    };
    let error = processes::launch(&spec(), start).err();
    ensure(matches!(error, Some(FabricError::Os { .. })), || format!("{error:?}"))?;
    let mut too_many = spec();
    too_many.ranks = 5000;
    let error = processes::launch(&too_many, |_, _| Command::new("true")).err();
    ensure(matches!(error, Some(FabricError::Spec { asked: 5000, .. })), || format!("{error:?}"))?;
    before.compare()
}

fn supervisor_kills_a_rank() -> Outcome {
    let before = Leftovers::now();
    let mut group = launch(culprit_does("barriers"))?;
    let deadline = Instant::now() + Duration::from_millis(200);
    while Instant::now() < deadline {
        ensure(!group.supervise(Duration::from_millis(20)).map_err(text)?, || "ended before it was killed".to_owned())?;
    }
    group.kill(CULPRIT);
    let error = group.wait();
    let expected = GroupError::Failed { rank: CULPRIT, error: ProcessEnd::Killed(9) };
    ensure(error == Err(expected), || format!("{error:?}"))?;
    before.compare()
}

/// A process that is stopped never exits: the others time out and say that it is suspended, and the supervisor ends it.
fn stopped_rank_is_killed_in_the_end() -> Outcome {
    let before = Leftovers::now();
    let start = Instant::now();
    let error = launch(culprit_does("stops"))?.wait();
    let named = matches!(&error, Err(GroupError::Fabric { rank: CULPRIT, error: FabricError::Suspended { ranks, .. } })
        if ranks[..] == [CULPRIT]);
    ensure(named && start.elapsed() < Duration::from_secs(5), || format!("{error:?} after {:?}", start.elapsed()))?;
    before.compare()
}

/// All others have left when it stops: only the supervisor waits for it.
fn stopped_rank_that_nobody_needs() -> Outcome {
    let before = Leftovers::now();
    let start = Instant::now();
    let role = |rank| if rank == CULPRIT { "one barrier and stops" } else { "one barrier" };
    let error = launch(role)?.wait();
    let operation = OperationKind::Leave;
    let named = matches!(&error, Err(GroupError::Fabric { rank: CULPRIT, error: FabricError::Suspended { ranks, operation: found, .. } })
        if ranks[..] == [CULPRIT] && *found == operation);
    ensure(named && start.elapsed() < Duration::from_secs(5), || format!("{error:?} after {:?}", start.elapsed()))?;
    before.compare()
}

/// All ranks are stopped for several timeouts, as by Ctrl-Z, and go on: nobody was lost.
fn group_that_was_suspended_goes_on() -> Outcome {
    let before = Leftovers::now();
    let mut group = launch(|_| "many barriers")?;
    let timeout = spec().timeout;
    let signal = |group: &Group, signal| {
        let ranks = (0..3).filter_map(|rank| group.process_id(Rank::new(rank)));
        let mut pids = ranks.filter_map(|id| rustix::process::Pid::from_raw(id.cast_signed()));
        pids.try_for_each(|pid| rustix::process::kill_process(pid, signal)).map_err(text)
    };
    let run = |group: &mut Group, time: Duration| {
        let deadline = Instant::now() + time;
        while Instant::now() < deadline {
            ensure(!group.supervise(Duration::from_millis(20)).map_err(text)?, || "ended too early".to_owned())?;
        }
        Ok::<(), String>(())
    };
    run(&mut group, Duration::from_millis(300))?;
    for _ in 0..2 {
        signal(&group, rustix::process::Signal::STOP)?;
        run(&mut group, 2 * timeout)?;
        signal(&group, rustix::process::Signal::CONT)?;
        run(&mut group, Duration::from_millis(100))?;
    }
    let error = group.wait();
    ensure(error == Ok(()), || format!("{error:?}"))?;
    before.compare()
}

fn rank_never_joins() -> Outcome {
    let before = Leftovers::now();
    let error = launch(culprit_does("never joins"))?.wait();
    let named = matches!(&error, Err(GroupError::Fabric { rank: CULPRIT, error: FabricError::Timeout { .. } }));
    ensure(named, || format!("{error:?}"))?;
    before.compare()
}

fn dropped_group_leaves_nothing() -> Outcome {
    let before = Leftovers::now();
    drop(launch(|_| "sleeps")?);
    before.compare()
}

/// Kills a launcher and looks for its ranks.
fn ranks_die_with_their_launcher() -> Outcome {
    let myself = std::env::current_exe().map_err(text)?;
    let mut launcher = Command::new(myself).arg("--as-launcher").stdout(Stdio::piped()).spawn().map_err(text)?;
    let output = BufReader::new(launcher.stdout.take().ok_or("no pipe")?);
    let ranks: Vec<String> = output.lines().take(3).collect::<Result<_, _>>().map_err(text)?;
    ensure(ranks.len() == 3 && ranks.iter().all(|id| alive(id)), || format!("ranks {ranks:?} do not live"))?;
    launcher.kill().map_err(text)?;
    launcher.wait().map_err(text)?;
    let deadline = Instant::now() + Duration::from_secs(5);
    while ranks.iter().any(|id| alive(id)) {
        ensure(Instant::now() < deadline, || format!("orphans among {ranks:?}"))?;
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Whether a process runs (one that only waits to be reaped does not).
fn alive(id: &str) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
    status
        .lines()
        .find(|line| line.starts_with("State:"))
        .is_some_and(|line| !line.contains('Z') && !line.contains('X'))
}
