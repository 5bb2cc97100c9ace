//! The commands as a user meets them: results on stdout, one line on stderr for bad input, exit codes.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use assert_cmd::assert::OutputAssertExt;
use assert_cmd::cargo::CommandCargoExt;
use predicates::prelude::*;
use predicates::str::{contains, starts_with};
use serde_json::Value;
use tempfile::TempDir;

const RANKS: usize = 8;
const EXPERTS: usize = 16;

fn ultraep(args: &[&str]) -> Command {
    let mut command = Command::cargo_bin("ultraep").unwrap();
    command.args(args);
    command
}

fn json(args: &[&str]) -> Value {
    let output = ultraep(args).assert().success().get_output().stdout.clone();
    serde_json::from_slice(&output).unwrap()
}

/// Skewed counts: expert 0 is hot, every source a little different.
fn counts() -> Vec<Vec<u32>> {
    let count = |r: usize, e: usize| if e == 0 { 10_000 } else { (1000 + 37 * r * e % 500) as u32 };
    (0..RANKS).map(|r| (0..EXPERTS).map(|e| count(r, e)).collect()).collect()
}

/// A folder with the counts in all formats.
struct Files {
    folder: TempDir,
}

impl Files {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let rows = counts();
        let line = |row: &Vec<u32>| row.iter().map(u32::to_string).collect::<Vec<_>>().join(",") + "\n";
        fs::write(folder.path().join("loads.csv"), rows.iter().map(line).collect::<String>()).unwrap();
        fs::write(folder.path().join("loads.json"), serde_json::json!({ "loads": rows }).to_string()).unwrap();
        let header = format!("{{'descr': '<u4', 'fortran_order': False, 'shape': ({RANKS}, {EXPERTS}), }}\n");
        let mut npy = b"\x93NUMPY\x01\x00".to_vec();
        npy.extend((header.len() as u16).to_le_bytes());
        npy.extend(header.bytes());
        npy.extend(rows.iter().flatten().flat_map(|c| c.to_le_bytes()));
        fs::write(folder.path().join("loads.npy"), npy).unwrap();
        Self { folder }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    fn with(&self, name: &str, contents: &str) -> String {
        let path: PathBuf = self.folder.path().join(name);
        fs::write(&path, contents).unwrap();
        path.to_str().unwrap().to_owned()
    }
}

