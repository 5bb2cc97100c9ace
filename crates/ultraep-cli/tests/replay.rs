//! `ultraep replay` and `ultraep trace` as a user meets them, on recordings written here and, where they are, on real ones.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use assert_cmd::assert::OutputAssertExt;
use assert_cmd::cargo::CommandCargoExt;
use predicates::prelude::*;
use predicates::str::{contains, is_empty};
use serde_json::Value;
use tempfile::TempDir;

fn ultraep(args: &[&str]) -> Command {
    let mut command = Command::cargo_bin("ultraep").unwrap();
    command.args(args);
    command
}

fn json(args: &[&str]) -> Value {
    let output = ultraep(args).assert().success().get_output().stdout.clone();
    serde_json::from_slice(&output).unwrap()
}

/// A folder of moe-beyond files: two layers, 16 experts, top-2, hot experts that move from window to window.
fn recording() -> TempDir {
    let folder = TempDir::new().unwrap();
    for file in 0..2 {
        let mut text = "Layer ID,Batch Number,Token,Activated Expert IDs\n".to_owned();
        for layer in [1, 5] {
            for token in 0..256_u32 {
                let hot = (token / 128 * 5 + file * 3 + layer) % 16;
                let other = (token * 7 + 3 * layer + 1) % 16;
                let first = if token % 3 == 0 { hot } else { (token * 5 + layer) % 16 };
                let second = if other == first { (other + 1) % 16 } else { other };
                text += &format!("{layer},0,\"t,{token}\",\"[{first}, {second}]\"\n");
            }
        }
        fs::write(folder.path().join(format!("p{file}.csv")), text).unwrap();
    }
    folder
}

fn imbalance(replay: &Value, ranks: u64, slots: u64, policy: &str) -> f64 {
    let lines = replay["scenarios"].as_array().unwrap();
    let is_it =
        |l: &&Value| l["ranks"] == ranks && l["policy"] == policy && (l["slots_per_rank"] == slots || slots == 0);
    lines.iter().find(is_it).unwrap()["imbalance_mean"].as_f64().unwrap()
}

#[test]
fn a_recording_is_replayed_over_sizes_slots_and_policies() {
    let folder = recording();
    let path = folder.path().to_str().unwrap();
    let args = ["replay", path, "--ranks", "4,8", "--slots", "1,2", "--min-quota", "1", "--microbatch-tokens", "128"];
    let replay = json(&[&args[..], &["--json"]].concat());
    assert_eq!(replay["schema"], "ultraep.replay/1");
    // none, llep and ideal once, five policies with one and two slots; 4 windows of 2 layers.
    let lines = replay["scenarios"].as_array().unwrap();
    assert_eq!(lines.len(), 2 * (3 + 5 * 2));
    assert!(lines.iter().all(|line| line["plans"] == 8));
    for ranks in [4, 8] {
        let of = |policy| imbalance(&replay, ranks, 0, policy);
        assert!(of("none") > of("llep").min(of("greedy")), "{replay}");
        assert!(of("ultraep") <= of("greedy") && of("ultraep") < 1.05, "{replay}");
        assert_eq!(of("ideal"), 1.0);
    }
    ultraep(&args).assert().success().stdout(contains("what if").and(contains("synthetic")).and(contains("plans/s")));
}

#[test]
fn what_comes_out_does_not_depend_on_threads() {
    let folder = recording();
    let path = folder.path().to_str().unwrap();
    let with = |threads: &str| {
        let args =
            ["replay", path, "--ranks", "8", "--min-quota", "1", "--microbatch-tokens", "64", "--json", "--threads"];
        let mut replay = json(&[&args[..], &[threads]].concat());
        for line in replay["scenarios"].as_array_mut().unwrap() {
            let line = line.as_object_mut().unwrap();
            line.retain(|key, _| !key.starts_with("solve_ns"));
            // Sums of floats depend on their order in the last digits.
            for key in ["imbalance_mean", "predicted_ns_mean", "predicted_speedup"] {
                line[key] = Value::from(format!("{:.9}", line[key].as_f64().unwrap()));
            }
        }
        replay["scenarios"].clone()
    };
    assert_eq!(with("1"), with("2"));
}

