//! Placements for engines, judged and advised on, as a user meets them.

use std::path::Path;

use assert_cmd::Command;
use predicates::prelude::*;
use serde_json::Value;

fn ultraep(folder: &Path, args: &str) -> Command {
    let mut command = Command::cargo_bin("ultraep").unwrap();
    command.current_dir(folder).env_remove("COLUMNS").args(args.split_whitespace());
    command
}

fn json(folder: &Path, args: &str) -> Value {
    let output = ultraep(folder, args).assert().success().get_output().stdout.clone();
    serde_json::from_slice(&output).unwrap_or_else(|error| panic!("{args}: {error}"))
}

/// A folder with a recording of 3 steps, 4 layers, 4 ranks and 8 experts: a few hot ones, others in each layer.
fn recorded() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut state = 7_u64;
    let mut next = |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) % below
    };
    let mut count = |layer: usize, expert: usize| {
        let hot = if expert == layer { 9000 } else { 300 };
        hot + next(200)
    };
    let steps: Vec<Vec<Vec<Vec<u64>>>> = (0..3)
        .map(|_| (0..4).map(|l| (0..4).map(|_| (0..8).map(|e| count(l, e)).collect()).collect()).collect())
        .collect();
    std::fs::write(folder.path().join("loads.json"), serde_json::to_string(&steps).unwrap()).unwrap();
    let one: Vec<String> =
        steps[0][1].iter().map(|row| row.iter().map(u64::to_string).collect::<Vec<_>>().join(",")).collect();
    std::fs::write(folder.path().join("one.csv"), one.join("\n") + "\n").unwrap();
    std::fs::write(folder.path().join("model.toml"), MODEL).unwrap();
    folder
}

const MODEL: &str = r#"
name = "made up"
layers = 4
dense_layers = 0
hidden = 2048
dense_width = 0
expert_width = 1408
experts = 8
shared_experts = 0
top_k = 2
vocabulary = 1000
sources = ["made up"]

[attention]
heads = 8
kv_heads = 8
head_width = 64
"#;

#[test]
fn one_placement_for_a_recording_is_written_for_every_engine_and_checked() {
    let folder = recorded();
    for engine in ["sglang", "vllm", "vllm-ascend", "trtllm"] {
        let replay = format!("replay loads.json --slots 1 --policies ultraep --out {engine}.map --for {engine}");
        let words = predicate::str::contains(format!("4 layers, 4 ranks of 3 slots, for {engine}"));
        ultraep(folder.path(), &replay).assert().success().stderr(words);
        ultraep(folder.path(), &replay).assert().code(2).stderr(predicate::str::contains("it exists already"));
        let check = json(folder.path(), &format!("check {engine}.map --load loads.json --json"));
        assert_eq!((&check["format"], &check["valid"]), (&Value::from(engine), &Value::from(true)));
        assert_eq!((&check["twice"], &check["empty_slots"]), (&Value::from(0), &Value::from(0)));
        let mean = |of: &str| check[of]["imbalance_mean"].as_f64().unwrap();
        assert!((mean("now") - mean("static_ours")).abs() < 1e-9, "{engine}: it is our static placement");
        assert!(mean("exact_ours") <= mean("now") + 1e-9, "{engine}");
        assert_eq!(check["layers"].as_array().unwrap().len(), 4);
    }
    let sglang: Value = serde_json::from_slice(&std::fs::read(folder.path().join("sglang.map")).unwrap()).unwrap();
    assert_eq!(sglang.as_object().unwrap().keys().collect::<Vec<_>>(), ["physical_to_logical_map"]);
    let left = std::fs::read_dir(folder.path())
        .unwrap()
        .filter(|e| e.as_ref().unwrap().file_name().to_str().unwrap().starts_with(".tmp"));
    assert_eq!(left.count(), 0, "no temporary file stays");
}

#[test]
fn plan_writes_one_layer_and_json_stays_alone_on_standard_output() {
    let folder = recorded();
    let plan = json(folder.path(), "plan one.csv --slots 1 --json --out one.map --for vllm");
    assert_eq!(plan["schema"], "ultraep.plan/1");
    let rows: Vec<Vec<usize>> = serde_json::from_slice(&std::fs::read(folder.path().join("one.map")).unwrap()).unwrap();
    assert_eq!((rows.len(), rows[0].len()), (1, 12));
    assert!((0..8).all(|expert| rows[0].contains(&expert)));
}

