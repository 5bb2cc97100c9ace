//! Files that lie, explode, call or escape are refused with words that name the place, in bounded memory.

mod common;

use std::io::Write;
use std::path::{Path, PathBuf};

use common::Folder;
use ultraep_import::{
    Grouping, Load, Microbatch, Microbatches, OpenOptions, Piece, Reading, SourceRule, Sources, open, open_with, survey,
};
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

/// Opens and reads to the end; the error's words, or `None`.
fn refusal(path: &Path) -> Option<String> {
    let mut recording = match open(&[path.to_owned()]) {
        Ok(recording) => recording,
        Err(error) => return Some(error.to_string()),
    };
    survey(&mut *recording).err().map(|error| error.to_string())
}

fn refused(path: &Path, words: &str) {
    let got = refusal(path).unwrap_or_else(|| panic!("{} was read; expected {words:?}", path.display()));
    assert!(got.contains(words), "{got}");
    assert!(!got.contains('\n'), "{got}");
}

fn archive(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut zip = ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (name, data) in entries {
        let options = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Deflated);
        zip.start_file(*name, options).expect("an entry");
        zip.write_all(data).expect("written");
    }
    zip.finish().expect("finished").into_inner()
}

fn npy(descr: &str, shape: &str, data: &[u8]) -> Vec<u8> {
    let header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n");
    let length = (header.len() as u16).to_le_bytes();
    [&b"\x93NUMPY\x01\x00"[..], &length, header.as_bytes(), data].concat()
}

/// A chunk of UltraEP v1 with one record of two experts, but for what `change` does.
fn chunk(change: impl Fn(&str, Vec<u8>) -> Vec<u8>) -> Vec<u8> {
    let text = "{\"schema\": \"ultra_ep_trace_v1\"}";
    let ucs4: Vec<u8> = text.chars().flat_map(|c| (c as u32).to_le_bytes()).collect();
    let arrays = [
        ("metadata.npy", npy(&format!("<U{}", text.len()), "()", &ucs4)),
        ("layers.npy", npy("<i4", "(1,)", &1_i32.to_le_bytes())),
        ("virtual_layers.npy", npy("<i4", "(1,)", &1_i32.to_le_bytes())),
        ("microbatches.npy", npy("<i8", "(1,)", &7_i64.to_le_bytes())),
        ("pre_logical_loads.npy", npy("<i4", "(1, 2)", &[3, 0, 0, 0, 4, 0, 0, 0])),
    ];
    let arrays: Vec<_> = arrays.into_iter().map(|(name, array)| (name, change(name, array))).collect();
    archive(&arrays.iter().map(|(name, array)| (*name, array.as_slice())).collect::<Vec<_>>())
}

#[test]
fn the_chunk_that_the_others_are_made_from_is_good() {
    let folder = Folder::new();
    assert_eq!(refusal(&folder.with("t.chunk000000.npz", chunk(|_, array| array))), None);
}

#[test]
fn a_zip_bomb_is_refused_by_its_size_before_it_is_expanded() {
    let folder = Folder::new();
    let bomb = vec![0; 300 << 20];
    let bytes = chunk(|name, array| if name.starts_with("pre") { bomb.clone() } else { array });
    assert!(bytes.len() < 1 << 20);
    refused(&folder.with("t.chunk000000.npz", bytes), "allowed are up to 268435456");
    // One that lies about its size: the directory says 10 bytes.
    let mut bytes = archive(&[("a/data.pkl", &vec![0; 1 << 20])]);
    let size = (1_u32 << 20).to_le_bytes();
    let at: Vec<usize> = (0..bytes.len() - 4).filter(|&i| bytes[i..i + 4] == size).collect();
    at.into_iter().for_each(|i| bytes[i..i + 4].copy_from_slice(&10_u32.to_le_bytes()));
    assert!(refusal(&folder.with("bomb.pt", bytes)).is_some());
}

#[test]
fn a_gzip_bomb_in_a_log_ends_at_the_limit_of_a_line() {
    let folder = Folder::new();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(b"{\"type\": \"route\", \"topk_ids\": [1").expect("packed");
    for _ in 0..64 {
        gzip.write_all(&vec![b' '; 1 << 20]).expect("packed");
    }
    let path = folder.with("log.jsonl.gz", gzip.finish().expect("packed"));
    refused(&path, "bytes in a line");
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(b"[").expect("packed");
    for _ in 0..80 {
        gzip.write_all(&vec![b' '; 1 << 20]).expect("packed");
    }
    refused(&folder.with("m.json.gz", gzip.finish().expect("packed")), "allowed are up to 67108864");
}

