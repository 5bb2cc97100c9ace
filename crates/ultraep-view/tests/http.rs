//! The server without a browser: what it refuses, how large its answers are, and what it makes of recordings.

mod common;
#[path = "browser/served.rs"]
mod served;

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};

use common::{LAYERS, Run, record, topology};
use serde_json::Value;
use served::Served;
use tempfile::TempDir;
use ultraep_plan::{Topology, TopologySpec};
use ultraep_replay::LeastQuota;
use ultraep_trace::{Record, TraceMeta, TraceWriter};
use ultraep_view::{ANSWER_BYTES_MAX, Settings, report};

/// Status, head and body of a request as written.
fn raw(served: &Served, request: &str) -> (u16, String, String) {
    let host = served.address.trim_start_matches("http://").trim_end_matches('/');
    let mut stream = TcpStream::connect(host).unwrap();
    stream.write_all(request.replace("HOST", host).as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, head.to_owned(), body.to_owned())
}

fn get(served: &Served, path: &str) -> (u16, String) {
    let (status, _, body) = raw(served, &format!("GET {path} HTTP/1.1\r\nHost: HOST\r\nConnection: close\r\n\r\n"));
    (status, body)
}

/// An answer that must be one.
fn json(served: &Served, path: &str) -> Value {
    let (status, body) = get(served, path);
    assert_eq!(status, 200, "{path}: {body}");
    assert!(body.len() <= ANSWER_BYTES_MAX, "{path}: {} bytes", body.len());
    serde_json::from_str(&body).unwrap()
}

