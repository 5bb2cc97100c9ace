//! Inputs that people have, and what must come of each. The files in `cases/` were made by us, after public reports; what
//! holds real data elsewhere is made here in the same form.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use common::{Folder, npy};
use ultraep_import::{
    Choice, Format, Inputs, LayerLoads, OpenOptions, Reading, SourceRule, Sources, Survey, open_with, read_loads,
    survey,
};

fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases").join(name)
}

fn asked(reading: Reading) -> OpenOptions {
    OpenOptions { reading: Some(reading), ..OpenOptions::default() }
}

/// What a recording is, and all that reading it tells.
struct Read {
    format: Format,
    sources: Sources,
    experts: Option<usize>,
    top_k: Option<usize>,
    found: Survey,
    /// Notes and ending, joined.
    words: String,
}

fn read_paths(paths: &[PathBuf], options: &OpenOptions) -> Result<Read, String> {
    let mut recording = open_with(paths, options).map_err(|error| error.to_string())?;
    let found = survey(&mut *recording).map_err(|error| error.to_string())?;
    let info = recording.info().clone();
    let words = info.notes.iter().cloned().chain(recording.ending()).collect::<Vec<_>>().join("; ");
    let (format, sources, experts, top_k) = (info.format, info.sources, info.experts, info.top_k);
    Ok(Read { format, sources, experts, top_k, found, words })
}

fn read(path: &Path) -> Read {
    read_with(path, &OpenOptions::default())
}

fn read_with(path: &Path, options: &OpenOptions) -> Read {
    read_paths(&[path.to_owned()], options).unwrap_or_else(|error| panic!("{error}"))
}

#[track_caller]
fn refused(path: &Path, options: &OpenOptions, words: &str) {
    let Err(error) = read_paths(&[path.to_owned()], options) else {
        panic!("{} was read; expected {words:?}", path.display())
    };
    assert!(error.contains(words), "{error}");
    assert!(!error.contains('\n'), "{error}");
}

/// As `ultraep plan` reads.
fn loads(path: &Path, options: &OpenOptions, layer: Option<u32>) -> Result<LayerLoads, String> {
    let choice = Choice { layer, step: None, ranks: None, microbatch_tokens: 8192, rule: SourceRule::Blocks, scale: 1 };
    let inputs = Inputs::new(&[path.to_owned()]).map_err(|error| error.to_string())?;
    read_loads(&inputs, options, &choice, "loads").map_err(|error| error.to_string())
}

/// Shape and counts of the one matrix of a file.
#[track_caller]
fn matrix(path: &Path) -> (usize, usize, Vec<u32>) {
    let read = loads(path, &OpenOptions::default(), None).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(read.loads.len(), 1);
    (read.loads[0].ranks(), read.loads[0].experts(), read.loads[0].counts().to_vec())
}

#[test]
fn case_01_floats_are_taken_when_they_are_exact() {
    let exact = matrix(&case("01_exact_i8.npy"));
    assert_eq!((exact.0, exact.1, exact.2.iter().sum::<u32>()), (4, 64, exact.2.iter().sum()));
    for name in ["01_f2.npy", "01_f8.npy"] {
        assert_eq!(matrix(&case(name)), exact, "{name}");
    }
    let default = OpenOptions::default();
    refused(&case("01_bf16_rounded_f4.npy"), &default, "look rounded to it");
    refused(&case("01_f2_over_2048.npy"), &default, "as f2, which holds whole numbers exactly up to 2048");
    assert_eq!(matrix(&case("01_i8_over_2048.npy")).1, 64);
    // The user may know better.
    assert_eq!(read_with(&case("01_bf16_rounded_f4.npy"), &asked(Reading::Counts)).found.experts, 64);
}

#[test]
fn case_02_types_and_layouts_give_equal_counts() {
    let counts = matrix(&case("02_i8.npy"));
    assert_eq!((counts.0, counts.1), (4, 16));
    for name in ["02_i2.npy", "02_i4.npy", "02_u2.npy", "02_u4.npy", "02_u8.npy", "02_be_i4.npy", "02_fortran_i8.npy"] {
        assert_eq!(matrix(&case(name)), counts, "{name}");
    }
    assert_eq!(matrix(&case("02_compressed.npz")), counts);
    let clipped = counts.2.iter().map(|&count| count.min(255)).collect();
    assert_eq!(matrix(&case("02_u1.npy")), (4, 16, clipped));
}

