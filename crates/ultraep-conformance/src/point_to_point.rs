//! Send and receive.

use crate::case::{Case, Need, Random, Report, all_equal, all_well, bytes, digest, ensure, plain, text};
use crate::failures;
use std::sync::Arc;
use std::time::{Duration, Instant};
use ultraep_fabric::backend::{Hold, Use};
use ultraep_fabric::{AccessError, Fabric, FabricError, GroupSpec, Operation, OperationKind, Region, Span, WindowId};
use ultraep_plan::Rank;

const SLOTS: WindowId = WindowId::new(0);
const CHUNK: usize = 70_000;
const CHUNKS: usize = 6;

const fn case(name: &'static str, main: fn(Box<dyn Fabric>, u64) -> Report) -> Case {
    Case {
        name,
        ranks: &[1, 2, 5, 8],
        seeds: &[1],
        needs: &[Need::PointToPoint],
        spec: with_slots,
        main,
        verify: all_well,
    }
}

pub(crate) const CASES: &[Case] = &[
    Case { seeds: &[1, 2], ..case("sends_meet_receives", sends_meet_receives) },
    Case { ranks: &[2, 5], ..case("sends_wait_for_credit_and_move_alone", sends_wait_for_credit) },
    Case { verify: all_equal, ..case("chunks_are_relayed", chunks_are_relayed) },
    case("receives_fill_one_region", receives_fill_one_region),
    case("sends_are_refused", sends_are_refused),
    Case { ranks: &[2, 5], verify: failures::all_named, ..case("different_lengths", different_lengths) },
    Case {
        ranks: &[2, 5],
        verify: failures::culprit_named,
        ..case("receive_from_a_rank_that_is_lost", receive_from_a_lost_rank)
    },
];

fn with_slots(ranks: usize) -> GroupSpec {
    let mut spec = plain(ranks);
    spec.add_window("slots", CHUNK * CHUNKS);
    spec
}

fn run(fabric: &mut Box<dyn Fabric>, operation: Operation<'_>) -> Result<ultraep_fabric::Completion, String> {
    fabric.run(operation).map_err(text)
}

/// The length of the n-th message with a key between two ranks: nothing, odd lengths, several chunks.
fn length(seed: u64, from: usize, to: usize, key: u64, n: u64) -> usize {
    let mut random = Random(seed ^ (from as u64) << 40 ^ (to as u64) << 20 ^ key << 8 ^ n);
    match random.below(4) {
        0 => 0,
        1 => random.below(300_000) as usize,
        _ => random.below(2000) as usize,
    }
}

/// Every rank sends to every rank, itself as well, under two keys twice each; receives are posted in another order.
fn sends_meet_receives(mut fabric: Box<dyn Fabric>, seed: u64) -> Report {
    let (me, ranks) = (fabric.rank().index(), fabric.ranks());
    let peers = || (0..ranks).flat_map(|peer| [7u64, u64::MAX].map(|key| (peer, key)));
    let content = |from: usize, to: usize, key: u64, n: u64| {
        bytes(seed ^ key ^ n << 4 ^ (to as u64) << 8, from, length(seed, from, to, key, n))
    };
    let (mut sends, mut recvs) = (Vec::new(), Vec::new());
    for (to, key) in peers() {
        for n in 0..2 {
            let from = Region::from_vec(content(me, to, key, n));
            let operation = Operation::Send { to: Rank::new(to), key, from: Span::whole(&from) };
            sends.push((fabric.submit(operation).map_err(text)?, if to == me { 0 } else { from.bytes() as u64 }));
        }
    }
    for (from, key) in peers().collect::<Vec<_>>().into_iter().rev() {
        for n in 0..2 {
            let to = Region::zeroed(length(seed, from, me, key, n));
            let operation = Operation::Recv { from: Rank::new(from), key, to: Span::whole(&to) };
            recvs.push((fabric.submit(operation).map_err(text)?, to, content(from, me, key, n), from));
        }
    }
    for (ticket, to, expected, from) in recvs {
        let done = fabric.wait(ticket).map_err(text)?;
        ensure(to.read::<u8>().map_err(text)?[..] == expected[..], || format!("wrong content from rank {from}"))?;
        let others = if from == me { 0 } else { expected.len() as u64 };
        ensure((done.bytes_sent, done.bytes_received) == (0, others), || format!("{done:?}"))?;
    }
    for (ticket, sent) in sends {
        let done = fabric.wait(ticket).map_err(text)?;
        ensure((done.bytes_sent, done.bytes_received) == (sent, 0), || format!("{done:?}"))?;
    }
    fabric.leave().map_err(text)?;
    Ok(0)
}