#[test]
fn plan_json_is_complete_and_consistent() {
    let files = Files::new();
    for policy in
        ["none", "eplb", "eplb-exact", "lplb", "llep", "moonep", "greedy", "ultraep-v1", "ultraep", "ultraep-cost"]
    {
        let args = ["plan", &files.path("loads.csv"), "--slots", "2", "--min-quota", "1", "--policy", policy];
        let plan = json(&[&args[..], &["--split", "--json"]].concat());
        assert_eq!(plan["schema"], "ultraep.plan/1");
        assert_eq!(plan["policy"], policy);
        let numbers = ["ranks", "experts", "masters_per_rank", "slots_per_rank", "domain"].map(|k| plan[k].as_u64());
        assert_eq!(numbers, [8, 16, 2, 2, 8].map(Some));
        let total: u64 = counts().iter().flatten().map(|&c| u64::from(c)).sum();
        assert_eq!(plan["total_tokens"], total);

        // Quotas add up to each expert's load, rank loads to their quotas.
        let mut of_rank = [0; RANKS];
        let mut of_expert: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
        for instance in plan["instances"].as_array().unwrap() {
            let [expert, rank, slot, quota] =
                ["expert", "rank", "slot", "quota"].map(|k| instance[k].as_u64().unwrap());
            assert!((slot < 2) == (expert / 2 == rank), "masters first, then slots");
            of_rank[rank as usize] += quota;
            of_expert.entry(expert).or_default().push(quota);
        }
        assert_eq!(plan["rank_load_after"], serde_json::json!(of_rank));
        let replicas = of_expert.values().map(|quotas| quotas.len() - 1).sum::<usize>();
        assert_eq!(plan["replicas"], replicas);
        let largest = *of_rank.iter().max().unwrap();
        let imbalance = plan["imbalance_after"].as_f64().unwrap();
        assert!((imbalance - largest as f64 * 8.0 / total as f64).abs() < 1e-12);
        assert_eq!(plan["threshold"].as_array().unwrap().len(), 1);
        assert!(plan["lower_bound"][0].as_u64() <= plan["threshold"][0].as_u64());
        assert_eq!(plan["digest"].as_str().unwrap().len(), 16);
        let balances = !matches!(policy, "none" | "eplb" | "lplb");
        assert!(if balances { imbalance < 1.35 } else { imbalance > 3.0 }, "{policy}: {imbalance}");

        // The split has an entry for every expert and source; both its sums are exact (v1 may miss quotas by some).
        let split = plan["split"].as_array().unwrap();
        assert_eq!(split.len(), RANKS * EXPERTS);
        let mut realised: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
        for share in split {
            let [expert, source] = ["expert", "source"].map(|k| share[k].as_u64().unwrap());
            let tokens: Vec<u64> = share["tokens"].as_array().unwrap().iter().map(|t| t.as_u64().unwrap()).collect();
            let expected = u64::from(counts()[source as usize][expert as usize]);
            assert_eq!(tokens.iter().sum::<u64>(), expected, "{policy}: source {source}, expert {expert}");
            let sums = realised.entry(expert).or_insert_with(|| vec![0; tokens.len()]);
            sums.iter_mut().zip(tokens).for_each(|(sum, t)| *sum += t);
        }
        if policy != "ultraep-v1" {
            assert_eq!(realised, of_expert, "{policy}");
        }
    }
}

#[test]
fn formats_give_the_same_plan_and_the_default_policy_is_named() {
    let files = Files::new();
    let plan = |name: &str| json(&["plan", &files.path(name), "--slots", "1", "--domain", "4", "--json"]);
    let (csv, of_json, npy) = (plan("loads.csv"), plan("loads.json"), plan("loads.npy"));
    assert!(csv == of_json && csv == npy);
    assert_eq!(csv["threshold"].as_array().unwrap().len(), 2, "one a domain");
    assert_eq!(csv.get("split"), None);
    ultraep(&["plan", "--help"])
        .assert()
        .success()
        .stdout(contains(format!("[default: {}]", csv["policy"].as_str().unwrap())));
}

#[test]
fn masters_are_listed_where_ranks_differ() {
    let files = Files::new();
    let loads = files.with("uneven.csv", "1,2,3\n4,5,6\n");
    assert_eq!(json(&["plan", &loads, "--slots", "0", "--json"])["masters_per_rank"], serde_json::json!([2, 1]));
}

#[test]
fn ranks_may_differ_in_slots_and_speed() {
    let files = Files::new();
    let args = ["plan", &files.path("loads.csv"), "--slots", "1", "--min-quota", "1", "--json"];
    let plan = |extra: &[&str]| json(&[&args[..], extra].concat());
    assert_eq!(plan(&[]).get("rank_speeds"), None);
    let slots = plan(&["--rank-slots", "0,0,4,4,0,0,0,0"]);
    assert_eq!(slots["slots_per_rank"], serde_json::json!([0, 0, 4, 4, 0, 0, 0, 0]));
    let ranks = slots["instances"].as_array().unwrap().iter().filter(|i| i["slot"].as_u64() >= Some(2));
    assert!(ranks.map(|i| i["rank"].as_u64().unwrap()).all(|rank| rank == 2 || rank == 3));
    let speeds = plan(&["--rank-speeds", "1024,1024,1024,512,1024,1024,1024,0"]);
    assert_eq!(speeds["rank_speeds"][3], 512);
    let load = |rank: usize| speeds["rank_load_after"][rank].as_u64().unwrap();
    assert!(load(3) < load(2) && speeds["rank_load_after"][7] == speeds["rank_load_before"][7]);
}

