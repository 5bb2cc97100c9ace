//! UltraEP v1 `ultra_ep_trace_v1`: `{trace_id}.manifest.json` and `{trace_id}.chunk{000000}.npz`.
//!
//! It keeps totals of experts, no sources: `layers` `[n]`, `virtual_layers` `[n]`, `microbatches` `[n]` (counted up in each
//! layer through the whole run), `pre_logical_loads` `[n, E]`, `post_physical_loads` `[n, P]`. A microbatch becomes a step of
//! one microbatch; where our writer made the file its metadata says how many microbatches a step has, and both come back.
//! Loads after balancing are not read: a replay plans anew.

use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::archive::Archive;
use crate::chain::Chain;
use crate::detect::Reader;
use crate::error::{count, layer_id};
use crate::input::read_whole;
use crate::npy::{self, Element, Header};
use crate::{Format, ImportError, OpenOptions, Piece, Place, Problem, Recording, RecordingInfo, Sources};

/// `schema` of manifest and metadata.
pub(crate) const SCHEMA: &str = "ultra_ep_trace_v1";
/// Largest array of a chunk, in bytes.
const MAX_ARRAY_BYTES: u64 = 256 << 20;
/// Most chunks of a trace.
const MAX_CHUNKS: u64 = 100_000;
/// Longest metadata, in characters.
const MAX_METADATA_CHARS: usize = 1 << 20;

/// What is read of manifest and metadata; the rest is ignored.
#[derive(Debug, Deserialize)]
struct Metadata {
    schema: String,
    #[serde(default)]
    trace_id: String,
    ep_size: Option<usize>,
    nvl_domain_size: Option<usize>,
    num_local_redundant_experts: Option<usize>,
    num_global_logical_experts: Option<usize>,
    /// Of the manifest only.
    chunks: Option<u64>,
    #[serde(default)]
    dropped_records: u64,
    /// Ours: microbatches of a step.
    ultraep_microbatches_per_step: Option<u64>,
}

struct Chunk {
    info: RecordingInfo,
    path: PathBuf,
    experts: usize,
    layers: Vec<u32>,
    microbatches: Vec<u64>,
    per_step: u64,
    element: Element,
    loads: Vec<u8>,
    next: usize,
}

/// Opens all chunks of a manifest.
pub(crate) fn open_manifest(path: &Path, options: &OpenOptions) -> Result<Box<dyn Recording>, ImportError> {
    let refuse = |problem: Problem| problem.at(path, Place::File);
    let bytes = read_whole(path, options)?;
    let manifest = parse_metadata(&bytes).map_err(refuse)?;
    if manifest.trace_id.contains(['/', '\\']) || manifest.trace_id.contains("..") {
        return Err(refuse(Problem::Path(manifest.trace_id.chars().take(80).collect())));
    }
    let name = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(".manifest.json"));
    let Some(trace_id) = name else {
        return Err(refuse(Problem::Unsupported("a manifest that is not named {trace_id}.manifest.json".to_owned())));
    };
    let chunks = manifest.chunks.unwrap_or(0);
    if chunks == 0 || chunks > MAX_CHUNKS {
        return Err(refuse(Problem::Limit { what: "chunks, at least 1:", got: chunks, max: MAX_CHUNKS }));
    }
    let paths = (0..chunks).map(|chunk| path.with_file_name(format!("{trace_id}.chunk{chunk:06}.npz"))).collect();
    Chain::open(paths, Reader::V1Chunk, options)
}

fn parse_metadata(text: &[u8]) -> Result<Metadata, Problem> {
    let metadata: Metadata = serde_json::from_slice(text).map_err(Problem::syntax)?;
    if metadata.schema == SCHEMA {
        return Ok(metadata);
    }
    Err(Problem::differs("schema", metadata.schema.chars().take(40).collect::<String>(), SCHEMA))
}

