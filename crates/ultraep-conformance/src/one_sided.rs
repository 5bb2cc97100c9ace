//! Windows, put, get, signals.

use crate::case::{Case, Report, all_equal, all_well, bytes, digest, ensure, plain, stamp, text};
use ultraep_fabric::{Fabric, FabricError, GroupSpec, Operation, Region, RemoteSpan, SIGNALS, Span, WindowId};
use ultraep_plan::Rank;

const WINDOW: WindowId = WindowId::new(0);
const PART: usize = 40_003;

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "put_to_all",
        ranks: &[1, 2, 5, 16],
        seeds: &[1],
        needs: &[],
        spec: with_window,
        main: put_to_all,
        verify: all_equal,
    },
    Case {
        name: "get_from_all",
        ranks: &[1, 2, 5, 16],
        seeds: &[1],
        needs: &[],
        spec: with_window,
        main: get_from_all,
        verify: all_equal,
    },
    Case {
        name: "relay_by_signals",
        ranks: &[1, 2, 5, 16],
        seeds: &[1],
        needs: &[],
        spec: with_window,
        main: relay_by_signals,
        verify: all_equal,
    },
    Case {
        name: "signals_count",
        ranks: &[1, 2, 5, 16],
        seeds: &[1],
        needs: &[],
        spec: with_permits,
        main: signals_count,
        verify: all_well,
    },
    Case {
        name: "racing_puts",
        ranks: &[5],
        seeds: &[1],
        needs: &[],
        spec: with_window,
        main: racing_puts,
        verify: all_well,
    },
    Case {
        name: "signal_beside_collective",
        ranks: &[2, 5],
        seeds: &[1],
        needs: &[],
        spec: plain,
        main: signal_beside_collective,
        verify: all_well,
    },
];

fn with_window(ranks: usize) -> GroupSpec {
    let mut spec = plain(ranks);
    spec.add_window("parts", PART * ranks);
    spec
}

fn with_permits(ranks: usize) -> GroupSpec {
    GroupSpec { cores: 1, ..plain(ranks) }
}

fn run(fabric: &mut Box<dyn Fabric>, operation: Operation<'_>) -> Result<ultraep_fabric::Completion, String> {
    fabric.run_stamped(operation, 5).map_err(text)
}

/// Each rank writes its bytes to its place on every rank: one put, many targets. Several epochs.
fn put_to_all(mut fabric: Box<dyn Fabric>, seed: u64) -> Report {
    let (me, ranks) = (fabric.rank().index(), fabric.ranks());
    let window = fabric.window(WINDOW).ok_or("no window")?;
    let mut seen = 0;
    for (epoch, size) in [0, 1, 77, PART].into_iter().enumerate() {
        let purpose = seed * 10 + epoch as u64;
        window.write::<u8>().map_err(text)?.fill(0);
        let mine = Region::from_vec([vec![1, 2, 3], bytes(purpose, me, size)].concat());
        run(&mut fabric, Operation::Open { window: WINDOW })?;
        let place = |rank| RemoteSpan { rank: Rank::new(rank), window: WINDOW, offset: me * PART + PART - size };
        let places: Vec<RemoteSpan> = (0..ranks).map(place).collect();
        let put = run(&mut fabric, Operation::Put { from: Span::part(&mine, 3, size), to: &places })?;
        ensure(put.bytes_sent == (size * (ranks - 1)) as u64 && put.stamp == stamp(&*fabric, 5), || {
            format!("{put:?}")
        })?;
        run(&mut fabric, Operation::Put { from: Span::whole(&mine), to: &[] })?;
        run(&mut fabric, Operation::Close { window: WINDOW })?;
        let got = window.read::<u8>().map_err(text)?;
        for rank in 0..ranks {
            let (gap, part) = got[rank * PART..(rank + 1) * PART].split_at(PART - size);
            ensure(part == bytes(purpose, rank, size), || format!("part of rank {rank}, {size} bytes"))?;
            ensure(gap.iter().all(|&byte| byte == 0), || format!("wrote beside the place of rank {rank}"))?;
        }
        seen = digest(seen, &got);
    }
    fabric.leave().map_err(text)?;
    Ok(seen)
}

