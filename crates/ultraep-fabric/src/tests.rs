//! What the conformance suite cannot see from outside: the segment's table, failure words, borrow states, copies.

use crate::backend::{Failure, Hold, Use};
use crate::operation::{Collective, OperationKind};
use crate::processes::{self, memory_file};
use crate::shared::{Layout, MAGIC, Segment};
use crate::sync::Ordering;
use crate::{AccessError, FabricError, FabricKind, GroupSpec, Loss, PROTOCOL_VERSION, Region, copy};
use core::time::Duration;
use proptest::prelude::*;
use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use rustix::fs::{SealFlags, fcntl_add_seals, ftruncate};
use rustix::io::Errno;
use ultraep_plan::Rank;

fn spec(ranks: usize, windows: &[usize]) -> GroupSpec {
    let mut spec = GroupSpec::new(ranks);
    for &bytes in windows {
        spec.add_window("window", bytes);
    }
    spec
}

#[test]
fn sections_do_not_overlap_and_fit() {
    for (ranks, windows) in [(1, &[][..]), (2, &[0, 1, 4096]), (5, &[100_001, 0, 7]), (1024, &[12])] {
        let layout = Layout::new(&spec(ranks, windows)).expect("a small group");
        let mut sections = vec![layout.control, layout.signals, layout.sizes, layout.records];
        sections.extend(layout.staging.iter().chain(&layout.reduced).chain(&layout.windows));
        let mut end = layout.header.offset + layout.header.stride;
        for section in sections {
            assert!(section.offset >= end && section.bytes <= section.stride, "{section:?} after {end}");
            end = section.offset + section.stride * ranks;
        }
        assert!(end <= layout.total_bytes && layout.total_bytes.is_multiple_of(4096));
        assert_eq!(layout.windows.iter().map(|window| window.bytes).collect::<Vec<_>>(), windows);
    }
}

#[test]
fn what_cannot_be_laid_out_is_refused() {
    for spec in [spec(0, &[]), spec(1025, &[]), spec(2, &[usize::MAX]), spec(1024, &[usize::MAX / 1000])] {
        let refused = Layout::new(&spec);
        assert!(matches!(refused, Err(FabricError::Spec { .. })), "{refused:?}");
    }
    let digests =
        [spec(2, &[1]), spec(2, &[2]), spec(2, &[1, 1]), spec(3, &[1])].map(|spec| Layout::new(&spec).unwrap().digest);
    let different: std::collections::HashSet<u64> = digests.into_iter().collect();
    assert_eq!(different.len(), digests.len());
}

#[test]
fn failures_survive_the_segment() {
    let collective = |sequence, kind, detail| Collective { sequence, kind, detail };
    let (rank, other) = (Rank::new(3), Rank::new(69));
    let missing = vec![Rank::new(0), Rank::new(63), Rank::new(64), other];
    let lost = |loss| Failure::Lost { rank: other, loss };
    let failures = [
        lost(Loss::Left),
        lost(Loss::Dropped),
        lost(Loss::Failed),
        lost(Loss::Panicked),
        lost(Loss::Killed { signal: 64 }),
        lost(Loss::Exited { code: 255 }),
        lost(Loss::Refused),
        lost(Loss::Vanished),
        Failure::Suspended { ranks: missing.clone(), operation: OperationKind::Leave, waited: Duration::ZERO },
        Failure::Timeout { missing, operation: OperationKind::AllToAll, waited: Duration::from_nanos(1_500_000_001) },
        Failure::Mismatch {
            rank,
            operation: collective(u64::MAX, OperationKind::Barrier, 0),
            other,
            other_operation: collective(1, OperationKind::AllGather, 1 << 40),
        },
        Failure::Sizes { from: other, to: rank, sent_bytes: u64::MAX, expected_bytes: 0 },
    ];
    for failure in failures {
        let segment = Segment::anonymous(&spec(70, &[])).expect("a small group");
        assert_eq!((segment.failure(), segment.has_failed()), (None, false));
        segment.fail(rank, &failure);
        // The first one stays.
        segment.fail(Rank::new(1), &Failure::Lost { rank: Rank::new(1), loss: Loss::Panicked });
        assert_eq!((segment.failure().as_ref(), segment.has_failed()), (Some(&failure), true));
    }
}

/// A file as `launch` makes it, for a group whose header `alter` has changed.
fn segment_file(spec: &GroupSpec, alter: impl Fn(&Segment)) -> OwnedFd {
    let layout = Layout::new(spec).expect("a small group");
    let file = memory_file(layout.total_bytes).expect("memory");
    let segment = Segment::map(file.as_fd(), layout).expect("a mapping");
    segment.initialise(spec);
    alter(&segment);
    file
}

