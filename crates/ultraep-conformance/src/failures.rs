//! Ranks that die, hang, leave early or disagree: every other rank ends with an error that names the one.

use crate::case::{Case, Ending, Need, Random, Report, ensure, plain, text};
use std::time::Duration;
use ultraep_fabric::{
    Fabric, FabricError, GroupSpec, Loss, Operation, OperationKind, Region, RemoteSpan, Span, WindowId,
};
use ultraep_plan::Rank;

/// The rank that does wrong in most cases.
pub(crate) const CULPRIT: Rank = Rank::new(1);
const FIRST: Rank = Rank::new(0);
const WINDOW: WindowId = WindowId::new(0);
const SIZES: &[usize] = &[2, 5, 16];
/// What a rank reports that has seen the right error, twice.
pub(crate) const NAMED: u64 = 1;

/// A case in which `CULPRIT` does wrong and all others must name it.
const fn case(name: &'static str, main: fn(Box<dyn Fabric>, u64) -> Report) -> Case {
    Case { name, ranks: SIZES, seeds: &[1], needs: &[], spec: short, main, verify: culprit_named }
}

const fn needing(case: Case, needs: &'static [Need]) -> Case {
    Case { needs, ..case }
}

pub(crate) const CASES: &[Case] = &[
    case("rank_returns_an_error", rank_returns_an_error),
    case("rank_panics", rank_panics),
    case("rank_drops_its_endpoint", rank_drops_its_endpoint),
    case("rank_leaves_early", rank_leaves_early),
    case("rank_drops_a_collective", rank_drops_a_collective),
    case("signaller_is_lost", signaller_is_lost),
    Case { verify: first_rank_named, ..case("first_rank_panics", first_rank_panics) },
    Case {
        verify: first_rank_named,
        needs: &[Need::OwnProcesses],
        ..case("first_rank_is_killed", first_rank_is_killed)
    },
    needing(case("rank_is_killed", rank_is_killed), &[Need::OwnProcesses]),
    needing(case("rank_exits_without_leaving", rank_exits_without_leaving), &[Need::OwnProcesses]),
    Case {
        ranks: &[5],
        seeds: &[1, 2, 3, 4, 5, 6],
        needs: &[Need::OwnProcesses],
        ..case("rank_is_killed_at_a_random_step", rank_is_killed_at_a_random_step)
    },
    Case {
        ranks: &[2, 16],
        spec: hasty,
        verify: culprit_named_in_time,
        needs: &[Need::RealTime],
        ..case("rank_hangs", rank_hangs)
    },
    Case {
        ranks: &[5],
        spec: hasty,
        verify: culprit_named_in_time,
        needs: &[Need::RealTime],
        ..case("signaller_hangs", signaller_hangs)
    },
    Case {
        ranks: &[3],
        spec: hasty_on_one_core,
        verify: culprit_named_in_time,
        needs: &[Need::CorePermits, Need::RealTime],
        ..case("rank_hangs_with_the_only_permit", rank_hangs_with_the_only_permit)
    },
    Case { spec: one_core, needs: &[Need::CorePermits], ..case("rank_dies_with_the_only_permit", rank_panics) },
    Case { verify: all_named, ..case("different_collectives", different_collectives) },
    Case { verify: all_named, ..case("different_sizes", different_sizes) },
    Case { verify: all_named, ..case("different_blocks", different_blocks) },
];

fn short(ranks: usize) -> GroupSpec {
    let mut spec = plain(ranks);
    spec.add_window("window", 1 << 16);
    spec
}

fn hasty(ranks: usize) -> GroupSpec {
    GroupSpec { timeout: Duration::from_millis(300), ..short(ranks) }
}

fn one_core(ranks: usize) -> GroupSpec {
    GroupSpec { cores: 1, ..short(ranks) }
}

/// Less hasty: the ranks' start counts as well, as those who wait for the permit cannot wait for each other first.
fn hasty_on_one_core(ranks: usize) -> GroupSpec {
    GroupSpec { cores: 1, timeout: Duration::from_millis(800), ..short(ranks) }
}

/// The group names the culprit, and so does every other rank.
pub(crate) fn culprit_named(ending: &Ending) -> Result<(), String> {
    named(ending, CULPRIT)
}

/// The same of rank 0, which on some fabrics has a part that no other has.
fn first_rank_named(ending: &Ending) -> Result<(), String> {
    named(ending, FIRST)
}

fn named(ending: &Ending, culprit: Rank) -> Result<(), String> {
    let named = ending.failure.as_ref().and_then(|(rank, _)| *rank);
    ensure(named == Some(culprit), || format!("the group says {:?}", ending.failure))?;
    for (rank, report) in ending.reports.iter().enumerate().filter(|&(rank, _)| rank != culprit.index()) {
        ensure(*report == Some(NAMED), || {
            format!("rank {rank} of {} did not name it (seed {})", ending.ranks, ending.seed)
        })?;
    }
    ensure(ending.elapsed < Duration::from_secs(10), || format!("took {:?}", ending.elapsed))
}