#[test]
fn case_02_what_is_no_counts_is_refused_or_read_as_what_it_is() {
    let default = OpenOptions::default();
    let map = case("02_bool_routing_map_T256_E16.npy");
    refused(&map, &default, "--as map");
    let of_map = read_with(&map, &asked(Reading::Map));
    assert_eq!((of_map.format, of_map.sources, of_map.experts), (Format::RoutingMap, Sources::Tokens, Some(16)));
    assert_eq!((of_map.found.layers[&0].tokens, of_map.found.layers[&0].choices), (250, 1008), "six rows are empty");

    let ids = read(&case("02_topk_ids_i8_T256_K4.npy"));
    assert_eq!(
        (ids.format, ids.sources, ids.top_k, ids.found.experts),
        (Format::ExpertIds, Sources::Tokens, Some(4), 16)
    );
    assert_eq!((ids.found.layers[&0].tokens, ids.found.layers[&0].choices), (256, 1024));
    assert!(ids.words.contains("--as counts"), "{}", ids.words);

    let folder = Folder::new();
    let logits: Vec<u8> = (0..256 * 16).flat_map(|i| (i as f32 * 0.37 - 700.3).to_le_bytes()).collect();
    refused(&folder.with("logits.npy", npy("<f4", "(256, 16)", &logits)), &default, "[0, 0] (from 0): -700.");
    refused(&case("02_nan_f4.npy"), &default, "NaN is no count");
    refused(&case("02_inf_f8.npy"), &default, "inf is no count");
    refused(&case("02_half_f8.npy"), &default, "[0, 0] (from 0): 1.5 is no count");
    refused(&case("02_object.npy"), &default, "elements of type \"|O\"");
    refused(&case("02_empty_0xE.npy"), &default, "no source ranks");
    refused(&case("02_empty_Nx0.npy"), &default, "no experts");
    refused(&case("02_1d_totals.npy"), &default, "shape [16]: expected [ranks, experts]");
    refused(&case("02_5d.npy"), &default, "dimensions 5");
}

#[test]
fn case_02_arrays_of_an_archive_are_chosen_by_name() {
    let default = OpenOptions::default();
    refused(&case("02_two_arrays.npz"), &default, "choose one with --array: logical_count [1, 4, 16], other [3]");
    let named = OpenOptions { array: Some("logical_count".to_owned()), ..default.clone() };
    let read = loads(&case("02_two_arrays.npz"), &named, None).expect("read");
    assert_eq!(read.loads[0].counts(), matrix(&case("02_i8.npy")).2);
    let wrong = OpenOptions { array: Some("none".to_owned()), ..default };
    refused(&case("02_two_arrays.npz"), &wrong, "no array of that name");
}

#[test]
fn case_03_numbers_at_the_limits() {
    let default = OpenOptions::default();
    let json = |words: &str| format!("[0, 0] (from 0): {words}");
    refused(&case("03_u32_max_sum.json"), &default, &json("4294967295 is no count"));
    refused(&case("03_u32_plus_one.json"), &default, &json("4294967296 is no count"));
    refused(&case("03_u64_max.json"), &default, &json("18446744073709551615 is no count"));
    refused(
        &case("03_negative.csv"),
        &default,
        "-1 is no count of tokens: allowed are whole numbers from 0 to 2147483647",
    );
    refused(&case("03_exp_notation.csv"), &default, "line 1: row 0, column 0 (from 0): \"1e3\" is no count");
    assert_eq!(matrix(&case("03_float_ints.json")), (2, 2, vec![1, 2, 3, 4]));
}

#[test]
fn case_03_extreme_loads_are_valid() {
    let total = |name: &str| {
        let (ranks, experts, counts) = matrix(&case(name));
        (ranks, experts, counts.iter().sum::<u32>())
    };
    assert_eq!(total("03_all_zero_8x64.csv"), (8, 64, 0));
    assert_eq!(total("03_balanced_exact_8x64.csv"), (8, 64, 512 * 512));
    assert_eq!(total("03_one_hot_8x64.csv"), (8, 64, 8 * 4096));
    assert_eq!(total("03_one_source_one_expert_8x64.csv"), (8, 64, 32_768));
    assert_eq!(total("03_one_token_8x64.csv"), (8, 64, 1));
    assert_eq!(total("03_one_expert_4x4_last.csv"), (4, 4, 28));
    assert_eq!(total("03_one_rank_1x8.csv"), (1, 8, 26));
    assert_eq!(total("12_uneven_sources_8x64.csv").0, 8);
    // As the skewed ones of the reports: a power law over 72 ranks.
    let folder = Folder::new();
    let row =
        |r: u32| (0..288_u32).map(|e| (1_000_000 / (1 + (e * 7 + r) % 288)).to_string()).collect::<Vec<_>>().join(",");
    let path = folder.with("zipf.csv", (0..72).map(|r| row(r) + "\n").collect::<String>());
    let (ranks, experts, counts) = matrix(&path);
    assert_eq!((ranks, experts, counts[0], counts[1]), (72, 288, 1_000_000, 125_000));
}

#[test]
fn case_04_shapes_that_do_not_divide() {
    assert_eq!(matrix(&case("04_vllm_128e_6ranks.csv")).0, 6);
    assert_eq!(matrix(&case("04_qwen_60e_8ranks.csv")).1, 60);
    let default = OpenOptions::default();
    // More ranks than experts: no plan can be for it, and it looks like the experts of tokens.
    refused(&case("04_fewer_experts_than_ranks_4e_8ranks.csv"), &default, "say which with --as ids or --as counts");
    refused(&case("04_ragged.csv"), &default, "line 2: row 1 (from 0) has 2 columns: allowed are 3");
    refused(&case("04_ragged.json"), &default, "[1] (from 0): length of a list: 2: expected 3");
}