#[test]
fn a_placement_is_for_one_group() {
    let folder = recorded();
    let wrong = |args: &str, words: &str| {
        ultraep(folder.path(), args).assert().code(2).stderr(predicate::str::contains(words.to_owned()));
    };
    wrong("replay loads.json --out x --for vllm", "--out: a placement is for one group");
    wrong("replay loads.json --slots 1 --out x", "--for");
    wrong("replay loads.json --slots 1 --out x --for tgi", "no placement format \"tgi\": allowed are sglang");
    assert!(!folder.path().join("x").exists());
}

#[test]
fn an_invalid_map_is_a_failure_that_names_the_expert() {
    let folder = recorded();
    std::fs::write(folder.path().join("bad.json"), "[[0,1,2,3,4,5,6,6]]").unwrap();
    let assert = ultraep(folder.path(), "check bad.json --load one.csv --json").assert().code(1);
    let words = "bad.json: invalid: 1 expert without a rank, the first is expert 7 of row 0";
    let output = assert.stderr(predicate::str::contains(words)).get_output().stdout.clone();
    let check: Value = serde_json::from_slice(&output).unwrap();
    assert_eq!((&check["valid"], &check["missing"][0][1]), (&Value::from(false), &Value::from(7)));
    std::fs::write(folder.path().join("masters.json"), "[[0,1,2,3,4,5,6,7]]").unwrap();
    let check = json(folder.path(), "check masters.json --load one.csv --json");
    let none = json(folder.path(), "plan one.csv --slots 0 --policy none --json");
    let now = check["now"]["imbalance_mean"].as_f64().unwrap();
    assert!((now - none["imbalance_after"].as_f64().unwrap()).abs() < 1e-9, "masters alone share nothing");
    ultraep(folder.path(), "check masters.json --load loads.json").assert().code(2);
}

/// Every number of the page can be had again: the commands on it are run and give the same.
#[test]
fn advice_is_reproduced_by_the_commands_that_it_prints() {
    let folder = recorded();
    let advise = "advise loads.json --model model.toml --hardware h100x8 --slots 1,2 --domain 2,4 --within 90%";
    let advice = json(folder.path(), &format!("{advise} --json"));
    let page =
        String::from_utf8(ultraep(folder.path(), advise).assert().success().get_output().stdout.clone()).unwrap();
    let commands: Vec<&str> =
        advice["commands"].as_array().unwrap().iter().map(|c| c["command"].as_str().unwrap()).collect();
    assert_eq!(commands.len(), 3);
    for (command, paragraph) in commands.iter().zip(advice["paragraphs"].as_array().unwrap()) {
        assert!(page.contains(command), "{page}");
        let first = paragraph.as_str().unwrap().split_whitespace().next().unwrap();
        assert!(page.contains(first), "{page}");
    }
    let run = |at: usize| json(folder.path(), &format!("{} --json", commands[at].strip_prefix("ultraep ").unwrap()));

    let replay = run(0);
    let lines = replay["scenarios"].as_array().unwrap();
    let find = |offer: &Value| {
        let same = |line: &&Value| {
            let slots = line["slots_per_rank"] == offer["slots_per_rank"] || offer["slots_per_rank"] == 0;
            line["policy"] == offer["policy"] && line["domain"] == offer["domain"] && slots
        };
        lines.iter().find(same).unwrap_or_else(|| panic!("{offer}"))
    };
    let offers = advice["offers"].as_array().unwrap();
    assert_eq!(offers.len(), 4);
    for offer in offers.iter().chain([&advice["none"], &advice["history"], &advice["ideal"]]) {
        let line = find(offer);
        for (key, of_line) in [
            ("imbalance_mean", "imbalance_mean"),
            ("imbalance_worst", "imbalance_worst"),
            ("replicas_mean", "replicas_mean"),
            ("predicted_ns_mean", "predicted_ns_mean"),
            ("slot_bytes_per_rank", "slot_bytes_per_rank"),
            ("share_of_ideal", "share_of_ideal"),
            ("speedup", "predicted_speedup"),
        ] {
            assert_eq!(offer[key], line[of_line], "{key} of {offer}");
        }
    }
    let chosen = &offers[advice["chosen"].as_u64().unwrap() as usize];
    assert!(chosen["speedup"].as_f64().unwrap() > 1.0, "{chosen}");

    // Layers: the table is sorted; its numbers are in the JSON.
    let layers = run(1);
    let of = |policy: &str, layer: &Value| {
        let line = layers["scenarios"].as_array().unwrap().iter().find(|line| line["policy"] == policy).unwrap();
        line["layers"].as_array().unwrap().iter().find(|l| &l["layer"] == layer).unwrap()["imbalance_mean"].clone()
    };
    for layer in advice["layers"].as_array().unwrap() {
        assert_eq!(of("none", &layer["layer"]), layer["none"]);
        assert_eq!(of("ultraep", &layer["layer"]), layer["balanced"]);
    }

    let only = run(2);
    let ours = only["plans"].as_array().unwrap().iter().find(|plan| plan["policy"] == "ultraep").unwrap();
    assert_eq!(ours["pays_from"], advice["typical"]["pays_from"]);
}