/// Opens one chunk.
pub(crate) fn open_chunk(path: &Path, options: &OpenOptions) -> Result<Box<dyn Recording>, ImportError> {
    let mut archive = Archive::open(path, options)?;
    let text = {
        let (header, data) = read_array(&mut archive, "metadata")?;
        npy::read_text(&mut data.as_slice(), &header, MAX_METADATA_CHARS)
            .map_err(|problem| archive.refuse("metadata", problem))?
    };
    let metadata = parse_metadata(text.as_bytes()).map_err(|problem| archive.refuse("metadata", problem))?;
    let layers = read_integers(&mut archive, "layers", |value| match u64::try_from(value) {
        Ok(layer) => layer_id(layer),
        Err(_) => Err(Problem::differs("layer", value, "0 and up")),
    })?;
    let microbatches = read_integers(&mut archive, "microbatches", |value| {
        u64::try_from(value).map_err(|_| Problem::differs("microbatch", value, "0 and up"))
    })?;
    let name = "pre_logical_loads";
    let (header, loads) = read_array(&mut archive, name)?;
    if !matches!(header.element, Element::Integer { .. }) {
        let got = format!("{:?}", header.element);
        return Err(archive.refuse(name, Problem::differs("elements", got, "integers")));
    }
    let &[rows, experts] = header.shape.as_slice() else {
        return Err(
            archive.refuse(name, Problem::differs("shape", format!("{:?}", header.shape), "[records, experts]"))
        );
    };
    let max = ultraep_plan::MAX_EXPERTS as u64;
    if experts == 0 || experts > max {
        return Err(archive.refuse(name, Problem::Limit { what: "experts:", got: experts, max }));
    }
    for (what, got) in [("layers", layers.len() as u64), ("microbatches", microbatches.len() as u64)] {
        if got != rows {
            return Err(archive.refuse(what, Problem::differs("number of records", got, rows)));
        }
    }
    let experts = experts as usize;
    if let Some(said) = metadata.num_global_logical_experts.filter(|&said| said != experts) {
        return Err(archive.refuse(name, Problem::differs("number of experts", experts, said)));
    }
    let (per_step, path) = (metadata.ultraep_microbatches_per_step.unwrap_or(1).max(1), path.to_owned());
    let info = describe(&metadata, experts);
    Ok(Box::new(Chunk { info, path, experts, layers, microbatches, per_step, element: header.element, loads, next: 0 }))
}

fn describe(metadata: &Metadata, experts: usize) -> RecordingInfo {
    let mut info = RecordingInfo::new(Format::UltraEpV1, Sources::Totals);
    info.experts = Some(experts);
    info.ranks = metadata.ep_size.filter(|&ranks| ranks > 0);
    info.domain_ranks = metadata.nvl_domain_size;
    info.slots_per_rank = metadata.num_local_redundant_experts;
    if metadata.dropped_records > 0 {
        info.notes.push(format!("{} records were dropped when it was recorded", metadata.dropped_records));
    }
    info
}

/// Reads an array's header, checks that the data is what it says, and gives the data.
fn read_array(archive: &mut Archive, name: &str) -> Result<(Header, Vec<u8>), ImportError> {
    let entry = format!("{name}.npy");
    let bytes = archive.read(&entry, MAX_ARRAY_BYTES)?;
    let mut rest = bytes.as_slice();
    let header = npy::read_header(&mut rest).map_err(|problem| archive.refuse(&entry, problem))?;
    if header.is_fortran && header.shape.len() > 1 {
        return Err(archive.refuse(&entry, Problem::Unsupported("an array in Fortran order".to_owned())));
    }
    let expected = header.elements().and_then(|n| n.checked_mul(header.element.bytes() as u64)).unwrap_or(u64::MAX);
    if expected != rest.len() as u64 {
        return Err(archive.refuse(&entry, Problem::differs("bytes of data:", rest.len(), expected)));
    }
    let mut data = Vec::new();
    rest.read_to_end(&mut data).map_err(|error| archive.refuse(&entry, npy::short(error)))?;
    Ok((header, data))
}

fn read_integers<T>(
    archive: &mut Archive,
    name: &str,
    checked: impl Fn(i128) -> Result<T, Problem>,
) -> Result<Vec<T>, ImportError> {
    let (header, data) = read_array(archive, name)?;
    if header.shape.len() != 1 || !matches!(header.element, Element::Integer { .. }) {
        let got = format!("{:?} of {:?}", header.shape, header.element);
        return Err(archive.refuse(name, Problem::differs("array", got, "[records] of integers")));
    }
    let values = data.chunks_exact(header.element.bytes()).map(|bytes| checked(npy::integer(bytes, header.element)));
    values.collect::<Result<Vec<T>, Problem>>().map_err(|problem| archive.refuse(name, problem))
}

impl Recording for Chunk {
    fn info(&self) -> &RecordingInfo {
        &self.info
    }

    fn next(&mut self, piece: &mut Piece) -> Result<bool, ImportError> {
        let row = self.next;
        let Some((&layer, &microbatch)) = self.layers.get(row).zip(self.microbatches.get(row)) else {
            return Ok(false);
        };
        piece.layer = layer;
        piece.step = microbatch / self.per_step;
        piece.microbatch = u32::try_from(microbatch % self.per_step).unwrap_or(u32::MAX);
        let row_bytes = self.experts * self.element.bytes();
        let counts = piece.counts(1);
        for bytes in self.loads[row * row_bytes..][..row_bytes].chunks_exact(self.element.bytes()) {
            let value = count(npy::integer(bytes, self.element));
            counts.push(value.map_err(|problem| problem.at(&self.path, Place::Row(row as u64)))?);
        }
        self.next += 1;
        Ok(true)
    }
}
