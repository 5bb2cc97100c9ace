//! Thousands of damaged files over all readers: an error or a recording, never a panic, in bounded memory and time.
//!
//! Good files of every kind are changed by a seeded mutator: bytes flipped and set, pieces cut out, repeated, moved and put in
//! from elsewhere, the end cut off. A child of this test reads them with its address space limited; a panic, a crash or a
//! file that takes too long ends it, and the seed that repeats it is printed. `MUTATED_FILES` says how many (`cargo xtask
//! mutate`: 20,000), `MUTATED_FROM` where to begin.
//!
//! Where the outcome of a change is known it is compared: the lines of a log cut anywhere give the whole lines before, twice
//! the lines give twice the tokens, and the lines of a layer in another order give the same loads.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use common::{Folder, archive, gzip, npy};
use ultraep_import::{Grouping, Microbatch, Microbatches, OpenOptions, Reading, SourceRule, open, open_with, survey};
use ultraep_trace::{Record, TraceMeta, TraceWriter};

/// Files in `cargo test`.
const FEW: u64 = 900;
/// Address space of the child, in KiB.
const LIMIT_KIB: u64 = 3 << 20;
/// One file may take this long on a machine under load.
const FILE_TIME: Duration = Duration::from_secs(60);
/// Set for the child: the folder it may write into.
const CHILD: &str = "MUTATED_CHILD";

/// Numbers from a seed (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }
}

/// A good file, and the files of its folder that are not changed.
struct Seed {
    name: &'static str,
    bytes: Vec<u8>,
    beside: Vec<(&'static str, Vec<u8>)>,
}

fn seed(name: &'static str, bytes: impl Into<Vec<u8>>) -> Seed {
    Seed { name, bytes: bytes.into(), beside: Vec::new() }
}

fn log(layers: u32, tokens: usize) -> String {
    let meta = "{\"type\": \"meta\", \"model_id\": \"m\", \"layers_logged\": [0], \"top_k\": 2, \"num_experts\": 16}\n";
    let row = |layer: u32, t: usize| {
        let first = (t * 5 + layer as usize) % 16;
        let ids = [first, (first + 1 + (t * 3 + t / 16) % 15) % 16];
        format!(
            "{{\"type\": \"route\", \"req_id\": \"r\", \"token_idx\": {t}, \"layer\": {layer}, \"topk_ids\": {ids:?}}}\n"
        )
    };
    meta.to_owned() + &(0..layers).flat_map(|layer| (0..tokens).map(move |t| row(layer, t))).collect::<String>()
}

fn megatron(rank: usize) -> String {
    let row = |step: u64, layer: u64, extra: &str| {
        format!(
            "{{\"step\": {step}, \"stage\": \"train\", {extra}\"layer\": {layer}, \"rank\": {rank}, \"num_tokens\": 2, \"topk\": 2, \
             \"top_indices\": [[{rank}, 3], [5, {layer}]]}}\n"
        )
    };
    let step = |s: u64| {
        row(s, 0, "\"block\": \"decoder\", ") + &row(s, 1, "") + &row(s, 0, "\"block\": \"mtp\", \"mtp_idx\": 0, ")
    };
    (0..3).map(step).collect()
}

fn uet() -> Vec<u8> {
    let topology = ultraep_plan::Topology::new(ultraep_plan::TopologySpec {
        ranks: 2,
        experts: 4,
        domain_ranks: 2,
        slots_per_rank: 1,
    });
    let mut writer =
        TraceWriter::new(Vec::new(), TraceMeta::of_topology(&topology.expect("a group"), 2)).expect("begun");
    for step in 0..6 {
        for layer in 0..2 {
            let before = (0..8).map(|cell| step as u32 * 10 + cell + layer).collect();
            let record = Record { step, microbatch: 0, layer, before, ..Record::default() };
            writer.append(&record).expect("appended");
        }
    }
    writer.finish().expect("finished")
}

fn v1_chunk() -> Vec<u8> {
    let text = "{\"schema\": \"ultra_ep_trace_v1\"}";
    let ucs4: Vec<u8> = text.chars().flat_map(|c| (c as u32).to_le_bytes()).collect();
    archive(&[
        ("metadata.npy", &npy(&format!("<U{}", text.len()), "()", &ucs4)),
        ("layers.npy", &npy("<i4", "(1,)", &1_i32.to_le_bytes())),
        ("virtual_layers.npy", &npy("<i4", "(1,)", &1_i32.to_le_bytes())),
        ("microbatches.npy", &npy("<i8", "(1,)", &7_i64.to_le_bytes())),
        ("pre_logical_loads.npy", &npy("<i4", "(1, 2)", &[3, 0, 0, 0, 4, 0, 0, 0])),
    ])
}

fn sglang() -> Vec<u8> {
    let text = |text: &str| [&b"X"[..], &(text.len() as u32).to_le_bytes(), text.as_bytes()].concat();
    let pickle = [
        &b"\x80\x02}q\x00"[..],
        &text("logical_count"),
        b"ctorch._utils\n_rebuild_tensor_v2\n((",
        &text("storage"),
        b"ctorch\nIntStorage\n",
        &text("0"),
        &text("cpu"),
        b"K\x08tQK\x00(K\x02K\x01K\x04t(K\x04K\x04K\x01t\x89ccollections\nOrderedDict\n)RtRs.",
    ]
    .concat();
    let data: Vec<u8> = (1..=8_i32).flat_map(i32::to_le_bytes).collect();
    archive(&[("a/data.pkl", &pickle), ("a/data/0", &data)])
}

fn safetensors() -> Vec<u8> {
    let header = "{\"0_1\": {\"dtype\": \"I64\", \"shape\": [2], \"data_offsets\": [0, 16]}}";
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]]
        .concat()
}

