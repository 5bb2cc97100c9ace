//! A run folder from creation to its end, and everything that can go wrong between.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;

use tempfile::TempDir;
use ultraep_plan::{Topology, TopologySpec};
use ultraep_run::{
    CorpusSummary, Digest, DomainSummary, Imbalance, LINE_BYTES_MAX, Metric, PolicyMeasurement, PolicyTable,
    ProfileSummary, RunError, RunInfo, RunReader, RunStatus, RunWriter, StepMetrics, StepParts, UtcTime,
    ValidationMetrics, write_atomically,
};
use ultraep_trace::{Record, TraceMeta};

const STARTED_S: u64 = 1_795_531_156;

fn info() -> RunInfo {
    let mut info = RunInfo::starting(UtcTime::from_unix_s(STARTED_S));
    info.command = vec!["ultraep".into(), "train".into()];
    info.config.insert("ranks".into(), 8.into());
    info.config.insert("learning_rate".into(), 0.1.into());
    info.versions.insert("ultraep".into(), "0.1.0".into());
    let domain = DomainSummary { name: "rust".into(), bytes: 9, file_count: 1, origin: "a test".into() };
    info.corpus = Some(CorpusSummary { digest: Digest(u64::MAX - 1), domains: vec![domain] });
    info
}

fn step(step: u64) -> Metric {
    Metric::Step(StepMetrics {
        step,
        loss: 5.5 / (step + 1) as f64,
        tokens: 4096,
        tokens_per_s: 1234.5,
        imbalance_before: Imbalance { mean: 1.9, worst: 2.5 },
        imbalance_after: Imbalance { mean: 1.004, worst: 1.01 },
        parallel_step_ns: 7_000_000,
        parts: StepParts { dense_ns: 1, router_ns: 2, weight_sync_ns: 50, exposed_sync_ns: 3, ..StepParts::default() },
        wall_ns: None,
    })
}

fn measurement(policy: &str, step: u64, parallel_step_ns: u64) -> PolicyMeasurement {
    PolicyMeasurement {
        policy: policy.into(),
        step,
        tokens: 1_000,
        imbalance_before: Imbalance { mean: 2.0, worst: 3.0 + step as f64 },
        imbalance_after: Imbalance { mean: 1.0 + step as f64, worst: 1.5 },
        replicas_per_layer: 4.0,
        tokens_crossed_fraction: 0.25,
        peak_tokens_per_rank: 100 + step,
        parallel_step_ns,
        parts: StepParts { experts_ns: parallel_step_ns, weight_sync_ns: 9, ..StepParts::default() },
        wall_ns: (policy == "ideal").then_some(3_000_000),
    }
}

fn table() -> PolicyTable {
    let measurements = [
        measurement("none", 0, 4_000_000),
        measurement("ideal", 0, 1_000_000),
        measurement("none", 1, 2_000_000),
        measurement("ideal", 1, 2_000_000),
        measurement("none", 2, 3_000_000),
        measurement("ideal", 2, 1_500_000),
    ];
    PolicyTable::of_measurements("2 ranks".into(), vec!["parallel time".into()], &measurements)
}

fn steps(folder: &Path) -> Vec<u64> {
    let metrics = RunReader::open(folder).expect("run").metrics().expect("metrics");
    metrics.map(|m| m.expect("line").step().expect("step")).collect()
}

#[test]
fn a_run_is_written_and_read_back() {
    let root = TempDir::new().expect("folder");
    let info = info();
    let folder = root.path().join("runs").join(info.started.folder_name());
    assert!(folder.ends_with("2026-11-24T14-39-16Z"));
    let mut writer = RunWriter::create(&folder, info.clone()).expect("create");
    assert!(writer.checkpoints_folder().is_dir());
    let lines = [
        step(0),
        Metric::Validation(ValidationMetrics { step: 1, loss: 4.0, tokens: 10 }),
        Metric::Policy(measurement("none", 1, 5)),
    ];
    lines.iter().for_each(|line| writer.append_metric(line).expect("append"));

    let reader = RunReader::open(&folder).expect("a run at work is readable");
    assert_eq!(reader.info(), &info);
    assert_eq!(reader.is_being_written(), Some(true));
    assert_eq!(reader.metrics().expect("metrics").collect::<Result<Vec<_>, _>>().expect("lines"), lines);
    assert!(reader.table().expect("no table yet").is_none() && reader.trace().expect("no trace yet").is_none());

    writer.write_table(&table()).expect("table");
    writer.end(RunStatus::Finished, UtcTime::from_unix_s(STARTED_S + 90)).expect("end");
    let reader = RunReader::open(&folder).expect("open");
    assert_eq!(reader.info().status, RunStatus::Finished);
    assert_eq!(reader.info().ended, Some(UtcTime::from_unix_s(STARTED_S + 90)));
    assert_eq!(reader.is_being_written(), Some(false));
    assert_eq!(reader.table().expect("table"), Some(table()));
    let markdown = fs::read_to_string(folder.join("table.md")).expect("table.md");
    assert_eq!(markdown, table().to_markdown());
    let leftovers = fs::read_dir(&folder).expect("folder").filter_map(Result::ok);
    assert!(!leftovers.into_iter().any(|e| e.file_name().to_string_lossy().ends_with(".part")));
}

