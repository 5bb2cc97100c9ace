//! TensorRT-LLM statistics: a folder with `meta_info.json` and `rank{r}.safetensors`, whose keys are `{iteration}_{layer}`:
//! counts `i64 [E]`, local to that rank. It has the source axis.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use ultraep_plan::{MAX_EXPERTS, MAX_RANKS};

use crate::error::{count, layer_id};
use crate::input::read_whole;
use crate::{Format, ImportError, OpenOptions, Piece, Place, Problem, Recording, RecordingInfo, Sources};

/// Longest header of a safetensors file.
const MAX_HEADER_BYTES: u64 = 64 << 20;

#[derive(Debug, Deserialize)]
struct Meta {
    num_experts: usize,
    num_experts_per_token: Option<usize>,
}

#[derive(Debug, Deserialize)]
struct Tensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

struct TensorRtLlm {
    info: RecordingInfo,
    experts: usize,
    ranks: Vec<RankFile>,
    /// (iteration, layer) in order, with the ranks that have it.
    keys: std::collections::btree_map::IntoIter<(u64, u32), usize>,
    incomplete: u64,
    buffer: Vec<u8>,
    options: OpenOptions,
}

/// One rank's file: where the tensor of each key lies.
struct RankFile {
    path: PathBuf,
    file: File,
    offsets: BTreeMap<(u64, u32), u64>,
}

/// Whether a folder is such a recording.
pub(crate) fn is_folder(folder: &Path) -> bool {
    folder.join("meta_info.json").is_file() && folder.join("rank0.safetensors").is_file()
}

pub(crate) fn open_folder(folder: &Path, options: &OpenOptions) -> Result<Box<dyn Recording>, ImportError> {
    let meta_path = folder.join("meta_info.json");
    let bytes = read_whole(&meta_path, options)?;
    let refuse = |problem: Problem| problem.at(&meta_path, Place::File);
    let meta: Meta = serde_json::from_slice(&bytes).map_err(|error| refuse(Problem::syntax(error)))?;
    let experts = meta.num_experts;
    if !(1..=MAX_EXPERTS).contains(&experts) {
        let max = MAX_EXPERTS as u64;
        return Err(refuse(Problem::Limit { what: "experts, at least 1:", got: experts as u64, max }));
    }
    let mut ranks = Vec::new();
    loop {
        let path = folder.join(format!("rank{}.safetensors", ranks.len()));
        if !path.is_file() {
            break;
        }
        if ranks.len() == MAX_RANKS {
            let (got, max) = (MAX_RANKS as u64 + 1, MAX_RANKS as u64);
            return Err(Problem::Limit { what: "ranks, at least", got, max }.at(folder, Place::File));
        }
        ranks.push(RankFile::open(path, experts)?);
    }
    let mut keys: BTreeMap<(u64, u32), usize> = BTreeMap::new();
    ranks.iter().flat_map(|rank| rank.offsets.keys()).for_each(|&key| *keys.entry(key).or_default() += 1);
    let mut info = RecordingInfo::new(Format::TensorRtLlm, Sources::Ranks(ranks.len()));
    (info.experts, info.top_k) = (Some(experts), meta.num_experts_per_token);
    let (keys, buffer, options) = (keys.into_iter(), vec![0; experts * size_of::<i64>()], options.clone());
    Ok(Box::new(TensorRtLlm { info, experts, ranks, keys, incomplete: 0, buffer, options }))
}

impl RankFile {
    /// Reads the header; every tensor must lie within the file and have `experts` numbers.
    fn open(path: PathBuf, experts: usize) -> Result<Self, ImportError> {
        let mut file = File::open(&path).map_err(ImportError::io(&path))?;
        let file_bytes = file.metadata().map_err(ImportError::io(&path))?.len();
        let mut length = [0; 8];
        file.read_exact(&mut length).map_err(ImportError::io(&path))?;
        let header_bytes = u64::from_le_bytes(length);
        let max = MAX_HEADER_BYTES.min(file_bytes.saturating_sub(8));
        if header_bytes > max {
            return Err(Problem::Limit { what: "bytes of header", got: header_bytes, max }.at(&path, Place::Byte(0)));
        }
        let mut header = vec![0; header_bytes as usize];
        file.read_exact(&mut header).map_err(ImportError::io(&path))?;
        let tensors: BTreeMap<String, serde_json::Value> =
            serde_json::from_slice(&header).map_err(|error| Problem::syntax(error).at(&path, Place::Byte(8)))?;
        let data = 8 + header_bytes;
        let mut offsets = BTreeMap::new();
        for (name, value) in tensors.into_iter().filter(|(name, _)| name != "__metadata__") {
            let found = locate(&name, value, experts, file_bytes - data);
            let (key, offset) =
                found.map_err(|problem| problem.at(&path, Place::Key(name.chars().take(80).collect())))?;
            offsets.insert(key, data + offset);
        }
        Ok(Self { path, file, offsets })
    }
}

/// Key and place of a tensor.
fn locate(name: &str, value: serde_json::Value, experts: usize, room: u64) -> Result<((u64, u32), u64), Problem> {
    let numbers = name.split_once('_').and_then(|(step, layer)| Some((step.parse().ok()?, layer.parse().ok()?)));
    let Some((step, layer)) = numbers else {
        return Err(Problem::differs("key", name.chars().take(40).collect::<String>(), "{iteration}_{layer}"));
    };
    let tensor: Tensor = serde_json::from_value(value).map_err(Problem::syntax)?;
    if tensor.dtype != "I64" || tensor.shape != [experts as u64] {
        let got = format!("{} {:?}", tensor.dtype.chars().take(10).collect::<String>(), tensor.shape);
        return Err(Problem::differs("tensor", got, format!("I64 [{experts}]")));
    }
    let [begin, end] = tensor.data_offsets;
    let expected = (experts * size_of::<i64>()) as u64;
    if end.checked_sub(begin) != Some(expected) || end > room {
        let got = format!("{begin} to {end}");
        return Err(Problem::differs("offsets", got, format!("{expected} bytes within {room}")));
    }
    Ok(((step, layer_id(layer)?), begin))
}

impl Recording for TensorRtLlm {
    fn info(&self) -> &RecordingInfo {
        &self.info
    }

    fn next(&mut self, piece: &mut Piece) -> Result<bool, ImportError> {
        let Some(((step, layer), ranks_with_it)) = self.keys.next() else { return Ok(false) };
        self.incomplete += u64::from(ranks_with_it < self.ranks.len());
        (piece.step, piece.microbatch, piece.layer) = (step, 0, layer);
        let counts = piece.counts(self.ranks.len());
        for rank in &mut self.ranks {
            let Some(&offset) = rank.offsets.get(&(step, layer)) else {
                counts.resize(counts.len() + self.experts, 0);
                continue;
            };
            let read = rank.file.seek(SeekFrom::Start(offset)).and_then(|_| rank.file.read_exact(&mut self.buffer));
            read.map_err(ImportError::io(&rank.path))?;
            self.options.count(self.buffer.len());
            for bytes in self.buffer.as_chunks::<8>().0 {
                let value = count(i128::from(i64::from_le_bytes(*bytes)));
                let refuse = |problem: Problem| problem.at(&rank.path, Place::Key(format!("{step}_{layer}")));
                counts.push(value.map_err(refuse)?);
            }
        }
        Ok(true)
    }

    fn ending(&self) -> Option<String> {
        let incomplete = self.incomplete;
        (incomplete > 0).then(|| format!("{incomplete} records lack some ranks, which count as having no tokens"))
    }
}