#[test]
fn a_rank_of_another_version_or_configuration_is_refused_with_both_named() {
    let spec = GroupSpec { config_digest: 0xabc, ..spec(2, &[100]) };
    let refused = |file: &OwnedFd, spec: &GroupSpec| {
        let info = format!("{}:{}:1", std::process::id(), file.as_raw_fd()).parse().expect("a join info");
        processes::join(spec, info).err().expect("refused").to_string()
    };
    let later = segment_file(&spec, |segment| segment.header().version.store(7, Ordering::Relaxed));
    assert_eq!(
        refused(&later, &spec),
        format!("rank 1 cannot join: protocol version {PROTOCOL_VERSION}, the group has 7")
    );
    let file = segment_file(&spec, |_| {});
    let other = GroupSpec { config_digest: 0xdef, ..spec.clone() };
    let digests = "rank 1 cannot join: config digest 0000000000000def, the group has 0000000000000abc";
    assert_eq!(refused(&file, &other), digests);
    let wider = GroupSpec { config_digest: 0xabc, ..self::spec(2, &[5000]) };
    assert!(refused(&file, &wider).contains("windows differ"));
    let torn = segment_file(&spec, |segment| segment.header().magic.store(MAGIC ^ 1, Ordering::Relaxed));
    assert!(refused(&torn, &spec).contains("is not the segment of a group"));
    // Nothing was taken by those who were refused, and whoever joins has a descriptor of its own.
    let info = format!("{}:{}:1", std::process::id(), file.as_raw_fd()).parse().expect("a join info");
    let fabric = processes::join(&spec, info).expect("the group's own configuration");
    assert_eq!(fabric.rank(), Rank::new(1));
    assert!(rustix::fs::fstat(&file).is_ok(), "the launcher's descriptor stays open");
}

#[test]
fn the_size_of_a_segment_is_sealed() {
    let file = memory_file(8192).expect("memory");
    for bytes in [0, 4096, 16_384] {
        assert_eq!(ftruncate(&file, bytes), Err(Errno::PERM), "{bytes} bytes");
    }
    assert_eq!(fcntl_add_seals(&file, SealFlags::WRITE), Err(Errno::PERM), "the seals are sealed, too");
}

#[test]
fn adopted_memory_is_neither_copied_nor_moved() {
    let values = vec![1.5f32, -2.0, 3.25];
    let address = values.as_ptr();
    let region = Region::from_vec(values);
    assert_eq!(region.bytes(), 12);
    assert_eq!(region.read::<f32>().expect("nobody writes").as_ptr(), address);
    region.write::<u32>().expect("nobody reads")[1] = 7.5f32.to_bits();
    assert_eq!(region.read::<f32>().expect("nobody writes")[..], [1.5, 7.5, 3.25]);
    let empty = Region::from_vec(Vec::<u64>::new());
    assert_eq!((empty.bytes(), empty.read::<u64>().expect("nobody writes").len()), (0, 0));
    let own = Region::zeroed(64);
    assert_eq!(own.read::<u64>().expect("aligned").as_ptr().align_offset(crate::REGION_ALIGN), 0);
}

#[test]
fn borrow_states_exclude_each_other() {
    let region = Region::zeroed(8);
    let clone = region.clone();
    let one = region.read::<u8>().expect("unused");
    let two = Hold::take(&clone, Use::Read).expect("readers share");
    assert_eq!(clone.write::<u8>().err(), Some(AccessError::BeingRead));
    assert_eq!(Hold::take(&clone, Use::Open).err(), Some(AccessError::BeingRead));
    drop((one, two));
    let hold = Hold::take(&region, Use::Receive).expect("unused");
    assert_eq!(clone.read::<u8>().err(), Some(AccessError::Receiving));
    hold.release();
    drop(Hold::take(&region, Use::Write).expect("released"));
    let open = Hold::take(&clone, Use::Open).expect("unused");
    assert_eq!(Hold::take(&region, Use::Receive).err(), Some(AccessError::Open));
    open.release();
    // A receiving hold that is dropped, not released, never comes back.
    drop(Hold::take(&region, Use::Receive).expect("unused"));
    assert_eq!(clone.write::<u8>().err(), Some(AccessError::Receiving));
    assert!(!region.same(&Region::zeroed(8)) && region.same(&clone));
}