/// The JSON that other programs read, spelled out.
#[test]
fn version_1_is_pinned() {
    let root = TempDir::new().expect("folder");
    let folder = root.path().join("run");
    let mut writer = RunWriter::create(&folder, info()).expect("create");
    writer.append_metric(&step(1)).expect("append");
    let profile = ProfileSummary { every: 2, recorded: 5, dropped: 1 };
    writer.update_info(|info| info.profile = Some(profile)).expect("update");
    let reason = "rank 3 died".to_string();
    writer.end(RunStatus::Failed { reason }, UtcTime::from_unix_s(STARTED_S + 1)).expect("end");
    let json: serde_json::Value =
        serde_json::from_slice(&fs::read(folder.join("run.json")).expect("run.json")).expect("JSON");
    let expected = serde_json::json!({
        "schema": "ultraep.run/1",
        "status": {"state": "failed", "reason": "rank 3 died"},
        "started": "2026-11-24T14:39:16Z",
        "ended": "2026-11-24T14:39:17Z",
        "resumed_from_steps": [],
        "command": ["ultraep", "train"],
        "config": {"ranks": 8, "learning_rate": 0.1},
        "versions": {"ultraep": "0.1.0"},
        "corpus": {
            "digest": "fffffffffffffffe",
            "domains": [{"name": "rust", "bytes": 9, "file_count": 1, "origin": "a test"}]
        },
        "profile": {"every": 2, "recorded": 5, "dropped": 1}
    });
    assert_eq!(json, expected);
    let line = concat!(
        r#"{"type":"step","step":1,"loss":2.75,"tokens":4096,"tokens_per_s":1234.5,"#,
        r#""imbalance_before":{"mean":1.9,"worst":2.5},"imbalance_after":{"mean":1.004,"worst":1.01},"#,
        r#""parallel_step_ns":7000000,"parts":{"dense_ns":1,"router_ns":2,"plan_ns":0,"reroute_ns":0,"#,
        r#""weight_sync_ns":50,"exposed_sync_ns":3,"all_to_all_ns":0,"experts_ns":0,"grad_reduce_exposed_ns":0,"#,
        r#""all_reduce_ns":0,"optimizer_ns":0},"wall_ns":null}"#,
        "\n",
    );
    assert_eq!(fs::read_to_string(folder.join("metrics.jsonl")).expect("metrics"), line);
}

#[test]
fn a_folder_belongs_to_one_run() {
    let root = TempDir::new().expect("folder");
    let folder = root.path().join("run");
    let writer = RunWriter::create(&folder, info()).expect("create");
    assert!(matches!(RunWriter::create(&folder, info()), Err(RunError::Exists { .. })));
    assert!(matches!(RunWriter::resume(&folder, 0), Err(RunError::Busy { .. })));
    drop(writer);
    assert_eq!(RunReader::open(&folder).expect("open").is_being_written(), Some(false), "killed: running, not written");
    RunWriter::resume(&folder, 0).expect("free again");
}

