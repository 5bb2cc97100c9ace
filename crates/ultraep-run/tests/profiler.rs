//! The profiler: what it records is what the trace holds; what it drops is counted; a failing disk is an error, not a hang.

use std::path::Path;

use ultraep_plan::{Topology, TopologySpec};
use ultraep_run::{Profiler, ProfilerOptions, RunInfo, RunReader, RunWriter, UtcTime};
use ultraep_trace::{Record, TraceMeta};

const RANKS: usize = 8;
const EXPERTS: usize = 32;

fn begin(folder: &Path, options: ProfilerOptions) -> (RunWriter, Profiler) {
    let writer = RunWriter::create(folder, RunInfo::starting(UtcTime::from_unix_s(0))).expect("run");
    let spec = TopologySpec { ranks: RANKS, experts: EXPERTS, domain_ranks: RANKS, slots_per_rank: 1 };
    let meta = TraceMeta::of_topology(&Topology::new(spec).expect("topology"), 4);
    let trace = writer.create_trace(meta).expect("trace");
    let profiler = Profiler::start(trace, options).expect("profiler");
    (writer, profiler)
}

fn fill(record: &mut Record, step: u64, layer: u32) {
    (record.step, record.microbatch, record.layer) = (step, 0, layer);
    record.before.clear();
    record.before.extend((0..(RANKS * EXPERTS) as u32).map(|i| (i * 7 + step as u32 + layer) % 97));
    (record.after, record.top_k) = (None, None);
}

#[test]
fn the_trace_holds_what_was_recorded_in_order() {
    let folder = tempfile::TempDir::new().expect("folder");
    let path = folder.path().join("run");
    let (writer, mut profiler) = begin(&path, ProfilerOptions { every: 3, ring: 64 });
    let mut expected = Vec::new();
    for step in 0..20 {
        if !profiler.wants(step) {
            continue;
        }
        for layer in 0..4 {
            profiler.record(|record| fill(record, step, layer)).expect("recorded");
            let mut record = Record::default();
            fill(&mut record, step, layer);
            expected.push(record);
        }
        if step == 9 {
            profiler.sync().expect("synced");
            let reader = RunReader::open(&path).expect("run");
            let seen = reader.trace().expect("trace").expect("there").records();
            assert_eq!(seen, expected.len() as u64, "a live reader sees what was synced");
        }
    }
    let summary = profiler.finish().expect("finished");
    assert_eq!((summary.every, summary.recorded, summary.dropped), (3, 28, 0));
    drop(writer);
    let mut trace = RunReader::open(&path).expect("run").trace().expect("trace").expect("there");
    assert_eq!(trace.records(), expected.len() as u64);
    let mut read = Record::default();
    for (number, expected) in expected.iter().enumerate() {
        trace.read(number as u64, &mut read).expect("record");
        assert!(&read == expected, "record {number} differs");
    }
}

#[test]
fn what_does_not_fit_is_dropped_and_counted() {
    let folder = tempfile::TempDir::new().expect("folder");
    let path = folder.path().join("run");
    let (_writer, mut profiler) = begin(&path, ProfilerOptions { every: 1, ring: 1 });
    for step in 0..2000 {
        profiler.record(|record| fill(record, step, 0)).expect("recorded");
    }
    let summary = profiler.finish().expect("finished");
    assert_eq!(summary.recorded + summary.dropped, 2000);
    let trace = RunReader::open(&path).expect("run").trace().expect("trace").expect("there");
    assert_eq!(trace.records(), summary.recorded);
}

#[test]
fn nothing_is_sampled_when_it_is_off() {
    let folder = tempfile::TempDir::new().expect("folder");
    let (_writer, profiler) = begin(&folder.path().join("run"), ProfilerOptions { every: 0, ring: 4 });
    assert!((0..100).all(|step| !profiler.wants(step)));
    assert_eq!(profiler.finish().expect("finished").recorded, 0);
}

#[test]
fn a_record_that_does_not_fit_the_trace_is_an_error_once() {
    let folder = tempfile::TempDir::new().expect("folder");
    let (_writer, mut profiler) = begin(&folder.path().join("run"), ProfilerOptions::default());
    profiler.record(|record| fill(record, 1, 0)).expect("recorded");
    profiler.record(|record| fill(record, 0, 99)).expect("handed over");
    let error = profiler.sync().expect_err("the writer met it");
    assert!(error.to_string().contains("loads.uet"), "{error}");
    profiler.record(|record| fill(record, 2, 0)).expect("nothing more to say");
    profiler.sync().expect("nothing more to say");
    profiler.finish().expect("nothing more to say");
}

#[test]
fn recording_allocates_nothing_once_records_are_recycled() {
    let folder = tempfile::TempDir::new().expect("folder");
    let (_writer, mut profiler) = begin(&folder.path().join("run"), ProfilerOptions { every: 1, ring: 4 });
    for step in 0..16 {
        profiler.record(|record| fill(record, step, 0)).expect("recorded");
        profiler.sync().expect("synced");
    }
    let info = allocation_counter::measure(|| {
        profiler.record(|record| fill(record, 99, 0)).expect("recorded");
    });
    assert_eq!(info.count_total, 0);
}