/// Good files of every kind: of the tests' folder and made here.
fn seeds() -> Vec<Seed> {
    let mut seeds = Vec::new();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases");
    for name in [
        "01_f2.npy",
        "02_be_i4.npy",
        "02_fortran_i8.npy",
        "02_u1.npy",
        "02_two_arrays.npz",
        "02_topk_ids_i8_T256_K4.npy",
        "05_eplb_readme_layers.json",
        "06_header_names.csv",
        "06_index_column.csv",
        "06_llamacpp_moe_trace.csv",
        "06_routes_ranks.json",
        "06_sglang4435_long.csv",
        "06_space_matrix.txt",
        "07_vllm_minus1.jsonl",
        "07_vllm_sentinel_E.jsonl",
    ] {
        seeds.push(seed(name, std::fs::read(folder.join(name)).expect("a case")));
    }
    let dump = |rank: usize| {
        let name = format!("10_mcore_ep_load_dump_v1/mcore_ep_loads_rank{rank}_abc123.npz");
        std::fs::read(folder.join(name)).expect("a case")
    };
    seeds.push(Seed {
        name: "dump/mcore_ep_loads_rank0_abc123.npz",
        bytes: dump(0),
        beside: vec![
            ("dump/mcore_ep_loads_rank1_abc123.npz", dump(1)),
            ("dump/mcore_ep_loads_rank2_abc123.npz", dump(2)),
            ("dump/mcore_ep_loads_rank3_abc123.npz", dump(3)),
        ],
    });
    let moe_beyond = "Layer ID,Batch Number,Token,Activated Expert IDs\n1,0,\"a,\nb\",\"[1, 2]\"\n1,0,c,\"[3, 4]\"\n2,0,d,\"[5, 6]\"\n";
    seeds.push(seed("a.csv", moe_beyond));
    seeds.push(seed("log.jsonl", log(2, 40)));
    seeds.push(seed("log.jsonl.gz", gzip(log(2, 40).as_bytes())));
    seeds.push(seed("counts.json", "{\"0\": {\"0\": 5, \"3\": 7}, \"15\": {\"1\": 2}}"));
    seeds.push(seed("passes.json", "[{\"0\": null, \"1\": [[27, 3], [42, 1]]}, {\"1\": [[7, -1]]}]"));
    seeds.push(seed("loads.uet", uet()));
    seeds.push(seed("t.chunk000000.npz", v1_chunk()));
    seeds.push(Seed {
        name: "t.manifest.json",
        bytes: b"{\"schema\": \"ultra_ep_trace_v1\", \"trace_id\": \"t\", \"chunks\": 1, \"ep_size\": 2}".to_vec(),
        beside: vec![("t.chunk000000.npz", v1_chunk())],
    });
    seeds.push(seed("rec.pt", sglang()));
    seeds.push(seed(
        "one.pkl",
        b"\x80\x04]\x8c\x0bcollections\x8c\x07Counter\x93}(K\x05M\x10\x00K\x07K\x09u\x85Ra.".to_vec(),
    ));
    seeds.push(Seed {
        name: "ranks/router_trace_rank0.jsonl",
        bytes: megatron(0).into_bytes(),
        beside: vec![("ranks/router_trace_rank1.jsonl", megatron(1).into_bytes())],
    });
    let harmoeny = "iteration,latency (ms),expert distribution\n0,0.5,\"[1, 2, 3]\"\n1,0.5,\"[4, 5, 6]\"\n";
    seeds.push(Seed {
        name: "h/0/moe_layer-0.csv",
        bytes: harmoeny.into(),
        beside: vec![("h/1/moe_layer-0.csv", harmoeny.into())],
    });
    seeds.push(Seed {
        name: "trt/rank0.safetensors",
        bytes: safetensors(),
        beside: vec![("trt/meta_info.json", b"{\"num_experts\": 2}".to_vec())],
    });
    seeds.push(seed("layer_03.parquet", parquet()));
    seeds
}

