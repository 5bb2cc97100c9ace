//! Wrong use is a typed error that changes nothing: the group goes on.

use crate::case::{Case, Report, all_well, ensure, plain, stamp, text};
use std::sync::Arc;
use ultraep_fabric::backend::{Hold, Use};
use ultraep_fabric::{
    AccessError, Fabric, FabricError, GroupSpec, Operation, OperationKind, Region, RemoteSpan, SIGNALS, Span, WindowId,
};
use ultraep_plan::Rank;

const WINDOW: WindowId = WindowId::new(0);
const OTHER: WindowId = WindowId::new(1);
const PART: usize = 256;

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "access_rules",
        ranks: &[1, 2, 5],
        seeds: &[1],
        needs: &[],
        spec: two_windows,
        main: access_rules,
        verify: all_well,
    },
    Case {
        name: "operands_in_flight",
        ranks: &[2, 5],
        seeds: &[1],
        needs: &[],
        spec: two_windows,
        main: operands_in_flight,
        verify: all_well,
    },
    Case {
        name: "out_of_range",
        ranks: &[1, 2, 5],
        seeds: &[1],
        needs: &[],
        spec: two_windows,
        main: out_of_range,
        verify: all_well,
    },
    Case {
        name: "one_collective_at_a_time",
        ranks: &[2, 5],
        seeds: &[1],
        needs: &[],
        spec: two_windows,
        main: one_collective_at_a_time,
        verify: all_well,
    },
];

fn two_windows(ranks: usize) -> GroupSpec {
    let mut spec = plain(ranks);
    spec.add_window("window", PART);
    spec.add_window("other", PART);
    spec
}

/// That an operation is refused for this reason.
fn refused(fabric: &mut Box<dyn Fabric>, operation: Operation<'_>, why: AccessError) -> Result<(), String> {
    let kind = operation.kind();
    match fabric.submit(operation) {
        Err(FabricError::Access { operation, source, rank, .. }) => {
            ensure((operation, source, rank) == (kind, why, fabric.rank()), || {
                format!("{operation}: {source}, not {why}")
            })
        }
        other => Err(format!("{other:?} instead of {why}")),
    }
}

fn run(fabric: &mut Box<dyn Fabric>, operation: Operation<'_>) -> Result<(), String> {
    fabric.run(operation).map(drop).map_err(text)
}

fn error_of<T>(result: Result<T, AccessError>) -> Option<AccessError> {
    result.err()
}

fn access_rules(mut fabric: Box<dyn Fabric>, _seed: u64) -> Report {
    let me = fabric.rank();
    let window = fabric.window(WINDOW).ok_or("no window")?;
    ensure(fabric.direct().is_some() == fabric.capabilities().direct, || "direct access is not as said".to_owned())?;
    let (region, target) = (Region::zeroed(8), [RemoteSpan { rank: me, window: WINDOW, offset: 0 }]);
    let put = || Operation::Put { from: Span::whole(&region), to: &target };
    let (open, close) = (|| Operation::Open { window: WINDOW }, || Operation::Close { window: WINDOW });

    // Closed: no put, no get, no close; guards exclude each other and opening.
    refused(&mut fabric, put(), AccessError::Closed)?;
    refused(&mut fabric, Operation::Get { from: target[0], to: Span::whole(&region) }, AccessError::Closed)?;
    refused(&mut fabric, close(), AccessError::Closed)?;
    let reading = window.read::<u8>().map_err(text)?;
    ensure(window.read::<u64>().is_ok(), || "a second reader".to_owned())?;
    ensure(error_of(window.write::<u8>()) == Some(AccessError::BeingRead), || "a writer beside a reader".to_owned())?;
    refused(&mut fabric, open(), AccessError::BeingRead)?;
    drop(reading);
    let writing = window.write::<u8>().map_err(text)?;
    ensure(error_of(window.read::<u8>()) == Some(AccessError::BeingWritten), || "a reader beside a writer".to_owned())?;
    refused(&mut fabric, open(), AccessError::BeingWritten)?;
    drop(writing);

    // Open: no guards, no opening again, no collective into it or out of it.
    run(&mut fabric, open())?;
    ensure(error_of(window.read::<u8>()) == Some(AccessError::Open), || "a reader in the epoch".to_owned())?;
    ensure(error_of(window.write::<u8>()) == Some(AccessError::Open), || "a writer in the epoch".to_owned())?;
    refused(&mut fabric, open(), AccessError::Open)?;
    refused(&mut fabric, Operation::AllReduceSumF32 { data: Span::whole(&window) }, AccessError::Open)?;
    let zeros = vec![0; fabric.ranks()];
    let send = || Span::part(&region, 0, 0);
    let exchange = |recv| Operation::AllToAll { send: send(), send_bytes: &zeros, recv, recv_bytes: &zeros };
    refused(&mut fabric, exchange(WINDOW), AccessError::Open)?;
    run(&mut fabric, exchange(OTHER))?;
    run(&mut fabric, put())?;
    let guard = region.write::<u8>().map_err(text)?;
    refused(&mut fabric, put(), AccessError::BeingWritten)?;
    refused(&mut fabric, Operation::Get { from: target[0], to: Span::whole(&region) }, AccessError::BeingWritten)?;
    drop(guard);

    // Once `Close` is submitted: no put, and no guard before it is complete.
    let ticket = fabric.submit(close()).map_err(text)?;
    refused(&mut fabric, put(), AccessError::Closed)?;
    fabric.wait(ticket).map_err(text)?;
    ensure(window.write::<u8>().is_ok(), || "no writer after the epoch".to_owned())?;
    views(&mut fabric)?;
    held_spans(&mut fabric)?;
    fabric.leave().map_err(text)?;
    Ok(0)
}