#[test]
fn a_torn_or_growing_last_line_waits() {
    let root = TempDir::new().expect("folder");
    let folder = root.path().join("run");
    let mut writer = RunWriter::create(&folder, info()).expect("create");
    let mut follower = RunReader::open(&folder).expect("open").metrics().expect("metrics");
    assert!(follower.next_metric().expect("nothing yet").is_none());
    writer.append_metric(&step(0)).expect("append");
    assert_eq!(follower.next_metric().expect("line"), Some(step(0)));
    assert!(follower.next_metric().expect("end").is_none());

    let line = serde_json::to_string(&step(1)).expect("JSON");
    let mut file = OpenOptions::new().append(true).open(folder.join("metrics.jsonl")).expect("open");
    for part in [&line[..20], &line[20..]] {
        file.write_all(part.as_bytes()).expect("write");
        assert!(follower.next_metric().expect("not whole").is_none());
    }
    assert_eq!(follower.torn_bytes(), line.len());
    file.write_all(b"\n{\"type\":\"later\",\"x\":1}\nnot JSON\n").expect("write");
    assert_eq!(follower.next_metric().expect("whole now"), Some(step(1)));
    assert_eq!(follower.torn_bytes(), 0);
    assert_eq!(follower.next_metric().expect("of a later version"), Some(Metric::Unknown));
    let error = follower.next_metric().expect_err("not JSON");
    assert!(matches!(error, RunError::Json { line: Some(4), .. }), "{error}");
    assert!(error.to_string().contains("metrics.jsonl line 4: "), "{error}");
    file.write_all(&vec![b' '; LINE_BYTES_MAX as usize + 1]).expect("write");
    assert!(matches!(follower.next_metric(), Err(RunError::TooLarge { what: "a line", .. })));
    assert!(follower.next().is_none(), "an iterator ends");
}

#[test]
fn a_run_is_taken_up_at_a_step() {
    let root = TempDir::new().expect("folder");
    let folder = root.path().join("run");
    let topology = Topology::new(TopologySpec { ranks: 2, experts: 2, domain_ranks: 2, slots_per_rank: 1 });
    let topology = topology.expect("topology");
    let record = |step| Record { step, before: vec![step as u32, 1, 2, 3], ..Record::default() };
    {
        let mut writer = RunWriter::create(&folder, info()).expect("create");
        let mut trace = writer.create_trace(TraceMeta::of_topology(&topology, 1)).expect("trace");
        assert!(matches!(writer.create_trace(TraceMeta::of_topology(&topology, 1)), Err(RunError::Write { .. })));
        for s in 0..7 {
            writer.append_metric(&step(s)).expect("append");
            trace.append(&record(s)).expect("append");
        }
        trace.flush().expect("flush");
        writer.write_table(&table()).expect("table");
    } // killed: neither trace nor run is ended
    let mut file = OpenOptions::new().append(true).open(folder.join("metrics.jsonl")).expect("open");
    file.write_all(b"{\"type\":\"step\",\"st").expect("a torn line");
    drop(file);
    assert_eq!(steps(&folder), [0, 1, 2, 3, 4, 5, 6]);

    let mut writer = RunWriter::resume(&folder, 5).expect("resume");
    assert_eq!(writer.info().resumed_from_steps, [5]);
    assert!(RunReader::open(&folder).expect("open").table().expect("read").is_none(), "the old table is gone");
    assert!(!folder.join("table.md").exists());
    let (mut trace, resumed) = writer.resume_trace(5).expect("trace");
    assert_eq!((resumed.kept_records, resumed.removed_records), (5, 2));
    for s in 5..8 {
        writer.append_metric(&step(s)).expect("append");
        trace.append(&record(s)).expect("append");
    }
    trace.finish().expect("finish");
    let interrupted = RunStatus::Interrupted { reason: "Ctrl-C".into() };
    writer.end(interrupted.clone(), UtcTime::from_unix_s(STARTED_S + 9)).expect("end");
    assert_eq!(steps(&folder), [0, 1, 2, 3, 4, 5, 6, 7]);
    let reader = RunReader::open(&folder).expect("open");
    assert_eq!(reader.info().status, interrupted);
    let mut trace = reader.trace().expect("trace").expect("there");
    assert!(trace.ending().is_closed && trace.records() == 8);
    let mut read = Record::default();
    trace.read(6, &mut read).expect("record");
    assert_eq!(read, record(6));
}

#[test]
fn what_is_no_run_is_refused() {
    let root = TempDir::new().expect("folder");
    let open = || RunReader::open(root.path()).map(|_| ()).expect_err("refused");
    assert!(matches!(open(), RunError::NotARun { .. }));
    let write = |text: &str| fs::write(root.path().join("run.json"), text).expect("write");
    write("{\"schema\": \"ultraep.run/2\"}");
    assert!(open().to_string().ends_with("schema \"ultraep.run/2\"; this reader knows \"ultraep.run/1\""));
    write("{}");
    assert!(matches!(open(), RunError::Schema { got, .. } if got == "(none)"));
    write("{\"schema\": \"ultraep.run/1\"}");
    assert!(matches!(open(), RunError::Json { line: None, .. }));
    write("{\"schema\"");
    assert!(matches!(open(), RunError::Json { line: None, .. }));
    fs::File::create(root.path().join("run.json")).and_then(|f| f.set_len(17 << 20)).expect("large");
    assert!(matches!(open(), RunError::TooLarge { .. }));
    assert!(matches!(RunReader::open(&root.path().join("run.json")), Err(RunError::Read { .. })));
}

