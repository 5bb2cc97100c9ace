//! `ultraep sim` as a user meets it.

use std::fs;

use assert_cmd::Command;
use predicates::prelude::*;
use serde_json::Value;

fn sim(arguments: &[&str]) -> Command {
    let mut command = Command::cargo_bin("ultraep").expect("built");
    command.arg("sim").args(arguments);
    command
}

const SMALL: &str = r#"
title = "small"
experiment = "training"
machine = "paper-rack"
systems = ["none", "ultraep", "ideal"]
metrics = ["tflops", "of-ideal", "imbalance"]

[[case]]
name = "a case"
model = "qwen3-235b-a22b"
ranks = 16
microbatches = 2
layers_sampled = 1
load = { none = 1.8 }
paper = [{ system = "none", metric = "imbalance", value = 1.8, calibrated = true }]
"#;

/// A plan file in a folder of its own.
fn plan(text: &str) -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("plan.toml");
    fs::write(&path, text).expect("written");
    let path = path.to_str().expect("UTF-8").to_owned();
    (folder, path)
}

fn json(arguments: &[&str]) -> Value {
    let output = sim(arguments).arg("--json").assert().success().get_output().stdout.clone();
    serde_json::from_slice(&output).expect("JSON")
}

#[test]
fn a_table_has_paper_simulated_and_difference() {
    let (_folder, path) = plan(SMALL);
    sim(&[&path])
        .assert()
        .success()
        .stdout(predicate::str::contains("calibrated").and(predicate::str::contains("difference")));
}

#[test]
fn results_do_not_depend_on_threads_and_a_small_run_is_kept() {
    let (_folder, path) = plan(SMALL);
    let (one, two) = (json(&[&path, "--threads", "1"]), json(&[&path, "--threads", "2"]));
    assert_eq!(one, two);
    let case = &one["cases"][0];
    let row = |system: &str, metric: &str| {
        let rows = case["rows"].as_array().expect("rows");
        let found = rows.iter().find(|row| row["system"] == system && row["metric"] == metric);
        found.expect("a row")["simulated"].as_f64().expect("a number")
    };
    assert!((row("none", "imbalance") - 1.8).abs() < 0.02);
    assert!(row("none", "tflops") < row("ultraep", "tflops") && row("ultraep", "tflops") < row("ideal", "tflops"));
    assert!(row("ultraep", "imbalance") < 1.02);
    let digests: Vec<&str> =
        case["systems"].as_array().expect("systems").iter().filter_map(|s| s["digest"].as_str()).collect();
    let kept = ["803c3b47bb0704d4", "8bfafd1fda8e1427", "df9b973eb5edf1e8"];
    assert_eq!(digests, kept, "the simulation changed");
}

#[test]
fn plots_and_a_timeline_are_written() {
    let (folder, path) = plan(SMALL);
    let (plots, trace) = (folder.path().join("plots"), folder.path().join("trace.json"));
    sim(&[&path, "--svg", plots.to_str().expect("UTF-8"), "--trace", trace.to_str().expect("UTF-8")])
        .assert()
        .success()
        .stderr(predicate::str::contains("wrote"));
    let svg = fs::read_to_string(plots.join("plan-of-ideal.svg")).expect("a plot");
    assert!(svg.starts_with("<svg") && svg.contains("simulated"), "a plot with its legend");
    let events: Vec<Value> = serde_json::from_slice(&fs::read(trace).expect("a timeline")).expect("JSON");
    for (name, pid) in [("experts", 16), ("dispatch", 1), ("forward 0", 0), ("backward 1", 0)] {
        let found = |event: &Value| event["name"] == name && event["pid"] == pid && event["ph"] == "X";
        assert!(events.iter().any(found), "{name} of process {pid}");
    }
}

#[test]
fn a_sweep_runs_every_combination_that_exists() {
    let text = SMALL.replace("\"training\"", "\"sweep\"").replace("load = { none = 1.8 }", "load = { skew = 500 }");
    let (_folder, path) = plan(&format!("{text}\n[sweep]\nranks = [8, 16]\ndomain = [8, 16]\nslots = [0, 2]\n"));
    let record = json(&[&path]);
    assert_eq!(record["points"].as_array().expect("points").len(), 6, "a domain of 16 does not divide 8 ranks");
    assert_eq!(record["left_out"], 2);
    sim(&[&path]).assert().success().stdout(predicate::str::contains("slots"));
}