#[test]
fn lying_shapes_are_refused() {
    let folder = Folder::new();
    let with = |name: &'static str, array: Vec<u8>| chunk(move |n, good| if n == name { array.clone() } else { good });
    for (name, array, words) in [
        ("pre_logical_loads.npy", npy("<i4", "(1000000, 4000)", &[0; 8]), "bytes of data"),
        ("pre_logical_loads.npy", npy("<i4", "(1, 100000)", &vec![0; 400_000]), "experts"),
        ("pre_logical_loads.npy", npy("<i4", "(1099511627776, 1099511627776)", &[0; 8]), "bytes of data"),
        ("pre_logical_loads.npy", npy("<i4", "(1, 2, 1, 1, 1)", &[0; 8]), "dimensions"),
        ("pre_logical_loads.npy", npy("<f4", "(1, 2)", &[0; 8]), "integers"),
        ("pre_logical_loads.npy", npy("<i4", "(1, 2)", &[0xff; 8]), "no count"),
        ("layers.npy", npy("<i4", "(2,)", &[0; 8]), "number of records"),
        ("layers.npy", npy("<i4", "(1,)", &[0xff; 4]), "layer -1"),
        ("metadata.npy", npy("<U9999999", "()", &[]), "bytes of data"),
    ] {
        refused(&folder.with("t.chunk000000.npz", with(name, array)), words);
    }
    refused(&folder.with("a.npy", npy("<i4", "(8, 64)", &[0; 16])), "ends before the shape says");
    refused(&folder.with("a.npy", npy("<i4", "(100000, 64)", &[])), "allowed are up to 1024");
    refused(&folder.with("a.npy", npy("<i4", "(99999999999999999999, 64)", &[])), "not a NumPy array");
}

#[test]
fn archives_of_plain_matrices() {
    let folder = Folder::new();
    let loads = npy("<u2", "(1, 2, 3)", &[1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0]);
    let other = npy("<i4", "(1,)", &[0; 4]);
    let path = folder.with("a.npz", archive(&[("other.npy", &other), ("loads.npy", &loads)]));
    let mut piece = Piece::default();
    let mut recording = open(&[path]).expect("opened");
    assert!(recording.next(&mut piece).expect("a piece"));
    assert_eq!(piece.load, Load::Counts { sources: 2, counts: vec![1, 2, 3, 4, 5, 6] });
    let several = archive(&[("other.npy", &other), ("more.npy", &loads)]);
    refused(&folder.with("a.npz", several), "choose one with --array: other [1], more [1, 2, 3]");
    let lying = npy("<u2", "(1000, 2, 3)", &[0; 12]);
    refused(&folder.with("a.npz", archive(&[("a.npy", &lying)])), "bytes of data");
}

#[test]
fn a_pickle_that_calls_something_is_named_and_not_called() {
    let folder = Folder::new();
    let witness = folder.0.path().join("called");
    let command = format!("touch {}", witness.display());
    let mut pickle = b"\x80\x02cposix\nsystem\nX".to_vec();
    pickle.extend((command.len() as u32).to_le_bytes());
    pickle.extend(command.bytes());
    pickle.extend(b"\x85R.");
    let path = folder.with("evil.pt", archive(&[("archive/data.pkl", &pickle)]));
    refused(&path, "the pickle calls posix.system");
    assert!(!witness.exists());
}

#[test]
fn paths_do_not_leave_the_folder() {
    let folder = Folder::new();
    refused(&folder.with("a.npz", archive(&[("../../etc/cron.d/x", b"x")])), "leaves the recording's folder");
    let manifest = "{\"schema\": \"ultra_ep_trace_v1\", \"trace_id\": \"../../secret\", \"chunks\": 1}";
    refused(&folder.with("t.manifest.json", manifest), "leaves the recording's folder");
    let manifest = "{\"schema\": \"ultra_ep_trace_v1\", \"trace_id\": \"t\", \"chunks\": 99999999999}";
    refused(&folder.with("t.manifest.json", manifest), "allowed are up to 100000");
}

