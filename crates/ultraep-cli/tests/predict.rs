//! Predictions are of what the product does, bounds are bounds, and a least quota that is in the way is named.

use std::fs;
use std::path::Path;

use assert_cmd::Command;
use predicates::prelude::*;
use serde_json::Value;

fn ultraep(folder: &Path, arguments: &str) -> Command {
    let mut command = Command::cargo_bin("ultraep").expect("built");
    command.current_dir(folder).args(arguments.split(' '));
    command
}

fn json(folder: &Path, arguments: &str) -> Value {
    let output = ultraep(folder, arguments).arg("--json").assert().success().get_output().stdout.clone();
    serde_json::from_slice(&output).expect("JSON")
}

/// A folder with a load in it: a row for each source.
fn load(name: &str, rows: &[Vec<u32>]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let line = |row: &Vec<u32>| row.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    fs::write(folder.path().join(name), rows.iter().map(line).collect::<Vec<_>>().join("\n") + "\n").expect("written");
    folder
}

/// All tokens of 64 ranks go to one of 128 experts: home alone would send 63 copies of 36 MiB, 2.6 ms.
fn one_hot(tokens: u32) -> tempfile::TempDir {
    load("worst.csv", &vec![(0..128).map(|e| if e == 51 { tokens } else { 0 }).collect(); 64])
}

fn line<'a>(lines: &'a Value, policy: &str) -> &'a Value {
    lines.as_array().expect("lines").iter().find(|line| line["policy"] == policy).expect(policy)
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("a number: {value}"))
}

#[test]
fn predicted_speedups_count_planned_transfers() {
    let folder = one_hot(128);
    let arguments = "replay worst.csv --slots 2 --min-quota 1 --policies none,ultraep";
    let replay = json(folder.path(), arguments);
    let ours = line(&replay["scenarios"], "ultraep");
    assert!(number(&ours["predicted_speedup"]) > 1.0, "{ours}");
    // One microbatch: what the replay predicts is what its one plan predicts, in all three commands.
    let only = json(folder.path(), &format!("{arguments} --only 0/0/0"));
    let plan = line(&only["plans"], "ultraep");
    let (sync, direct) = (number(&plan["weight_sync_ns"]), number(&plan["direct_weight_sync_ns"]));
    assert!(sync * 10.0 < direct, "{plan}");
    assert!(number(&plan["predicted_ns"]) < direct, "{plan}");
    let compared = json(folder.path(), "compare worst.csv --slots 2 --min-quota 1 --policies none,ultraep");
    for other in [&ours["predicted_ns_mean"], &line(&compared["policies"], "ultraep")["predicted_ns_mean"]] {
        assert!((number(other) - number(&plan["predicted_ns"])).abs() <= 1.0, "{other} {plan}");
    }
    // Planning is ours, not v1's published 72 us, and masters only need none.
    let none = number(&line(&only["plans"], "none")["predicted_ns"]);
    let without = json(folder.path(), "compare worst.csv --slots 2 --min-quota 1 --policies none,ultraep --plan-ps 0");
    let planning =
        number(&ours["predicted_ns_mean"]) - number(&line(&without["policies"], "ultraep")["predicted_ns_mean"]);
    assert!((5_000.0..60_000.0).contains(&planning), "{planning} ns");
    assert!((number(&line(&without["policies"], "none")["predicted_ns_mean"]) - none).abs() <= 1.0);
}

#[test]
fn a_small_load_is_balanced_and_a_least_quota_in_the_way_is_named() {
    for (name, rows) in
        [("toy.csv", [vec![90, 10, 10, 10], vec![0; 4]]), ("packing.csv", [vec![9, 1, 1, 1], vec![0; 4]])]
    {
        let folder = load(name, &rows);
        let plan = json(folder.path(), &format!("plan {name} --slots 1"));
        assert_eq!(plan["imbalance_after"], 1.0, "{plan}");
        assert_eq!((&plan["least_quota"], &plan["min_quota"]), (&Value::from("auto"), &Value::from(1)));
        // At the published value nothing can be moved, and it says why.
        let arguments = format!("plan {name} --slots 1 --min-quota 1024");
        let said = predicate::str::contains("would reach an imbalance of 1.0000 (replicas: 1)");
        let bound = predicate::str::contains("lower bound at this quota");
        ultraep(folder.path(), &arguments).assert().success().stdout(said.and(bound));
        let compare = format!("compare {name} --slots 1 --min-quota 1024");
        ultraep(folder.path(), &compare).assert().success().stdout(predicate::str::contains("hint: --min-quota"));
        let replay = format!("replay {name} --slots 1 --min-quota 1024");
        ultraep(folder.path(), &replay)
            .assert()
            .success()
            .stdout(predicate::str::contains("note: with --min-quota 1, 1 of 1 plans of ultraep"));
    }
}