#[test]
fn case_05_layers_of_a_file_are_chosen() {
    assert_eq!(matrix(&case("05_packing_9_1_1_1.csv")), (2, 4, vec![9, 1, 1, 1, 0, 0, 0, 0]));
    assert_eq!(matrix(&case("05_balancedness_100_200.csv")), (2, 2, vec![50, 100, 50, 100]));
    assert_eq!(matrix(&case("05_eplb_readme_layer0_4ranks.csv")).1, 12);
    let layers = case("05_eplb_readme_layers.json");
    let refusal = loads(&layers, &OpenOptions::default(), None).expect_err("two layers");
    assert!(refusal.contains("2 layers (0, 1): choose one with --layer, or use replay"), "{refusal}");
    let first = loads(&layers, &OpenOptions::default(), Some(0)).expect("layer 0");
    assert_eq!(first.loads[0].row(0), [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86]);
    let absent = loads(&layers, &OpenOptions::default(), Some(7)).expect_err("no layer 7");
    assert!(absent.contains("no layer 7: there are 0, 1"), "{absent}");
}

#[test]
fn case_06_tables_as_spreadsheets_pandas_and_numpy_write_them() {
    let expected = (2, 4, vec![10, 20, 30, 40, 50, 60, 70, 80]);
    for name in
        ["06_bom_crlf.csv", "06_header_names.csv", "06_index_column.csv", "06_semicolon.csv", "06_space_matrix.txt"]
    {
        assert_eq!(matrix(&case(name)), expected, "{name}");
    }
    let folder = Folder::new();
    for (name, text) in [
        ("tabs.tsv", "10\t20\t30\t40\n50\t60\t70\t80\n"),
        ("cr.csv", "10,20,30,40\r50,60,70,80\r"),
        ("quoted.csv", "\"10\",\"20\",\"30\",\"40\"\n\"50\",\"60\",\"70\",\"80\"\n"),
        ("floats.csv", "10.0,20.0,30.0,40.0\n50.0,60.0,70.0,80.0\n"),
        (
            "savetxt.txt",
            "1.000000000000000000e+01 2.000000000000000000e+01 3.000000000000000000e+01 4.000000000000000000e+01\n\
                         5.000000000000000000e+01 6.000000000000000000e+01 7.000000000000000000e+01 8.000000000000000000e+01\n",
        ),
        ("numbered.csv", "0,1,2,3\n10,20,30,40\n50,60,70,80\n"),
        ("order.csv", "expert_3,expert_1,expert_2,expert_0\n40,20,30,10\n80,60,70,50\n"),
        ("unnamed.csv", "Unnamed: 0,0,1,2,3\n0,10,20,30,40\n1,50,60,70,80\n"),
        ("bare.json", "[[10, 20, 30, 40], [50, 60, 70, 80]]"),
    ] {
        assert_eq!(matrix(&folder.with(name, text)), expected, "{name}");
    }
    // Counting up is no line of names.
    assert_eq!(matrix(&folder.with("up.csv", "0,1,2,3\n4,5,6,7\n")).0, 2);
    let default = OpenOptions::default();
    refused(&case("06_thousands.csv"), &default, "row 0, column 0 (from 0): \"1,000\" is no count");
    refused(&case("06_trailing_comma.csv"), &default, "row 0, column 2 (from 0): \"\" is no count");
    refused(&case("06_utf16.csv"), &default, "UTF-16: save it as UTF-8");
    refused(&folder.with("gpu.csv", ",timestamp,gpu_util\n0,17,3\n"), &default, "column \"timestamp\"");
    refused(&folder.with("gap.csv", "e0,e2\n1,2\n"), &default, "no column of expert 1");
}

#[test]
fn case_06_long_tables_are_totals_by_layer() {
    let long = read(&case("06_sglang4435_long.csv"));
    assert_eq!((long.format, long.sources), (Format::LongTable, Sources::Totals));
    assert!(long.found.layers.keys().copied().eq([0, 1, 2]));
    assert_eq!(long.found.layers[&0].expert_loads[..4], [6476, 6647, 4455, 1752]);
    let choices = read(&case("06_llamacpp_moe_trace.csv"));
    assert!(choices.words.contains("top-k is not recorded"), "{}", choices.words);
    let rows = std::fs::read_to_string(case("06_llamacpp_moe_trace.csv")).expect("read").lines().count() as u64 - 1;
    assert_eq!(choices.found.layers.values().map(|layer| layer.choices).sum::<u64>(), rows);
    let folder = Folder::new();
    let ranks = folder.with("ranks.csv", "step,layer,rank,expert,count\n0,3,1,2,5\n0,3,0,0,7\n1,3,0,1,1\n");
    let ranks = read(&ranks);
    assert_eq!((ranks.sources, ranks.found.steps), (Sources::Ranks(2), Some((0, 1))));
    assert_eq!(ranks.found.layers[&3].expert_loads, [7, 1, 5]);
    let keyed = read(&folder.with("keyed.csv", "layer,expert_0,expert_1\n4,5,6\n5,7,8\n"));
    assert_eq!((keyed.found.layers[&4].choices, keyed.found.layers[&5].choices), (11, 15));
    refused(&folder.with("w.csv", "layer,expert,price\n0,1,2\n"), &OpenOptions::default(), "column \"price\"");
}

