//! Our traces as parquet ([`crate::write_parquet`]): steps, microbatches, layers and counts; what else a record had stays in the
//! file.
//!
//! Memory: a record's counts and the pages they lie in.

use std::fs::File;
use std::path::{Path, PathBuf};

use parquet::basic::Type;
use parquet::column::reader::ColumnReaderImpl;
use parquet::data_type::{DataType, Int32Type, Int64Type};
use parquet::file::reader::{FileReader, SerializedFileReader};
use ultraep_plan::MAX_TOKENS;
use ultraep_trace::TraceMeta;

use crate::parquet_file::{MAX_CHUNK_VALUES, check_chunk, column, guarded};
use crate::write_parquet::KEY;
use crate::{Format, ImportError, OpenOptions, Piece, Place, Problem, Recording, RecordingInfo, Sources};

/// Longest header, as in a trace.
const MAX_HEADER_BYTES: usize = ultraep_trace::MAX_HEADER_BYTES as usize;

struct UetParquet {
    info: RecordingInfo,
    path: PathBuf,
    meta: TraceMeta,
    file: SerializedFileReader<File>,
    columns: [usize; 4],
    next_group: usize,
    group: Option<Group>,
    row: u64,
    last_step: u64,
}

/// The columns of a row group being read.
struct Group {
    left: u64,
    step: ColumnReaderImpl<Int64Type>,
    microbatch: ColumnReaderImpl<Int32Type>,
    layer: ColumnReaderImpl<Int32Type>,
    counts: ColumnReaderImpl<Int32Type>,
}

/// Whether a parquet file says that it is a trace of ours.
pub(crate) fn is_ours(path: &Path) -> bool {
    let Ok(file) = File::open(path) else { return false };
    guarded(|| SerializedFileReader::new(file)).is_ok_and(|file| header(&file).is_some())
}

fn header(file: &SerializedFileReader<File>) -> Option<&str> {
    let pairs = file.metadata().file_metadata().key_value_metadata()?;
    pairs.iter().find(|pair| pair.key == KEY)?.value.as_deref()
}

pub(crate) fn open(path: &Path, options: &OpenOptions) -> Result<Box<dyn Recording>, ImportError> {
    let refuse = |problem: Problem| problem.at(path, Place::File);
    let file = File::open(path).map_err(ImportError::io(path))?;
    let file_bytes = file.metadata().map_err(ImportError::io(path))?.len();
    let file = guarded(|| SerializedFileReader::new(file)).map_err(refuse)?;
    let meta = meta(&file).map_err(refuse)?;
    let columns = columns(&file).map_err(refuse)?;
    for group in file.metadata().row_groups() {
        for column in columns {
            check_chunk(group.column(column), file_bytes).map_err(refuse)?;
        }
    }
    options.count(usize::try_from(file_bytes).unwrap_or(usize::MAX));
    let mut info = RecordingInfo::new(Format::UetParquet, Sources::Ranks(meta.ranks));
    (info.experts, info.top_k, info.domain_ranks) = (Some(meta.experts), meta.top_k, Some(meta.domain_ranks));
    info.slots_per_rank = meta.slots_per_rank.first().map(|&slots| slots as usize);
    info.slots_per_rank.take_if(|first| meta.slots_per_rank.iter().any(|&slots| slots as usize != *first));
    let text = |value: &serde_json::Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    info.metadata = meta.metadata.iter().map(|(key, value)| (key.clone(), text(value))).collect();
    info.notes.push("only loads are read from it: plans, splits and top-k ids stay in the file".to_owned());
    let path = path.to_owned();
    Ok(Box::new(UetParquet { info, path, meta, file, columns, next_group: 0, group: None, row: 0, last_step: 0 }))
}

fn meta(file: &SerializedFileReader<File>) -> Result<TraceMeta, Problem> {
    let text = header(file).ok_or_else(|| Problem::Missing(format!("key {KEY}")))?;
    if text.len() > MAX_HEADER_BYTES {
        return Err(Problem::Limit {
            what: "bytes of the header:",
            got: text.len() as u64,
            max: MAX_HEADER_BYTES as u64,
        });
    }
    let meta: TraceMeta = serde_json::from_str(text).map_err(Problem::syntax)?;
    meta.check().map_err(Problem::syntax)?;
    Ok(meta)
}

