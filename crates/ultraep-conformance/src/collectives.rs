//! Barrier, all-gather, all-to-all, all-reduce, and core permits.

use crate::case::{Case, Need, Random, Report, all_equal, all_well, bytes, digest, ensure, plain, stamp, text};
use ultraep_fabric::{Fabric, GroupSpec, Operation, Region, Span, WindowId};

const GROUPS: &[usize] = &[1, 2, 5, 16];
const INBOX: WindowId = WindowId::new(0);
const INBOX_BYTES: usize = 1 << 20;
const EMPTY: WindowId = WindowId::new(1);

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "barrier_stamps",
        ranks: GROUPS,
        seeds: &[1],
        needs: &[],
        spec: with_windows,
        main: barrier_stamps,
        verify: all_equal,
    },
    Case {
        name: "all_gather",
        ranks: GROUPS,
        seeds: &[1],
        needs: &[],
        spec: plain,
        main: all_gather,
        verify: all_equal,
    },
    Case {
        name: "all_to_all_random",
        ranks: GROUPS,
        seeds: &[1, 2, 3],
        needs: &[],
        spec: with_windows,
        main: all_to_all_random,
        verify: all_well,
    },
    Case {
        name: "all_reduce",
        ranks: GROUPS,
        seeds: &[1],
        needs: &[],
        spec: plain,
        main: all_reduce,
        verify: all_equal,
    },
    Case {
        name: "mixed_sequence",
        ranks: &[3, 16],
        seeds: &[1, 2],
        needs: &[Need::CorePermits],
        spec: with_permits,
        main: mixed_sequence,
        verify: all_equal,
    },
    Case {
        name: "core_permits",
        ranks: &[2, 5, 16],
        seeds: &[1],
        needs: &[Need::CorePermits],
        spec: with_permits,
        main: core_permits,
        verify: all_well,
    },
];

fn with_windows(ranks: usize) -> GroupSpec {
    let mut spec = plain(ranks);
    spec.add_window("inbox", INBOX_BYTES);
    spec.add_window("empty", 0);
    spec
}

fn with_permits(ranks: usize) -> GroupSpec {
    let mut spec = with_windows(ranks);
    spec.cores = 2;
    spec
}

fn stamp_of(rank: usize, round: u64) -> u64 {
    Random(round * 1000 + rank as u64).below(1 << 40)
}

/// Every collective completes with the largest stamp, whoever passed it.
fn barrier_stamps(mut fabric: Box<dyn Fabric>, _seed: u64) -> Report {
    let (me, ranks) = (fabric.rank().index(), fabric.ranks());
    let region = Region::zeroed(4);
    let gathered = Region::zeroed(4 * ranks);
    let none = vec![0; ranks];
    let mut seen = 0;
    for round in 0..60 {
        let operation = match round % 6 {
            1 => Operation::Open { window: INBOX },
            2 => Operation::Close { window: INBOX },
            3 => Operation::AllGather { send: Span::whole(&region), recv: Span::whole(&gathered) },
            4 => Operation::AllReduceSumF32 { data: Span::whole(&region) },
            5 => {
                let send = Span::part(&region, 0, 0);
                Operation::AllToAll { send, send_bytes: &none, recv: EMPTY, recv_bytes: &none }
            }
            _ => Operation::Barrier,
        };
        let completion = fabric.run_stamped(operation, stamp_of(me, round)).map_err(text)?;
        let largest = (0..ranks).map(|rank| stamp_of(rank, round)).max().ok_or("no ranks")?;
        ensure(completion.stamp == stamp(&*fabric, largest), || {
            format!("stamp {} in round {round}, not {largest}", completion.stamp)
        })?;
        seen = digest(seen, &largest.to_le_bytes());
    }
    fabric.leave().map_err(text)?;
    Ok(seen)
}