#[test]
fn case_06_call_logs_keep_their_ranks() {
    let calls = read(&case("06_routes_ranks.json"));
    assert_eq!((calls.format, calls.sources, calls.experts), (Format::CallLog, Sources::Ranks(4), Some(16)));
    assert_eq!((calls.found.pieces, calls.found.steps), (3, Some((0, 2))));
}

#[test]
fn case_07_padding_is_left_out_and_told() {
    let minus = read(&case("07_vllm_minus1.jsonl"));
    assert_eq!((minus.found.experts, minus.found.layers[&0].tokens), (16, 48));
    assert!(minus.words.contains("16 tokens without any expert (padding) left out"), "{}", minus.words);
    let sentinel = read(&case("07_vllm_sentinel_E.jsonl"));
    assert_eq!((sentinel.experts, sentinel.found.experts, sentinel.found.layers[&0].tokens), (Some(16), 16, 48));
    assert!(sentinel.words.contains("16 tokens without any expert"), "{}", sentinel.words);
    let pads = read(&case("07_vllm_pad_0123.jsonl"));
    assert_eq!(pads.found.layers[&0].tokens, 64);
    assert!(pads.words.contains("16 equal tokens at the end of layer 0 (experts 0, 1, 2, 3)"), "{}", pads.words);
}

#[test]
fn case_07_oddities_are_told() {
    let twice = read(&case("07_vllm_duplicates.jsonl"));
    assert!(twice.words.contains("16 tokens with one expert in all places (padding) left out"), "{}", twice.words);
    let folder = Folder::new();
    let some = meta("m", 4) + &route(0, 0, &[3, 3, 1, 2]) + &route(1, 0, &[4, 5, 1, 2]);
    let some = read(&folder.with("log.jsonl", some));
    assert_eq!(some.found.layers[&0].expert_loads[3], 2);
    assert!(some.words.contains("1 token with an expert twice, counted twice"), "{}", some.words);
    let changes = read(&case("07_vllm_topk_changes.jsonl"));
    assert!(changes.words.contains("1 token with 2 experts, not 4"), "{}", changes.words);
    let torn = read(&case("07_vllm_truncated_last_line.jsonl"));
    assert_eq!(torn.found.layers[&0].tokens, 48);
    assert!(torn.words.contains("line 50 is torn and left out, all before it is read"), "{}", torn.words);
}

#[test]
fn case_08_routed_experts_are_tokens_of_layers() {
    let path = case("08_routed_experts_i2_511x4x8.npy");
    let plain = read(&path);
    assert_eq!((plain.format, plain.sources, plain.top_k), (Format::ExpertIds, Sources::Tokens, Some(8)));
    assert_eq!(plain.found.layers.len(), 4);
    assert!(plain.found.layers.values().all(|layer| (layer.tokens, layer.choices) == (511, 511 * 8)));
    // The first token of the second layer, by hand: numbers 8 to 15.
    let bytes = std::fs::read(&path).expect("read");
    let data = &bytes[bytes.len() - 511 * 4 * 8 * 2..];
    let id = |at: usize| u16::from_le_bytes([data[2 * at], data[2 * at + 1]]);
    let mut recording = open_with(std::slice::from_ref(&path), &OpenOptions::default()).expect("opened");
    let pieces = common::pieces(&mut *recording);
    let second = pieces.iter().find(|piece| piece.layer == 1).expect("layer 1");
    let ultraep_import::Load::Choices { ids, .. } = &second.load else { panic!("counts") };
    assert_eq!(ids[..8], (8..16).map(id).collect::<Vec<_>>());

    // -1 fills the last eleven tokens; the same array in an archive.
    let folder = Folder::new();
    let mut filled = bytes.clone();
    let start = filled.len() - 11 * 4 * 8 * 2;
    filled[start..].fill(0xff);
    let filled = read(&folder.with("filled.npy", filled));
    assert!(filled.found.layers.values().all(|layer| layer.tokens == 500));
    assert!(filled.words.contains("44 tokens without any expert"), "{}", filled.words);
    let archive = common::archive(&[("routed_experts.npy", &bytes)]);
    let named = read(&folder.with("r.npz", archive));
    assert_eq!(named.found, plain.found);
    // Counts of a rank for 64 experts cannot be told from them by shape alone, but by content.
    let counts = |t: u64| ((t.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 17).wrapping_mul(t | 1) % 97) as u16;
    let data: Vec<u8> = (0..511 * 4 * 8).flat_map(|i| counts(i).to_le_bytes()).collect();
    assert_eq!(read(&folder.with("counts.npy", npy("<u2", "(511, 4, 8)", &data))).format, Format::Matrices);
}