/// The same, and not long after the timeout.
fn culprit_named_in_time(ending: &Ending) -> Result<(), String> {
    culprit_named(ending)?;
    ensure(ending.elapsed < Duration::from_secs(5), || format!("took {:?}", ending.elapsed))
}

/// Nobody died: every rank, the culprit too, has seen the mismatch, and the group reports it.
pub(crate) fn all_named(ending: &Ending) -> Result<(), String> {
    ensure(ending.failure.is_some(), || "the group did not fail".to_owned())?;
    let rank = ending.reports.iter().position(|report| *report != Some(NAMED));
    ensure(rank.is_none(), || format!("rank {rank:?} did not name it"))
}

/// Barriers until one fails: the first that the culprit does not reach, or the one before, which it may have left by the
/// time that this rank looks. Then the same error again at once, whatever is called.
fn failing(fabric: &mut Box<dyn Fabric>) -> Result<FabricError, String> {
    let error = (0..2).find_map(|_| fabric.run(Operation::Barrier).err()).ok_or("no barrier failed")?;
    same_again(fabric, &error)?;
    Ok(error)
}

fn same_again(fabric: &mut Box<dyn Fabric>, error: &FabricError) -> Result<(), String> {
    ensure(error.ends_group(), || format!("{error} does not end the group"))?;
    let again = [
        fabric.run(Operation::Barrier).err(),
        fabric.submit(Operation::Signal { rank: Rank::new(0), signal: 0, add: 1 }).err(),
        fabric.submit(Operation::AwaitSignal { signal: 0, at_least: 0 }).err(),
    ];
    for later in again {
        ensure(later.as_ref().and_then(FabricError::culprit) == error.culprit(), || {
            format!("{later:?} after {error}")
        })?;
    }
    Ok(())
}

/// That the culprit was lost, in one of these ways.
fn lost(error: &FabricError, ways: &[Loss]) -> Report {
    lost_rank(error, CULPRIT, ways)
}

fn lost_rank(error: &FabricError, culprit: Rank, ways: &[Loss]) -> Report {
    match error {
        FabricError::PeerLost { rank, operation: OperationKind::Barrier, reason }
            if *rank == culprit && ways.contains(reason) =>
        {
            Ok(NAMED)
        }
        other => Err(format!("{other} ({other:?})")),
    }
}

fn first_rank_panics(mut fabric: Box<dyn Fabric>, _seed: u64) -> Report {
    if fabric.rank() == FIRST {
        fabric.run(Operation::Barrier).map_err(text)?;
        std::panic::resume_unwind(Box::new("(deliberate)"));
    }
    lost_rank(&failing(&mut fabric)?, FIRST, &[Loss::Panicked])
}

fn first_rank_is_killed(mut fabric: Box<dyn Fabric>, _seed: u64) -> Report {
    if fabric.rank() == FIRST {
        fabric.run(Operation::Barrier).map_err(text)?;
        kill_myself()?;
    }
    lost_rank(&failing(&mut fabric)?, FIRST, &[Loss::Killed { signal: 9 }, Loss::Vanished])
}

fn rank_returns_an_error(mut fabric: Box<dyn Fabric>, _seed: u64) -> Report {
    if fabric.rank() == CULPRIT {
        fabric.run(Operation::Barrier).map_err(text)?;
        return Err("(deliberate)".to_owned());
    }
    lost(&failing(&mut fabric)?, &[Loss::Dropped, Loss::Failed, Loss::Exited { code: 1 }])
}

fn rank_panics(mut fabric: Box<dyn Fabric>, _seed: u64) -> Report {
    if fabric.rank() == CULPRIT {
        fabric.run(Operation::Barrier).map_err(text)?;
        // Like a panic, but without the message on the screen.
        std::panic::resume_unwind(Box::new("(deliberate)"));
    }
    lost(&failing(&mut fabric)?, &[Loss::Panicked])
}

fn rank_drops_its_endpoint(mut fabric: Box<dyn Fabric>, _seed: u64) -> Report {
    if fabric.rank() == CULPRIT {
        fabric.run(Operation::Barrier).map_err(text)?;
        drop(fabric);
        return Ok(0);
    }
    lost(&failing(&mut fabric)?, &[Loss::Dropped])
}

fn rank_leaves_early(mut fabric: Box<dyn Fabric>, _seed: u64) -> Report {
    if fabric.rank() == CULPRIT {
        fabric.run(Operation::Barrier).map_err(text)?;
        fabric.leave().map_err(text)?;
        return Ok(0);
    }
    lost(&failing(&mut fabric)?, &[Loss::Left])
}