fn all_gather(mut fabric: Box<dyn Fabric>, seed: u64) -> Report {
    let (me, ranks) = (fabric.rank().index(), fabric.ranks());
    // Exactly one staging chunk, and a bit more than two; smaller with many ranks, for the sake of the test's time.
    let (chunk, largest) = if ranks > 5 { (5000, 262_145) } else { (256 * 1024, 524_289) };
    let mut seen = 0;
    for (round, size) in [0, 1, 3, 64, 1000, 0, chunk, largest].into_iter().enumerate() {
        for in_place in [false, true] {
            if in_place && ranks > 5 && size == largest {
                continue;
            }
            let purpose = seed * 100 + round as u64;
            let mine = bytes(purpose, me, size);
            // With something before and after, which must stay as it is.
            let mut target = vec![7u8; size * ranks + 5];
            if in_place {
                target[2 + me * size..2 + (me + 1) * size].copy_from_slice(&mine);
            }
            let (send, recv) = (Region::from_vec(mine), Region::from_vec(target));
            let send = if in_place { Span::part(&recv, 2 + me * size, size) } else { Span::whole(&send) };
            let operation = Operation::AllGather { send, recv: Span::part(&recv, 2, size * ranks) };
            let completion = fabric.run(operation).map_err(text)?;
            let expected: Vec<u8> = (0..ranks).flat_map(|rank| bytes(purpose, rank, size)).collect();
            let got = recv.read::<u8>().map_err(text)?;
            ensure(got[2..2 + size * ranks] == expected[..], || format!("wrong content with {size} bytes"))?;
            ensure(got[..2] == [7; 2] && got[2 + size * ranks..] == [7; 3], || "wrote outside of recv".to_owned())?;
            let others = (size * (ranks - 1)) as u64;
            ensure((completion.bytes_sent, completion.bytes_received) == (others, others), || {
                format!("{completion:?}")
            })?;
            seen = digest(seen, &got);
        }
    }
    fabric.leave().map_err(text)?;
    Ok(seen)
}

fn block(seed: u64, round: u64, from: usize, to: usize, size: usize) -> Vec<u8> {
    bytes(seed * 1_000_000 + round * 1000 + to as u64, from, size)
}

/// Sizes `[from][to]` of a round: many zeros, odd sizes, sometimes one large block, sometimes silent ranks.
fn sizes(random: &mut Random, ranks: usize) -> Vec<Vec<usize>> {
    let silent = random.below(2 * ranks as u64) as usize;
    let mut size = |from: usize, to: usize| match random.below(8) {
        0..3 => 0,
        7 if ranks <= 5 => random.below(100_000) as usize,
        _ if from == silent || to == silent => 0,
        _ => random.below(3000) as usize,
    };
    (0..ranks).map(|from| (0..ranks).map(|to| size(from, to)).collect()).collect()
}

fn all_to_all_random(mut fabric: Box<dyn Fabric>, seed: u64) -> Report {
    let (me, ranks) = (fabric.rank().index(), fabric.ranks());
    let inbox = fabric.window(INBOX).ok_or("no window")?;
    let mut random = Random(seed);
    let mut seen = 0;
    for round in 0..20 {
        let sizes = sizes(&mut random, ranks);
        let send: Vec<u8> = (0..ranks).flat_map(|to| block(seed, round, me, to, sizes[me][to])).collect();
        let expected: Vec<u8> = (0..ranks).flat_map(|from| block(seed, round, from, me, sizes[from][me])).collect();
        let recv_bytes: Vec<usize> = sizes.iter().map(|row| row[me]).collect();
        let send = Region::from_vec(send);
        let operation = Operation::AllToAll {
            send: Span::whole(&send),
            send_bytes: &sizes[me],
            recv: INBOX,
            recv_bytes: &recv_bytes,
        };
        let completion = fabric.run(operation).map_err(text)?;
        let got = inbox.read::<u8>().map_err(text)?;
        ensure(got[..expected.len()] == expected[..], || format!("wrong content in round {round}"))?;
        let own = sizes[me][me];
        ensure(completion.bytes_sent as usize == send.bytes() - own, || format!("{completion:?}"))?;
        ensure(completion.bytes_received as usize == expected.len() - own, || format!("{completion:?}"))?;
        seen = digest(seen, &expected);
    }
    fabric.leave().map_err(text)?;
    Ok(seen)
}

/// Values of very different size, so that any other order of the sum shows.
fn values(seed: u64, rank: usize, count: usize) -> Vec<f32> {
    let mut random = Random(seed * 7919 + rank as u64);
    let value = |bits: u64| (bits as i32 as f32) * [1e-12, 1e-3, 1.0, 1e9][(bits >> 40) as usize % 4];
    (0..count).map(|_| value(random.next())).collect()
}