#[test]
fn plan_prints_a_table_and_bars() {
    let files = Files::new();
    let args = ["plan", &files.path("loads.json"), "--slots", "2", "--min-quota", "1", "--policy", "greedy", "--split"];
    let all =
        contains("imbalance").and(contains("target-reached")).and(contains(" before |█")).and(contains("  after |"));
    ultraep(&args).assert().success().stdout(all.and(contains("split of replicated experts"))).stderr("");
}

/// Fixed costs make small batches not worth balancing: `plan` says from which size on it is, and `ultraep-cost` leaves the
/// smaller ones alone.
#[test]
fn plan_shows_the_break_even_size() {
    let files = Files::new();
    let line = |extra: &[&str]| {
        let args = ["plan", &files.path("loads.csv"), "--slots", "2", "--min-quota", "1"];
        let output = ultraep(&[&args[..], extra].concat()).assert().success().get_output().stdout.clone();
        String::from_utf8(output).unwrap().lines().find(|l| l.contains("balancing pays")).unwrap().to_owned()
    };
    let tokens = |line: &str| {
        let number = line.split("from about ").nth(1).and_then(|rest| rest.split(' ').next());
        number.unwrap_or_else(|| panic!("{line}")).parse::<u64>().unwrap()
    };
    let (cheap, dear) = (tokens(&line(&[])), tokens(&line(&["--replica-ps", "2000000000"])));
    assert!(0 < cheap && cheap < dear, "{cheap}, {dear}");
    assert!(line(&["--policy", "none"]).contains("at no size"));
    let args = ["plan", &files.path("loads.csv"), "--slots", "2", "--min-quota", "1", "--policy", "ultraep-cost"];
    let left = json(&[&args[..], &["--replica-ps", "60000000000", "--json"]].concat());
    assert_eq!((left["replicas"].as_u64(), left["stop_reason"].as_str()), (Some(0), Some("least-cost")));
}

#[test]
fn policies_say_what_their_numbers_stand_for() {
    let files = Files::new();
    let noted = |policy: &str, words: &str| {
        let args = ["plan", &files.path("loads.json"), "--slots", "2", "--policy", policy];
        ultraep(&args).assert().success().stderr(starts_with("note: ").and(contains(words.to_owned())));
    };
    noted("eplb", "eplb plans from earlier microbatches");
    noted("ideal", "ideal changes the routing");
}

#[test]
fn compare_shows_all_policies_side_by_side() {
    let files = Files::new();
    let (csv, npy) = (files.path("loads.csv"), files.path("loads.npy"));
    let args = ["compare", &csv, &npy, "--slots", "2", "--min-quota", "1"];
    let comparison = json(&[&args[..], &["--json"]].concat());
    assert_eq!(comparison["schema"], "ultraep.compare/1");
    assert_eq!(comparison["microbatches"], 2);
    let line = |policy: &str| {
        let found = comparison["policies"].as_array().unwrap().iter().find(|l| l["policy"] == policy);
        found.unwrap_or_else(|| panic!("{policy} is missing")).clone()
    };
    let imbalance = |policy: &str| line(policy)["imbalance_mean"].as_f64().unwrap();
    assert!(imbalance("none") > 3.0 && imbalance("greedy") < 1.02 && imbalance("ideal") < 1.0001);
    let eplb = line("eplb");
    assert!(eplb["historical"] == true && eplb["imbalance_worst"].as_f64() > eplb["imbalance_mean"].as_f64());
    assert!(line("moonep")["max_copies"].as_u64() >= Some(1) && line("llep")["solve_ns_p50"].as_u64() > Some(0));
    let predicted = |policy: &str| line(policy)["predicted_ns_mean"].as_u64().unwrap();
    assert!(predicted("ultraep-cost") <= predicted("ultraep").min(predicted("none")));
    let table = ultraep(&args).assert().success().get_output().stdout.clone();
    let table = String::from_utf8(table).unwrap();
    for line in comparison["policies"].as_array().unwrap() {
        assert!(table.contains(line["policy"].as_str().unwrap()));
    }
    assert!(table.contains("* plans from earlier microbatches"));
    let two = json(&[&args[..], &["--policies", "none,greedy", "--json"]].concat());
    assert_eq!(two["policies"].as_array().unwrap().len(), 2);
}