/// Rank 1 sends before rank 0 receives: its memory stays taken, collectives pass by, and the message then goes although rank 1 makes
/// no call.
fn sends_wait_for_credit(mut fabric: Box<dyn Fabric>, seed: u64) -> Report {
    let source = Region::from_vec(bytes(seed, 1, 3 * CHUNK));
    match fabric.rank().index() {
        0 => {
            run(&mut fabric, Operation::Barrier)?;
            let target = Region::zeroed(3 * CHUNK);
            run(&mut fabric, Operation::Recv { from: Rank::new(1), key: 3, to: Span::whole(&target) })?;
            ensure(target.read::<u8>().map_err(text)?[..] == source.read::<u8>().map_err(text)?[..], || {
                "wrong content".to_owned()
            })?;
        }
        1 => {
            let send = Operation::Send { to: Rank::new(0), key: 3, from: Span::whole(&source) };
            let ticket = fabric.submit(send).map_err(text)?;
            ensure(fabric.poll(&ticket).map_err(text)?.is_none(), || "sent without a credit".to_owned())?;
            ensure(source.write::<u8>().err() == Some(AccessError::BeingRead), || "the source is free".to_owned())?;
            run(&mut fabric, Operation::Barrier)?;
            let deadline = Instant::now() + Duration::from_secs(20);
            while source.write::<u8>().is_err() {
                ensure(Instant::now() < deadline, || "nothing moves while the owner computes".to_owned())?;
                std::thread::sleep(Duration::from_millis(1));
            }
            ensure(fabric.poll(&ticket).map_err(text)?.is_some(), || "it has left, and is not complete".to_owned())?;
        }
        _ => drop(run(&mut fabric, Operation::Barrier)?),
    }
    run(&mut fabric, Operation::Barrier)?;
    fabric.leave().map_err(text)?;
    Ok(0)
}

/// Chunks go from rank to rank through slots in an open window, several in flight, each on as soon as it is there.
fn chunks_are_relayed(mut fabric: Box<dyn Fabric>, seed: u64) -> Report {
    let (me, ranks) = (fabric.rank().index(), fabric.ranks());
    let slots = fabric.window(SLOTS).ok_or("no window")?;
    let all = bytes(seed, 0, CHUNK * CHUNKS);
    if me == 0 {
        slots.write::<u8>().map_err(text)?.copy_from_slice(&all);
    }
    run(&mut fabric, Operation::Open { window: SLOTS })?;
    let chunk = |n: usize| Span::part(&slots, n * CHUNK, CHUNK);
    let mut arrivals = Vec::new();
    if me > 0 {
        for n in 0..CHUNKS {
            let operation = Operation::Recv { from: Rank::new(me - 1), key: n as u64, to: chunk(n) };
            arrivals.push(fabric.submit(operation).map_err(text)?);
        }
    }
    let mut arrivals = arrivals.into_iter();
    let mut sent = Vec::new();
    for n in 0..CHUNKS {
        if let Some(arrival) = arrivals.next() {
            fabric.wait(arrival).map_err(text)?;
        }
        if me + 1 < ranks {
            let operation = Operation::Send { to: Rank::new(me + 1), key: n as u64, from: chunk(n) };
            sent.push(fabric.submit(operation).map_err(text)?);
        }
    }
    for ticket in sent {
        fabric.wait(ticket).map_err(text)?;
    }
    run(&mut fabric, Operation::Close { window: SLOTS })?;
    let got = slots.read::<u8>().map_err(text)?;
    ensure(got[..] == all[..], || "wrong content".to_owned())?;
    let seen = digest(0, &got);
    fabric.leave().map_err(text)?;
    Ok(seen)
}

/// Everyone's bytes into one region at a time, under a right that the caller holds; no window, no epoch.
fn receives_fill_one_region(mut fabric: Box<dyn Fabric>, seed: u64) -> Report {
    let (me, ranks) = (fabric.rank().index(), fabric.ranks());
    let all = Region::zeroed(CHUNK * ranks);
    let hold = Arc::new(Hold::take(&all, Use::Write).map_err(text)?);
    let mine = Region::from_vec(bytes(seed, me, CHUNK));
    let mut tickets = Vec::new();
    for peer in 0..ranks {
        let to = Span::held(&hold, peer * CHUNK, CHUNK);
        tickets.push(fabric.submit(Operation::Recv { from: Rank::new(peer), key: 0, to }).map_err(text)?);
    }
    for peer in 0..ranks {
        let operation = Operation::Send { to: Rank::new(peer), key: 0, from: Span::whole(&mine) };
        tickets.push(fabric.submit(operation).map_err(text)?);
    }
    for ticket in tickets {
        fabric.wait(ticket).map_err(text)?;
    }
    ensure(all.read::<u8>().is_err(), || "the caller's right is gone".to_owned())?;
    drop(hold);
    let expected: Vec<u8> = (0..ranks).flat_map(|rank| bytes(seed, rank, CHUNK)).collect();
    ensure(all.read::<u8>().map_err(text)?[..] == expected[..], || "wrong content".to_owned())?;
    fabric.leave().map_err(text)?;
    Ok(0)
}