/// The overview once everything is read.
fn overview(served: &Served) -> Value {
    loop {
        let overview = json(served, "/api/recordings/0/overview");
        assert!(overview["about"]["error"].is_null(), "{overview}");
        if overview["about"]["is_read"] == true && overview["about"]["is_live"] == false {
            return overview;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

fn closed_trace(path: &Path) {
    trace_of(path, |_| {});
}

/// A trace whose records are changed before they are written.
fn trace_of(path: &Path, change: impl Fn(&mut Record)) {
    let topology = topology();
    let meta = TraceMeta::of_topology(&topology, LAYERS);
    let mut writer = TraceWriter::new(BufWriter::new(File::create(path).unwrap()), meta).unwrap();
    for step in 0..6 {
        for layer in 0..LAYERS as u32 {
            let mut record = record(&topology, step, layer);
            change(&mut record);
            writer.append(&record).unwrap();
        }
    }
    writer.finish().unwrap();
}

#[test]
fn what_is_not_for_this_page_is_refused() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("loads.uet");
    closed_trace(&path);
    let served = Served::start(&[path]);
    let of = |request: &str| raw(&served, request).0;
    assert_eq!(of("GET / HTTP/1.1\r\nHost: HOST\r\nConnection: close\r\n\r\n"), 200);
    assert_eq!(of("GET / HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n"), 421);
    assert_eq!(of("GET /api/recordings HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n"), 421);
    assert_eq!(of("GET / HTTP/1.1\r\nHost: HOST\r\nHost: evil.example\r\nConnection: close\r\n\r\n"), 421);
    assert_eq!(of("POST / HTTP/1.1\r\nHost: HOST\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"), 405);
    for path in ["/assets/../Cargo.toml", "/../../etc/passwd", "/assets/%2e%2e/x", "/assets/..%2fx", "/assets/%2E%2E"] {
        assert_eq!(get(&served, path).0, 400, "{path}");
    }
    for path in ["/etc/passwd", "/assets/none.js", "/api/recordings/1/overview", "/api/recordings/0/layers/9"] {
        assert_eq!(get(&served, path).0, 404, "{path}");
    }
    let (_, head, _) = raw(&served, "GET / HTTP/1.1\r\nHost: HOST\r\nConnection: close\r\n\r\n");
    let head = head.to_ascii_lowercase();
    for header in ["content-security-policy: default-src 'none'; script-src 'self'", "x-content-type-options: nosniff"]
    {
        assert!(head.contains(header), "{head}");
    }
}

#[test]
fn a_microbatch_is_shown_as_recorded_and_planned_again() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("loads.uet");
    closed_trace(&path);
    let served = Served::start(&[path]);
    let about = overview(&served);
    assert_eq!((about["microbatches"].as_u64(), about["about"]["planned"].as_u64()), (Some(24), Some(0)));
    assert_eq!(about["about"]["policy"], "ultraep");
    let place = "/api/recordings/0/microbatch?step=3&microbatch=0&layer=2";
    let recorded = json(&served, place);
    assert_eq!(recorded["is_recorded"], true);
    assert_eq!((&recorded["previous"], &recorded["next"]), (&serde_json::json!([2, 0]), &serde_json::json!([4, 0])));
    assert_eq!((&recorded["layer_below"], &recorded["layer_above"]), (&serde_json::json!(1), &serde_json::json!(3)));
    let total = recorded["total_tokens"].as_u64().unwrap();
    let sum = |list: &Value| list.as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).sum::<u64>();
    assert_eq!(sum(&recorded["plan"]["rank_after"]), total);
    assert_eq!(sum(&recorded["plan"]["flow"]["tokens"]), total);
    let of_ranks = recorded["plan"]["instances"].as_array().unwrap();
    let of_rank = |flat: &Value| flat.as_array().unwrap().chunks(4).map(|i| i[2].as_u64().unwrap()).sum::<u64>();
    assert_eq!(of_ranks.iter().map(of_rank).sum::<u64>(), total);

    // The same settings give the same plan; others give others.
    let same = json(&served, &format!("{place}&policy=ultraep&min_quota=64"));
    assert_eq!((&same["plan"]["digest"], same["is_recorded"].as_bool()), (&recorded["plan"]["digest"], Some(false)));
    let none = json(&served, &format!("{place}&policy=none"));
    assert_eq!(none["plan"]["imbalance_after"], recorded["plan"]["imbalance_before"]);
    assert_eq!(none["plan"]["replicas"], 0);
    let halves = json(&served, &format!("{place}&domain=4&min_quota=64"));
    assert!(halves["plan"]["copies"].as_array().unwrap().iter().all(|copy| {
        let rank = |at: usize| copy[at].as_u64().unwrap();
        rank(1) / 4 == rank(2) / 4
    }));
    for policy in ultraep_baselines::PolicyKind::ALL {
        let planned = json(&served, &format!("{place}&policy={policy}&min_quota=64&window=2"));
        assert_eq!(sum(&planned["plan"]["rank_after"]), total, "{policy}");
    }
    let slow = json(&served, &format!("{place}&hardware=h100x8"));
    assert!(
        slow["plan"]["times"]["after"]["experts_ns"].as_u64() > same["plan"]["times"]["after"]["experts_ns"].as_u64()
    );

    let (copy, loads) = (&recorded["plan"]["copies"][0], &recorded["expert_loads"]);
    let split = json(&served, &place.replace("microbatch?", &format!("split?expert={}&", copy[0])));
    assert_eq!(sum(&split["tokens"]), loads[copy[0].as_u64().unwrap() as usize].as_u64().unwrap());
    assert!(split["instances"].as_array().unwrap().iter().any(|i| i[0] == copy[2] && i[1] == copy[3] && i[2] == 1));
    assert_eq!(get(&served, &place.replace("microbatch?", "split?expert=32&")).0, 404);

    let refused =
        ["slots=65", "slots=-1", "domain=3", "beta=0", "beta=x", "policy=best", "min_quota=0", "hardware=/etc/passwd"];
    for query in refused {
        let (status, body) = get(&served, &format!("{place}&{query}"));
        assert_eq!(status, 400, "{query}");
        let error: Value = serde_json::from_str(&body).unwrap();
        assert!(error["error"].as_str().unwrap().contains("allowed") || query == "domain=3", "{error}");
    }
    let (status, body) = get(&served, "/api/recordings/0/microbatch?step=77&microbatch=0&layer=0");
    assert!(status == 404 && body.contains("steps 0 to 5"), "{body}");
}