#[test]
fn text_that_lies_names_its_line() {
    let folder = Folder::new();
    let csv = |rows: &str| format!("Layer ID,Batch Number,Token,Activated Expert IDs\n{rows}\n");
    for (name, text, words) in [
        ("a.csv", csv("1,0,a,\"[1]\"\n1,0,a,\"[1, -2]\""), "line 3"),
        ("a.csv", csv("1,0,a,\"[99999999999999999999]\""), "line 2"),
        ("a.csv", csv("70000,0,a,\"[1]\""), "layer 70000"),
        ("a.csv", csv("1,0,\"[1]\""), "number of columns 3"),
        ("a.csv", csv("1,0,a,[]"), "a list such as"),
        ("a.jsonl", "{\"type\": \"route\", \"topk_ids\": []}".into(), "no topk_ids"),
        ("a.jsonl", "{\"type\": \"meta\", \"layers_logged\": []}\n{\"type\": \"route\"\n".into(), "line 2"),
        ("a.json", "{\"0\": {\"5000\": 1}}".into(), "expert 5000"),
        ("a.json", "{\"0\": {\"1\": -4}}".into(), "no count"),
        ("a.json", "{\"0\": {\"1\": 4}, \"0\": {}}".into(), "twice"),
        (
            "router_trace_rank0.jsonl",
            "{\"step\": 3, \"layer\": 1, \"num_tokens\": 9, \"top_indices\": [[1]]}".into(),
            "length of top_indices",
        ),
        ("a.json", "[[1, 2], [3]]".into(), "[1] (from 0)"),
        ("a.bin", "what is this".into(), "no known recording"),
        ("a.bin", String::new(), "empty"),
    ] {
        refused(&folder.with(name, text), words);
    }
}

#[test]
fn a_safetensors_header_is_believed_only_within_the_file() {
    let folder = Folder::new();
    folder.with("meta_info.json", "{\"num_experts\": 2}");
    let file = |header: &str| [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 16]].concat();
    let tensor = |key: &str, shape: &str, offsets: &str| {
        file(&format!("{{\"{key}\": {{\"dtype\": \"I64\", \"shape\": {shape}, \"data_offsets\": {offsets}}}}}"))
    };
    for (bytes, words) in [
        (u64::MAX.to_le_bytes().to_vec(), "bytes of header"),
        (tensor("0_1", "[2]", "[16, 32]"), "offsets"),
        (tensor("0_1", "[2]", "[32, 16]"), "offsets"),
        (tensor("0_1", "[9]", "[0, 16]"), "tensor I64 [9]"),
        (tensor("../x", "[2]", "[0, 16]"), "{iteration}_{layer}"),
        (file("{"), "byte 8"),
    ] {
        folder.with("rank0.safetensors", bytes);
        refused(folder.0.path(), words);
    }
}

/// A dict of one key with a tensor, as `torch.save` pickles it.
fn tensor_pickle(key: &str, shape: &[u8], stride: &[u8]) -> Vec<u8> {
    let text = |text: &str| [&b"X"[..], &(text.len() as u32).to_le_bytes(), text.as_bytes()].concat();
    let numbers =
        |values: &[u8]| [&b"("[..], &values.iter().flat_map(|&v| [b'K', v]).collect::<Vec<_>>(), b"t"].concat();
    [
        &b"\x80\x02}q\x00"[..],
        &text(key),
        b"ctorch._utils\n_rebuild_tensor_v2\n((",
        &text("storage"),
        b"ctorch\nIntStorage\n",
        &text("0"),
        &text("cpu"),
        b"K\x08tQK\x00",
        &numbers(shape),
        &numbers(stride),
        b"\x89ccollections\nOrderedDict\n)RtRs.",
    ]
    .concat()
}

fn pt(folder: &Folder, pickle: &[u8]) -> PathBuf {
    let data: Vec<u8> = (1..=8_i32).flat_map(i32::to_le_bytes).collect();
    let entries: [(&str, &[u8]); 3] = [("a/data.pkl", pickle), ("a/byteorder", b"little"), ("a/data/0", &data)];
    folder.with("rec.pt", archive(&entries))
}

#[test]
fn sglang_counts_are_read_and_their_tensors_must_fit() {
    let folder = Folder::new();
    let path = pt(&folder, &tensor_pickle("logical_count", &[2, 1, 4], &[4, 4, 1]));
    let mut recording = open(&[path]).expect("opened");
    assert_eq!(recording.info().sources, Sources::Totals);
    let mut piece = Piece::default();
    for (step, expected) in [(0, vec![1, 2, 3, 4]), (1, vec![5, 6, 7, 8])] {
        assert!(recording.next(&mut piece).expect("a piece"));
        assert_eq!((piece.step, piece.layer), (step, 0));
        assert_eq!(piece.load, Load::Counts { sources: 1, counts: expected });
    }
    assert!(!recording.next(&mut piece).expect("the end"));
    refused(&pt(&folder, &tensor_pickle("logical_count", &[200, 1, 4], &[4, 4, 1])), "at most 8 elements");
    refused(&pt(&folder, &tensor_pickle("logical_count", &[200, 200, 4], &[0, 0, 0])), "not contiguous");
    refused(&pt(&folder, &tensor_pickle("other", &[2, 1, 4], &[4, 4, 1])), "no records");
}