#[test]
fn generated_loads_are_files_that_plan_reads() {
    let files = Files::new();
    let plan = |name: &str| {
        let path = files.path(name);
        let args = ["load", &path, "--ranks", "8", "--experts", "32", "--ratio", "2.5", "--tokens", "1000"];
        ultraep(&args).assert().success().stdout("").stderr("");
        json(&["plan", &path, "--slots", "2", "--min-quota", "1", "--json"])
    };
    let (csv, of_json, npy) = (plan("made.csv"), plan("made.json"), plan("made.npy"));
    assert!(csv == of_json && csv == npy);
    assert!((csv["imbalance_before"].as_f64().unwrap() - 2.5).abs() <= 0.025);
    assert_eq!(csv["total_tokens"], 8 * 1000 * 8);
    ultraep(&["load", "no such folder/loads.csv"])
        .assert()
        .code(1)
        .stderr(starts_with("error: no such folder/loads.csv: "));
}

#[test]
fn bench_measures_against_a_floor() {
    let small = ["--ranks", "8", "--experts", "32", "--tokens", "256", "--top-k", "4", "--iterations", "3", "--json"];
    let lines = |what: &str| {
        let record = json(&[&["bench", what][..], &small].concat());
        assert_eq!((record["schema"].as_str(), record["bench"].as_str()), (Some("ultraep.bench/1"), Some(what)));
        assert!((record["imbalance_before"].as_f64().unwrap() - 2.0).abs() <= 0.02);
        record["lines"].as_array().unwrap().clone()
    };
    for (what, names) in [
        ("plan", vec!["plan", "plan + own split"]),
        ("split", vec!["own split", "splits of all sources"]),
        ("reroute", vec!["sparse prepare", "sparse forward", "dense forward", "dense backward"]),
    ] {
        let (first, second) = (lines(what), lines(what));
        assert_eq!(first.iter().map(|l| l["name"].as_str().unwrap()).collect::<Vec<_>>(), names);
        for (line, again) in first.iter().zip(second) {
            let [p50, p99, max, floor] =
                ["p50_ns", "p99_ns", "max_ns", "floor_p50_ns"].map(|k| line[k].as_u64().unwrap());
            assert!(0 < p50 && p50 <= p99 && p99 <= max && floor > 0);
            assert_eq!(line["digest"], again["digest"], "{what}: equal runs, equal results");
            let sparse = line["name"] == "sparse forward";
            assert_eq!(line["closer_floor"].as_str(), sparse.then_some("count ids"));
            assert_eq!(line["closer_floor_p50_ns"].as_u64() > Some(0), sparse);
        }
    }
    ultraep(&["bench", "plan", "--iterations", "2"]).assert().success().stdout(contains("floor p50"));
}

/// Direct transfers take longer the larger the imbalance; relays take some of that back, and never add to it.
#[test]
fn bench_weight_sync_predicts_by_a_model() {
    let args = ["bench", "weight-sync", "--model", "--workload", "hot-rank", "--ratio", "2,4,8"];
    let record = json(&[&args[..], &["--json"]].concat());
    assert_eq!((record["schema"].as_str(), record["source"].as_str()), (Some("ultraep.weight-sync/1"), Some("model")));
    let lines = record["lines"].as_array().unwrap();
    let predicted = |line: usize, mode: &str| {
        let of_mode = lines[line]["modes"].as_array().unwrap().iter().find(|m| m["mode"] == mode).unwrap();
        let (ns, bound) = (of_mode["predicted_ns"].as_u64().unwrap(), lines[line]["bound_ns"].as_u64().unwrap());
        assert!(bound <= ns, "{mode}: {ns} below {bound}");
        assert_eq!(of_mode["ratio_to_bound"].as_f64(), Some(ns as f64 / bound as f64));
        assert!(mode == "direct" || ns <= predicted_direct(&lines[line]), "{mode} is slower than direct");
        ns
    };
    for (line, imbalance) in [2.0, 4.0, 8.0].into_iter().enumerate() {
        assert!((lines[line]["imbalance_before"].as_f64().unwrap() / imbalance - 1.0).abs() <= 0.01);
        assert!(predicted(line, "adaptive") <= predicted(line, "v1"));
    }
    assert!(predicted(2, "direct") > 2 * predicted(0, "direct"));
    assert!(predicted(2, "adaptive") < predicted(2, "direct"));
    let one = [&args[..], &["--mode", "adaptive"]].concat();
    ultraep(&one).assert().success().stdout(contains("predicted by a model").and(contains("of bound"))).stderr("");
}