#[test]
fn case_09_routers_of_other_blocks_are_layers_of_their_own() {
    let traces = read(&case("09_megatron_mtp"));
    assert_eq!((traces.format, traces.sources), (Format::Megatron, Sources::Ranks(2)));
    // Expert i is in every choice of router i: decoder 0 and 1, mtp 0 and 1.
    assert!(traces.found.layers.keys().copied().eq([0, 1, 2, 3]), "{:?}", traces.found.layers.keys());
    for (&layer, of_layer) in &traces.found.layers {
        assert_eq!((of_layer.microbatches, of_layer.expert_loads[layer as usize]), (2, 2 * 2 * 32), "{layer}");
    }
    assert!(traces.words.contains("layer 2 is mtp 0"), "{}", traces.words);
    let alone = read(&case("09_megatron_mtp/router_trace_rank0.jsonl"));
    assert_eq!(alone.found.layers.len(), 4);
}

#[test]
fn case_10_load_dumps_need_to_know_what_is_logical() {
    let folder = case("10_mcore_ep_load_dump_v1");
    refused(&folder, &OpenOptions::default(), "20 physical experts and no map to logical ones");
    let dump = read_with(&folder, &OpenOptions { experts: Some(20), ..OpenOptions::default() });
    assert_eq!((dump.format, dump.sources, dump.experts), (Format::McoreLoadDump, Sources::Ranks(4), Some(20)));
    let microbatches: Vec<(u32, u64)> = dump.found.layers.iter().map(|(&l, of)| (l, of.microbatches)).collect();
    assert_eq!(microbatches, [(2, 5), (3, 5), (4, 4)], "forward_counts");
    let one = folder.join("mcore_ep_loads_rank1_abc123.npz");
    refused(&one, &OpenOptions { experts: Some(20), ..OpenOptions::default() }, "files of ranks: 1: expected 4");
}

/// A row of a vLLM log.
fn route(token: usize, layer: u32, ids: &[usize]) -> String {
    format!(
        "{{\"type\": \"route\", \"req_id\": \"r1\", \"token_idx\": {token}, \"layer\": {layer}, \"topk_ids\": {ids:?}}}\n"
    )
}

/// Tokens of real text: their experts move about.
fn text(tokens: std::ops::Range<usize>) -> String {
    tokens.map(|t| route(t, 0, &[t * 7 % 60, (t * 7 + 1 + t % 5) % 60, (t * 7 + 30) % 60, (t * 7 + 40) % 60])).collect()
}

fn meta(model: &str, top_k: usize) -> String {
    format!("{{\"type\": \"meta\", \"model_id\": \"{model}\", \"layers_logged\": [0], \"top_k\": {top_k}}}\n")
}

#[test]
fn profiling_runs_are_found_wherever_they_are() {
    let folder = Folder::new();
    let dummy =
        |tokens: usize, from: usize| (from..from + tokens).map(|t| route(t, 0, &[43, 5, 7, 58])).collect::<String>();
    let dropped = OpenOptions { drop_dummy_run: true, ..OpenOptions::default() };
    let logs = [
        // Two passes at the start, numbered anew.
        (meta("m", 4) + &dummy(8192, 0) + &dummy(256, 0) + &text(0..500), 8448),
        // Numbers of tokens that never restart.
        (meta("m", 4) + &dummy(2048, 0) + &text(2048..2548), 2048),
        // The engine starts again, with a row that says so and without.
        (meta("m", 4) + &dummy(64, 0) + &text(0..250) + &meta("m", 4) + &dummy(32, 0) + &text(250..500), 96),
        (meta("m", 4) + &text(0..250) + &dummy(512, 0) + &text(250..500), 512),
    ];
    for (log, rows) in logs {
        let path = folder.with("log.jsonl", &log);
        let noted = read(&path);
        assert_eq!(noted.found.layers[&0].tokens, rows + 500);
        let words = format!("{rows} of {} rows are an engine's profiling run", rows + 500);
        assert!(noted.words.contains(&words) && noted.words.contains("--drop-dummy-run"), "{}", noted.words);
        let real = read_with(&path, &dropped);
        assert_eq!(real.found.layers[&0].tokens, 500);
        assert!(
            real.words.contains(&format!("{rows} rows of the engine's profiling (dummy) run left out")),
            "{}",
            real.words
        );
    }
    let none = read_with(&folder.with("log.jsonl", meta("m", 4) + &text(0..500)), &dropped);
    assert_eq!(none.found.layers[&0].tokens, 500);
    assert!(none.words.contains("no profiling run of an engine found"), "{}", none.words);
    let counts = read_with(&case("02_i8.npy"), &dropped);
    assert!(counts.words.contains("counts are recorded, not tokens"), "{}", counts.words);
}

#[test]
fn a_corrupt_expert_is_refused_where_the_experts_are_known() {
    let folder = Folder::new();
    let log = meta("m", 4) + &text(0..3) + &route(3, 0, &[1, 4000, 2, 3]) + &text(4..50);
    let path = folder.with("log.jsonl", log);
    let options = OpenOptions { experts: Some(60), ..OpenOptions::default() };
    refused(&path, &options, "line 5: expert 4000: allowed are 0 to 59");
}