/// Where step, microbatch, layer and counts are.
fn columns(file: &SerializedFileReader<File>) -> Result<[usize; 4], Problem> {
    let schema = file.metadata().file_metadata().schema_descr();
    let find = |name: &str, kind: Type, lists: i16, least: i16| {
        let is_it = |&index: &usize| schema.column(index).path().parts().first().is_some_and(|part| part == name);
        let index = (0..schema.num_columns()).find(is_it).ok_or_else(|| Problem::Missing(format!("column {name}")))?;
        let leaf = schema.column(index);
        let got = (leaf.physical_type(), leaf.max_rep_level(), leaf.max_def_level());
        if got != (kind, lists, least) {
            let got = format!("{name}: {:?} in {} lists, {} optional", got.0, got.1, got.2);
            return Err(Problem::differs("column", got, format!("{kind:?} in {lists} lists, {least} optional")));
        }
        Ok(index)
    };
    Ok([
        find("step", Type::INT64, 0, 0)?,
        find("microbatch", Type::INT32, 0, 0)?,
        find("layer", Type::INT32, 0, 0)?,
        find("counts", Type::INT32, 1, 1)?,
    ])
}

/// The next value of a column without levels.
fn next<T: DataType>(reader: &mut ColumnReaderImpl<T>) -> Result<T::T, Problem> {
    let mut values = Vec::with_capacity(1);
    guarded(|| reader.read_records(1, None, None, &mut values))?;
    values.pop().ok_or_else(|| Problem::Syntax("a column has fewer rows than its group".to_owned()))
}

impl UetParquet {
    /// Begins the next row group; false at the end.
    fn begin_group(&mut self) -> Result<bool, Problem> {
        let index = self.next_group;
        if index == self.file.num_row_groups() {
            return Ok(false);
        }
        self.next_group += 1;
        let rows = u64::try_from(self.file.metadata().row_group(index).num_rows()).unwrap_or(0);
        let [step, microbatch, layer, counts] = self.columns;
        let values = rows.saturating_mul(self.meta.counts() as u64);
        if values > MAX_CHUNK_VALUES {
            return Err(Problem::Limit { what: "counts in a row group:", got: values, max: MAX_CHUNK_VALUES });
        }
        self.group = Some(Group {
            left: rows,
            step: column(&self.file, (index, step), rows)?,
            microbatch: column(&self.file, (index, microbatch), rows)?,
            layer: column(&self.file, (index, layer), rows)?,
            counts: column(&self.file, (index, counts), values)?,
        });
        Ok(true)
    }

    fn read(&mut self, piece: &mut Piece) -> Result<bool, Problem> {
        while self.group.as_ref().is_none_or(|group| group.left == 0) {
            if !self.begin_group()? {
                return Ok(false);
            }
        }
        let Some(group) = &mut self.group else { return Ok(false) };
        group.left -= 1;
        let (step, layer) = (next(&mut group.step)? as u64, next(&mut group.layer)? as u32);
        piece.microbatch = next(&mut group.microbatch)? as u32;
        if step < self.last_step {
            return Err(Problem::differs("step", step, format!("{} or later: steps never go back", self.last_step)));
        }
        if layer as usize >= self.meta.layers {
            return Err(Problem::differs("layer", layer, format!("below {}", self.meta.layers)));
        }
        (piece.step, piece.layer, self.last_step) = (step, layer, step);
        let (mut definitions, mut repetitions, mut values) = (Vec::new(), Vec::new(), Vec::new());
        guarded(|| group.counts.read_records(1, Some(&mut definitions), Some(&mut repetitions), &mut values))?;
        if values.len() != self.meta.counts() {
            return Err(Problem::differs("number of counts:", values.len(), self.meta.counts()));
        }
        let counts = piece.counts(self.meta.ranks);
        let mut total = 0_u64;
        for value in values {
            let count = u32::try_from(value).map_err(|_| Problem::Count { got: value.to_string() })?;
            total += u64::from(count);
            counts.push(count);
        }
        if total > u64::from(MAX_TOKENS) {
            return Err(Problem::Limit { what: "tokens of a record:", got: total, max: u64::from(MAX_TOKENS) });
        }
        Ok(true)
    }
}

impl Recording for UetParquet {
    fn info(&self) -> &RecordingInfo {
        &self.info
    }

    fn next(&mut self, piece: &mut Piece) -> Result<bool, ImportError> {
        let read = self.read(piece).map_err(|problem| problem.at(&self.path, Place::Row(self.row)));
        self.row += 1;
        read
    }
}