#[test]
fn a_whole_file_is_whole_or_as_it_was() {
    let root = TempDir::new().expect("folder");
    let path = root.path().join("file");
    write_atomically(&path, b"first").expect("write");
    write_atomically(&path, b"second").expect("overwrite");
    assert_eq!(fs::read(&path).expect("read"), b"second");
    assert_eq!(fs::read_dir(root.path()).expect("folder").count(), 1);

    #[cfg(target_os = "linux")]
    {
        // A disk that is full: what is written goes to a device that never has room.
        std::os::unix::fs::symlink("/dev/full", root.path().join("file.part")).expect("link");
        let error = write_atomically(&path, b"third").expect_err("full");
        assert!(error.to_string().ends_with("the file from before is still there"), "{error}");
        assert_eq!(fs::read(&path).expect("read"), b"second");
        assert_eq!(fs::read_dir(root.path()).expect("folder").count(), 1, "nothing is left beside it");
    }
    let missing = root.path().join("missing/file");
    let error = write_atomically(&missing, b"x").expect_err("no folder");
    assert!(error.to_string().ends_with("nothing of it is left behind"), "{error}");
}

#[test]
fn a_loss_that_is_no_number_reads_back() {
    let root = TempDir::new().expect("folder");
    let folder = root.path().join("run");
    let mut writer = RunWriter::create(&folder, info()).expect("create");
    writer
        .append_metric(&Metric::Validation(ValidationMetrics { step: 0, loss: f64::NAN, tokens: 1 }))
        .expect("append");
    let read = RunReader::open(&folder).expect("open").metrics().expect("metrics").next_metric().expect("line");
    assert!(matches!(read, Some(Metric::Validation(v)) if v.loss.is_nan()));
}

#[test]
fn the_table_summarises_measurements() {
    let table = table();
    let [none, ideal] = table.rows.as_slice() else { panic!("two rows, in the order of appearance") };
    assert_eq!((none.policy.as_str(), ideal.policy.as_str()), ("none", "ideal"));
    assert_eq!(none.imbalance_before, Imbalance { mean: 2.0, worst: 5.0 });
    assert_eq!(none.imbalance_after, Imbalance { mean: 2.0, worst: 1.5 });
    assert_eq!((none.step_ns, ideal.step_ns, none.peak_tokens_per_rank), (3_000_000, 1_500_000, 102));
    assert_eq!((none.parts.experts_ns, none.parts.weight_sync_ns), (3_000_000, 9));
    assert_eq!(none.parts.critical_ns(), 3_000_000, "weight sync itself is not on the critical path");
    assert_eq!((none.share_of_ideal, ideal.share_of_ideal), (Some(0.5), Some(1.0)));
    assert_eq!(ideal.throughput_tokens_per_s, 1_000.0 / 0.0015);
    assert_eq!((none.wall_ns, ideal.wall_ns), (None, Some(3_000_000)));
    let huge = PolicyMeasurement { tokens: u64::MAX, ..measurement("x", 0, u64::MAX) };
    PolicyTable::of_measurements(String::new(), Vec::new(), &[huge.clone(), huge]); // from a hostile file: no overflow
    assert!(PolicyTable::of_measurements(String::new(), Vec::new(), &[]).rows.is_empty());

    let expected = "\
# 2 ranks

| policy | imbalance before | worst | imbalance after | worst | replicas a layer | crossed ranks | step ms | of ideal | tokens/s | peak tokens | wall ms |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|
| none | 2.000 | 5.000 | 2.000 | 1.500 | 4.0 | 25.0% | 3.00 | 50.0% | 333333 | 102 | - |
| ideal | 2.000 | 5.000 | 2.000 | 1.500 | 4.0 | 25.0% | 1.50 | 100.0% | 666667 | 102 | 3.00 |

## Parts of the step, ms

| policy | dense | router | plan | reroute | weight sync | exposed sync | all-to-all | experts | grad reduce | all-reduce | optimizer |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|
| none | 0.00 | 0.00 | 0.00 | 0.00 | 0.00 | 0.00 | 0.00 | 3.00 | 0.00 | 0.00 | 0.00 |
| ideal | 0.00 | 0.00 | 0.00 | 0.00 | 0.00 | 0.00 | 0.00 | 1.50 | 0.00 | 0.00 | 0.00 |

The step is the sum of its parts without weight sync, of which only the exposed part counts.

parallel time
";
    assert_eq!(table.to_markdown(), expected);
}
