//! SGLang's detail recordings: token choices by physical expert, mapped to logical ones.

use std::io::Write;
use std::path::PathBuf;

use tempfile::TempDir;
use ultraep_import::{Format, Load, Piece, Sources, open};
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

fn text(text: &str) -> Vec<u8> {
    [&b"X"[..], &(text.len() as u32).to_le_bytes(), text.as_bytes()].concat()
}

fn number(value: u32) -> Vec<u8> {
    [&b"J"[..], &(value as i32).to_le_bytes()].concat()
}

fn tuple(values: &[u32]) -> Vec<u8> {
    [&b"("[..], &values.iter().flat_map(|&v| number(v)).collect::<Vec<_>>(), b"t"].concat()
}

/// A contiguous tensor of the storage `key`, as `torch.save` pickles it.
fn tensor(kind: &str, key: &str, shape: &[u32]) -> Vec<u8> {
    let stride: Vec<u32> = (0..shape.len()).map(|i| shape[i + 1..].iter().product()).collect();
    let count = shape.iter().product();
    [
        &b"ctorch._utils\n_rebuild_tensor_v2\n(("[..],
        &text("storage"),
        format!("ctorch\n{kind}\n").as_bytes(),
        &text(key),
        &text("cpu"),
        &number(count),
        b"tQ",
        &number(0),
        &tuple(shape),
        &tuple(&stride),
        b"\x89ccollections\nOrderedDict\n)RtR",
    ]
    .concat()
}

fn archive(folder: &TempDir, pickle: &[u8], storages: &[(&str, Vec<u8>)]) -> PathBuf {
    let mut zip = ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let stored = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    zip.start_file("rec/data.pkl", stored).expect("an entry");
    zip.write_all(pickle).expect("written");
    for (name, data) in storages {
        zip.start_file(format!("rec/data/{name}"), stored).expect("an entry");
        zip.write_all(data).expect("written");
    }
    let path = folder.path().join("rec.pt");
    std::fs::write(&path, zip.finish().expect("finished").into_inner()).expect("written");
    path
}

/// `{"records": [{"forward_pass_id": 5, KEY: tensor}], "last_physical_to_logical_map": tensor}`.
fn detail(key: &str, of_record: &[u8]) -> Vec<u8> {
    [
        &b"\x80\x02}("[..],
        &text("records"),
        b"](}(",
        &text("forward_pass_id"),
        &number(5),
        &text("gatherer_key"),
        &text("primary"),
        &text(key),
        of_record,
        b"ue",
        &text("last_physical_to_logical_map"),
        &tensor("LongStorage", "1", &[2, 3]),
        b"u.",
    ]
    .concat()
}

fn map() -> (&'static str, Vec<u8>) {
    // Three physical experts of two logical ones; the copy is another in the second layer.
    ("1", [0_i64, 1, 1, 0, 1, 0].into_iter().flat_map(i64::to_le_bytes).collect())
}

#[test]
fn token_choices_are_mapped_to_logical_experts_and_pads_are_left_out() {
    let folder = TempDir::new().expect("a folder");
    let ids = [0_i32, 2, 1, -1, 2, 1, -1, -1].into_iter().flat_map(i32::to_le_bytes).collect();
    let pickle = detail("topk_ids_of_layer", &tensor("IntStorage", "0", &[2, 2, 2]));
    let mut recording = open(&[archive(&folder, &pickle, &[("0", ids), map()])]).expect("opened");
    let info = recording.info();
    assert_eq!((info.format, info.sources, info.experts), (Format::Sglang, Sources::Tokens, Some(2)));
    let mut piece = Piece::default();
    let none = u16::MAX;
    for (layer, expected) in [(0, vec![0, 1, 1, none]), (1, vec![0, 1])] {
        assert!(recording.next(&mut piece).expect("a piece"));
        assert_eq!((piece.step, piece.layer), (5, layer));
        assert_eq!(piece.load, Load::Choices { per_token: 2, ids: expected });
    }
    assert!(!recording.next(&mut piece).expect("the end"));
}

#[test]
fn counts_of_physical_experts_are_added_up() {
    let folder = TempDir::new().expect("a folder");
    let counts = [10_i32, 20, 30, 1, 2, 3].into_iter().flat_map(i32::to_le_bytes).collect();
    let pickle = detail("global_physical_count", &tensor("IntStorage", "0", &[2, 3]));
    let mut recording = open(&[archive(&folder, &pickle, &[("0", counts), map()])]).expect("opened");
    let mut piece = Piece::default();
    for (layer, expected) in [(0, vec![10, 50]), (1, vec![4, 2])] {
        assert!(recording.next(&mut piece).expect("a piece"));
        assert_eq!((piece.layer, &piece.load), (layer, &Load::Counts { sources: 1, counts: expected }));
    }
    // An id that the map does not have.
    let ids = vec![9_i32; 8].into_iter().flat_map(i32::to_le_bytes).collect();
    let pickle = detail("topk_ids_of_layer", &tensor("IntStorage", "0", &[2, 2, 2]));
    let mut recording = open(&[archive(&folder, &pickle, &[("0", ids), map()])]).expect("opened");
    let error = recording.next(&mut piece).expect_err("no such expert").to_string();
    assert!(error.contains("expert 9: allowed are 0 to 2"), "{error}");
}