/// Weight sync and grad reduce are measured beside the machine's limit, whatever the format; replicas are checked by the command.
#[test]
fn bench_measures_what_is_moved() {
    let small = ["--ranks", "3", "--ratio", "2", "--expert-bytes", "20000,70000", "--iterations", "1"];
    for format in ["bf16", "fp8-e8m0"] {
        let more =
            ["--weight-format", format, "--tile-bytes", "4096", "--chunk-bytes", "16384", "--workers", "1", "--json"];
        let record = json(&[&["bench", "weight-sync"][..], &small, &more].concat());
        assert_eq!((record["schema"].as_str(), record["source"].as_str()), (Some("ultraep.moved/2"), Some("measured")));
        let lines = record["lines"].as_array().unwrap();
        assert_eq!(lines.len(), 2);
        for line in lines {
            let (bytes, replicas) = (line["expert_bytes"].as_u64().unwrap(), line["replicas"].as_u64().unwrap());
            assert!(replicas > 0, "{line}");
            for of_mode in line["modes"].as_array().unwrap() {
                assert_eq!(of_mode["written_bytes"].as_u64(), Some(bytes * replicas), "every replica once: {of_mode}");
                let positive = ["p50_ns", "predicted_ns", "limit_ns"].map(|name| of_mode[name].as_u64() > Some(0));
                assert_eq!(positive, [true; 3], "{of_mode}");
                assert!(of_mode["of_limit_low"].as_f64() <= of_mode["of_limit_high"].as_f64(), "{of_mode}");
            }
        }
    }
    let record = json(&[&["bench", "grad-reduce"][..], &small, &["--json"]].concat());
    let line = &record["lines"][0];
    assert_eq!(line["modes"][0]["read_bytes"], line["modes"][0]["written_bytes"]);
    ultraep(&[&["bench", "grad-reduce"][..], &small].concat()).assert().success().stdout(contains("of limit"));
}

fn predicted_direct(line: &serde_json::Value) -> u64 {
    line["modes"].as_array().unwrap().iter().find(|m| m["mode"] == "direct").unwrap()["predicted_ns"].as_u64().unwrap()
}