/// What a typed view of memory can be refused for.
fn views(fabric: &mut Box<dyn Fabric>) -> Result<(), String> {
    let odd = Region::zeroed(9);
    let ragged = Some(AccessError::Ragged { bytes: 9, size: 4 });
    ensure(error_of(odd.read::<u32>()) == ragged, || "9 bytes as u32".to_owned())?;
    let nothing = error_of(odd.read::<()>());
    ensure(matches!(nothing, Some(AccessError::Ragged { .. })), || format!("{nothing:?}"))?;
    let foreign = Region::foreign(8, Arc::new("a device's handle"));
    ensure(error_of(foreign.read::<u8>()) == Some(AccessError::NoHostView), || "a device's memory".to_owned())?;
    refused(fabric, Operation::AllReduceSumF32 { data: Span::whole(&foreign) }, AccessError::NoHostView)?;
    let ragged = AccessError::Ragged { bytes: 9, size: 4 };
    refused(fabric, Operation::AllReduceSumF32 { data: Span::whole(&odd) }, ragged)?;
    ensure(odd.write::<u8>().is_ok(), || "still held after a refusal".to_owned())
}

/// An operation uses the caller's right where a span carries one, and refuses one that does not suffice.
fn held_spans(fabric: &mut Box<dyn Fabric>) -> Result<(), String> {
    let region = Region::from_vec(vec![1.0f32; 4]);
    let hold = Arc::new(Hold::take(&region, Use::Write).map_err(text)?);
    refused(fabric, Operation::AllReduceSumF32 { data: Span::whole(&region) }, AccessError::BeingWritten)?;
    run(fabric, Operation::AllReduceSumF32 { data: Span::held(&hold, 4, 8) })?;
    drop(hold);
    let sum = fabric.ranks() as f32;
    ensure(region.read::<f32>().map_err(text)?[..] == [1.0, sum, sum, 1.0], || "wrong sums".to_owned())?;
    let reading = Arc::new(Hold::take(&region, Use::Read).map_err(text)?);
    refused(fabric, Operation::AllReduceSumF32 { data: Span::held(&reading, 0, 16) }, AccessError::BeingRead)
}

/// Regions of an operation in flight.
fn operands_in_flight(mut fabric: Box<dyn Fabric>, _seed: u64) -> Report {
    let ranks = fabric.ranks();
    let (send, recv) = (Region::zeroed(8), Region::zeroed(8 * ranks));
    let gather = || Operation::AllGather { send: Span::whole(&send), recv: Span::whole(&recv) };
    let overlap = Operation::AllGather { send: Span::part(&recv, 1, 8), recv: Span::whole(&recv) };
    refused(&mut fabric, overlap, AccessError::Overlap)?;
    let guard = send.write::<u8>().map_err(text)?;
    refused(&mut fabric, gather(), AccessError::BeingWritten)?;
    ensure(recv.write::<u8>().is_ok(), || "recv is still held after a refusal".to_owned())?;
    drop(guard);
    let ticket = fabric.submit(gather()).map_err(text)?;
    ensure(error_of(recv.read::<u8>()) == Some(AccessError::BeingWritten), || "recv read in flight".to_owned())?;
    ensure(error_of(send.write::<u8>()) == Some(AccessError::BeingRead), || "send written in flight".to_owned())?;
    fabric.wait(ticket).map_err(text)?;
    ensure(recv.write::<u8>().is_ok() && send.write::<u8>().is_ok(), || "held after completion".to_owned())?;

    let window = fabric.window(WINDOW).ok_or("no window")?;
    let sizes = vec![0; ranks];
    let exchange = |send| Operation::AllToAll { send, send_bytes: &sizes, recv: WINDOW, recv_bytes: &sizes };
    let from_itself = exchange(Span::part(&window, 0, 0));
    refused(&mut fabric, from_itself, AccessError::BeingRead)?;
    let ticket = fabric.submit(exchange(Span::part(&send, 0, 0))).map_err(text)?;
    ensure(error_of(window.read::<u8>()) == Some(AccessError::Receiving), || "window read in flight".to_owned())?;
    fabric.wait(ticket).map_err(text)?;
    ensure(window.write::<u8>().is_ok(), || "window held after completion".to_owned())?;
    fabric.leave().map_err(text)?;
    Ok(0)
}