/// The published settings are those of full loads.
#[test]
fn the_default_is_the_published_least_quota_at_full_loads() {
    let folder = load("full.csv", &vec![vec![4096; 8]; 8]);
    let plan = json(folder.path(), "plan full.csv --slots 1");
    assert_eq!(plan["min_quota"], 1024);
    let words = "least quota of a replica: 1024 tokens (auto: 1/32 of the mean load of a rank, at most 1024)";
    ultraep(folder.path(), "plan full.csv --slots 1").assert().success().stdout(predicate::str::contains(words));
    ultraep(folder.path(), "plan full.csv --slots 1 --min-quota some")
        .assert()
        .code(2)
        .stderr(predicate::str::contains("allowed are auto and 1 to"));
}

/// Of replicas there are some, but fewer than it takes.
#[test]
fn a_hint_comes_also_where_some_replicas_exist() {
    let rows: Vec<Vec<u32>> = (0..4).map(|_| (0..8).map(|e| [700, 20, 20, 20, 150, 20, 20, 20][e]).collect()).collect();
    let folder = load("some.csv", &rows);
    let arguments = "plan some.csv --slots 1 --min-quota 800";
    let plan = json(folder.path(), arguments);
    assert!(number(&plan["replicas"]) > 0.0 && number(&plan["imbalance_after"]) > 1.01, "{plan}");
    assert!(plan["hint"].as_str().is_some_and(|hint| hint.starts_with("--min-quota ")), "{plan}");
}

#[test]
fn no_slots_are_no_reason_to_lower_a_least_quota_of_one() {
    let rows: Vec<Vec<u32>> = (0..8).map(|r| (0..16).map(|e| if e < 2 { 400 } else { 10 + r }).collect()).collect();
    let folder = load("loads.csv", &rows);
    ultraep(folder.path(), "replay loads.csv --slots 0,2 --policies none,ultraep --min-quota 1")
        .assert()
        .success()
        .stdout(predicate::str::contains("--min-quota 1").not());
}

#[test]
fn slots_of_every_rank_take_the_place_of_slots() {
    let folder = load("loads.csv", &vec![vec![50, 1, 1, 1]; 4]);
    let plan = json(folder.path(), "plan loads.csv --rank-slots 1,2,1,1");
    assert_eq!(plan["slots_per_rank"], serde_json::json!([1, 2, 1, 1]));
    ultraep(folder.path(), "plan loads.csv").assert().code(2).stderr(predicate::str::contains("--slots"));
}

#[test]
fn ideal_is_below_every_policy_also_where_experts_do_not_divide() {
    let rows: Vec<Vec<u32>> = (0..8).map(|r| (0..30).map(|e| (r * 131 + e * 77) % 500).collect()).collect();
    let folder = load("uneven.csv", &rows);
    for more in ["", " --rank-speeds 1024,1024,512,1024,1024,1024,900,1024"] {
        let compared = json(folder.path(), &format!("compare uneven.csv --slots 2 --min-quota 1{more}"));
        let imbalance = |line: &Value| number(&line["imbalance_mean"]);
        let ideal = imbalance(line(&compared["policies"], "ideal"));
        assert!(ideal < 1.001, "{ideal}");
        for line in compared["policies"].as_array().expect("lines") {
            assert!(imbalance(line) >= ideal, "{line}");
        }
        // By speed: what the planner minimises.
        assert!(imbalance(line(&compared["policies"], "ultraep")) <= 1.0101, "{more}");
    }
}

#[test]
fn a_replay_is_drawn() {
    let rows: Vec<Vec<u32>> = (0..8).map(|r| (0..16).map(|e| if e < 2 { 400 } else { 10 + r }).collect()).collect();
    let folder = load("loads.csv", &rows);
    ultraep(folder.path(), "replay loads.csv --slots 1,2 --policies none,ultraep --svg plot.svg").assert().success();
    let svg = fs::read_to_string(folder.path().join("plot.svg")).expect("written");
    for words in
        ["microbatch, in the order", "imbalance (largest", "EP8, slots 1", "EP8, slots 2", "none", "ultraep", "layer"]
    {
        assert!(svg.contains(words), "{words}");
    }
}