/// Wrong use changes nothing; a rank with messages in flight cannot leave.
fn sends_are_refused(mut fabric: Box<dyn Fabric>, _seed: u64) -> Report {
    let (me, ranks) = (fabric.rank(), fabric.ranks());
    let region = Region::zeroed(8);
    let whole = || Span::whole(&region);
    let beyond = || Span::part(&region, 1, 8);
    let wrong = [
        Operation::Send { to: Rank::new(ranks), key: 0, from: whole() },
        Operation::Recv { from: Rank::new(ranks), key: 0, to: whole() },
        Operation::Send { to: me, key: 0, from: beyond() },
        Operation::Recv { from: me, key: 0, to: beyond() },
    ];
    for operation in wrong {
        let refused = fabric.submit(operation);
        ensure(matches!(refused, Err(FabricError::OutOfRange { .. })), || format!("{refused:?}"))?;
    }
    let guard = region.read::<u8>().map_err(text)?;
    let refused = fabric.submit(Operation::Recv { from: me, key: 0, to: whole() });
    ensure(matches!(refused, Err(FabricError::Access { source: AccessError::BeingRead, .. })), || {
        format!("{refused:?}")
    })?;
    drop(guard);
    ensure(region.write::<u8>().is_ok(), || "held after refusals".to_owned())?;
    // To itself, receive first.
    let (from, to) = (Region::from_vec(vec![5u8; 8]), Region::zeroed(8));
    let recv = fabric.submit(Operation::Recv { from: me, key: 1, to: Span::whole(&to) }).map_err(text)?;
    ensure(fabric.poll(&recv).map_err(text)?.is_none(), || "received nothing".to_owned())?;
    run(&mut fabric, Operation::Send { to: me, key: 1, from: Span::whole(&from) })?;
    fabric.wait(recv).map_err(text)?;
    ensure(to.read::<u8>().map_err(text)?[..] == [5; 8], || "wrong content".to_owned())?;
    // A window is not closed under a receive.
    let slots = fabric.window(SLOTS).ok_or("no window")?;
    run(&mut fabric, Operation::Open { window: SLOTS })?;
    let operation = Operation::Recv { from: me, key: 2, to: Span::part(&slots, 3, 8) };
    let recv = fabric.submit(operation).map_err(text)?;
    let early = fabric.submit(Operation::Close { window: SLOTS });
    ensure(matches!(early, Err(FabricError::InFlight { in_flight: OperationKind::Recv, .. })), || {
        format!("{early:?}")
    })?;
    run(&mut fabric, Operation::Send { to: me, key: 2, from: Span::whole(&from) })?;
    fabric.wait(recv).map_err(text)?;
    run(&mut fabric, Operation::Close { window: SLOTS })?;
    ensure(slots.read::<u8>().map_err(text)?[3..11] == [5; 8], || "wrong content in the window".to_owned())?;
    fabric.leave().map_err(text)?;
    Ok(0)
}

/// Sender and receiver disagree on a length: every rank hears.
fn different_lengths(mut fabric: Box<dyn Fabric>, _seed: u64) -> Report {
    let region = Region::zeroed(9);
    let (from, to) = (Rank::new(1), Rank::new(0));
    let operation = match fabric.rank().index() {
        0 => Operation::Recv { from, key: 0, to: Span::whole(&region) },
        1 => Operation::Send { to, key: 0, from: Span::part(&region, 0, 8) },
        _ => Operation::Barrier,
    };
    let error = fabric.run(operation).err().ok_or("no error")?;
    let expected = FabricError::SizeMismatch { from, to, sent_bytes: 8, expected_bytes: 9 };
    ensure(error == expected, || text(&error))?;
    Ok(failures::NAMED)
}

/// The culprit drops its endpoint; whoever waits for a message of it is told.
fn receive_from_a_lost_rank(mut fabric: Box<dyn Fabric>, _seed: u64) -> Report {
    if fabric.rank() == failures::CULPRIT {
        run(&mut fabric, Operation::Barrier)?;
        return Ok(0);
    }
    let region = Region::zeroed(8);
    let operation = Operation::Recv { from: failures::CULPRIT, key: 0, to: Span::whole(&region) };
    // The culprit may have gone by the time that this rank looks at the barrier.
    let error = fabric.run(Operation::Barrier).and_then(|_| fabric.run(operation)).err().ok_or("no error")?;
    ensure(error.ends_group() && error.culprit() == Some(failures::CULPRIT), || text(&error))?;
    Ok(failures::NAMED)
}