/// A trace of ours as parquet.
fn parquet() -> Vec<u8> {
    let folder = Folder::new();
    let trace = folder.with("a.uet", uet());
    let mut bytes = Vec::new();
    ultraep_import::write_parquet(&trace, &mut bytes).expect("written");
    bytes
}

/// Changes bytes in one to four ways.
fn mutate(random: &mut Random, bytes: &mut Vec<u8>, other: &[u8]) {
    for _ in 0..=random.below(4) {
        let (at, to) = (random.below(bytes.len() + 1), random.below(bytes.len() + 1));
        let (start, end) = (at.min(to), at.max(to));
        let end = end.min(start + 1 + random.below(200));
        match random.below(9) {
            0 if start < bytes.len() => bytes[start] ^= 1 << random.below(8),
            1 if start < bytes.len() => bytes[start] = random.next() as u8,
            2 if start < bytes.len() => bytes[start] = b"0123456789,[]{}\"-\n"[random.below(18)],
            3 => drop(bytes.drain(start..end.min(bytes.len()))),
            4 => {
                let piece = bytes[start..end.min(bytes.len())].to_vec();
                let times = 1 + random.below(40);
                bytes.splice(start..start, piece.repeat(times));
            }
            5 => {
                let piece: Vec<u8> = bytes.drain(start..end.min(bytes.len())).collect();
                let at = random.below(bytes.len() + 1);
                bytes.splice(at..at, piece);
            }
            6 => bytes.truncate(at),
            7 => {
                let from = random.below(other.len() + 1);
                let piece = &other[from..other.len().min(from + 1 + random.below(100))];
                bytes.splice(start..start, piece.iter().copied());
            }
            // A number where lengths and shapes are.
            _ if start + 4 <= bytes.len() => {
                let value = [0, 1, 0x7fff_ffff, u32::MAX, 1 << 20, random.next() as u32][random.below(6)];
                bytes[start..start + 4].copy_from_slice(&value.to_le_bytes());
            }
            _ => {}
        }
    }
}

