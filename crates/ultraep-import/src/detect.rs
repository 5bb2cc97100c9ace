//! What a file is, found out by its content; names only group the files of a recording.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use crate::archive::Archive;
use crate::chain::Chain;
use crate::classify::{is_placement_name, known_names};
use crate::input::read_head;
use crate::readers::{
    arrays, calls, counters, expert_counts, flame, harmoeny, mcore_dump, megatron, moe_beyond, passes, sglang, table,
    tensorrt, uet, uet_parquet, ultraep_v1, vllm,
};
use crate::watch::watch;
use crate::{ImportError, Inputs, OpenOptions, Place, Problem, Recording};

/// Bytes at a file's beginning that are looked at.
const HEAD_BYTES: usize = 1 << 16;
/// Most files of one recording.
const MAX_FILES: usize = 100_000;
/// Lines at a file's beginning that are looked at for the keys of a log.
const HEAD_LINES: usize = 8;

/// A reader of one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reader {
    Uet,
    UetParquet,
    Flame,
    Npy,
    Npz,
    JsonArray,
    Table,
    MoeBeyond,
    ExpertCounts,
    Passes,
    Calls,
    Counters,
    VllmLogger,
    Megatron,
    Sglang,
    V1Manifest,
    V1Chunk,
    McoreDump,
}

impl Reader {
    /// Opens one file with it.
    pub(crate) fn open(self, path: &Path, options: &OpenOptions) -> Result<Box<dyn Recording>, ImportError> {
        match self {
            Self::Uet => uet::open(path, options),
            Self::UetParquet => uet_parquet::open(path, options),
            Self::Flame => flame::open(path, options),
            Self::Npy => arrays::open_npy(path, options),
            Self::Npz => arrays::open_npz(path, options),
            Self::JsonArray => arrays::open_json(path, options),
            Self::Table => table::open(path, first_line(&read_head(path, HEAD_BYTES)?), options),
            Self::MoeBeyond => moe_beyond::open(path, options),
            Self::ExpertCounts => expert_counts::open(path, options),
            Self::Passes => passes::open(path, options),
            Self::Calls => calls::open(path, options),
            Self::Counters => counters::open(path, options),
            Self::VllmLogger => vllm::open(path, options),
            Self::Megatron => megatron::open(path, options),
            Self::Sglang => sglang::open(path, options),
            Self::V1Manifest => ultraep_v1::open_manifest(path, options),
            Self::V1Chunk => ultraep_v1::open_chunk(path, options),
            Self::McoreDump => mcore_dump::open_ranks(&[path.to_owned()], options),
        }
    }
}

/// Opens files or folders as one recording. Several files are read one after another, in the order given; the files of a
/// folder in the order of the numbers in their names. `-` is standard input; a pipe is read once, into a temporary file.
pub fn open(paths: &[PathBuf]) -> Result<Box<dyn Recording>, ImportError> {
    open_with(paths, &OpenOptions::default())
}

/// As [`open`], with options. What is read more than once from a pipe needs [`Inputs`].
pub fn open_with(paths: &[PathBuf], options: &OpenOptions) -> Result<Box<dyn Recording>, ImportError> {
    Inputs::new(paths)?.open(options)
}

/// Opens files that can be opened again.
pub(crate) fn open_files(paths: &[PathBuf], options: &OpenOptions) -> Result<Box<dyn Recording>, ImportError> {
    open_unwatched(paths, options).map(|recording| watch(recording, options))
}

fn open_unwatched(paths: &[PathBuf], options: &OpenOptions) -> Result<Box<dyn Recording>, ImportError> {
    if let [folder] = paths
        && folder.is_dir()
        && let Some(recording) = open_folder(folder, options)?
    {
        return Ok(recording);
    }
    let (mut files, mut side_files) = (Vec::new(), Vec::new());
    for path in paths {
        if path.is_dir() {
            sort_out(files_in(path)?, &mut files, &mut side_files)?;
        } else {
            files.push((path.clone(), reader_of(path)?));
        }
    }
    let Some(&(ref first, reader)) = files.first() else {
        let path = paths.first().cloned().unwrap_or_default();
        return Err(side_files.into_iter().next().map_or_else(|| unknown(&path, "no files"), |(_, error)| error));
    };
    if reader == Reader::V1Manifest && files.len() > 1 {
        return Err(unknown(first, "a manifest names its chunks: give it alone, or the chunks"));
    }
    if let Some((path, _)) = files.iter().find(|(_, other)| *other != reader) {
        return Err(unknown(path, format!("of another format than {}", first.display())));
    }
    let paths: Vec<PathBuf> = files.into_iter().map(|(path, _)| path).collect();
    let recording = match reader {
        Reader::Megatron => megatron::open_ranks(&paths, options)?,
        Reader::McoreDump => mcore_dump::open_ranks(&paths, options)?,
        _ => Chain::open(paths, reader, options)?,
    };
    Ok(arrays::noted(recording, side_note(&side_files)))
}

