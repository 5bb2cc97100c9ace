//! One reader for all commands, as a user meets it: standard input, pipes, choices of layer and array, files that are cut,
//! and results that are there whole or not at all.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use assert_cmd::assert::OutputAssertExt;
use assert_cmd::cargo::CommandCargoExt;
use predicates::str::{contains, is_empty};
use serde_json::Value;
use tempfile::TempDir;

fn ultraep(args: &[&str]) -> Command {
    let mut command = Command::cargo_bin("ultraep").unwrap();
    command.args(args);
    command
}

fn json(command: &mut Command) -> Value {
    let output = command.assert().success().get_output().stdout.clone();
    serde_json::from_slice(&output).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A load of 4 ranks and 8 experts; expert 0 is hot.
fn matrix() -> Vec<Vec<u32>> {
    (0..4).map(|r| (0..8).map(|e| if e == 0 { 9000 } else { 500 + 37 * r * e }).collect()).collect()
}

fn csv() -> String {
    matrix().iter().map(|row| row.iter().map(u32::to_string).collect::<Vec<_>>().join(",") + "\n").collect()
}

/// A log of one layer, 16 experts, top-2.
fn log(tokens: usize) -> String {
    let row = |t: usize| {
        let ids = [t * 5 % 16, (t * 5 + 1 + (t * 3 + t / 16) % 15) % 16];
        format!("{{\"type\": \"route\", \"layer\": 0, \"token_idx\": {t}, \"topk_ids\": {ids:?}}}\n")
    };
    "{\"type\": \"meta\", \"model_id\": \"m\", \"num_experts\": 16}\n".to_owned()
        + &(0..tokens).map(row).collect::<String>()
}

#[test]
fn every_command_reads_every_form_also_from_standard_input() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("loads.csv");
    fs::write(&path, csv()).unwrap();
    let plan = ["plan", "-", "--slots", "1", "--min-quota", "1", "--json"];
    let from_file = json(ultraep(&plan).args(["--policy", "ultraep"]).stdin(fs::File::open(&path).unwrap()));
    let expected = json(&mut ultraep(&["plan", text(&path), "--slots", "1", "--min-quota", "1", "--json"]));
    assert_eq!(from_file["digest"], expected["digest"]);
    let layers = serde_json::json!([matrix(), matrix()]).to_string();
    let bare = folder.path().join("layers.json");
    fs::write(&bare, &layers).unwrap();
    let plan = ["plan", text(&bare), "--slots", "1", "--min-quota", "1", "--json"];
    ultraep(&plan).assert().code(2).stdout(is_empty()).stderr(contains("2 layers (0, 1): choose one with --layer"));
    assert_eq!(json(ultraep(&plan).args(["--layer", "1"]))["digest"], expected["digest"]);
    // --rank-slots stands for --slots.
    ultraep(&["plan", text(&path), "--rank-slots", "1,1,1,1"]).assert().success();
    // From a pipe that a writer fills while it is read; several readings of it are needed.
    for args in [
        &["replay", "-", "--ranks", "4", "--json"][..],
        &["trace", "info", "-", "--json"],
        &["compare", "-", "--ranks", "4", "--slots", "1", "--json"],
    ] {
        let mut child = ultraep(args).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut input = child.stdin.take().unwrap();
        std::io::Write::write_all(&mut input, log(9000).as_bytes()).unwrap();
        drop(input);
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{args:?}");
        assert!(serde_json::from_slice::<Value>(&output.stdout).unwrap()["schema"].is_string());
    }
    let bad = ultraep(&["trace", "info", "-"]).stdin(Stdio::null()).output().unwrap();
    bad.assert().code(2).stderr(contains("standard input: an empty file"));
}

#[test]
fn cut_files_are_told_in_every_conversion() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::write(at("log.jsonl"), &log(3000)[..100_000]).unwrap();
    let convert = |from: &str, to: &str, extra: &[&str]| {
        ultraep(&[&["trace", "convert", text(&at(from)), "-o", text(&at(to))][..], extra].concat()).assert()
    };
    let grouping = ["--ranks", "4", "--microbatch-tokens", "16"];
    convert("log.jsonl", "whole.uet", &grouping).success().stderr(contains("is torn and left out"));
    let whole = fs::read(at("whole.uet")).unwrap();
    fs::write(at("torn.uet"), &whole[..whole.len() - 60]).unwrap();
    for (to, extra) in [("a.uet", &[][..]), ("a.parquet", &["--to", "parquet"]), ("v1", &["--to", "v1"])] {
        convert("torn.uet", to, extra).success().stderr(contains("note: the trace was not closed"));
    }
    let parquet = fs::read(at("a.parquet")).unwrap();
    fs::write(at("cut.parquet"), &parquet[..parquet.len() / 2]).unwrap();
    ultraep(&["trace", "info", text(&at("cut.parquet"))]).assert().code(2).stderr(contains("cut off"));
}

#[test]
fn what_fails_leaves_nothing_and_blocks_nothing() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    let bad = log(3000) + "{\"type\": \"route\", \"layer\": 0, \"topk_ids\": [1, 99]}\n";
    fs::write(at("bad.jsonl"), bad).unwrap();
    fs::write(at("good.jsonl"), log(3000)).unwrap();
    let convert = |from: &str| {
        let (from, to) = (at(from), at("out.uet"));
        ultraep(&["trace", "convert", text(&from), "-o", text(&to), "--ranks", "4"]).assert()
    };
    convert("bad.jsonl").code(2).stderr(contains("line 3002: expert 99"));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    convert("good.jsonl").success();
    convert("good.jsonl").code(2).stderr(contains("exists"));
    let nowhere = at("no/such/folder.uet");
    ultraep(&["trace", "convert", text(&at("good.jsonl")), "-o", text(&nowhere), "--ranks", "4"]).assert().code(2);
    // A report of what cannot be read.
    let report = at("report.html");
    ultraep(&["report", text(&at("bad.jsonl")), "-o", text(&report)]).assert().code(2);
    assert!(!report.exists());
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3);
}

#[test]
fn what_content_cannot_tell_is_decided_by_options() {
    let folder = TempDir::new().unwrap();
    let ids = folder.path().join("ids.json");
    let rows: Vec<[usize; 2]> = (0..20).map(|t| [t * 5 % 16, (t * 5 + 3) % 16]).collect();
    fs::write(&ids, serde_json::json!(rows).to_string()).unwrap();
    let info = ["trace", "info", text(&ids), "--json"];
    ultraep(&info).assert().code(2).stdout(is_empty()).stderr(contains("--as ids or --as counts"));
    assert_eq!(json(ultraep(&info).args(["--as", "ids"]))["sources"], "tokens");
    assert_eq!(json(ultraep(&info).args(["--as", "counts"]))["source_ranks"], 20);
    ultraep(&info).args(["--as", "colours"]).assert().code(2).stderr(contains("allowed are counts, ids and map"));
    let json_of = |extra: &[&str]| json(ultraep(&info).args(["--as", "ids"]).args(extra));
    assert_eq!(json_of(&["--experts", "64"])["experts"], 64);
    let few = ultraep(&info).args(["--as", "ids", "--experts", "4"]).output().unwrap();
    few.assert().code(2).stderr(contains("allowed are 0 to 3"));
}