/// The culprit has submitted its part, so nobody waits for it; but it will not be there for the next.
fn rank_drops_a_collective(mut fabric: Box<dyn Fabric>, _seed: u64) -> Report {
    if fabric.rank() == CULPRIT {
        let _ticket = fabric.submit(Operation::Barrier).map_err(text)?;
        let refused = fabric.leave();
        ensure(matches!(refused, Err(FabricError::InFlight { .. })), || format!("{refused:?}"))?;
        return Ok(0);
    }
    lost(&failing(&mut fabric)?, &[Loss::Dropped])
}

fn signaller_is_lost(mut fabric: Box<dyn Fabric>, _seed: u64) -> Report {
    if fabric.rank() == CULPRIT {
        std::panic::resume_unwind(Box::new("(deliberate)"));
    }
    let error = fabric.run(Operation::AwaitSignal { signal: 0, at_least: 1 }).err().ok_or("no error")?;
    same_again(&mut fabric, &error)?;
    ensure(error.culprit() == Some(CULPRIT), || text(&error))?;
    Ok(NAMED)
}

fn kill_myself() -> Result<(), String> {
    rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL).map_err(text)?;
    Err("still alive".to_owned())
}

fn rank_is_killed(mut fabric: Box<dyn Fabric>, _seed: u64) -> Report {
    if fabric.rank() == CULPRIT {
        fabric.run(Operation::Barrier).map_err(text)?;
        kill_myself()?;
    }
    lost(&failing(&mut fabric)?, &[Loss::Killed { signal: 9 }, Loss::Vanished])
}

fn rank_exits_without_leaving(mut fabric: Box<dyn Fabric>, _seed: u64) -> Report {
    if fabric.rank() == CULPRIT {
        fabric.run(Operation::Barrier).map_err(text)?;
        std::process::exit(0);
    }
    lost(&failing(&mut fabric)?, &[Loss::Exited { code: 0 }, Loss::Vanished])
}

/// A working loop in which the culprit kills itself before, in or after some operation.
fn rank_is_killed_at_a_random_step(mut fabric: Box<dyn Fabric>, seed: u64) -> Report {
    const STEPS: u64 = 24;
    let (me, ranks) = (fabric.rank(), fabric.ranks());
    let last = Random(seed).below(STEPS);
    let data = Region::zeroed(1 << 20);
    let sizes = vec![100; ranks];
    let to: Vec<_> = (0..ranks).map(|rank| RemoteSpan { rank: Rank::new(rank), window: WINDOW, offset: 0 }).collect();
    let mut step = 0;
    let error = loop {
        let operation = match step % 6 {
            0 => Operation::AllReduceSumF32 { data: Span::whole(&data) },
            1 => {
                let send = Span::part(&data, 0, 100 * ranks);
                Operation::AllToAll { send, send_bytes: &sizes, recv: WINDOW, recv_bytes: &sizes }
            }
            2 => Operation::Open { window: WINDOW },
            3 => Operation::Put { from: Span::part(&data, 0, 1 << 16), to: &to },
            4 => Operation::Close { window: WINDOW },
            _ => Operation::Barrier,
        };
        let dies = me == CULPRIT && step == last;
        match fabric.submit(operation) {
            // In the middle: its part is submitted and not waited for.
            Ok(_) if dies => kill_myself()?,
            Ok(ticket) => {
                if let Err(error) = fabric.wait(ticket) {
                    break error;
                }
            }
            Err(error) => break error,
        }
        step += 1;
        ensure(step < 10 * STEPS, || "nobody died".to_owned())?;
    };
    same_again(&mut fabric, &error)?;
    match error {
        FabricError::PeerLost { rank: CULPRIT, reason: Loss::Killed { signal: 9 } | Loss::Vanished, .. } => Ok(NAMED),
        other => Err(text(other)),
    }
}