#[test]
fn two_models_are_two_recordings() {
    let folder = Folder::new();
    let qwen = folder.with("qwen.jsonl", meta("qwen", 4) + &text(0..50));
    let olmoe = folder.with("olmoe.jsonl", meta("olmoe", 4) + &text(0..50));
    let Err(error) = read_paths(&[qwen.clone(), olmoe], &OpenOptions::default()) else { panic!("merged") };
    assert!(error.contains("olmoe.jsonl") && error.contains("model olmoe: expected qwen"), "{error}");
    let more = folder.with("more.jsonl", meta("qwen", 4) + &text(50..100));
    let Ok(both) = read_paths(&[qwen, more], &OpenOptions::default()) else { panic!("refused") };
    assert_eq!(both.found.layers[&0].tokens, 100);
    let mixed = folder.with("mixed.jsonl", meta("qwen", 4) + &text(0..50) + &meta("olmoe", 4) + &text(0..50));
    refused(&mixed, &OpenOptions::default(), "line 52: model olmoe: expected qwen");
    let without = |top_k| format!("{{\"type\": \"meta\", \"top_k\": {top_k}}}\n") + &text(0..9);
    let (first, second) = (folder.with("a.jsonl", without(4)), folder.with("b.jsonl", without(8)));
    let Err(error) = read_paths(&[first, second], &OpenOptions::default()) else { panic!("merged") };
    assert!(error.contains("top-k 8: expected 4"), "{error}");
}

#[test]
fn our_minimal_lines_are_read() {
    let folder = Folder::new();
    let log = "{\"type\": \"route\", \"layer\": 3, \"token_idx\": 0, \"topk_ids\": [5, 17]}\n\
               {\"type\": \"route\", \"layer\": 3, \"token_idx\": 1, \"topk_ids\": [2, 5]}\n";
    let minimal = read(&folder.with("minimal.jsonl", log));
    assert_eq!((minimal.format, minimal.found.layers[&3].tokens, minimal.found.experts), (Format::VllmLogger, 2, 18));
}

#[test]
fn arrays_with_more_behind_them_are_refused_by_all() {
    let folder = Folder::new();
    let good = npy("<i4", "(2, 2)", &[[1, 0, 0, 0], [2, 0, 0, 0], [3, 0, 0, 0], [4, 0, 0, 0]].concat());
    assert_eq!(matrix(&folder.with("a.npy", &good)).2, [1, 2, 3, 4]);
    refused(
        &folder.with("extra.npy", [&good[..], b"extra"].concat()),
        &OpenOptions::default(),
        "more bytes behind the data",
    );
    let bools: Vec<u8> = (0..8 * 32).map(|i| u8::from(i % 3 == 0)).collect();
    let path = folder.with("bool.npy", npy("|b1", "(8, 32)", &bools));
    refused(&path, &OpenOptions::default(), "--as map");
    assert_eq!(read_with(&path, &asked(Reading::Counts)).sources, Sources::Ranks(8));
}

#[test]
fn placement_maps_are_no_loads() {
    let folder = Folder::new();
    let default = OpenOptions::default();
    let row: Vec<u8> = (0..3).flat_map(|l| (0..24_i64).flat_map(move |p| ((p * 5 + l) % 16).to_le_bytes())).collect();
    let array = npy("<i8", "(3, 24)", &row);
    for (name, contents) in [
        ("sglang.json", b"{\"physical_to_logical_map\": [[0, 1, 2, 3]]}".to_vec()),
        ("ascend.json", b"{\"moe_layer_count\": 1, \"layer_list\": [{\"layer_id\": 0, \"device_list\": []}]}".to_vec()),
        ("trtllm.yaml", b"initial_global_assignments:\n  0: [0, 1, 2, 3]\n".to_vec()),
        ("map.npz", common::archive(&[("physical_to_logical_map.npy", &array)])),
        ("map.npy", array.clone()),
    ] {
        refused(&folder.with(name, contents), &default, "a placement map");
    }
    let Ok(counts) = read_paths(&[folder.with("map.npy", array)], &asked(Reading::Counts)) else { panic!("refused") };
    assert_eq!(counts.sources, Sources::Ranks(3));
}

#[test]
fn passes_are_tokens_by_layer() {
    let folder = Folder::new();
    let first = folder.with(
        "a.json",
        "[{\"0\": null, \"1\": [[27], [42], [98]], \"3\": [[31], [57], [31]]}, {\"0\": null, \"1\": [[7]], \"3\": [[8]]}]",
    );
    let second = folder.with("b.json", "{\"1\": [[27], [-1]], \"3\": [[1], [2]]}");
    let Ok(both) = read_paths(&[first, second], &OpenOptions { experts: Some(128), ..OpenOptions::default() }) else {
        panic!("refused")
    };
    assert_eq!((both.format, both.top_k, both.experts), (Format::Passes, Some(1), Some(128)));
    let tokens: BTreeMap<u32, u64> = both.found.layers.iter().map(|(&layer, of)| (layer, of.tokens)).collect();
    assert_eq!(tokens, BTreeMap::from([(1, 5), (3, 6)]));
    assert!(both.words.contains("1 token without any expert"), "{}", both.words);
    for (bad, words) in [
        ("[{\"1\": [[27], [x]]}]", "line 1"),
        ("[{\"1\": [[200]]}]", "expert 200: allowed are 0 to 127"),
        ("[{\"one\": [[2]]}]", "layer \"one\": expected a number"),
        ("[{\"1\": [[27], [42]", "EOF"),
        ("[{\"1\": null}]", "no tokens in any pass"),
    ] {
        let options = OpenOptions { experts: Some(128), ..OpenOptions::default() };
        refused(&folder.with("bad.json", bad), &options, words);
    }
}