#[test]
fn holds_copy_within_the_region_and_as_their_use_allows() {
    let region = Region::from_vec((0..8u8).collect());
    let reading = Hold::take(&region, Use::Read).expect("unused");
    let mut bytes = [0; 3];
    reading.read_bytes(5, &mut bytes).expect("within");
    assert_eq!(bytes, [5, 6, 7]);
    let beyond = AccessError::Beyond { end: 9, bytes: 8 };
    assert_eq!(reading.read_bytes(6, &mut bytes), Err(beyond));
    assert!(reading.read_bytes(usize::MAX, &mut bytes).is_err());
    assert_eq!(reading.write_bytes(0, &[9]), Err(AccessError::BeingRead));
    drop(reading);
    for usage in [Use::Write, Use::Open, Use::Receive] {
        let hold = Hold::take(&region, usage).expect("unused");
        hold.write_bytes(7, &[usage as u8]).expect("within");
        assert_eq!(hold.write_bytes(7, &[1, 2]), Err(beyond));
        assert!(region.read::<u8>().is_err(), "{usage:?} excludes guards");
        hold.release();
        assert_eq!(region.read::<u8>().expect("released")[7], usage as u8);
    }
    let device = Region::foreign(8, std::sync::Arc::new(()));
    let hold = Hold::take(&device, Use::Write).expect("the state of a device's memory is kept, too");
    assert_eq!(hold.write_bytes(0, &[1]), Err(AccessError::NoHostView));
    assert!(hold.start().is_err() && Hold::take(&device, Use::Read).is_err());
}

/// Foreign memory lives as long as the region and no longer.
#[test]
fn adopted_memory_is_kept_by_its_keeper() {
    let keeper = std::sync::Arc::new(std::sync::Mutex::new(vec![7u8; 16]));
    let start = core::ptr::NonNull::new(keeper.lock().expect("no panic").as_mut_ptr()).expect("not null");
    // SAFETY: the vector is neither moved, grown nor touched while the region lives, and the keeper keeps it.
    let region = unsafe { Region::adopt(start, 16, keeper.clone()) };
    region.write::<u8>().expect("unused")[3] = 9;
    assert_eq!(std::sync::Arc::strong_count(&keeper), 2);
    drop(region);
    assert_eq!(std::sync::Arc::strong_count(&keeper), 1);
    assert_eq!(keeper.lock().expect("no panic")[..5], [7, 7, 7, 9, 7]);
}

#[test]
fn names_of_fabrics_are_read_back() {
    for kind in FabricKind::ALL {
        assert_eq!(kind.to_string().parse(), Ok(kind));
    }
    let error = "mpi".parse::<FabricKind>().expect_err("not yet");
    assert_eq!(error.to_string(), "no fabric is called `mpi`: allowed are threads and processes");
}

#[test]
fn errors_say_who_and_what() {
    let missing = vec![Rank::new(3), Rank::new(5)];
    let timeout =
        FabricError::Timeout { missing, operation: OperationKind::AllGather, waited: Duration::from_millis(1500) };
    assert_eq!(timeout.to_string(), "all-gather timed out after 1.500 s: no sign of ranks 3, 5");
    let (rank, operation) = (Rank::new(2), OperationKind::Barrier);
    let suspended = FabricError::Suspended { ranks: vec![rank], operation, waited: Duration::from_secs(60) };
    assert_eq!(suspended.to_string(), "barrier timed out after 60.000 s: suspended (stopped by a signal): rank 2");
    assert!(suspended.ends_group() && suspended.culprit() == Some(rank));
    let lost = FabricError::PeerLost { rank, operation, reason: Loss::Killed { signal: 9 } };
    assert_eq!(lost.to_string(), "rank 2 was lost (killed by signal 9): barrier cannot complete");
    assert!(lost.ends_group() && lost.culprit() == Some(rank));
}

proptest! {
    /// Copies write exactly their range, whatever the length and the alignment, to each of the targets.
    #[test]
    fn copies_write_their_range_and_nothing_else(length in 0usize..40_000, from in 0usize..9, to in 0usize..9) {
        let source: Vec<u8> = (0..from + length).map(|index| (index * 31 % 251) as u8).collect();
        let mut targets = [vec![255u8; to + length + 3], vec![255u8; to + length + 3]];
        let [first, second] = &mut targets;
        let starts = [first[to..].as_mut_ptr(), second[to..].as_mut_ptr()];
        // SAFETY: the ranges lie within the vectors, which nothing else refers to during the call.
        unsafe { copy::copy_to_many(source[from..].as_ptr(), starts.into_iter(), length) };
        for target in targets {
            prop_assert!(target[..to].iter().chain(&target[to + length..]).all(|&byte| byte == 255));
            prop_assert_eq!(&target[to..to + length], &source[from..]);
        }
    }
}