#[test]
fn converting_to_our_format_changes_nothing() {
    let folder = recording();
    let path = folder.path().to_str().unwrap();
    let out = TempDir::new().unwrap();
    let trace = out.path().join("loads.uet");
    let trace = trace.to_str().unwrap();
    let grouping = ["--ranks", "8", "--microbatch-tokens", "64"];
    ultraep(&[&["trace", "convert", path, "-o", trace][..], &grouping].concat())
        .assert()
        .success()
        .stdout(contains("16 records"));
    let direct = json(&[&["replay", path, "--min-quota", "1", "--json"][..], &grouping].concat());
    let through = json(&["replay", trace, "--min-quota", "1", "--json"]);
    for policy in ["none", "eplb", "llep", "ultraep"] {
        assert!((imbalance(&direct, 8, 0, policy) - imbalance(&through, 8, 0, policy)).abs() < 1e-12, "{policy}");
    }
    // Through UltraEP v1's layout the totals survive, the sources do not.
    let v1 = out.path().join("epg0");
    ultraep(&["trace", "convert", trace, "--to", "v1", "-o", v1.to_str().unwrap()])
        .assert()
        .success()
        .stdout(contains("16 records in 1 chunk"));
    let through = json(&["replay", v1.with_extension("manifest.json").to_str().unwrap(), "--min-quota", "1", "--json"]);
    assert!((imbalance(&direct, 8, 0, "none") - imbalance(&through, 8, 0, "none")).abs() < 1e-12);
    // What exists is never overwritten.
    ultraep(&[&["trace", "convert", path, "-o", trace][..], &grouping].concat()).assert().code(2).stdout(is_empty());
    let info = json(&["trace", "info", trace, "--json"]);
    assert_eq!((&info["source_ranks"], &info["experts"]), (&Value::from(8), &Value::from(16)));
    ultraep(&["trace", "head", trace, "-n", "1"]).assert().success().stdout(contains("from 8 sources"));
}

#[test]
fn bad_input_is_one_line_that_says_what_is_allowed() {
    let folder = recording();
    let path = folder.path().to_str().unwrap();
    let strange = folder.path().join("strange.csv");
    let one_line = contains("\n").count(1);
    let refused = |args: &[&str], words: &str| {
        ultraep(args).assert().code(2).stdout(is_empty()).stderr(contains(words).and(one_line.clone()));
    };
    refused(&["replay", path, "--ranks", "64"], "16 experts on 64 ranks: allowed are");
    refused(&["replay", path, "--hardware", "abacus"], "gb200-nvl72");
    refused(&["replay", path, "--experts", "4"], "allowed are 0 to 3");
    fs::write(&strange, "Layer ID,Batch Number,Token,Activated Expert IDs\n1,0,x,\"[5000]\"\n").unwrap();
    refused(&["replay", strange.to_str().unwrap()], "line 2: expert 5000: allowed are 0 to 4095");
    fs::write(&strange, "no,such,format\n").unwrap();
    refused(&["trace", "info", strange.to_str().unwrap()], "no known recording");
}

fn real(name: &str) -> Option<String> {
    let folder = std::env::var_os("ULTRAEP_TRACES").map(PathBuf::from).filter(|f| f.is_dir());
    if folder.is_none() {
        println!("SKIP {name}: set ULTRAEP_TRACES to the folder of real recordings");
    }
    folder.map(|f| f.join(name).to_str().unwrap().to_owned())
}

/// Published behaviour on real load: planning from history lags exact planning, and ours is the best.
#[test]
fn real_load_puts_the_policies_in_their_published_order() {
    // Short recordings, each token standing for many: LLEP spills no piece under 1024 tokens.
    let settings: [(&str, &[&str]); 3] = [
        ("deepseek-v2-lite", &["--ranks", "32", "--microbatch-tokens", "128", "--scale", "64"]),
        ("qwen1.5-moe", &["--ranks", "16,32", "--microbatch-tokens", "512", "--scale", "16", "--drop-dummy-run"]),
        ("olmoe", &["--ranks", "16,32"]),
    ];
    for (name, arguments) in settings {
        let Some(path) = real(name) else { return };
        let replay = json(&[&["replay", &path, "--slots", "1", "--min-quota", "64", "--json"][..], arguments].concat());
        let of = |policy| imbalance(&replay, 32, 0, policy);
        assert!(of("none") > of("eplb"), "{name}");
        assert!(of("eplb") > of("llep"), "{name}");
        assert!(of("llep") > of("ultraep"), "{name}");
        assert!(of("ultraep") <= 1.02, "{name}: {}", of("ultraep"));
    }
}
