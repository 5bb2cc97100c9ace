//! Random programs of operations: what every rank sees is the same on threads and under any schedule.

use proptest::prelude::*;
use ultraep_fabric::simulated::{Simulation, run_simulated};
use ultraep_fabric::{Fabric, FabricError, GroupSpec, Operation, Region, RemoteSpan, Span, WindowId, run_threads};
use ultraep_plan::Rank;

const EPOCHS: WindowId = WindowId::new(0);
const INBOX: WindowId = WindowId::new(1);
/// Bytes of a place in a window; a put fills one or less.
const PLACE_BYTES: usize = 48;
const PLACES: usize = 6;
const INBOX_BYTES: usize = 4096;
/// Signal word that counts puts.
const ARRIVED: usize = 5;

#[derive(Clone, Debug)]
enum Step {
    Barrier,
    /// Every rank's bytes to all.
    Gather {
        bytes: usize,
    },
    /// A sum over ranks.
    Reduce {
        count: usize,
    },
    /// Blocks of `sizes[from * ranks + to]` bytes.
    Exchange {
        sizes: Vec<usize>,
    },
    /// Between open and close: puts, each announced by a signal; who has all of its own reads them at once.
    Epoch {
        puts: Vec<Put>,
    },
}

/// Bytes from one rank to a place at another; a place is filled at most once in an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Put {
    from: usize,
    to: usize,
    place: usize,
    bytes: usize,
}

fn bytes_of(rank: usize, step: usize, count: usize) -> Vec<u8> {
    (0..count).map(|at| (rank * 101 + step * 37 + at * 7 + at / 256 + 1) as u8).collect()
}