/// A pickled list of counters, as Python 3 writes it: NumPy scalars as keys, the second of them recalled from the memo.
fn counters(layers: &[&[(u8, u16)]]) -> Vec<u8> {
    let text = |text: &str| [&[0x8c, text.len() as u8], text.as_bytes()].concat();
    let mut bytes = [&b"\x80\x04]("[..]].concat();
    let global = |module: &str, name: &str| [text(module), text(name), vec![0x93]].concat();
    for layer in layers {
        bytes.extend(global("collections", "Counter"));
        bytes.extend(b"}(");
        for (expert, count) in *layer {
            bytes.extend(global("numpy.core.multiarray", "scalar"));
            bytes.extend(global("numpy", "dtype"));
            bytes.extend(text("i8"));
            bytes.extend(b"\x89\x88\x87R(K\x03");
            bytes.extend(text("<"));
            bytes.extend(b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb");
            bytes.extend([&b"C\x08"[..], &[*expert], &[0; 7], b"\x86R"].concat());
            bytes.extend([&b"M"[..], &count.to_le_bytes()].concat());
        }
        bytes.extend(b"u\x85R");
    }
    bytes.extend(b"e.");
    bytes
}

#[test]
fn counters_are_totals_by_layer() {
    let folder = Folder::new();
    let path = folder.with("a.pkl", counters(&[&[(14, 500), (3, 7)], &[(0, 1)], &[(1, 2), (63, 9)]]));
    let read = read(&path);
    assert_eq!((read.format, read.sources, read.found.experts), (Format::Counters, Sources::Totals, 64));
    assert!(read.found.layers.keys().copied().eq([0, 7, 15]), "three counters are OLMoE's");
    assert_eq!((read.found.layers[&0].expert_loads[14], read.found.layers[&0].choices), (500, 507));
    let two = read_with(&folder.with("b.pkl", counters(&[&[(14, 500)], &[(0, 1)]])), &OpenOptions::default());
    assert!(two.found.layers.keys().copied().eq([0, 1]));
    assert!(two.words.contains("counted from 0"), "{}", two.words);
    let calls = b"\x80\x04cposix\nsystem\nX\x02\x00\x00\x00ls\x85R.".to_vec();
    refused(&folder.with("evil.pkl", calls), &OpenOptions::default(), "the pickle calls posix.system");
    refused(&folder.with("state.pkl", b"\x80\x04}K\x01b."), &OpenOptions::default(), "the pickle calls the state");
    refused(&folder.with("text.pkl", b"\x80\x04X\x01\x00\x00\x00a."), &OpenOptions::default(), "a bare pickle");
}

/// A HarMoEny folder: two ranks, two layers, three iterations of four experts, and what lies beside them.
fn harmoeny(folder: &Folder, torn: bool) -> PathBuf {
    let header = "iteration,latency (ms),total number of tokens sent,expert distribution\n";
    for rank in 0..2_u32 {
        for layer in 0..2_u32 {
            let row = |i: u32| format!("{i},0.5,10,\"[{}, {}, {}, 0]\"\n", 10 * rank + i, layer, 10 - i);
            let mut text = header.to_owned() + &(0..3).map(row).collect::<String>();
            if torn && rank == 1 && layer == 1 {
                text.truncate(text.len() - 9);
            }
            folder.with(&format!("{rank}/moe_layer-{layer}.csv"), text);
        }
        folder.with(&format!("{rank}/e2e.csv"), "iteration,latency (s)\n0,2.1\n");
    }
    folder.with("cpu.csv", ",timestamp,cpu_util\n0,1736358795.3,0.0\n");
    folder.with("data.json", "{\"num_experts\": 4, \"world_size\": 2}");
    folder.0.path().to_owned()
}

#[test]
fn harmoeny_folders_have_steps_layers_and_ranks() {
    let folder = Folder::new();
    let whole = read(&harmoeny(&folder, false));
    assert_eq!((whole.format, whole.sources, whole.experts), (Format::Harmoeny, Sources::Ranks(2), Some(4)));
    assert_eq!((whole.found.pieces, whole.found.steps, whole.found.layers.len()), (6, Some((0, 2)), 2));
    assert_eq!(whole.found.layers[&1].expert_loads, [36, 6, 54, 0]);
    let folder = Folder::new();
    let torn = read(&harmoeny(&folder, true));
    assert_eq!((torn.found.layers[&0].microbatches, torn.found.layers[&1].microbatches), (3, 2));
    assert!(
        torn.words.contains("line 4 is torn") && torn.words.contains("1 records that some ranks lack"),
        "{}",
        torn.words
    );
}

#[test]
fn side_files_of_a_folder_are_left_out_and_named() {
    let folder = Folder::new();
    folder.with("a.csv", "Layer ID,Batch Number,Token,Activated Expert IDs\n1,0,a,\"[1, 2]\"\n");
    folder.with("b.csv", "Layer ID,Batch Number,Token,Activated Expert IDs\n1,0,a,\"[3, 4]\"\n");
    folder.with("README.md", "# what this is\n");
    folder.with("config.json", "{\"hidden_size\": 4096}");
    let read = read(folder.0.path());
    assert_eq!(read.found.layers[&1].tokens, 2);
    assert!(read.words.contains("no recording, left out: README.md, config.json"), "{}", read.words);
    folder.with("damaged.npz", "PK\x03\x04");
    refused(folder.0.path(), &OpenOptions::default(), "damaged.npz: the file: cut off, or no zip archive");
}

#[test]
fn cut_files_are_read_as_far_as_they_go_or_refused_in_words() {
    let folder = Folder::new();
    let default = OpenOptions::default();
    // gzip: what was expanded is read, the torn last line is not.
    let log = meta("m", 4) + &text(0..2000);
    let packed = common::gzip(log.as_bytes());
    let cut = read(&folder.with("log.jsonl.gz", &packed[..packed.len() / 2]));
    let tokens = cut.found.layers[&0].tokens;
    assert!((100..2000).contains(&tokens), "{tokens}");
    assert!(cut.words.contains("the gzip stream is cut off"), "{}", cut.words);
    // moe-beyond: the last row is torn.
    let rows = "Layer ID,Batch Number,Token,Activated Expert IDs\n1,0,a,\"[1, 2]\"\n1,0,b,\"[3, 4]\"\n";
    for cut in 1..rows.len() - rows.find("1,0,b").expect("there") {
        let torn = read(&folder.with("a.csv", &rows[..rows.len() - cut]));
        // The last quote may be missing: the list before it is whole.
        let whole = u64::from(cut < 3);
        assert_eq!(torn.found.layers[&1].tokens, 1 + whole, "{cut}");
        assert_eq!(torn.words.contains("line 3 is torn"), whole == 0, "{cut}: {}", torn.words);
    }
    // A table whose last row is short.
    let torn = read(&folder.with("long.csv", "layer,expert,count\n0,1,5\n0,2,"));
    assert_eq!(torn.found.layers[&0].choices, 5);
    // A number that may have been cut is told.
    let open = read(&folder.with("open.csv", "10,20\n30,40"));
    assert!(open.words.contains("no line end"), "{}", open.words);
    // Archives and parquet have their directory at the end.
    refused(
        &folder.with("cut.npz", &std::fs::read(case("02_compressed.npz")).expect("read")[..300]),
        &default,
        "cut off",
    );
    refused(&folder.with("cut.parquet", b"PAR1 and then nothing"), &default, "a parquet file that is cut off");
    refused(&folder.with("cut.json.gz", &common::gzip(b"[[1, 2], [3, 4]]")[..20]), &default, "cut off");
    refused(
        &folder.with("cut.npy", npy("<i4", "(2, 2)", &[1, 0, 0, 0])),
        &default,
        "the data ends before the shape says",
    );
}

/// The folder of real recordings, where there is one.
fn real(name: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("ULTRAEP_TRACES").map(PathBuf::from).filter(|f| f.is_dir());
    if folder.is_none() {
        println!("SKIP {name}: set ULTRAEP_TRACES to the folder of real recordings");
    }
    folder.map(|f| f.join(name))
}

#[test]
fn real_recordings_of_every_kind() {
    let Some(path) = real("harmoeny-qwen") else { return };
    let qwen = read(&path);
    assert_eq!((qwen.sources, qwen.experts, qwen.found.steps), (Sources::Ranks(6), Some(60), Some((0, 1))));
    assert!(
        qwen.found.layers.len() == 24
            && qwen.found.layers.values().all(|l| (l.microbatches, l.choices) == (2, 2 * 6 * 8192))
    );
    let Some(path) = real("llama4-pass") else { return };
    let llama = read(&path);
    assert!(llama.found.layers.keys().copied().eq((1..48).step_by(2)), "odd layers");
    let Some(path) = real("olmoe-counter/olmoe") else { return };
    let (pickles, Some(json)) = (read(&path), real("olmoe")) else { return };
    assert_eq!(pickles.found.layers, read(&json).found.layers, "the published counts");
    let Some(path) = real("vllm-olmoe") else { return };
    let log = read(&path);
    assert!(log.words.contains("2048 of 6519 rows are an engine's profiling run"), "{}", log.words);
    let log = read_with(&path, &OpenOptions { drop_dummy_run: true, ..OpenOptions::default() });
    assert_eq!(log.found.layers[&0].tokens, 4471);
    assert!((log.found.layers[&0].expert_imbalance(64) - 5.083).abs() < 0.001);
}