#[test]
fn windows_are_bounded_too() {
    let folder = Folder::new();
    let path = folder.with("a.csv", "Layer ID,Batch Number,Token,Activated Expert IDs\n1,0,a,\"[9]\"\n");
    let grouping = Grouping { ranks: 2, experts: 4, microbatch_tokens: 1, rule: SourceRule::Blocks, scale: 1 };
    let read = |grouping: Grouping| {
        let mut recording = open(std::slice::from_ref(&path)).expect("opened");
        let made = Microbatches::new(&mut *recording, grouping);
        made.and_then(|mut m| m.next(&mut Microbatch::default())).err().map(|error| error.to_string())
    };
    assert_eq!(read(grouping).as_deref(), Some("layer 1: expert 9; the group has 4"));
    let scaled = Grouping { experts: 10, scale: i32::MAX as u32, ..grouping };
    assert_eq!(read(scaled), None);
    assert!(read(Grouping { ranks: 0, ..grouping }).is_some_and(|words| words.contains("ranks 0")));
    assert!(read(Grouping { ranks: 5000, ..grouping }).is_some_and(|words| words.contains("ranks 5000")));
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(200))]
    /// Good files with a few bytes changed, and cut: an error or a recording, never a panic.
    #[test]
    fn changed_bytes_never_panic(which in 0..4_usize, changes in proptest::collection::vec((0..4000_usize, 0..=255_u8), 0..4), cut in 0..4000_usize) {
        let folder = Folder::new();
        let (name, mut bytes) = match which {
            0 => ("a.npz", chunk(|_, array| array)),
            1 => ("a.pt", std::fs::read(pt(&folder, &tensor_pickle("logical_count", &[2, 1, 4], &[4, 4, 1]))).expect("read")),
            2 => ("a.npy", npy("<i4", "(2, 1, 2, 2)", &[1; 32])),
            _ => ("a.json", b"[[[1, 2], [3, 4]], [[5, 6], [7, 8]]]".to_vec()),
        };
        for (at, value) in changes {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        if cut < bytes.len() && cut % 3 == 0 {
            bytes.truncate(cut);
        }
        let _ = refusal(&folder.with(name, bytes));
    }
}

/// Expert ids at the ends of 64 bits, in every format of text that has ids, and in arrays of them: refused with the place,
/// and no memory is taken for so many experts.
#[test]
fn the_largest_and_smallest_numbers_are_no_experts() {
    for id in [i64::MAX.to_string(), i64::MIN.to_string(), u64::MAX.to_string()] {
        let files = [
            (
                "log.jsonl",
                format!(
                    "{{\"type\": \"route\", \"req_id\": \"r\", \"token_idx\": 0, \"layer\": 0, \"topk_ids\": [1, {id}]}}\n"
                ),
            ),
            (
                "beyond.csv",
                format!("Layer ID,Batch Number,Token,Activated Expert IDs\n1,0,a,\"[1, 2]\"\n1,0,b,\"[3, {id}]\"\n"),
            ),
            ("llama.csv", format!("layer,expert\n0,1\n0,{id}\n")),
            ("long.csv", format!("layer_id,expert_id,count\n0,0,5\n0,{id},7\n")),
            ("counts.json", format!("{{\"0\": {{\"0\": 5, \"{id}\": 7}}}}")),
            ("passes.json", format!("[{{\"1\": [[27, 3], [42, {id}]]}}]")),
            (
                "router_trace_rank0.jsonl",
                format!(
                    "{{\"step\": 3, \"layer\": 1, \"num_tokens\": 1, \"topk\": 2, \"top_indices\": [[1, {id}]]}}\n"
                ),
            ),
        ];
        for (name, text) in files {
            let folder = Folder::new();
            let path = folder.with(name, text);
            let mut got = None;
            let memory = allocation_counter::measure(|| got = refusal(&path));
            let got = got.unwrap_or_else(|| panic!("{name} with {id} was read"));
            assert!(got.contains(name) && got.contains(&id[..10]) && !got.contains('\n'), "{name} with {id}: {got}");
            assert!(memory.bytes_max < 64 << 20, "{name} with {id}: {} bytes", memory.bytes_max);
        }
    }
    for id in [i64::MAX, i64::MIN, i64::from(u32::MAX), 1 << 32] {
        let folder = Folder::new();
        let data: Vec<u8> = [1, 2, 3, id].into_iter().flat_map(i64::to_le_bytes).collect();
        let path = folder.with("ids.npy", npy("<i8", "(2, 2)", &data));
        let options = OpenOptions { reading: Some(Reading::Ids), ..OpenOptions::default() };
        let read = open_with(&[path], &options).and_then(|mut recording| survey(&mut *recording));
        let error = read.map(drop).expect_err("an id that is none").to_string();
        assert!(error.contains("ids.npy") && error.contains(&id.to_string()), "{error}");
    }
}