/// Each rank reads every rank's part.
fn get_from_all(mut fabric: Box<dyn Fabric>, seed: u64) -> Report {
    let (me, ranks) = (fabric.rank().index(), fabric.ranks());
    let window = fabric.window(WINDOW).ok_or("no window")?;
    window.write::<u8>().map_err(text)?[..PART].copy_from_slice(&bytes(seed, me, PART));
    run(&mut fabric, Operation::Open { window: WINDOW })?;
    let all = Region::zeroed(ranks * PART);
    for rank in 0..ranks {
        for (offset, size) in [(0, 0), (0, 5), (5, PART - 6), (PART - 1, 1)] {
            let from = RemoteSpan { rank: Rank::new(rank), window: WINDOW, offset };
            let to = Span::part(&all, rank * PART + offset, size);
            let got = run(&mut fabric, Operation::Get { from, to })?;
            let expected = if rank == me { 0 } else { size as u64 };
            ensure(got.bytes_received == expected, || format!("{got:?}"))?;
        }
    }
    run(&mut fabric, Operation::Close { window: WINDOW })?;
    let got = all.read::<u8>().map_err(text)?;
    let expected: Vec<u8> = (0..ranks).flat_map(|rank| bytes(seed, rank, PART)).collect();
    ensure(got[..] == expected[..], || "wrong content".to_owned())?;
    let seen = digest(0, &got);
    drop(got);
    fabric.leave().map_err(text)?;
    Ok(seen)
}

/// Rank 0's bytes travel rank by rank inside one epoch: put, signal, wait, put on from the own open part.
fn relay_by_signals(mut fabric: Box<dyn Fabric>, seed: u64) -> Report {
    const CHUNK: usize = 1111;
    let (me, ranks) = (fabric.rank().index(), fabric.ranks());
    let window = fabric.window(WINDOW).ok_or("no window")?;
    if me == 0 {
        window.write::<u8>().map_err(text)?[..PART].copy_from_slice(&bytes(seed, 0, PART));
    }
    run(&mut fabric, Operation::Open { window: WINDOW })?;
    let check = Region::zeroed(CHUNK);
    for (count, offset) in (0..PART - CHUNK).step_by(CHUNK).enumerate() {
        if me > 0 {
            run(&mut fabric, Operation::AwaitSignal { signal: 3, at_least: count as u64 + 1 })?;
            // The guard is refused in the epoch; a get from the own part is not.
            let from = RemoteSpan { rank: Rank::new(me), window: WINDOW, offset };
            run(&mut fabric, Operation::Get { from, to: Span::whole(&check) })?;
            let expected = &bytes(seed, 0, PART)[offset..offset + CHUNK];
            ensure(check.read::<u8>().map_err(text)?[..] == *expected, || {
                format!("chunk {count} came before its bytes")
            })?;
        }
        if me + 1 < ranks {
            let next = Rank::new(me + 1);
            let to = [RemoteSpan { rank: next, window: WINDOW, offset }];
            run(&mut fabric, Operation::Put { from: Span::part(&window, offset, CHUNK), to: &to })?;
            run(&mut fabric, Operation::Signal { rank: next, signal: 3, add: 1 })?;
        }
    }
    run(&mut fabric, Operation::Close { window: WINDOW })?;
    let seen = digest(0, &window.read::<u8>().map_err(text)?[..PART - CHUNK]);
    fabric.leave().map_err(text)?;
    Ok(seen)
}

