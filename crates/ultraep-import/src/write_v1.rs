//! Writes one of our traces in UltraEP's `ultra_ep_trace_v1` layout, so that tools made for it can read it.
//!
//! What it keeps: layers, microbatches, experts' loads before balancing, physical experts' loads after (masters first, then
//! slots, rank by rank). What is lost, because it has no place for it: the source axis, policies, digests, top-k ids, which
//! expert a slot held. Steps are folded into microbatch numbers (`step * per_step + microbatch`); our own key
//! `ultraep_microbatches_per_step` in the metadata lets our reader unfold them.
//!
//! Deviation from upstream: its microbatch numbers count up without gaps in each layer; ours may skip where a trace does.

use std::fs::File;
use std::io::{BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use ultraep_load::npy_header;
use ultraep_plan::MAX_TOKENS;
use ultraep_trace::{Record, TraceMeta, TraceReader};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use crate::files::{OutputFile, OutputFiles};
use crate::readers::ultraep_v1::SCHEMA;
use crate::{ImportError, Place, Problem};

/// How to write.
#[derive(Clone, Debug, PartialEq)]
pub struct V1Options {
    /// Name of the recording: letters, digits, `_` and `-`.
    pub trace_id: String,
    /// Time of writing, seconds since 1970.
    pub created_unix: f64,
    /// Records of a chunk, at least 1. Memory: one chunk.
    pub records_per_chunk: usize,
}

/// What was written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct V1Written {
    /// Records.
    pub records: u64,
    /// Chunks.
    pub chunks: u64,
    /// Records without a plan: their loads after balancing are those of masters only.
    pub without_plan: u64,
    /// How the trace ended, where it was torn.
    pub ending: Option<String>,
}

/// One chunk's arrays.
#[derive(Debug, Default)]
struct Arrays {
    layers: Vec<i32>,
    virtual_layers: Vec<i32>,
    microbatches: Vec<i64>,
    before: Vec<i32>,
    after: Vec<i32>,
}

struct Writer<'a> {
    folder: &'a Path,
    options: &'a V1Options,
    meta: TraceMeta,
    per_step: u64,
    masters: usize,
    slots: usize,
    arrays: Arrays,
    written: V1Written,
    files: OutputFiles,
}

/// Writes the trace at `trace` into `folder`, which must exist. No file is overwritten, and none stays when it fails.
pub fn write_ultra_ep_v1(trace: &Path, folder: &Path, options: &V1Options) -> Result<V1Written, ImportError> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if options.trace_id.is_empty() || !options.trace_id.chars().all(is_plain) {
        return Err(Problem::Path(options.trace_id.clone()).at(folder, Place::File));
    }
    let per_step = microbatches_per_step(trace)?;
    let mut reader = open(trace)?;
    let meta = reader.meta().clone();
    let uniform = |what: &'static str, values: &[u32]| match values {
        [first, rest @ ..] if rest.iter().all(|v| v == first) => Ok(*first as usize),
        _ => Err(Problem::Unsupported(format!("{what} differ from rank to rank: the layout has one number for all"))
            .at(trace, Place::File)),
    };
    let masters = uniform("masters", &meta.masters_per_rank)?;
    let slots = uniform("slots", &meta.slots_per_rank)?;
    let (arrays, written) = (Arrays::default(), V1Written::default());
    let mut writer =
        Writer { folder, options, meta, per_step, masters, slots, arrays, written, files: OutputFiles::default() };
    let mut record = Record::default();
    while reader.read_into(&mut record).map_err(|source| ImportError::Trace { path: trace.to_owned(), source })? {
        let number = writer.written.records;
        writer.add(&record).map_err(|problem| problem.at(trace, Place::Row(number)))?;
        if writer.arrays.layers.len() >= options.records_per_chunk.max(1) {
            writer.write_chunk()?;
        }
    }
    writer.write_chunk()?;
    writer.write_manifest()?;
    writer.files.finish().map_err(|(path, source)| ImportError::io(&path)(source))?;
    writer.written.ending = reader.ending().and_then(|ending| ending.describe());
    Ok(writer.written)
}