#[test]
fn advice_needs_the_right_model() {
    let folder = recorded();
    let args = "advise loads.json --model qwen3-235b-a22b --hardware h100x8";
    ultraep(folder.path(), args).assert().code(2).stderr(predicate::str::contains("it is of another model"));
    let args = "advise loads.json --model model.toml --hardware h100x8 --within 300%";
    ultraep(folder.path(), args).assert().code(2).stderr(predicate::str::contains("allowed are 1% to 100%"));
}

#[test]
fn layers_are_filtered_and_sorted() {
    let folder = recorded();
    let all = "replay loads.json --slots 1 --policies none,ultraep --format csv --layers";
    let rows = |args: &str| {
        let output = ultraep(folder.path(), args).assert().success().get_output().stdout.clone();
        let mut csv = csv::Reader::from_reader(&output[..]);
        csv.records().map(|row| row.unwrap().iter().map(|c| c.parse().unwrap()).collect()).collect::<Vec<Vec<f64>>>()
    };
    let by_layer = rows(&format!("{all} all"));
    assert_eq!(by_layer.iter().map(|row| row[0] as u32).collect::<Vec<_>>(), [0, 1, 2, 3]);
    let by_none = rows(&format!("{all} all --sort none"));
    assert!(by_none.windows(2).all(|pair| pair[0][1] >= pair[1][1]), "{by_none:?}");
    assert_eq!(rows(&format!("{all} 3,1")).iter().map(|row| row[0] as u32).collect::<Vec<_>>(), [1, 3]);
    ultraep(folder.path(), &format!("{all} 9")).assert().code(2).stderr(predicate::str::contains("none of them"));
    ultraep(folder.path(), &format!("{all} all --sort eplb"))
        .assert()
        .code(2)
        .stderr(predicate::str::contains("not replayed"));
}

#[test]
fn shells_and_man_get_what_they_need() {
    let folder = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish"] {
        let words = predicate::str::contains("ultraep").and(predicate::str::contains("advise"));
        ultraep(folder.path(), &format!("completions {shell}")).assert().success().stdout(words);
    }
    ultraep(folder.path(), "man pages").assert().success();
    for page in ["ultraep.1", "ultraep-replay.1", "ultraep-check.1", "ultraep-trace-info.1"] {
        let text = std::fs::read_to_string(folder.path().join("pages").join(page)).unwrap();
        assert!(text.contains(".SH NAME"), "{page}");
    }
}

#[test]
fn names_close_to_a_known_one_are_offered() {
    let folder = recorded();
    for (args, name) in [
        ("plan one.csv --slots 1 --policy ultrep", "\"ultraep\""),
        ("replay loads.json --hardware h100x9", "\"h100x8\""),
        ("advise loads.json --model qwen3-235b-a22 --hardware h100x8", "\"qwen3-235b-a22b\""),
        ("plan ones.csv --slots 1", "\"one.csv\""),
        ("pln one.csv", "'plan'"),
        ("plan one.csv --slot 1", "'--slots'"),
    ] {
        let one_line = predicate::function(|text: &str| text.lines().count() == 1);
        ultraep(folder.path(), args).assert().code(2).stderr(predicate::str::contains(name).and(one_line));
    }
}