/// Many signals from many ranks to many words, on one core: no addition and no wake-up is lost.
fn signals_count(mut fabric: Box<dyn Fabric>, _seed: u64) -> Report {
    const ROUNDS: u64 = 30;
    let (me, ranks) = (fabric.rank().index(), fabric.ranks());
    for round in 0..ROUNDS {
        for rank in 0..ranks {
            let signal = (me + rank) % SIGNALS;
            run(&mut fabric, Operation::Signal { rank: Rank::new(rank), signal, add: 1 + round % 3 })?;
        }
        let total = (0..=round).map(|round| 1 + round % 3).sum();
        for from in 0..ranks {
            run(&mut fabric, Operation::AwaitSignal { signal: (me + from) % SIGNALS, at_least: total })?;
        }
    }
    run(&mut fabric, Operation::AwaitSignal { signal: SIGNALS - 1, at_least: 0 })?;
    // Nobody leaves while others may still wait for its signals: they have them, so it may.
    fabric.leave().map_err(text)?;
    Ok(0)
}

/// All ranks put to one place at once. What lands is a mix of their bytes, nothing else, and nothing breaks.
fn racing_puts(mut fabric: Box<dyn Fabric>, _seed: u64) -> Report {
    let (me, ranks) = (fabric.rank().index(), fabric.ranks());
    let window = fabric.window(WINDOW).ok_or("no window")?;
    let mine = Region::from_vec(vec![me as u8 + 1; PART]);
    run(&mut fabric, Operation::Open { window: WINDOW })?;
    let to = [RemoteSpan { rank: Rank::new(0), window: WINDOW, offset: 11 }];
    let read = Region::zeroed(PART);
    for _ in 0..50 {
        run(&mut fabric, Operation::Put { from: Span::whole(&mine), to: &to })?;
        run(&mut fabric, Operation::Get { from: to[0], to: Span::whole(&read) })?;
        let allowed = |byte: &u8| (1..=ranks as u8).contains(byte);
        ensure(read.read::<u8>().map_err(text)?.iter().all(allowed), || "bytes that nobody put".to_owned())?;
    }
    run(&mut fabric, Operation::Close { window: WINDOW })?;
    drop(window);
    fabric.leave().map_err(text)?;
    Ok(0)
}

/// A rank that waits for a signal keeps its part of a collective moving, as the signaller may need that first.
fn signal_beside_collective(mut fabric: Box<dyn Fabric>, seed: u64) -> Report {
    let (me, ranks) = (fabric.rank().index(), fabric.ranks());
    // Several chunks, so that the collective needs its ranks again and again.
    let mine = Region::from_vec(bytes(seed, me, 600_000));
    let all = Region::zeroed(600_000 * ranks);
    let gather = Operation::AllGather { send: Span::whole(&mine), recv: Span::whole(&all) };
    if me == 0 {
        let ticket = fabric.submit_stamped(gather, 1).map_err(text)?;
        run(&mut fabric, Operation::AwaitSignal { signal: 0, at_least: ranks as u64 - 1 })?;
        let busy = fabric.submit(Operation::Barrier);
        ensure(matches!(busy, Err(FabricError::InFlight { .. })), || format!("{busy:?}"))?;
        let completion = fabric.wait(ticket).map_err(text)?;
        ensure(completion.stamp == stamp(&*fabric, 1), || "stamp".to_owned())?;
    } else {
        run_at(&mut fabric, gather, 0)?;
        run(&mut fabric, Operation::Signal { rank: Rank::new(0), signal: 0, add: 1 })?;
    }
    let expected: Vec<u8> = (0..ranks).flat_map(|rank| bytes(seed, rank, 600_000)).collect();
    ensure(all.read::<u8>().map_err(text)?[..] == expected[..], || "wrong content".to_owned())?;
    fabric.leave().map_err(text)?;
    Ok(0)
}

fn run_at(fabric: &mut Box<dyn Fabric>, operation: Operation<'_>, stamp: u64) -> Result<(), String> {
    fabric.run_stamped(operation, stamp).map(drop).map_err(text)
}