/// Parts what can be read from what lies beside it.
fn sort_out(
    found: Vec<PathBuf>,
    files: &mut Vec<(PathBuf, Reader)>,
    side_files: &mut Vec<(PathBuf, ImportError)>,
) -> Result<(), ImportError> {
    for path in found {
        match reader_of(&path) {
            Ok(reader) => files.push((path, reader)),
            Err(error @ ImportError::Unknown { .. }) => side_files.push((path, error)),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn side_note(side_files: &[(PathBuf, ImportError)]) -> Option<String> {
    const SHOWN: usize = 4;
    let name = |(path, _): &(PathBuf, ImportError)| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let names: Vec<String> = side_files.iter().take(SHOWN).map(name).collect();
    let more = side_files.len().saturating_sub(SHOWN);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    (!names.is_empty()).then(|| format!("no recording, left out: {}{more}", names.join(", ")))
}

/// Folders that are one recording.
fn open_folder(folder: &Path, options: &OpenOptions) -> Result<Option<Box<dyn Recording>>, ImportError> {
    if folder.join("run.json").is_file() {
        return uet::open_run(folder, options).map(Some);
    }
    if tensorrt::is_folder(folder) {
        return tensorrt::open_folder(folder, options).map(Some);
    }
    let ranks = harmoeny::ranks_in(folder);
    if !ranks.is_empty() {
        return harmoeny::open(&ranks, options).map(Some);
    }
    let ranks = megatron::files_in(folder)?;
    if !ranks.is_empty() {
        return megatron::open_ranks(&ranks, options).map(Some);
    }
    let layers = flame::files_in(folder)?;
    if !layers.is_empty() {
        return Chain::open(layers, Reader::Flame, options).map(Some);
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
fn reader_of(path: &Path) -> Result<Reader, ImportError> {
    let head = read_head(path, HEAD_BYTES)?;
    let text = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&head).trim_ascii_start();
    if text.is_empty() {
        return Err(unknown(path, "an empty file"));
    }
    if head.starts_with(b"\x89UET") {
        return Ok(Reader::Uet);
    }
    if head.starts_with(b"\x93NUMPY") {
        return Ok(Reader::Npy);
    }
    if head.starts_with(b"PK") {
        return archive_reader(path);
    }
    if head.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        return Err(unknown(path, "compressed with zstd, which is not read here: unpack it first (zstd -d)"));
    }
    if head.starts_with(&[0xff, 0xfe]) || head.starts_with(&[0xfe, 0xff]) {
        return Err(unknown(path, "text in UTF-16: save it as UTF-8"));
    }
    if head.starts_with(b"PAR1") {
        return parquet_reader(path);
    }
    if matches!(head.as_slice(), [0x80, 2..=5, ..]) {
        return Ok(Reader::Counters);
    }
    if text.starts_with(b"initial_global_assignments") {
        return Err(Problem::Placement("initial_global_assignments".to_owned()).at(path, Place::File));
    }
    match text.first() {
        Some(b'{') => json_reader(path, text),
        Some(b'[') if text[1..].trim_ascii_start().first() == Some(&b'{') => Ok(Reader::Passes),
        Some(b'[') => Ok(Reader::JsonArray),
        _ => table_reader(path, &head),
    }
}

/// A parquet file's directory is at its end: one that is cut off has none.
fn parquet_reader(path: &Path) -> Result<Reader, ImportError> {
    let mut end = [0; 4];
    let mut file = File::open(path).map_err(ImportError::io(path))?;
    let is_whole = file.seek(SeekFrom::End(-4)).and_then(|_| file.read_exact(&mut end)).is_ok() && &end == b"PAR1";
    if !is_whole {
        let words = "a parquet file that is cut off: its directory, at the end, is missing";
        return Err(Problem::Syntax(words.to_owned()).at(path, Place::File));
    }
    Ok(if uet_parquet::is_ours(path) { Reader::UetParquet } else { Reader::Flame })
}

/// Archives are told apart by their entries.
fn archive_reader(path: &Path) -> Result<Reader, ImportError> {
    let archive = Archive::open(path, &OpenOptions::default())?;
    let has = |entry: &str| archive.names().any(|name| name == entry);
    if has("metadata.npy") && has("pre_logical_loads.npy") {
        return Ok(Reader::V1Chunk);
    }
    if mcore_dump::is_dump(&archive) {
        return Ok(Reader::McoreDump);
    }
    if archive.names().any(|name| name.ends_with("/data.pkl")) {
        return Ok(Reader::Sglang);
    }
    if archive.names().any(|name| name.ends_with(".npy")) {
        return Ok(Reader::Npz);
    }
    let names: Vec<&str> = archive.names().take(6).collect();
    Err(unknown(path, format!("an archive of no known kind; it holds {}", names.join(", "))))
}

/// JSON and JSON lines, told apart by their first keys.
fn json_reader(path: &Path, text: &[u8]) -> Result<Reader, ImportError> {
    let within = |text: &[u8], key: &str| {
        let quoted = format!("\"{key}\"");
        text.windows(quoted.len()).any(|w| w == quoted.as_bytes())
    };
    let first_lines_end = text.iter().enumerate().filter(|&(_, &b)| b == b'\n').nth(HEAD_LINES - 1);
    let first_lines = &text[..first_lines_end.map_or(text.len(), |(at, _)| at)];
    let has_key = |key: &str| within(first_lines, key);
    let first_key = text[1..].trim_ascii_start().strip_prefix(b"\"").unwrap_or_default();
    if first_key.first().is_some_and(u8::is_ascii_digit) {
        let digits = first_key.iter().take_while(|b| b.is_ascii_digit()).count();
        let value = first_key[digits..].iter().copied().find(|b| !b"\": \t\r\n".contains(b));
        return Ok(if matches!(value, Some(b'[' | b'n')) { Reader::Passes } else { Reader::ExpertCounts });
    }
    if has_key("type") && (has_key("topk_ids") || has_key("layers_logged") || has_key("route")) {
        return Ok(Reader::VllmLogger);
    }
    if has_key("top_indices") && has_key("step") {
        return Ok(Reader::Megatron);
    }
    if is_manifest(path) || text.windows(ultraep_v1::SCHEMA.len()).any(|w| w == ultraep_v1::SCHEMA.as_bytes()) {
        return Ok(Reader::V1Manifest);
    }
    if within(text, "ranks") && within(text, "tokens_per_expert") {
        return Ok(Reader::Calls);
    }
    let names =
        ["physical_to_logical_map", "logical_to_physical_map", "logical_to_all_physical_map", "moe_layer_count"];
    if let Some(name) = names.into_iter().find(|name| is_placement_name(name) && within(text, name)) {
        return Err(Problem::Placement(name.to_owned()).at(path, Place::File));
    }
    if known_names().into_iter().any(|name| within(text, name)) {
        return Ok(Reader::JsonArray);
    }
    let words = "JSON of no known kind: known are {\"loads\": [[..]]}, counts by layer, passes, vLLM and Megatron logs";
    Err(unknown(path, words))
}

/// The first line that is not empty, without a byte order mark. Lines may end as on any system.
fn first_line(head: &[u8]) -> &[u8] {
    let text = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head);
    text.split(|&b| b == b'\n' || b == b'\r').find(|line| !line.trim_ascii().is_empty()).unwrap_or_default()
}

fn table_reader(path: &Path, head: &[u8]) -> Result<Reader, ImportError> {
    let line = first_line(head);
    if line.trim_ascii() == moe_beyond::HEADER.as_bytes() {
        return Ok(Reader::MoeBeyond);
    }
    if table::is_table(line) {
        return Ok(Reader::Table);
    }
    let shown = String::from_utf8_lossy(&line[..line.len().min(60)]).into_owned();
    let columns = table::refusal(line).map_or_else(String::new, |words| format!(": {words}"));
    Err(unknown(path, format!("no known recording: it begins {shown:?}{columns}")))
}