fn open(trace: &Path) -> Result<TraceReader<BufReader<File>>, ImportError> {
    let file = File::open(trace).map_err(ImportError::io(trace))?;
    TraceReader::new(BufReader::new(file)).map_err(|source| ImportError::Trace { path: trace.to_owned(), source })
}

fn microbatches_per_step(trace: &Path) -> Result<u64, ImportError> {
    let (mut reader, mut record, mut most) = (open(trace)?, Record::default(), 0);
    while reader.read_into(&mut record).map_err(|source| ImportError::Trace { path: trace.to_owned(), source })? {
        most = most.max(record.microbatch);
    }
    Ok(u64::from(most) + 1)
}

impl Writer<'_> {
    fn physical(&self) -> usize {
        self.masters + self.slots
    }

    fn add(&mut self, record: &Record) -> Result<(), Problem> {
        let experts = self.meta.experts;
        let microbatch =
            record.step.checked_mul(self.per_step).and_then(|m| m.checked_add(u64::from(record.microbatch)));
        let microbatch = microbatch.and_then(|m| i64::try_from(m).ok());
        let Some(microbatch) = microbatch else {
            return Err(Problem::Limit { what: "step", got: record.step, max: i64::MAX as u64 / self.per_step });
        };
        let virtual_layer = u64::from(record.layer) * self.per_step + u64::from(record.microbatch);
        let Ok(virtual_layer) = i32::try_from(virtual_layer) else {
            return Err(Problem::Limit { what: "virtual layer", got: virtual_layer, max: i32::MAX as u64 });
        };
        let first = self.arrays.before.len();
        self.arrays.before.resize(first + experts, 0);
        for row in record.before.chunks_exact(experts) {
            // The total of a record is at most MAX_TOKENS, which is i32::MAX.
            self.arrays.before[first..].iter_mut().zip(row).for_each(|(sum, &c)| *sum += c as i32);
        }
        const { assert!(MAX_TOKENS == i32::MAX as u32) };
        self.add_after(record, first)?;
        self.arrays.layers.push(record.layer as i32); // below 2^16
        self.arrays.virtual_layers.push(virtual_layer);
        self.arrays.microbatches.push(microbatch);
        self.written.records += 1;
        Ok(())
    }

    /// Loads of physical experts, `[N, M + R]`, by the realised split where there is one, else by quotas.
    fn add_after(&mut self, record: &Record, before: usize) -> Result<(), Problem> {
        let (physical, masters) = (self.physical(), self.masters);
        let start = self.arrays.after.len();
        self.arrays.after.resize(start + self.meta.ranks * physical, 0);
        let Arrays { before: loads, after, .. } = &mut self.arrays;
        let Some(plan) = &record.after else {
            self.written.without_plan += 1;
            for (expert, &load) in loads[before..].iter().enumerate() {
                after[start + expert / masters * physical + expert % masters] = load;
            }
            return Ok(());
        };
        for (index, instance) in plan.instances.iter().enumerate() {
            let tokens = match &plan.split {
                Some(split) => split.chunks_exact(plan.instances.len()).map(|row| u64::from(row[index])).sum(),
                None => u64::from(instance.quota),
            };
            if instance.physical.index() >= physical {
                let (got, max) = (instance.physical.index() as u64, physical as u64 - 1);
                return Err(Problem::Limit { what: "physical expert of a rank:", got, max });
            }
            let cell = &mut after[start + instance.rank.index() * physical + instance.physical.index()];
            let sum = u64::from(cell.unsigned_abs()) + tokens;
            let max = u64::from(MAX_TOKENS);
            *cell = i32::try_from(sum).map_err(|_| Problem::Limit { what: "tokens of an instance:", got: sum, max })?;
        }
        Ok(())
    }

    /// What manifest and chunks say.
    fn metadata(&self) -> Map<String, Value> {
        let TraceMeta { ranks, experts, domain_ranks, layers, .. } = self.meta;
        let fields = json!({
            "schema": SCHEMA,
            "trace_id": self.options.trace_id,
            "created_unix": self.options.created_unix,
            "ep_group_id": 0,
            "ep_size": ranks,
            "num_layers": layers,
            "max_microbatches": self.per_step,
            "nvl_domain_size": domain_ranks,
            "placement_mode": "contiguous",
            "num_local_master_experts": self.masters,
            "num_local_redundant_experts": self.slots,
            "num_local_physical_experts": self.physical(),
            "num_global_logical_experts": experts,
            "num_global_physical_experts": ranks * self.physical(),
            "writer_group_rank": 0,
            "record_interval": 1,
            "flush_interval": self.options.records_per_chunk,
            "dropped_records": 0,
            "ultraep_microbatches_per_step": self.per_step,
        });
        match fields {
            Value::Object(map) => map,
            _ => Map::new(),
        }
    }

    fn write_chunk(&mut self) -> Result<(), ImportError> {
        let records = self.arrays.layers.len();
        if records == 0 {
            return Ok(());
        }
        let name = format!("{}.chunk{:06}.npz", self.options.trace_id, self.written.chunks);
        let path = self.folder.join(name);
        let mut metadata = self.metadata();
        metadata.insert("chunk_id".to_owned(), json!(self.written.chunks));
        metadata.insert("records".to_owned(), json!(records));
        let text = Value::Object(metadata).to_string();
        let arrays = std::mem::take(&mut self.arrays);
        let ucs4: Vec<u8> = text.chars().flat_map(|c| (c as u32).to_le_bytes()).collect();
        let i32s = |values: &[i32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let microbatches = arrays.microbatches.iter().flat_map(|v| v.to_le_bytes()).collect();
        let wide = self.meta.ranks * self.physical();
        let entries: [(&str, String, String, Vec<u8>); 6] = [
            ("metadata", format!("<U{}", text.chars().count()), "()".to_owned(), ucs4),
            ("layers", "<i4".to_owned(), format!("({records},)"), i32s(&arrays.layers)),
            ("virtual_layers", "<i4".to_owned(), format!("({records},)"), i32s(&arrays.virtual_layers)),
            ("microbatches", "<i8".to_owned(), format!("({records},)"), microbatches),
            (
                "pre_logical_loads",
                "<i4".to_owned(),
                format!("({records}, {})", self.meta.experts),
                i32s(&arrays.before),
            ),
            ("post_physical_loads", "<i4".to_owned(), format!("({records}, {wide})"), i32s(&arrays.after)),
        ];
        let file = OutputFile::new(&path).map_err(ImportError::io(&path))?;
        file.file().and_then(|file| write_npz(file, &entries)).map_err(ImportError::io(&path))?;
        self.files.push(file).map_err(|(path, error)| ImportError::io(&path)(error))?;
        self.written.chunks += 1;
        Ok(())
    }

    fn write_manifest(&mut self) -> Result<(), ImportError> {
        let path = self.folder.join(format!("{}.manifest.json", self.options.trace_id));
        let mut manifest = self.metadata();
        manifest.insert("chunks".to_owned(), json!(self.written.chunks));
        let text = format!("{:#}\n", Value::Object(manifest));
        let file = OutputFile::new(&path).map_err(ImportError::io(&path))?;
        file.file().and_then(|mut file| file.write_all(text.as_bytes())).map_err(ImportError::io(&path))?;
        self.files.push(file).map_err(|(path, error)| ImportError::io(&path)(error))
    }
}

/// An uncompressed archive of NumPy arrays: name, type, shape, data.
fn write_npz(file: File, entries: &[(&str, String, String, Vec<u8>)]) -> std::io::Result<()> {
    let mut zip = ZipWriter::new(BufWriter::new(file));
    let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    for (name, descr, shape, data) in entries {
        zip.start_file(format!("{name}.npy"), stored)?;
        zip.write_all(&npy_header(descr, shape))?;
        zip.write_all(data)?;
    }
    zip.finish()?.flush()
}

/// Where the manifest of a recording written by [`write_ultra_ep_v1`] lies.
pub fn v1_manifest_path(folder: &Path, trace_id: &str) -> PathBuf {
    folder.join(format!("{trace_id}.manifest.json"))
}