fn out_of_range(mut fabric: Box<dyn Fabric>, _seed: u64) -> Report {
    let (me, ranks) = (fabric.rank(), fabric.ranks());
    run(&mut fabric, Operation::Open { window: WINDOW })?;
    let region = Region::zeroed(PART);
    let (few, exact) = (vec![0; ranks - 1], vec![0; ranks]);
    let mut large = exact.clone();
    large[0] = PART + 1;
    let mut huge = exact.clone();
    huge[0] = usize::MAX;
    let place = |rank, window, offset| [RemoteSpan { rank: Rank::new(rank), window, offset }];
    let (no_rank, no_window) = (place(ranks, WINDOW, 0), place(0, WindowId::new(9), 0));
    let (behind, wrapping) = (place(me.index(), WINDOW, 1), place(0, WINDOW, usize::MAX));
    let whole = || Span::whole(&region);
    let none = || Span::part(&region, 0, 0);
    let exchange = |send, send_bytes, recv_bytes| Operation::AllToAll { send, send_bytes, recv: OTHER, recv_bytes };
    let wrong = [
        Operation::Put { from: Span::part(&region, 1, PART), to: &[] },
        Operation::Put { from: Span::part(&region, usize::MAX, 2), to: &[] },
        Operation::Put { from: whole(), to: &no_rank },
        Operation::Put { from: whole(), to: &no_window },
        Operation::Put { from: whole(), to: &behind },
        Operation::Put { from: whole(), to: &wrapping },
        Operation::Get { from: behind[0], to: whole() },
        Operation::Get { from: no_rank[0], to: none() },
        Operation::Signal { rank: Rank::new(ranks), signal: 0, add: 1 },
        Operation::Signal { rank: me, signal: SIGNALS, add: 1 },
        Operation::AwaitSignal { signal: SIGNALS, at_least: 0 },
        Operation::Open { window: WindowId::new(2) },
        Operation::Close { window: WindowId::new(2) },
        Operation::AllGather { send: whole(), recv: Span::part(&region, 0, 1) },
        Operation::AllReduceSumF32 { data: Span::part(&region, 4, PART) },
        exchange(none(), &few, &exact),
        exchange(none(), &exact, &few),
        exchange(Span::part(&region, 0, 1), &exact, &exact),
        exchange(none(), &exact, &large),
        exchange(none(), &exact, &huge),
    ];
    for operation in wrong {
        let (shown, kind) = (format!("{operation:?}"), operation.kind());
        match fabric.submit(operation) {
            Err(FabricError::OutOfRange { operation, .. }) if operation == kind => {}
            other => return Err(format!("{shown}: {other:?}")),
        }
    }
    ensure(fabric.window(WindowId::new(2)).is_none(), || "a window that is not there".to_owned())?;
    run(&mut fabric, Operation::Close { window: WINDOW })?;
    ensure(region.write::<u8>().is_ok(), || "still held after refusals".to_owned())?;
    fabric.leave().map_err(text)?;
    Ok(0)
}

fn one_collective_at_a_time(mut fabric: Box<dyn Fabric>, _seed: u64) -> Report {
    let me = fabric.rank();
    run(&mut fabric, Operation::Barrier)?;
    let first = fabric.submit_stamped(Operation::Barrier, me.index() as u64).map_err(text)?;
    match fabric.submit(Operation::Open { window: WINDOW }) {
        Err(FabricError::InFlight { operation, rank, in_flight }) => {
            let expected = (OperationKind::Open, me, OperationKind::Barrier);
            ensure((operation, rank, in_flight) == expected, || format!("{operation} {rank} {in_flight}"))?;
        }
        other => return Err(format!("{other:?}")),
    }
    // One-sided operations go on beside it.
    run(&mut fabric, Operation::Signal { rank: me, signal: 0, add: 1 })?;
    run(&mut fabric, Operation::AwaitSignal { signal: 0, at_least: 1 })?;
    // Polling finds it complete in the end, once.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    let completion = loop {
        match fabric.poll(&first).map_err(text)? {
            Some(completion) => break completion,
            None => ensure(std::time::Instant::now() < deadline, || "polling never ends".to_owned())?,
        }
        std::thread::yield_now();
    };
    ensure(completion.stamp == stamp(&*fabric, fabric.ranks() as u64 - 1), || format!("{completion:?}"))?;
    let again = fabric.poll(&first);
    ensure(matches!(again, Err(FabricError::UnknownTicket { .. })), || format!("{again:?}"))?;
    run(&mut fabric, Operation::Open { window: WINDOW })?;
    run(&mut fabric, Operation::Close { window: WINDOW })?;
    fabric.leave().map_err(text)?;
    Ok(0)
}
