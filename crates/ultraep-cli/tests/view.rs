//! `ultraep view`, `ultraep report`, `replay --only` and `trace convert --to parquet` as a user meets them.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};

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

/// A recording of one layer, 12 experts, top-2, with a hot expert.
fn recording() -> TempDir {
    let folder = TempDir::new().unwrap();
    let mut text = "Layer ID,Batch Number,Token,Activated Expert IDs\n".to_owned();
    for token in 0..512_u32 {
        let first = if token % 2 == 0 { 7 } else { token * 5 % 7 };
        text += &format!("2,0,t,\"[{first}, {}]\"\n", 8 + token % 4);
    }
    fs::write(folder.path().join("prompt.csv"), text).unwrap();
    folder
}

/// One line that says `word`.
fn one_line(word: &'static str) -> impl Predicate<str> {
    contains(word)
        .and(predicates::function::function(|text: &str| text.starts_with("error: ") && text.lines().count() == 1))
}

const ARGS: [&str; 6] = ["--ranks", "4", "--min-quota", "1", "--microbatch-tokens", "128"];

#[test]
fn a_report_is_written_once_and_errors_are_one_line() {
    let folder = recording();
    let (path, output) = (folder.path().join("prompt.csv"), folder.path().join("report.html"));
    let (path, output) = (path.to_str().unwrap(), output.to_str().unwrap());
    let write = |args: &[&str]| ultraep(&[&["report", path, "-o", output], args].concat()).assert();
    write(&["--ranks", "13"]).code(2).stdout(is_empty()).stderr(one_line("1, 2, 3, 4, 6, 12"));
    write(&["--hardware", "none-such"]).code(2).stderr(one_line("gb200-nvl72"));
    write(&ARGS).success().stdout(contains("report.html: ")).stderr(is_empty());
    let html = fs::read_to_string(output).unwrap();
    assert!(html.contains("4 microbatches of 1 layer") && html.contains("Content-Security-Policy"));
    write(&ARGS).code(2).stderr(one_line("exists"));
    ultraep(&["view", "/none/such"]).assert().code(2).stderr(one_line("/none/such: "));
}

#[test]
fn a_page_is_served_until_it_is_interrupted() {
    let folder = recording();
    let path = folder.path().to_str().unwrap();
    let mut child =
        ultraep(&[&["view", path, "--port", "0"], &ARGS[..]].concat()).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let host = line.strip_prefix("http://").and_then(|rest| rest.split('/').next()).unwrap().to_owned();
    let mut stream = TcpStream::connect(&host).unwrap();
    let request = format!("GET /api/recordings HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("moe-beyond CSV"), "{answer}");
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    assert!(child.wait().unwrap().success());
}

#[test]
fn one_microbatch_is_planned_by_every_scenario() {
    let folder = recording();
    let path = folder.path().to_str().unwrap();
    let args = [&["replay", path, "--policies", "none,eplb,ultraep", "--slots", "1"], &ARGS[..]].concat();
    let output = ultraep(&[&args[..], &["--only", "1/0/2", "--json"]].concat()).assert().success();
    let replans: Value = serde_json::from_slice(&output.get_output().stdout).unwrap();
    assert_eq!(replans["schema"], "ultraep.replan/1");
    let plans = replans["plans"].as_array().unwrap();
    let of = |index: usize, key: &str| plans[index][key].as_f64().unwrap();
    assert_eq!(of(0, "imbalance_after"), of(0, "imbalance_before"));
    assert!(of(2, "imbalance_after") < 1.05 && of(0, "imbalance_after") > 1.3, "{replans}");
    // History tells: the load of the microbatch before is much the same.
    assert!(of(1, "imbalance_after") < of(0, "imbalance_after"), "{replans}");
    assert!(of(2, "weight_sync_ns") > 0.0 && of(0, "weight_sync_ns") == 0.0);
    ultraep(&[&args[..], &["--only", "1/0/2"]].concat()).assert().success().stdout(contains("layer 2"));
    ultraep(&[&args[..], &["--only", "9/0/2"]].concat()).assert().code(2).stderr(contains("no such microbatch"));
    ultraep(&[&args[..], &["--only", "9"]].concat()).assert().code(2).stderr(contains("step/microbatch/layer"));
}

#[test]
fn a_trace_goes_to_parquet_and_back() {
    let folder = recording();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (csv, uet, parquet, back) = (at("prompt.csv"), at("a.uet"), at("a.parquet"), at("b.uet"));
    let convert =
        |from: &str, to: &str, args: &[&str]| ultraep(&[&["trace", "convert", from, "-o", to], args].concat()).assert();
    convert(&csv, &uet, &["--ranks", "4", "--microbatch-tokens", "128"]).success();
    convert(&uet, &parquet, &["--to", "parquet"]).success().stdout(contains("4 records"));
    convert(&parquet, &back, &[]).success().stdout(contains("4 records"));
    let heads = [&uet, &parquet, &back]
        .map(|path| ultraep(&["trace", "head", path, "--json"]).assert().success().get_output().stdout.clone());
    assert!(heads[0] == heads[1] && heads[0] == heads[2] && !heads[0].is_empty());
    convert(&uet, &parquet, &["--to", "parquet"]).code(2).stderr(contains("exists"));
    convert(&csv, &at("c.parquet"), &["--to", "parquet"]).code(2).stderr(contains("convert it to .uet first"));
}