fn all_reduce(mut fabric: Box<dyn Fabric>, seed: u64) -> Report {
    let (me, ranks) = (fabric.rank().index(), fabric.ranks());
    let mut seen = 0;
    for (round, count) in [0, 1, 3, 15, 17, 1001, 65_536, 65_537, 150_001].into_iter().enumerate() {
        let purpose = seed * 100 + round as u64;
        let data = Region::from_vec(values(purpose, me, count));
        let completion = fabric.run(Operation::AllReduceSumF32 { data: Span::whole(&data) }).map_err(text)?;
        let mut expected = values(purpose, 0, count);
        for rank in 1..ranks {
            expected.iter_mut().zip(values(purpose, rank, count)).for_each(|(sum, value)| *sum += value);
        }
        let got = data.read::<f32>().map_err(text)?;
        let same = got.iter().zip(&expected).all(|(got, expected)| got.to_bits() == expected.to_bits());
        ensure(same && got.len() == count, || format!("not the sequential sum with {count} values"))?;
        ensure((ranks == 1 || count == 0) == (completion.bytes_sent == 0), || format!("{completion:?}"))?;
        seen = digest(seen, bytemuck::cast_slice(&got));
    }
    // A span that is not aligned for f32, and negative zero: (-0.0) + (-0.0) stays negative.
    let odd = Region::from_vec([vec![9u8], (-0.0f32).to_le_bytes().to_vec(), vec![9]].concat());
    fabric.run(Operation::AllReduceSumF32 { data: Span::part(&odd, 1, 4) }).map_err(text)?;
    let expected = [&[9], &(-0.0f32).to_le_bytes()[..], &[9]].concat();
    ensure(odd.read::<u8>().map_err(text)?[..] == expected[..], || {
        "negative zero or its neighbours changed".to_owned()
    })?;
    fabric.leave().map_err(text)?;
    Ok(seen)
}

/// Random collectives one after another, with core permits: staging areas are reused across kinds.
fn mixed_sequence(mut fabric: Box<dyn Fabric>, seed: u64) -> Report {
    let (me, ranks) = (fabric.rank().index(), fabric.ranks());
    let mut random = Random(seed);
    let inbox = fabric.window(INBOX).ok_or("no window")?;
    let mut seen = 0;
    for round in 0..60 {
        let size = random.below(4000) as usize;
        match random.below(4) {
            0 => {
                let all = Region::zeroed(size * ranks);
                let send = Region::from_vec(bytes(round, me, size));
                let operation = Operation::AllGather { send: Span::whole(&send), recv: Span::whole(&all) };
                fabric.run(operation).map_err(text)?;
                seen = digest(seen, &all.read::<u8>().map_err(text)?);
            }
            1 => {
                let data = Region::from_vec(values(round, me, size));
                fabric.run(Operation::AllReduceSumF32 { data: Span::whole(&data) }).map_err(text)?;
                seen = digest(seen, bytemuck::cast_slice(&data.read::<f32>().map_err(text)?));
            }
            2 => {
                let part = size / ranks;
                let send = Region::from_vec(bytes(round, me, part * ranks));
                let sizes = vec![part; ranks];
                let send = Span::whole(&send);
                let operation = Operation::AllToAll { send, send_bytes: &sizes, recv: INBOX, recv_bytes: &sizes };
                fabric.run(operation).map_err(text)?;
                let got = inbox.read::<u8>().map_err(text)?;
                for from in 0..ranks {
                    let sent = bytes(round, from, part * ranks);
                    let expected = &sent[me * part..(me + 1) * part];
                    ensure(got[from * part..(from + 1) * part] == *expected, || format!("block of rank {from}"))?;
                }
            }
            _ => drop(fabric.run_stamped(Operation::Barrier, round).map_err(text)?),
        }
    }
    fabric.leave().map_err(text)?;
    Ok(seen)
}

/// Nanoseconds on the clock that all processes of the machine share.
fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Ranks compute between barriers and write down when; never do more of these times overlap than there are cores.
fn core_permits(mut fabric: Box<dyn Fabric>, _seed: u64) -> Report {
    const ROUNDS: usize = 20;
    let ranks = fabric.ranks();
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        let start = now_ns();
        while now_ns() < start + 100_000 {
            std::hint::spin_loop();
        }
        times.extend([start, now_ns()]);
        fabric.run(Operation::Barrier).map_err(text)?;
    }
    let (mine, all) = (Region::from_vec(times), Region::zeroed(ranks * ROUNDS * 16));
    fabric.run(Operation::AllGather { send: Span::whole(&mine), recv: Span::whole(&all) }).map_err(text)?;
    let all = all.read::<u64>().map_err(text)?;
    let mut events: Vec<(u64, i32)> = all.chunks(2).flat_map(|pair| [(pair[0], 1), (pair[1], -1)]).collect();
    events.sort_unstable();
    let mut computing = 0;
    let most = events
        .iter()
        .map(|&(_, step)| {
            computing += step;
            computing
        })
        .max();
    ensure(most <= Some(2), || format!("{most:?} ranks computed at a time"))?;
    fabric.leave().map_err(text)?;
    Ok(0)
}