/// Bad input: exit code 2, nothing on stdout, one line on stderr that says what, where and what is allowed.
#[test]
fn bad_input_is_one_clear_line() {
    let files = Files::new();
    let loads = files.path("loads.csv");
    let file = |name: &str, contents: &str| files.with(name, contents);
    let plan = |path: &str| vec!["plan".to_owned(), path.to_owned(), "--slots".to_owned(), "1".to_owned()];
    let more = |extra: &[&str]| [plan(&loads), extra.iter().map(|s| (*s).to_owned()).collect()].concat();
    let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let other = file("other.csv", "1,2\n3,4\n");
    let cases = [
        (vec![], "subcommand"),
        (words("plot"), "unrecognized subcommand 'plot'"),
        (words("plan"), "required arguments were not provided: "),
        (vec!["plan".into(), loads.clone()], "--slots <R>"),
        (more(&["--slot", "2"]), "unexpected argument '--slot'"),
        (more(&["--policy", "best"]), "no policy \"best\": allowed are none, eplb, "),
        (more(&["--beta", "one"]), "invalid value 'one' for '--beta <RATIO>'"),
        (more(&["--beta", "0"]), "invalid value '0' for '--beta <RATIO>'"),
        (more(&["--beta", "NaN"]), "invalid value 'NaN' for '--beta <RATIO>'"),
        (
            more(&["--min-quota", "0"]),
            "invalid value '0' for '--min-quota <TOKENS>': allowed are auto and 1 to 2147483647",
        ),
        (more(&["--min-quota", "-1"]), "'-1'"),
        (more(&["--domain", "3"]), "domains of 3 ranks do not divide 8 ranks evenly"),
        (more(&["--domain", "0"]), "invalid value '0' for '--domain <G>': allowed are 1 to 1024"),
        (words(&format!("plan {loads} --slots 65")), "invalid value '65' for '--slots <R>': allowed are 0 to 64"),
        (words(&format!("plan {loads} --slots -1")), "'-1'"),
        (words(&format!("plan {loads} --slots two")), "invalid value 'two' for '--slots <R>'"),
        (plan(&files.path("absent.csv")), "absent.csv: No such file"),
        (plan(files.folder.path().to_str().unwrap()), "of another format than"),
        (plan(&file("empty.csv", "")), "empty.csv: an empty file"),
        (plan(&file("empty.json", "")), "empty.json: an empty file"),
        (plan(&file("empty.npy", "")), "empty.npy: an empty file"),
        (plan(&file("cut.json", "{\"loads\": [[1,2],[3")), "cut.json: line 1: not JSON: EOF"),
        (plan(&file("ragged.csv", "1,2\n3\n")), "ragged.csv: line 2: row 1 (from 0) has 1 columns: allowed are 2"),
        (
            plan(&file("negative.csv", "1,-2\n3,4\n")),
            "negative.csv: line 1: row 0, column 1 (from 0): \"-2\" is no count",
        ),
        (plan(&file("float.json", "{\"loads\": [[1.5]]}")), "float.json: [0, 0] (from 0): 1.5 is no count"),
        (plan(&file("nan.csv", "nan\n")), "nan.csv: line 1: row 0, column 0 (from 0): \"nan\" is no count"),
        (
            plan(&file("huge.csv", "4294967296\n")),
            "is no count of tokens: allowed are whole numbers from 0 to 2147483647",
        ),
        (plan(&file("sum.csv", "2147483647,1\n")), "2147483648 tokens in one microbatch, allowed are up to 2147483647"),
        (plan(&file("few.csv", "1\n2\n")), "say which with --as ids or --as counts"),
        (more(&["--rank-slots", "1,2"]), "slots: 2 values for 8 ranks"),
        (more(&["--rank-slots", "1,x"]), "invalid value 'x' for '--rank-slots"),
        (more(&["--rank-speeds", "1,1,1,1,1,1,1,2000"]), "speed weight 2000: allowed are 0 (no replica here) to 1024"),
        (more(&["--rank-speeds", "0,0,0,0,0,0,0,0"]), "every rank of domain 0 has speed weight 0"),
        (words("compare --slots 1"), "<LOADS>..."),
        (
            words(&format!("compare {loads} {other} --slots 1")),
            "other.csv: 2 ranks and 2 experts: allowed are 8 and 16",
        ),
        (words(&format!("compare {loads} --slots 1 --window 0")), "'--window <MICROBATCHES>': allowed are 1 to 1000"),
        (more(&["--link-bytes-per-s", "0"]), "allowed are 1 to 1152921504606846976"),
        (more(&["--row-ps", "fast"]), "invalid value 'fast' for '--row-ps <PS>'"),
        (words("bench"), "subcommand"),
        (words("load"), "<OUT>"),
        (words("load loads.txt"), "loads.txt: unknown extension: allowed are .json, .csv, .npy"),
        (words("load loads.csv --top-k 0"), "invalid value '0' for '--top-k <K>': allowed are 1 to 4096"),
        (words("bench plan --ranks 0"), "invalid value '0' for '--ranks <N>': allowed are 1 to 1024"),
        (
            words("bench plan --ranks 2000 --experts 2000"),
            "invalid value '2000' for '--ranks <N>': allowed are 1 to 1024",
        ),
        (words("bench plan --experts 5000"), "invalid value '5000' for '--experts <E>': allowed are 1 to 4096"),
        (words("bench plan --ratio 0.5"), "invalid value '0.5' for '--ratio <RATIO>': an imbalance is at least 1"),
        (words("bench plan --ratio 64"), "ratio 64: this workload reaches"),
        (words("bench plan --top-k 300"), "top-300: allowed are 1 to 256"),
        (words("bench plan --tokens 4294967295"), "'--tokens <TOKENS>': allowed are 1 to 2147483647"),
        (words("bench plan --tokens 2147483647"), "tokens in all: allowed are up to 2147483647"),
        (words("bench plan --workload worst"), "no workload \"worst\": allowed are balanced, "),
        (words("bench split --iterations 0"), "allowed are 1 to 10000000"),
        (words("bench weight-sync --ratio 2,99"), "ratio 99: this workload reaches"),
        (
            words("bench weight-sync --weight-format fp4"),
            "no format is called `fp4`: allowed are bf16, f16, f32, fp8-f32",
        ),
        (words("bench weight-sync --model --expert-bytes 1000,2000"), "--expert-bytes: --model takes one size"),
        (words("bench weight-sync --model --chunk-bytes 0"), "in chunks of 0: allowed are 1 to 4096 chunks"),
        (words("bench weight-sync --model --chunk-bytes 64"), "in chunks of 64: allowed are 1 to 4096 chunks"),
        (words("bench weight-sync --model --hop-ns 5000000000"), "hop of 5000000000 ns: allowed are 0 to 4294967295"),
        (words("bench weight-sync --model --max-stripes 5"), "5 is not in 1..=4"),
        (words("bench weight-sync --model --mode rely"), "invalid value 'rely' for '--mode <MODE,...>'"),
        (words("bench weight-sync --model --ratio 2,x"), "invalid value 'x' for '--ratio <RATIO,...>'"),
    ];
    for (args, expected) in cases {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let one_line = predicate::function(|text: &str| text.lines().count() == 1 && text.ends_with('\n'));
        let line = starts_with("error: ").and(contains(expected)).and(one_line);
        ultraep(&args).assert().code(2).stdout("").stderr(line);
    }
}