/// Waits for all ranks however long their start takes: polling has no timeout.
fn all_here(fabric: &mut Box<dyn Fabric>) -> Result<(), String> {
    let ticket = fabric.submit(Operation::Barrier).map_err(text)?;
    while fabric.poll(&ticket).map_err(text)?.is_none() {
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// The culprit sleeps long past the timeout, then comes back and is told as well.
fn hang(fabric: &mut Box<dyn Fabric>, time: Duration) -> Report {
    std::thread::sleep(time);
    let error = fabric.run(Operation::Barrier).err().ok_or("the group went on without it")?;
    timed_out(&error, &[OperationKind::Barrier, OperationKind::AwaitSignal, OperationKind::CorePermit])
}

fn timed_out(error: &FabricError, during: &[OperationKind]) -> Report {
    match error {
        FabricError::Timeout { missing, operation, waited } => {
            ensure(missing[..] == [CULPRIT] && *waited >= Duration::from_millis(300), || format!("{error:?}"))?;
            ensure(during.contains(operation), || format!("{error:?}"))?;
            Ok(NAMED)
        }
        other => Err(text(other)),
    }
}

fn rank_hangs(mut fabric: Box<dyn Fabric>, _seed: u64) -> Report {
    all_here(&mut fabric)?;
    if fabric.rank() == CULPRIT {
        return hang(&mut fabric, Duration::from_millis(700));
    }
    timed_out(&failing(&mut fabric)?, &[OperationKind::Barrier])
}

fn rank_hangs_with_the_only_permit(mut fabric: Box<dyn Fabric>, _seed: u64) -> Report {
    if fabric.rank() == CULPRIT {
        // All others have started when this barrier is over, and wait for the permit that the culprit then has.
        fabric.run(Operation::Barrier).map_err(text)?;
        return hang(&mut fabric, Duration::from_millis(1600));
    }
    timed_out(&failing(&mut fabric)?, &[OperationKind::Barrier, OperationKind::CorePermit])
}

fn signaller_hangs(mut fabric: Box<dyn Fabric>, _seed: u64) -> Report {
    all_here(&mut fabric)?;
    if fabric.rank() == CULPRIT {
        return hang(&mut fabric, Duration::from_millis(700));
    }
    let error = fabric.run(Operation::AwaitSignal { signal: 7, at_least: 1 }).err().ok_or("no error")?;
    same_again(&mut fabric, &error)?;
    timed_out(&error, &[OperationKind::AwaitSignal])
}

/// The last rank is in another collective.
fn different_collectives(mut fabric: Box<dyn Fabric>, _seed: u64) -> Report {
    let (me, last) = (fabric.rank().index(), fabric.ranks() - 1);
    fabric.run(Operation::Barrier).map_err(text)?;
    let (send, recv) = (Region::zeroed(24), Region::zeroed(24 * fabric.ranks()));
    let operation = if me == last {
        Operation::AllGather { send: Span::whole(&send), recv: Span::whole(&recv) }
    } else {
        Operation::Barrier
    };
    let error = fabric.run(operation).err().ok_or("no error")?;
    same_again(&mut fabric, &error)?;
    match &error {
        FabricError::Mismatch { rank, operation, other, other_operation } => {
            let named = (rank.index(), other.index(), operation.kind, other_operation.kind, other_operation.detail);
            let expected = (0, last, OperationKind::Barrier, OperationKind::AllGather, 24);
            ensure(named == expected && operation.sequence == 1, || text(&error))?;
            Ok(NAMED)
        }
        other => Err(text(other)),
    }
}

/// All ranks are in an all-reduce, the last with another size.
fn different_sizes(mut fabric: Box<dyn Fabric>, _seed: u64) -> Report {
    let (me, last) = (fabric.rank().index(), fabric.ranks() - 1);
    let data = Region::zeroed(if me == last { 40 } else { 44 });
    let error = fabric.run(Operation::AllReduceSumF32 { data: Span::whole(&data) }).err().ok_or("no error")?;
    same_again(&mut fabric, &error)?;
    match &error {
        FabricError::Mismatch { rank, operation, other, other_operation } => {
            let named = (rank.index(), other.index(), operation.detail, other_operation.detail);
            ensure(named == (0, last, 44, 40), || text(&error))?;
            Ok(NAMED)
        }
        other => Err(text(other)),
    }
}

/// One block of an all-to-all has another size at its other end; the ranks that have nothing to do with it hear too.
fn different_blocks(mut fabric: Box<dyn Fabric>, _seed: u64) -> Report {
    let (me, ranks) = (fabric.rank().index(), fabric.ranks());
    let send = Region::zeroed(8 * ranks);
    let (send_bytes, mut recv_bytes) = (vec![8; ranks], vec![8; ranks]);
    if me == 0 {
        recv_bytes[1] = 9;
    }
    let send = Span::whole(&send);
    let operation = Operation::AllToAll { send, send_bytes: &send_bytes, recv: WINDOW, recv_bytes: &recv_bytes };
    let error = fabric.run(operation).err().ok_or("no error")?;
    same_again(&mut fabric, &error)?;
    let (from, to) = (Rank::new(1), Rank::new(0));
    let expected = FabricError::SizeMismatch { from, to, sent_bytes: 8, expected_bytes: 9 };
    ensure(error == expected, || text(&error))?;
    // Its window may still be written to: it stays out of reach.
    let window = fabric.window(WINDOW).ok_or("no window")?;
    ensure(window.read::<u8>().is_err(), || "a window of a broken collective can be read".to_owned())?;
    Ok(NAMED)
}