/// Where tokens went is not made up for the overview; a microbatch's page follows the plan's rule.
#[test]
fn a_plan_without_its_split_is_shown_without_places() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("loads.uet");
    let drop_split = |record: &mut Record| record.after.iter_mut().for_each(|plan| plan.split = None);
    trace_of(&path, drop_split);
    let served = Served::start(&[path]);
    let all = overview(&served);
    assert!(all["remote_share"].is_null() && all["after"]["count"] == 24, "{all}");
    assert!(!all["words"].to_string().contains("another rank"), "{}", all["words"]);
    let shown = json(&served, "/api/recordings/0/microbatch?step=3&microbatch=0&layer=2");
    assert_eq!((shown["is_recorded"].as_bool(), shown["plan"]["remote_share"].is_number()), (Some(true), true));
}

/// A trace of the largest group, and one of many layers and steps: no answer over a megabyte.
#[test]
fn answers_stay_small_whatever_the_trace() {
    let folder = TempDir::new().unwrap();
    let wide = folder.path().join("wide.uet");
    let spec = TopologySpec { ranks: 1024, experts: 4096, domain_ranks: 1024, slots_per_rank: 2 };
    let topology = Topology::new(spec).unwrap();
    let mut writer =
        TraceWriter::new(BufWriter::new(File::create(&wide).unwrap()), TraceMeta::of_topology(&topology, 1)).unwrap();
    let counts = |i: usize| (i % 4096 * 7919 % 13 / 4 + usize::from(i % 4096 < 300) * 6) as u32;
    let before: Vec<u32> = (0..1024 * 4096).map(counts).collect();
    writer.append(&Record { before, ..Record::default() }).unwrap();
    writer.finish().unwrap();
    let served = Served::start(std::slice::from_ref(&wide));
    overview(&served);
    json(&served, "/api/recordings/0/layers/0");
    let shown = json(&served, "/api/recordings/0/microbatch?step=0&microbatch=0&layer=0");
    assert!(shown["plan"]["replicas"].as_u64().unwrap() > 500, "{}", shown["plan"]["replicas"]);
    let html = report(&wide, &Settings::default(), &|_, _| {}).unwrap();
    assert!(html.len() < 2_000_000, "{}", html.len());

    let long = folder.path().join("long.uet");
    let spec = TopologySpec { ranks: 2, experts: 8, domain_ranks: 2, slots_per_rank: 1 };
    let meta = TraceMeta::of_topology(&Topology::new(spec).unwrap(), 300);
    let mut writer = TraceWriter::new(BufWriter::new(File::create(&long).unwrap()), meta).unwrap();
    for step in 0..300_u64 {
        for layer in 0..300 {
            let before = (0..16).map(|i| (step as u32 * 31 + layer * 17 + i * 7) % 50).collect();
            writer.append(&Record { step, layer, before, ..Record::default() }).unwrap();
        }
    }
    writer.finish().unwrap();
    let served = Served::start(&[long]);
    let all = overview(&served);
    assert_eq!(all["microbatches"], 90_000);
    assert!(all["heat"]["layers"].as_array().unwrap().len() <= 128);
    json(&served, "/api/recordings/0/layers/299");
    json(&served, "/api/recordings/0/microbatch?step=299&microbatch=0&layer=299");
}