#[test]
fn help_has_examples_and_version_is_printed() {
    for command in [
        &["plan"][..],
        &["compare"],
        &["load"],
        &["bench", "plan"],
        &["bench", "split"],
        &["bench", "reroute"],
        &["bench", "weight-sync"],
        &["bench", "grad-reduce"],
    ] {
        let args = [command, &["--help"]].concat();
        ultraep(&args).assert().success().stdout(contains("Examples:\n  ultraep ")).stderr("");
    }
    ultraep(&["--version"]).assert().success().stdout(starts_with("ultraep "));
    ultraep(&["--help"]).assert().success().stdout(contains("Exit codes: 0 success, 1 failure, 2 usage"));
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let files = Files::new();
    let wide = format!("{}1\n", "1,".repeat(4095)).repeat(32);
    let loads = files.with("wide.csv", &wide);
    for args in [vec!["plan", &loads, "--slots", "1", "--split", "--json"], vec!["plan", "--help"]] {
        let mut child = ultraep(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        child.wait_with_output().unwrap().assert().success().stderr("");
    }
}

#[test]
fn a_full_disk_is_a_failure() {
    let Ok(full) = fs::OpenOptions::new().write(true).open("/dev/full") else {
        println!("SKIP: this system has no /dev/full");
        return;
    };
    let files = Files::new();
    let mut command = ultraep(&["plan", &files.path("loads.csv"), "--slots", "1"]);
    let output = command.stdout(Stdio::from(full)).output().unwrap();
    output.assert().code(1).stderr(starts_with("error: stdout: "));
}