fn fold(digest: &mut u64, bytes: &[u8]) {
    for &byte in bytes {
        *digest = (*digest ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
}

fn spec(ranks: usize) -> GroupSpec {
    let mut spec = GroupSpec::new(ranks);
    spec.add_window("epochs", PLACES * PLACE_BYTES);
    spec.add_window("inbox", INBOX_BYTES);
    spec
}

/// One rank's run of a program: a digest of all that it saw.
fn interpret(mut fabric: Box<dyn Fabric>, program: &[Step]) -> Result<u64, FabricError> {
    let (me, ranks) = (fabric.rank().index(), fabric.ranks());
    let mut digest = 0xcbf2_9ce4_8422_2325;
    let mut arrived = 0;
    for (index, step) in program.iter().enumerate() {
        match step {
            Step::Barrier => {
                let stamp = fabric.run_stamped(Operation::Barrier, (me * 7 + index) as u64 % 5)?.stamp;
                fold(&mut digest, &stamp.to_le_bytes());
            }
            Step::Gather { bytes } => {
                let (send, recv) = (Region::from_vec(bytes_of(me, index, *bytes)), Region::zeroed(bytes * ranks));
                fabric.run(Operation::AllGather { send: Span::whole(&send), recv: Span::whole(&recv) })?;
                fold(&mut digest, &recv.read::<u8>().expect("complete"));
            }
            Step::Reduce { count } => {
                let values = (0..*count).map(|at| ((me + 1) as f32) / (at + index + 1) as f32);
                let data = Region::from_vec(values.collect::<Vec<f32>>());
                fabric.run(Operation::AllReduceSumF32 { data: Span::whole(&data) })?;
                fold(&mut digest, &data.read::<u8>().expect("complete"));
            }
            Step::Exchange { sizes } => exchange(&mut *fabric, index, sizes, &mut digest)?,
            Step::Epoch { puts } => epoch(&mut *fabric, index, puts, &mut arrived, &mut digest)?,
        }
    }
    fabric.leave()?;
    Ok(digest)
}

fn exchange(fabric: &mut dyn Fabric, index: usize, sizes: &[usize], digest: &mut u64) -> Result<(), FabricError> {
    let (me, ranks) = (fabric.rank().index(), fabric.ranks());
    let send_bytes = &sizes[me * ranks..(me + 1) * ranks];
    let recv_bytes: Vec<usize> = (0..ranks).map(|from| sizes[from * ranks + me]).collect();
    let send = Region::from_vec(bytes_of(me, index, send_bytes.iter().sum()));
    let send = Span::whole(&send);
    fabric.run(Operation::AllToAll { send, send_bytes, recv: INBOX, recv_bytes: &recv_bytes })?;
    let inbox = fabric.window(INBOX).expect("the group has it");
    fold(digest, &inbox.read::<u8>().expect("complete")[..recv_bytes.iter().sum()]);
    Ok(())
}

fn epoch(
    fabric: &mut dyn Fabric,
    index: usize,
    puts: &[Put],
    arrived: &mut u64,
    digest: &mut u64,
) -> Result<(), FabricError> {
    let me = fabric.rank();
    fabric.run(Operation::Open { window: EPOCHS })?;
    for put in puts.iter().filter(|put| put.from == me.index()) {
        let from = Region::from_vec(bytes_of(put.from, index + put.place, put.bytes));
        let rank = Rank::new(put.to);
        let to = [RemoteSpan { rank, window: EPOCHS, offset: put.place * PLACE_BYTES }];
        fabric.run(Operation::Put { from: Span::whole(&from), to: &to })?;
        fabric.run(Operation::Signal { rank, signal: ARRIVED, add: 1 })?;
    }
    let mine = || puts.iter().filter(|put| put.to == me.index());
    *arrived += mine().count() as u64;
    fabric.run(Operation::AwaitSignal { signal: ARRIVED, at_least: *arrived })?;
    for put in mine() {
        let to = Region::zeroed(put.bytes);
        let from = RemoteSpan { rank: me, window: EPOCHS, offset: put.place * PLACE_BYTES };
        fabric.run(Operation::Get { from, to: Span::whole(&to) })?;
        let got = to.read::<u8>().expect("complete");
        assert!(
            got[..] == bytes_of(put.from, index + put.place, put.bytes)[..],
            "{put:?} was not there after its signal"
        );
        fold(digest, &got);
    }
    fabric.run(Operation::Close { window: EPOCHS })?;
    // What earlier epochs left in other places is there, too.
    let window = fabric.window(EPOCHS).expect("the group has it");
    fold(digest, &window.read::<u8>().expect("closed"));
    Ok(())
}

fn step(ranks: usize) -> impl Strategy<Value = Step> {
    let put = (0..ranks, 0..ranks, 0..PLACES, 0..=PLACE_BYTES).prop_map(|(from, to, place, bytes)| Put {
        from,
        to,
        place,
        bytes,
    });
    let puts = prop::collection::vec(put, 0..8).prop_map(|mut puts| {
        let mut filled = Vec::new();
        puts.retain(|put| {
            let place = (put.to, put.place);
            let free = !filled.contains(&place);
            filled.push(place);
            free
        });
        Step::Epoch { puts }
    });
    prop_oneof![
        1 => Just(Step::Barrier),
        1 => (0usize..200).prop_map(|bytes| Step::Gather { bytes }),
        1 => (0usize..60).prop_map(|count| Step::Reduce { count }),
        2 => prop::collection::vec(0usize..80, ranks * ranks).prop_map(|sizes| Step::Exchange { sizes }),
        3 => puts,
    ]
}

fn program() -> impl Strategy<Value = (usize, Vec<Step>)> {
    (1usize..5).prop_flat_map(|ranks| (Just(ranks), prop::collection::vec(step(ranks), 1..12)))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn ranks_see_the_same_on_threads_and_under_any_schedule((ranks, program) in program(), seed in any::<u64>()) {
        let spec = spec(ranks);
        let expected = run_threads(&spec, |fabric| interpret(fabric, &program));
        let expected = expected.map_err(|error| TestCaseError::fail(error.to_string()))?;
        for seed in [seed, seed ^ 1, seed ^ 2] {
            let run = run_simulated(&spec, &Simulation::new(seed), |fabric| interpret(fabric, &program));
            let got = run.map_err(|error| TestCaseError::fail(error.to_string()))?.result;
            prop_assert_eq!(got.as_ref(), Ok(&expected), "under schedule {}", seed);
        }
    }
}