/// Writes the file of a number and reads it in every way.
fn read_mutated(folder: &Path, seeds: &[Seed], number: u64) {
    let mut random = Random(number);
    let chosen = &seeds[random.below(seeds.len())];
    let other = &seeds[random.below(seeds.len())];
    let mut bytes = chosen.bytes.clone();
    mutate(&mut random, &mut bytes, &other.bytes);
    let path = folder.join(number.to_string()).join(chosen.name);
    let write = |path: &Path, bytes: &[u8]| {
        std::fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
        std::fs::write(path, bytes).expect("written");
    };
    write(&path, &bytes);
    chosen.beside.iter().for_each(|(name, bytes)| write(&folder.join(number.to_string()).join(name), bytes));
    let opened = if chosen.name.contains('/') {
        folder.join(number.to_string()).join(chosen.name.split('/').next().unwrap_or(""))
    } else {
        path
    };
    let reading = [None, Some(Reading::Counts), Some(Reading::Ids), Some(Reading::Map)][random.below(4)];
    let experts = [None, Some(16), Some(20), Some(4096)][random.below(4)];
    let options = OpenOptions { reading, experts, drop_dummy_run: random.below(2) == 0, ..OpenOptions::default() };
    let paths = [opened];
    if let Ok(mut recording) = open_with(&paths, &options) {
        let _ = survey(&mut *recording);
        let _ = recording.ending();
    }
    if let Ok(mut recording) = open_with(&paths, &options) {
        let grouping =
            Grouping { ranks: 4, experts: 64, microbatch_tokens: 32, rule: SourceRule::RoundRobin, scale: 1 };
        let mut microbatches = Microbatches::new(&mut *recording, grouping).expect("a group that can be");
        let mut one = Microbatch::default();
        while matches!(microbatches.next(&mut one), Ok(true)) {}
    }
    std::fs::remove_dir_all(folder.join(number.to_string())).expect("removed");
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// What the child does; nothing without its variable.
#[test]
fn child_reads_mutated_files() {
    let Some(folder) = std::env::var_os(CHILD).map(PathBuf::from) else { return };
    let seeds = seeds();
    let (from, files) = (setting("MUTATED_FROM", 0), setting("MUTATED_FILES", FEW));
    for number in from..from + files {
        // Read by the parent when something goes wrong.
        std::fs::write(folder.join("number"), number.to_string()).expect("written");
        let start = Instant::now();
        read_mutated(&folder, &seeds, number);
        assert!(start.elapsed() < FILE_TIME, "file {number} took {:?}", start.elapsed());
    }
    std::fs::write(folder.join("number"), "done").expect("written");
}

#[test]
fn no_mutated_file_panics_or_takes_memory() {
    let folder = Folder::new();
    let test = std::env::current_exe().expect("this test");
    let mut command = Command::new("sh");
    // The limit is of the shell that becomes the child.
    command.args(["-c", &format!("ulimit -v {LIMIT_KIB} && exec \"$0\" \"$@\"")]).arg(test);
    command.args(["--exact", "child_reads_mutated_files", "--test-threads", "1", "--nocapture"]);
    command.env(CHILD, folder.0.path()).env("RUST_BACKTRACE", "0");
    let output = command.output().expect("a shell");
    let number = std::fs::read_to_string(folder.0.path().join("number")).unwrap_or_default();
    assert!(
        output.status.success() && number == "done",
        "{}: repeat with MUTATED_FROM={number} MUTATED_FILES=1 cargo test -p ultraep-import --test mutate\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Without this the limit would hold nothing.
#[test]
fn the_limit_is_held() {
    let limited = Command::new("sh").args(["-c", "ulimit -v 3145728 && ulimit -v"]).output().expect("a shell");
    assert_eq!(String::from_utf8_lossy(&limited.stdout).trim(), LIMIT_KIB.to_string());
}

fn loads_of(path: &Path) -> std::collections::BTreeMap<u32, (u64, Vec<u64>)> {
    let found = survey(&mut *open(&[path.to_owned()]).expect("opened")).expect("read");
    found.layers.into_iter().map(|(layer, of)| (layer, (of.tokens, of.expert_loads))).collect()
}

#[test]
fn cuts_repeats_and_orders_of_a_log_give_what_they_must() {
    let folder = Folder::new();
    let whole = log(2, 60);
    let lines: Vec<&str> = whole.lines().collect();
    let mut random = Random(5);
    for _ in 0..60 {
        let cut = lines[0].len() + 2 + random.below(whole.len() - lines[0].len() - 2);
        let path = folder.with("cut.jsonl", &whole[..cut]);
        let rows = whole[..cut].lines().skip(1);
        // A last line that lacks nothing but its end is whole.
        let rows = rows.filter(|line| line.ends_with('}')).count() as u64;
        let got: u64 = if rows == 0 { 0 } else { loads_of(&path).values().map(|(tokens, _)| tokens).sum() };
        assert_eq!(got, rows, "cut at {cut}");
    }
    let once = loads_of(&folder.with("a.jsonl", &whole));
    let body = lines[1..].join("\n") + "\n";
    let twice = loads_of(&folder.with("b.jsonl", whole.clone() + &body));
    for (layer, (tokens, loads)) in &once {
        let doubled = (2 * tokens, loads.iter().map(|load| 2 * load).collect::<Vec<_>>());
        assert_eq!(twice[layer], doubled);
    }
    let mut shuffled: Vec<&str> = lines[1..].to_vec();
    for at in (1..shuffled.len()).rev() {
        shuffled.swap(at, random.below(at + 1));
    }
    let other = lines[0].to_owned() + "\n" + &shuffled.join("\n") + "\n";
    assert_eq!(loads_of(&folder.with("c.jsonl", other)), once);
}

/// Every cut of our own trace gives the whole records before it, and none gives another.
#[test]
fn cuts_of_a_trace_give_its_beginning() {
    let folder = Folder::new();
    let whole = uet();
    let all = common::pieces(&mut *open(&[folder.with("a.uet", &whole)]).expect("opened"));
    for cut in 0..whole.len() {
        let path = folder.with("cut.uet", &whole[..cut]);
        let Ok(mut recording) = open(&[path]) else { continue };
        let mut piece = ultraep_import::Piece::default();
        let mut read = Vec::new();
        while let Ok(true) = recording.next(&mut piece) {
            read.push(piece.clone());
        }
        assert_eq!(read, all[..read.len()], "cut at {cut}");
        assert!(recording.ending().is_some() || read.len() == all.len(), "cut at {cut}");
    }
}