#[test]
fn prefill_serves_all_requests() {
    let text = SMALL
        .replace("\"training\"", "\"prefill\"")
        .replace("metrics = [\"tflops\", \"of-ideal\", \"imbalance\"]\n", "");
    let (_folder, path) = plan(&format!("{text}\n[prefill]\nrates = [200]\nrequests = 60\nleast_tokens = 2048\n"));
    let record = json(&[&path, "--threads", "2"]);
    let value = |case: usize, system: &str, metric: &str| {
        let rows = record["cases"][case]["rows"].as_array().expect("rows");
        let found = rows.iter().find(|row| row["system"] == system && row["metric"] == metric).expect("a row");
        found["simulated"].as_f64().expect("a number")
    };
    assert!(value(0, "none", "of-ideal") < value(0, "ultraep", "of-ideal"), "saturated");
    assert!(value(1, "none", "ttft-ms") > value(1, "ideal", "ttft-ms"), "at a rate");
}

#[test]
fn a_recording_takes_the_place_of_a_generated_load() {
    let (folder, _) = plan(SMALL);
    // One layer, 16 ranks, 128 experts: rank r's tokens go to experts r and up.
    let counts: Vec<String> = (0..16)
        .map(|rank| (0..128).map(|e| if (e + rank) % 8 == 0 { "4000" } else { "100" }).collect::<Vec<_>>().join(","))
        .collect();
    let recorded = folder.path().join("load.csv");
    fs::write(&recorded, counts.join("\n") + "\n").expect("written");
    let path = folder.path().join("recorded.toml");
    let load = format!("load = {{ recording = {:?} }}", recorded.to_str().expect("UTF-8"));
    fs::write(&path, SMALL.replace("load = { none = 1.8 }", &load)).expect("written");
    let record = json(&[path.to_str().expect("UTF-8")]);
    let rows = record["cases"][0]["rows"].as_array().expect("rows");
    let none = rows.iter().find(|r| r["system"] == "none" && r["metric"] == "imbalance").expect("a row");
    assert!((none["simulated"].as_f64().expect("a number") - 1.0).abs() < 0.6, "{none}");
    let served = SMALL.replace("load = { none = 1.8 }", &load).replace("\"training\"", "\"prefill\"");
    fs::write(&path, format!("{served}\n[prefill]\nrates = []\nrequests = 40\n")).expect("written");
    let record = json(&[path.to_str().expect("UTF-8")]);
    let rows = record["cases"][0]["rows"].as_array().expect("rows");
    let none = rows.iter().find(|r| r["system"] == "none" && r["metric"] == "imbalance").expect("a row");
    assert!((none["simulated"].as_f64().expect("a number") - 1.0).abs() < 0.6, "{none}");
    fs::write(&path, SMALL.replace("load = { none = 1.8 }", "load = { recording = \"nowhere\" }")).expect("written");
    sim(&[path.to_str().expect("UTF-8")]).assert().code(2).stderr(predicate::str::contains("nowhere"));
}

#[test]
fn what_a_rank_has_no_memory_for_is_marked() {
    let text = SMALL.replace("ranks = 16", "ranks = 8").replace("load = { none = 1.8 }", "load = { skew = 500 }");
    let (_folder, path) = plan(&text);
    let words = "does not fit: ";
    sim(&[&path]).assert().success().stdout(predicate::str::contains(words).and(predicate::str::contains("186.0 GB")));
    let text = text.replace("\"training\"", "\"sweep\"");
    let (_folder, path) = plan(&format!("{text}\n[sweep]\nranks = [8, 64]\n"));
    let record = json(&[&path]);
    let fits = |point: usize| record["points"][point]["does_not_fit"].as_array().expect("a list").is_empty();
    assert!(!fits(0) && fits(1), "235 billion parameters on 8 ranks: {record}");
    sim(&[&path]).assert().success().stdout(predicate::str::contains("In brackets"));
}