#[test]
fn recordings_of_others_are_brought_to_a_group() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("prompt.csv");
    let mut text = "Layer ID,Batch Number,Token,Activated Expert IDs\n".to_owned();
    for token in 0..512 {
        text += &format!("3,0,t,\"[{}, {}]\"\n", token % 5, 5 + token % 55);
    }
    std::fs::write(&path, text).unwrap();
    let settings = Settings {
        ranks: Some(16),
        microbatch_tokens: 128,
        min_quota: Some(LeastQuota::Tokens(4)),
        ..Settings::default()
    };
    let served = Served::with(std::slice::from_ref(&path), &settings);
    let about = overview(&served);
    // 60 experts on 16 ranks: uneven masters, said in a note.
    assert_eq!((about["microbatches"].as_u64(), about["about"]["planned"].as_u64()), (Some(4), Some(4)));
    let notes = about["about"]["notes"].to_string();
    assert!(notes.contains("4 or 3 masters") && notes.contains("synthetic"), "{notes}");
    assert!(about["before"]["mean"].as_f64() > about["after"]["mean"].as_f64());
    let shown = json(&served, "/api/recordings/0/microbatch?step=1&microbatch=0&layer=3");
    assert_eq!((shown["is_recorded"].as_bool(), shown["total_tokens"].as_u64()), (Some(false), Some(256)));

    let too_many = Settings { ranks: Some(64), ..settings };
    let error = report(&path, &too_many, &|_, _| {}).unwrap_err().to_string();
    assert!(error.contains("best those that divide them: 1, 2, 3, 4, 5, 6, 10, 12, 15, 20, 30, 60"), "{error}");
}

#[test]
fn a_run_that_is_taken_up_again_is_read_anew() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("run");
    let mut run = Run::begin(&path);
    (0..4).for_each(|step| run.step(step));
    let served = Served::start(std::slice::from_ref(&path));
    // The loads and the metrics are followed on their own.
    let wait_until = |what: &str, holds: &dyn Fn(&Value) -> bool| {
        for _ in 0..1000 {
            let overview = json(&served, "/api/recordings/0/overview");
            assert!(overview["about"]["error"].is_null(), "{overview}");
            if holds(&overview) {
                return overview;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        panic!("never {what}");
    };
    let live = wait_until("4 steps", &|o| o["microbatches"] == 16 && o["run"]["steps_done"] == 4);
    assert_eq!(live["about"]["is_live"], true);
    let Run { writer, trace, .. } = run;
    drop((writer, trace));
    // A crash, and a resumption from an earlier step that comes to its end.
    let writer = ultraep_run::RunWriter::resume(&path, 2).unwrap();
    let (trace, _) = writer.resume_trace(2).unwrap();
    wait_until("the steps before the second", &|o| o["microbatches"] == 8);
    trace.finish().unwrap();
    writer.end(ultraep_run::RunStatus::Finished, ultraep_run::UtcTime::from_unix_s(1_795_000_200)).unwrap();
    wait_until("the end", &|o| o["run"]["state"] == "finished" && o["run"]["steps_done"] == 2);
}

/// Real recordings of released models.
#[test]
fn real_recordings_are_viewed_and_reported() {
    let Some(folder) = std::env::var_os("ULTRAEP_TRACES").map(PathBuf::from).filter(|folder| folder.is_dir()) else {
        println!("SKIP real recordings: set ULTRAEP_TRACES to their folder");
        return;
    };
    let settings = Settings {
        microbatch_tokens: 256,
        min_quota: Some(LeastQuota::Tokens(4)),
        reading: ultraep_import::OpenOptions { drop_dummy_run: true, ..ultraep_import::OpenOptions::default() },
        ..Settings::default()
    };
    for (name, layers, ranks) in
        [("deepseek-v2-lite", 26, 16), ("qwen1.5-moe", 3, 12), ("qwen1.5-moe", 3, 16), ("olmoe", 3, 8)]
    {
        let settings = Settings { ranks: Some(ranks), ..settings.clone() };
        let path = folder.join(name);
        let served = Served::with(std::slice::from_ref(&path), &settings);
        let all = overview(&served);
        assert_eq!(all["layers"].as_array().unwrap().len(), layers, "{name}");
        assert!(all["after"]["mean"].as_f64() < all["before"]["mean"].as_f64(), "{name}");
        let worst = &all["worst"][0];
        let place = format!("step={}&microbatch={}&layer={}", worst["step"], worst["microbatch"], worst["layer"]);
        json(&served, &format!("/api/recordings/0/layers/{}", worst["layer"]));
        json(&served, &format!("/api/recordings/0/microbatch?{place}"));
        assert!(report(&path, &settings, &|_, _| {}).unwrap().len() < 2_000_000, "{name}");
    }
}
