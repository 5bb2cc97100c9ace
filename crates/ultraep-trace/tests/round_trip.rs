//! What is written is what is read, in order, by number, by key, and after taking a trace up again.

mod common;

use std::fs::{self, File, OpenOptions};
use std::io::Read;

use common::{Draws, Shape, meta, open, read_all, records, write};
use proptest::prelude::*;
use tempfile::TempDir;
use ultraep_plan::{Instance, PhysicalIndex, Plan, Rank, SplitRule, Topology, TopologySpec};
use ultraep_trace::{BlockSize, PlanRecord, Record, RecordError, TopKIds, TraceError, TraceFile, TraceWriter};

fn shapes() -> impl Strategy<Value = Shape> {
    (1_usize..9, 1_usize..5, 1_usize..5, 1_usize..4).prop_map(|(ranks, per_rank, layers, top_k)| {
        let experts = ranks * per_rank + (per_rank - 1).min(1); // not always divisible
        Shape { ranks, experts, layers, top_k: top_k.min(experts) }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    #[test]
    fn any_trace_reads_back(shape in shapes(), count in 0_usize..40, block_records in 1_u32..20, seed: u64) {
        let meta = meta(shape);
        let mut draws = Draws(seed);
        let records = records(count, shape, &mut draws);
        let bytes = write(&records, &meta, BlockSize { records: block_records, ..BlockSize::default() });
        prop_assert_eq!(&bytes, &write(&records, &meta, BlockSize { records: block_records, ..BlockSize::default() }));

        let (read, ending) = read_all(&bytes);
        prop_assert_eq!(&read, &records);
        prop_assert!(ending.expect("intact").is_closed);

        let mut file = open(&bytes);
        prop_assert_eq!(file.meta(), &meta);
        prop_assert_eq!(file.records(), count as u64);
        prop_assert_eq!(file.blocks().len(), count.div_ceil(block_records as usize));
        let mut record = Record::default();
        for _ in 0..2 * count {
            let number = draws.below(count);
            file.read(number as u64, &mut record).expect("record");
            prop_assert_eq!(&record, &records[number]);
        }
        for wanted in &records {
            let key = |r: &Record| (r.step, r.microbatch, r.layer);
            let first = records.iter().position(|r| key(r) == key(wanted)).map(|n| n as u64);
            prop_assert_eq!(file.find(wanted.step, wanted.microbatch, wanted.layer).expect("find"), first);
        }
        prop_assert_eq!(file.find(u64::MAX, 0, 0).expect("find"), None);
        let past = file.read(count as u64, &mut record);
        let is_refused = matches!(past, Err(TraceError::NoSuchRecord { .. }));
        prop_assert!(is_refused);
    }

    /// Taking up a trace at a step gives the records that survived from before, and those made anew.
    #[test]
    fn a_trace_is_taken_up_at_any_step(count in 1_usize..30, block_records in 1_u32..7, cut in 0_usize..3000, seed: u64) {
        let shape = Shape { ranks: 3, experts: 4, layers: 2, top_k: 2 };
        let (meta, mut draws) = (meta(shape), Draws(seed));
        let records = records(count, shape, &mut draws);
        let mut bytes = write(&records, &meta, BlockSize { records: block_records, ..BlockSize::default() });
        let header_bytes = open(&bytes).blocks()[0].offset as usize;
        bytes.truncate((bytes.len() - cut.min(bytes.len())).max(header_bytes));
        let survivors = read_all(&bytes).0.len();

        let folder = TempDir::new().expect("folder");
        let path = folder.path().join("loads.uet");
        fs::write(&path, &bytes).expect("write");
        let from_step = records[draws.below(count)].step;
        let file = OpenOptions::new().read(true).write(true).open(&path).expect("open");
        let (mut writer, resumed) = TraceWriter::resume(file, from_step).expect("resume");
        let kept = records[..survivors].iter().filter(|r| r.step < from_step).count();
        prop_assert_eq!(resumed.kept_records, kept as u64);
        prop_assert_eq!(resumed.removed_records, (survivors - kept) as u64);
        let again: Vec<&Record> = records.iter().skip_while(|r| r.step < from_step).collect();
        for record in &again {
            writer.append(record).expect("append");
        }
        writer.finish().expect("finish");
        let whole: Vec<Record> = records[..kept].iter().chain(again).cloned().collect();
        let (read, ending) = read_all(&fs::read(&path).expect("read"));
        prop_assert_eq!(&read, &whole);
        prop_assert!(ending.expect("intact").is_closed);
        prop_assert_eq!(open(&fs::read(&path).expect("read")).records(), whole.len() as u64);
    }
}

/// The bytes of version 1, spelled out. If this fails, old traces no longer read: make a version 2 instead.
#[test]
fn version_1_is_pinned() {
    let shape = Shape { ranks: 2, experts: 2, layers: 1, top_k: 1 };
    let mut meta = meta(shape);
    meta.metadata.clear();
    let instance =
        |rank, physical, quota| Instance { rank: Rank::new(rank), physical: PhysicalIndex::new(physical), quota };
    let record = Record {
        step: 7,
        microbatch: 1,
        layer: 0,
        before: vec![1, 0, 0, 1],
        after: Some(PlanRecord {
            policy: "p".into(),
            digest: 0x0102_0304_0506_0708,
            offsets: vec![0, 2, 3],
            instances: vec![instance(0, 0, 0), instance(1, 1, 1), instance(1, 0, 1)],
            split: Some(vec![0, 1, 0, 0, 0, 1]),
        }),
        top_k: Some(TopKIds { tokens: vec![1, 1], ids: vec![0, 1] }),
    };
    let json = br#"{"schema":"ultraep.trace/1","ranks":2,"experts":2,"domain_ranks":1,"masters_per_rank":[1,1],"slots_per_rank":[2,2],"layers":1,"top_k":1,"tokens_per_rank":null,"metadata":{}}"#;
    let raw: Vec<u8> = [
        &[35][..],                          // length
        &[0, 1, 0, 7],                      // step - first_step, microbatch, layer, flags
        &[1, 0, 1, 2],                      // row 0; row 1 as zigzag differences: -1, +1
        &[1, b'p', 8, 7, 6, 5, 4, 3, 2, 1], // policy, digest
        &[2, 0, 0, 0, 1, 1, 1],             // expert 0: two instances
        &[1, 1, 0, 1],                      // expert 1: one
        &[0, 0],                            // split: expert 0's first instance, two sources
        &[1, 1, 1, 2],                      // tokens; ids + 1
    ]
    .concat();
    let mut expected = b"\x89UET\r\n\x1a\n\x01\0\0\0".to_vec();
    expected.extend_from_slice(&(json.len() as u32).to_le_bytes());
    expected.extend_from_slice(&crc32fast::hash(json).to_le_bytes());
    expected.extend_from_slice(json);
    let block_offset = expected.len() as u64;
    let header = |marker: &[u8; 4], count: u32, first: u64, payload: &[u8]| {
        let mut header = marker.to_vec();
        header.extend_from_slice(&count.to_le_bytes());
        [first, 7, 7].iter().for_each(|v| header.extend_from_slice(&v.to_le_bytes()));
        [payload.len() as u32; 2].iter().for_each(|v| header.extend_from_slice(&v.to_le_bytes()));
        header.extend_from_slice(&crc32fast::hash(payload).to_le_bytes());
        header.extend_from_slice(&crc32fast::hash(&header).to_le_bytes());
        header
    };
    expected.extend(header(b"UETB", 1, 0, &raw));
    expected.extend_from_slice(&raw);
    let index_offset = expected.len() as u64;
    let mut entry = Vec::new();
    [block_offset, 0, 7, 7].iter().for_each(|v: &u64| entry.extend_from_slice(&v.to_le_bytes()));
    [1, raw.len() as u32].iter().for_each(|v| entry.extend_from_slice(&v.to_le_bytes()));
    expected.extend(header(b"UETI", 1, 1, &entry));
    expected.extend_from_slice(&entry);
    expected.extend_from_slice(&index_offset.to_le_bytes());
    expected.extend_from_slice(b"UETEND\r\n");
    let (read, ending) = read_all(&expected);
    assert_eq!(read, std::slice::from_ref(&record));
    assert!(ending.expect("intact").is_closed);

    // The writer's file differs in the compressed payload alone, which must expand to the same bytes.
    let written = write(&[record], &meta, BlockSize::default());
    let payload_bytes = open(&written).blocks()[0].payload_bytes as usize;
    let payload = &written[block_offset as usize + 48..][..payload_bytes];
    let mut expanded = Vec::new();
    flate2::read::DeflateDecoder::new(payload).read_to_end(&mut expanded).expect("DEFLATE");
    assert_eq!(expanded, raw);
    assert_eq!(written[..block_offset as usize + 32], expected[..block_offset as usize + 32]);
    assert_eq!(written[written.len() - 8..], expected[expected.len() - 8..]);
}

#[test]
fn a_plan_is_captured_as_it_is() {
    let topology =
        Topology::new(TopologySpec { ranks: 2, experts: 3, domain_ranks: 2, slots_per_rank: 1 }).expect("topology");
    let mut plan = Plan::for_slots(&topology);
    plan.begin(SplitRule::default());
    let instance = |rank, quota| Instance { rank: Rank::new(rank), physical: PhysicalIndex::new(0), quota };
    for instances in [&[instance(0, 5), instance(1, 2)][..], &[instance(0, 1)], &[instance(1, 4)]] {
        instances.iter().for_each(|&i| plan.push_instance(i));
        plan.end_expert();
    }
    let mut captured = PlanRecord { policy: "old".into(), split: Some(vec![1]), ..PlanRecord::default() };
    captured.capture("greedy", 9, &plan);
    assert_eq!((captured.policy.as_str(), captured.digest), ("greedy", 9));
    assert_eq!(captured.offsets, [0, 2, 3, 4]);
    assert_eq!(captured.instances, plan.instances());
    assert_eq!(captured.split, None);
    assert_eq!(captured.rank_loads(2), [6, 6]);
    captured.split = Some(vec![3, 0, 1, 0, 0, 4, 0, 4]); // [2 sources, 4 instances]
    assert_eq!(captured.rank_loads(2), [4, 8], "by the realised split where there is one");
}

#[test]
fn a_trace_at_work_is_followed() {
    let shape = Shape { ranks: 2, experts: 3, layers: 1, top_k: 1 };
    let records = records(9, shape, &mut Draws(4));
    let folder = TempDir::new().expect("folder");
    let path = folder.path().join("loads.uet");
    let mut writer = TraceWriter::new(File::create(&path).expect("create"), meta(shape)).expect("writer");
    let mut follower = TraceFile::open(File::open(&path).expect("open")).expect("a header is enough");
    assert_eq!((follower.records(), follower.ending().is_closed), (0, false));
    let mut read = Record::default();
    for (number, record) in records.iter().enumerate() {
        writer.append(record).expect("append");
        follower.refresh().expect("refresh");
        assert_eq!(follower.records(), number as u64, "the block is not out yet");
        writer.flush().expect("flush");
        follower.refresh().expect("refresh");
        for (known, expected) in records[..=number].iter().enumerate() {
            follower.read(known as u64, &mut read).expect("record");
            assert_eq!(read, *expected);
        }
    }
    let written = fs::read(&path).expect("read");
    fs::write(&path, &written[..written.len() - 1]).expect("cut");
    assert!(matches!(follower.refresh(), Err(TraceError::Damaged { .. })), "it became shorter");
    fs::write(&path, &written).expect("as it was");
    writer.finish().expect("finish");
    follower.refresh().expect("refresh");
    assert!(follower.ending().is_closed && follower.records() == 9);
}

#[test]
fn rank_loads_before_are_those_of_the_masters() {
    let meta = meta(Shape { ranks: 2, experts: 3, layers: 1, top_k: 1 }); // rank 0 is home to two experts
    let record = Record { before: vec![1, 2, 3, 10, 20, 30], ..Record::default() };
    assert_eq!(record.rank_loads(&meta), [33, 33]);
}

#[test]
fn records_that_do_not_fit_are_refused_and_leave_the_trace_as_it_was() {
    let shape = Shape { ranks: 2, experts: 2, layers: 1, top_k: 1 };
    let instance = |rank| Instance { rank: Rank::new(rank), physical: PhysicalIndex::new(0), quota: 0 };
    let good = Record { step: 5, before: vec![1, 0, 2, 3], ..Record::default() };
    let plan =
        PlanRecord { offsets: vec![0, 1, 2], instances: vec![instance(0), instance(1)], ..PlanRecord::default() };
    let with_plan = |change: &dyn Fn(&mut PlanRecord)| {
        let mut plan = plan.clone();
        change(&mut plan);
        Record { after: Some(plan), ..good.clone() }
    };
    let with_ids = |tokens: [u32; 2], ids: &[u16]| Record {
        top_k: Some(TopKIds { tokens: tokens.to_vec(), ids: ids.to_vec() }),
        ..good.clone()
    };
    type Expected = fn(&RecordError) -> bool;
    let cases: Vec<(&str, Record, Expected)> = vec![
        ("layer", Record { layer: 1, ..good.clone() }, |e| matches!(e, RecordError::Layer { got: 1, layers: 1 })),
        ("step", Record { step: 4, ..good.clone() }, |e| matches!(e, RecordError::StepBack { got: 4, last: 5 })),
        ("shape", Record { before: vec![0; 3], ..good.clone() }, |e| matches!(e, RecordError::Length { got: 3, .. })),
        ("total", Record { before: vec![u32::MAX; 4], ..good.clone() }, |e| matches!(e, RecordError::TooManyTokens(_))),
        ("policy", with_plan(&|p| p.policy = "x".repeat(65)), |e| matches!(e, RecordError::PolicyName(65))),
        ("offsets short", with_plan(&|p| p.offsets = vec![0, 2]), |e| matches!(e, RecordError::Length { .. })),
        ("offsets back", with_plan(&|p| p.offsets = vec![0, 3, 2]), |e| {
            matches!(e, RecordError::Offsets { expert: 1 })
        }),
        ("offsets end", with_plan(&|p| p.offsets = vec![0, 1, 3]), |e| matches!(e, RecordError::Offsets { .. })),
        ("rank", with_plan(&|p| p.instances[1] = instance(2)), |e| {
            matches!(e, RecordError::InstanceRank { expert: 1, rank: 2, .. })
        }),
        (
            "twice",
            with_plan(&|p| {
                p.offsets = vec![0, 2, 3];
                p.instances.insert(0, instance(0));
            }),
            |e| matches!(e, RecordError::InstanceRank { expert: 0, rank: 0, .. }),
        ),
        ("split shape", with_plan(&|p| p.split = Some(vec![1])), |e| matches!(e, RecordError::Length { .. })),
        ("split sum", with_plan(&|p| p.split = Some(vec![1, 0, 2, 4])), |e| {
            matches!(e, RecordError::Split { source_rank: 1, expert: 1, got: 4, expected: 3 })
        }),
        ("id", with_ids([1, 5], &[2, 0, 0, 1, 1, 1]), |e| matches!(e, RecordError::TopKExpert { got: 2, .. })),
        ("ids", with_ids([1, 5], &[0, 0, 0, 1, 1]), |e| matches!(e, RecordError::Length { got: 5, .. })),
        ("id counts", with_ids([1, 5], &[0, 0, 1, 1, 1, 1]), |e| {
            matches!(e, RecordError::TopKCounts { source_rank: 1, expert: 0, got: 1, expected: 2 })
        }),
    ];
    let mut writer = TraceWriter::new(Vec::new(), meta(shape)).expect("writer");
    writer.append(&good).expect("good");
    for (name, record, expected) in &cases {
        match writer.append(record) {
            Err(TraceError::Record { record: 1, source }) => assert!(expected(&source), "{name}: {source}"),
            other => panic!("{name}: {other:?}"),
        }
    }
    writer.append(&with_ids([1, 5], &[0, 0, 0, 1, 1, 1])).expect("good");
    writer.append(&with_plan(&|p| p.split = Some(vec![1, 0, 2, 3]))).expect("good");
    let mut no_top_k = meta(shape);
    no_top_k.top_k = None;
    let mut other = TraceWriter::new(Vec::new(), no_top_k).expect("writer");
    let refused = other.append(&with_ids([1, 5], &[0, 0, 0, 1, 1, 1]));
    assert!(matches!(refused, Err(TraceError::Record { source: RecordError::NoTopK, .. })));
    assert_eq!(read_all(&writer.finish().expect("finish")).0.len(), 3);
}