#[test]
fn the_slowest_machine_that_is_allowed_is_simulated() {
    let paper = include_str!("../../../sims/paper-rack.toml");
    let mut machine = String::new();
    for line in paper.lines() {
        match line.split_once(" = ") {
            Some((name, _)) if name.ends_with("_per_s") => machine += &format!("{name} = 1\n"),
            _ => machine += &format!("{line}\n"),
        }
    }
    let (folder, path) = plan(&SMALL.replace("paper-rack", "MACHINE"));
    let slow = folder.path().join("slow.toml");
    fs::write(&slow, machine).expect("written");
    fs::write(&path, SMALL.replace("paper-rack", slow.to_str().expect("UTF-8"))).expect("written");
    for fidelity in ["closed-form", "events"] {
        sim(&[&path, "--fidelity", fidelity]).assert().success();
    }
}

#[test]
fn bad_plans_name_the_line_the_field_and_what_is_allowed() {
    for (from, to, words) in [
        ("ranks = 16", "ranks = 0", "line 11: `ranks = 0`: 0: allowed are 1 to 1024"),
        ("ranks = 16", "rank = 16", "line 11: `rank = 16`: unknown field `rank`"),
        ("none = 1.8 }", "none = 99 }", "imbalance 99: allowed are 1.0 (even) to 64.0"),
        ("none = 1.8 }", "none = 30.0 }", "no load process has a mean imbalance of 30000 thousandths"),
        ("\"training\"", "\"trainin\"", "unknown variant `trainin`, expected one of `training`"),
        ("\"ultraep\", \"ideal\"", "\"ultra\"", "no system \"ultra\": allowed are eplb, eplb-plus, ideal"),
        ("\"qwen3-235b-a22b\"", "\"qwen\"", "allowed are a file or qwen3-235b-a22b"),
        ("ranks = 16", "ranks = 16\ndomain = 3", "domains of 3 ranks do not divide 16 ranks"),
        ("ranks = 16", "ranks = 16\nstages = 95", "95 pipeline parts for 94 layers"),
        ("\"training\"", "\"sweep\"", "no [sweep]"),
        ("\"training\"", "\"balancing\"", "no [grid]"),
        ("[[case]]", "[[cases]]", "unknown field `cases`"),
    ] {
        assert!(SMALL.contains(from), "{from}");
        let (_folder, path) = plan(&SMALL.replacen(from, to, 1));
        sim(&[&path])
            .assert()
            .code(2)
            .stdout("")
            .stderr(predicate::str::contains(words).and(predicate::str::contains("\n").count(1)));
    }
    sim(&["no-such-plan"]).assert().code(2).stderr(predicate::str::contains("allowed are a file or calibrate"));
    sim(&[]).assert().code(2).stderr(predicate::str::contains("no plan"));
}

/// One layer of 16 sources and 128 experts, `scale` times as many tokens of the same routing.
fn recorded(folder: &std::path::Path, name: &str, scale: u32) -> String {
    let row =
        |rank: u32| (0..128).map(|e| (scale * (4 + (e * 7 + rank * 3) % 61 / 10)).to_string()).collect::<Vec<_>>();
    let rows: Vec<String> = (0..16).map(|rank| row(rank).join(",")).collect();
    let path = folder.join(name);
    fs::write(&path, rows.join("\n") + "\n").expect("written");
    format!("load = {{ recording = {:?} }}", path.to_str().expect("UTF-8"))
}

#[test]
fn a_recording_is_simulated_at_the_size_of_the_case() {
    let folder = tempfile::tempdir().expect("a folder");
    let figures = |scale: u32| {
        let load = recorded(folder.path(), &format!("{scale}.csv"), scale);
        let (_folder, path) = plan(&SMALL.replace("load = { none = 1.8 }", &load));
        let record = json(&[&path]);
        let rows = record["cases"][0]["rows"].as_array().expect("rows").clone();
        let none = |metric: &str| {
            let row = rows.iter().find(|r| r["system"] == "none" && r["metric"] == metric).expect("a row");
            row["simulated"].as_f64().expect("a number")
        };
        (none("tflops"), none("imbalance"))
    };
    let (small, large) = (figures(1), figures(64));
    assert!((small.0 / large.0 - 1.0).abs() < 0.01, "{small:?} {large:?}");
    assert!((small.1 / large.1 - 1.0).abs() < 0.01, "{small:?} {large:?}");
}

