//! What a file is, found out by its content; names only group the files of a recording.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use crate::archive::Archive;
use crate::chain::{Chain, OpenOne};
use crate::input::read_head;
use crate::readers::{
    expert_counts, flame, matrices, megatron, moe_beyond, sglang, tensorrt, uet, uet_parquet, ultraep_v1, vllm,
};
use crate::{ImportError, OpenOptions, Recording};

/// Bytes at a file's beginning that are looked at.
const HEAD_BYTES: usize = 1 << 16;
/// Most files of one recording.
const MAX_FILES: usize = 100_000;

/// Opens files or folders as one recording. Several files are read one after another, in the order given; the files of a
/// folder in the order of the numbers in their names.
pub fn open(paths: &[PathBuf]) -> Result<Box<dyn Recording>, ImportError> {
    open_with(paths, &OpenOptions::default())
}

/// As [`open`], with options.
pub fn open_with(paths: &[PathBuf], options: &OpenOptions) -> Result<Box<dyn Recording>, ImportError> {
    if let [folder] = paths
        && folder.is_dir()
        && let Some(recording) = open_folder(folder, options)?
    {
        return Ok(recording);
    }
    let mut files = Vec::new();
    for path in paths {
        if path.is_dir() { files.extend(files_in(path)?) } else { files.push(path.clone()) }
    }
    let Some(first) = files.first() else {
        let path = paths.first().cloned().unwrap_or_default();
        return Err(ImportError::Unknown { path, reason: "no files".to_owned() });
    };
    let open_one = reader_of(first)?;
    let is_same = |open_one: OpenOne, other: OpenOne| std::ptr::fn_addr_eq(open_one, other);
    if is_same(open_one, ultraep_v1::open_manifest) && files.len() > 1 {
        return Err(unknown(first, "a manifest names its chunks: give it alone, or the chunks"));
    }
    if let Some(other) = files.iter().skip(1).find_map(|path| match reader_of(path) {
        Ok(reader) if is_same(reader, open_one) => None,
        Ok(_) => Some(unknown(path, format!("of another format than {}", first.display()))),
        Err(error) => Some(error),
    }) {
        return Err(other);
    }
    if is_same(open_one, megatron::open) {
        return megatron::open_ranks(&files, options);
    }
    Chain::open(files, open_one, options)
}

/// Folders that are one recording.
fn open_folder(folder: &Path, options: &OpenOptions) -> Result<Option<Box<dyn Recording>>, ImportError> {
    if folder.join("run.json").is_file() {
        return uet::open_run(folder, options).map(Some);
    }
    if tensorrt::is_folder(folder) {
        return tensorrt::open_folder(folder, options).map(Some);
    }
    let ranks = megatron::files_in(folder)?;
    if !ranks.is_empty() {
        return megatron::open_ranks(&ranks, options).map(Some);
    }
    let layers = flame::files_in(folder)?;
    if !layers.is_empty() {
        return Chain::open(layers, flame::open, options).map(Some);
    }
    let manifests: Vec<PathBuf> = files_in(folder)?.into_iter().filter(|path| is_manifest(path)).collect();
    match manifests.as_slice() {
        [] => Ok(None),
        [manifest] => ultraep_v1::open_manifest(manifest, options).map(Some),
        [_, ..] => Err(unknown(folder, format!("{} manifests: give one of them", manifests.len()))),
    }
}

/// The plain files of a folder, hidden ones left out, in the order of the numbers in their names.
fn files_in(folder: &Path) -> Result<Vec<PathBuf>, ImportError> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(ImportError::io(folder))? {
        let path = entry.map_err(ImportError::io(folder))?.path();
        let is_hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if path.is_file() && !is_hidden {
            files.push(path);
        }
        if files.len() > MAX_FILES {
            return Err(unknown(folder, format!("over {MAX_FILES} files")));
        }
    }
    files.sort_by_cached_key(|path| natural_key(path.file_name().unwrap_or(OsStr::new(""))));
    Ok(files)
}

/// Digits sort as numbers: `rank10` comes after `rank9`.
pub(crate) fn natural_key(name: &OsStr) -> Vec<(Vec<u8>, u128)> {
    let mut key = Vec::new();
    let mut rest = name.as_encoded_bytes();
    while !rest.is_empty() {
        let text = rest.iter().take_while(|b| !b.is_ascii_digit()).count();
        let digits = rest[text..].iter().take_while(|b| b.is_ascii_digit()).take(38).count();
        let number = rest[text..text + digits].iter().fold(0, |n: u128, b| n * 10 + u128::from(b - b'0'));
        key.push((rest[..text].to_vec(), number));
        rest = &rest[text + digits..];
    }
    key
}