#[test]
fn a_recording_of_another_model_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("log.jsonl");
    let line = |token: u32| {
        let ids: Vec<String> = (0..4).map(|k| ((token * 13 + k * 17) % 60).to_string()).collect();
        format!("{{\"type\": \"route\", \"layer\": 0, \"token_idx\": {token}, \"topk_ids\": [{}]}}\n", ids.join(", "))
    };
    fs::write(&path, (0..400).map(line).collect::<String>()).expect("written");
    let load = |more: &str| format!("tokens = 16\nload = {{ recording = {:?}{more} }}", path.to_str().expect("UTF-8"));
    for (more, words) in [
        ("", "experts up to 59 occur in it, the case has 128: give `experts` as the recorded model has them"),
        (", recorded_experts = 128", "top-4 is recorded, the case has top-8: give `top_k = 4`"),
        (", recorded_experts = 64", "64 experts are recorded, the case has 128"),
    ] {
        let (_folder, plan) = plan(&SMALL.replace("load = { none = 1.8 }", &load(more)));
        let one_line = predicate::str::contains(words).and(predicate::str::contains("\n").count(1));
        sim(&[&plan]).assert().code(2).stdout("").stderr(one_line);
    }
    let (_folder, fits) =
        plan(&SMALL.replace("load = { none = 1.8 }", &format!("experts = 60\ntop_k = 4\n{}", load(""))));
    sim(&[&fits]).assert().success();
}

#[test]
fn a_shipped_plan_is_printed() {
    sim(&["--print", "figure-11"]).assert().success().stdout(include_str!("../../../sims/figure-11.toml"));
    sim(&["figure-15", "--print"]).assert().success().stdout(predicate::str::contains("[grid]"));
    sim(&["--print", "mine.toml"])
        .assert()
        .code(2)
        .stderr(predicate::str::contains("allowed are calibrate, figure-11"));
}

#[test]
fn what_an_experiment_cannot_show_is_refused_before_it_runs() {
    for plan in ["figure-15", "figure-16", "sweep", "figure-12"] {
        let words = "which has no step to show: allowed are plans of training\n";
        sim(&[plan, "--trace", "t.json"]).assert().code(2).stdout("").stderr(predicate::str::contains(words));
    }
    sim(&["sweep", "--svg", "plots"]).assert().code(2).stderr(predicate::str::contains("which has no plots"));
}

#[test]
fn calibration_is_json_where_json_is_asked_for() {
    let text = include_str!("../../../sims/paper-rack.toml");
    let record = json(&["calibrate"]);
    assert_eq!(record["schema"], "ultraep.sim-calibration/1");
    let rate = record["calibrated"]["forward_flops_per_s"].as_u64().expect("a rate");
    assert!(text.replace('_', "").contains(&format!("forwardflopspers = {rate}")), "{rate}");
}

/// Slots cost memory: of the two groups only one has configurations in which all systems fit, and only they are compared.
#[test]
fn columns_of_a_sweep_are_means_over_the_same_configurations() {
    let text = SMALL
        .replace("\"training\"", "\"sweep\"")
        .replace("load = { none = 1.8 }", "load = { none = 1.8, eplb = 1.4 }");
    let (_folder, path) = plan(&format!("{text}\n[sweep]\nranks = [8, 64]\nslots = [1, 4]\n"));
    let record = json(&[&path]);
    let points = record["points"].as_array().expect("points");
    let none = |point: &Value| point["imbalance"]["none"].as_f64().expect("a number");
    assert_eq!(none(&points[0]), none(&points[1]), "one load for all slots: {record}");
    assert_eq!(none(&points[2]), none(&points[3]), "one load for all slots: {record}");
    sim(&[&path]).assert().success().stdout(predicate::str::contains("all fit").and(predicate::str::contains("-")));
}