fn is_manifest(path: &Path) -> bool {
    path.file_name().and_then(OsStr::to_str).is_some_and(|name| name.ends_with(".manifest.json"))
}

fn unknown(path: &Path, reason: impl Into<String>) -> ImportError {
    ImportError::Unknown { path: path.to_owned(), reason: reason.into() }
}

/// The reader for a file.
fn reader_of(path: &Path) -> Result<OpenOne, ImportError> {
    let head = read_head(path, HEAD_BYTES)?;
    let text = head.trim_ascii_start();
    if head.is_empty() {
        return Err(unknown(path, "an empty file"));
    }
    if head.starts_with(b"\x89UET") {
        return Ok(uet::open);
    }
    if head.starts_with(b"\x93NUMPY") {
        return Ok(matrices::open_npy);
    }
    if head.starts_with(b"PK") {
        return archive_reader(path);
    }
    if head.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        return Err(unknown(path, "compressed with zstd, which is not read here: unpack it first (zstd -d)"));
    }
    if head.starts_with(b"PAR1") {
        return Ok(if uet_parquet::is_ours(path) { uet_parquet::open } else { flame::open });
    }
    if matches!(head.as_slice(), [0x80, 2..=5, ..]) {
        return Err(unknown(path, "a bare pickle: torch.save of PyTorch 1.6 and later writes an archive"));
    }
    match text.first() {
        Some(b'{') => json_reader(path, text),
        Some(b'[') => Ok(matrices::open_json_list),
        _ => csv_reader(path, &head),
    }
}

/// Archives are told apart by their entries.
fn archive_reader(path: &Path) -> Result<OpenOne, ImportError> {
    let archive = Archive::open(path, &OpenOptions::default())?;
    let has = |entry: &str| archive.names().any(|name| name == entry);
    if has("metadata.npy") && has("pre_logical_loads.npy") {
        return Ok(ultraep_v1::open_chunk);
    }
    if archive.names().any(|name| name.ends_with("/data.pkl")) {
        return Ok(sglang::open);
    }
    if archive.names().any(|name| name.ends_with(".npy")) {
        return Ok(matrices::open_npz);
    }
    let names: Vec<&str> = archive.names().take(6).collect();
    Err(unknown(path, format!("an archive of no known kind; it holds {}", names.join(", "))))
}

/// JSON and JSON lines, told apart by their first keys.
fn json_reader(path: &Path, text: &[u8]) -> Result<OpenOne, ImportError> {
    let first_line = text.split(|&b| b == b'\n').next().unwrap_or(text);
    let has_key = |key: &str| {
        let quoted = format!("\"{key}\"");
        first_line.windows(quoted.len()).any(|w| w == quoted.as_bytes())
    };
    let first_key = text[1..].trim_ascii_start().strip_prefix(b"\"").unwrap_or_default();
    if first_key.first().is_some_and(u8::is_ascii_digit) {
        return Ok(expert_counts::open);
    }
    if has_key("topk_ids") || has_key("layers_logged") {
        return Ok(vllm::open);
    }
    if has_key("top_indices") {
        return Ok(megatron::open);
    }
    if is_manifest(path) || text.windows(ultraep_v1::SCHEMA.len()).any(|w| w == ultraep_v1::SCHEMA.as_bytes()) {
        return Ok(ultraep_v1::open_manifest);
    }
    if text.windows(7).any(|w| w == b"\"loads\"") {
        return Ok(matrices::open_json_object);
    }
    Err(unknown(path, "JSON of no known kind: known are {\"loads\": [[..]]}, counts by layer, vLLM and Megatron logs"))
}

fn csv_reader(path: &Path, head: &[u8]) -> Result<OpenOne, ImportError> {
    let first_line = head.split(|&b| b == b'\n').next().unwrap_or(head);
    let first_line = first_line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(first_line).trim_ascii();
    if first_line == moe_beyond::HEADER.as_bytes() {
        return Ok(moe_beyond::open);
    }
    if !first_line.is_empty() && first_line.iter().all(|b| b.is_ascii_digit() || b", \t".contains(b)) {
        return Ok(matrices::open_csv);
    }
    let shown = String::from_utf8_lossy(&first_line[..first_line.len().min(60)]).into_owned();
    Err(unknown(path, format!("no known recording: it begins {shown:?}")))
}
