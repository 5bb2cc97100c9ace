//! Writes one of our traces as parquet, for tools that read tables: one row a record, lists as list columns.
//!
//! Nothing of a trace is lost: its header is the value of the file's key [`KEY`], and every part of a record has its column. A
//! plan's instances are four lists of equal length, ordered by expert, the master first. Parts that a record does not have
//! are null.

use std::fs::File;
use std::io::{BufReader, Write};
use std::path::Path;
use std::sync::Arc;

use parquet::basic::Compression;
use parquet::data_type::{ByteArray, ByteArrayType, DataType, Int32Type, Int64Type};
use parquet::errors::Result;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::parser::parse_message_type;
use ultraep_trace::{Record, TraceError, TraceReader};

/// Key of the file's metadata whose value is the trace's header, JSON.
pub const KEY: &str = "ultraep.trace";

/// Values of counts in a row group, about: memory of the writer, and of whoever reads a group at a time.
const GROUP_COUNTS: usize = 1 << 21;

/// Columns: what a record is, its counts, its plan, its routing.
const SCHEMA: &str = "message trace {
    required int64 step (INTEGER(64,false));
    required int32 microbatch (INTEGER(32,false));
    required int32 layer (INTEGER(32,false));
    required group counts (LIST) { repeated group list { required int32 element (INTEGER(32,false)); } }
    optional binary policy (STRING);
    optional int64 digest (INTEGER(64,false));
    optional group instance_expert (LIST) { repeated group list { required int32 element (INTEGER(32,false)); } }
    optional group instance_rank (LIST) { repeated group list { required int32 element (INTEGER(32,false)); } }
    optional group instance_physical (LIST) { repeated group list { required int32 element (INTEGER(32,false)); } }
    optional group instance_quota (LIST) { repeated group list { required int32 element (INTEGER(32,false)); } }
    optional group split (LIST) { repeated group list { required int32 element (INTEGER(32,false)); } }
    optional group top_k_tokens (LIST) { repeated group list { required int32 element (INTEGER(32,false)); } }
    optional group top_k_ids (LIST) { repeated group list { required int32 element (INTEGER(32,false)); } }
}";

/// Why no parquet file was written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteParquetError {
    /// The trace could not be opened.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// The trace could not be read.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// The file could not be written.
    #[error("parquet: {0}")]
    Write(String),
}

impl From<parquet::errors::ParquetError> for WriteParquetError {
    fn from(error: parquet::errors::ParquetError) -> Self {
        Self::Write(error.to_string())
    }
}

/// What was written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ParquetWritten {
    /// Records.
    pub records: u64,
    /// How the trace ended, where it was torn.
    pub ending: Option<String>,
}

/// Writes the trace at `trace` to `out`.
pub fn write_parquet<W: Write + Send>(trace: &Path, out: W) -> std::result::Result<ParquetWritten, WriteParquetError> {
    let mut reader = TraceReader::new(BufReader::new(File::open(trace)?))?;
    let meta = reader.meta().clone();
    let header = serde_json::to_string(&meta).map_err(|error| WriteParquetError::Write(error.to_string()))?;
    let properties = WriterProperties::builder()
        .set_compression(Compression::SNAPPY)
        .set_created_by(concat!("ultraep ", env!("CARGO_PKG_VERSION")).to_owned())
        .set_key_value_metadata(Some(vec![KeyValue::new(KEY.to_owned(), header)]));
    let schema = Arc::new(parse_message_type(SCHEMA)?);
    let mut file = SerializedFileWriter::new(out, schema, Arc::new(properties.build()))?;
    let group_rows = (GROUP_COUNTS / meta.counts().max(1)).clamp(1, 1 << 16);
    let (mut rows, mut written) = (Vec::new(), 0);
    let mut has_more = true;
    while has_more {
        let mut record = Record::default();
        has_more = reader.read_into(&mut record)?;
        if has_more {
            written += 1;
            rows.push(record);
        }
        if rows.len() == group_rows || (!has_more && !rows.is_empty()) {
            let mut group = file.next_row_group()?;
            write_group(&mut group, &rows)?;
            group.close()?;
            rows.clear();
        }
    }
    file.close()?;
    let ending = reader.ending().and_then(|ending| ending.describe());
    Ok(ParquetWritten { records: written, ending })
}

type Group<'a, W> = SerializedRowGroupWriter<'a, W>;

/// The columns in the order of the schema.
fn write_group<W: Write + Send>(group: &mut Group<'_, W>, rows: &[Record]) -> Result<()> {
    let after = |row: usize| rows[row].after.as_ref();
    let top_k = |row: usize| rows[row].top_k.as_ref();
    plain::<Int64Type, W>(group, &rows.iter().map(|r| r.step as i64).collect::<Vec<_>>(), None)?;
    plain::<Int32Type, W>(group, &rows.iter().map(|r| r.microbatch as i32).collect::<Vec<_>>(), None)?;
    plain::<Int32Type, W>(group, &rows.iter().map(|r| r.layer as i32).collect::<Vec<_>>(), None)?;
    let mut counts = Lists::required();
    rows.iter().for_each(|record| counts.push(Some(record.before.iter().map(|&n| n as i32))));
    counts.write(group)?;
    let has_plan: Vec<i16> = (0..rows.len()).map(|row| i16::from(after(row).is_some())).collect();
    let plans = || (0..rows.len()).filter_map(after);
    let names: Vec<ByteArray> = plans().map(|plan| plan.policy.as_str().into()).collect();
    plain::<ByteArrayType, W>(group, &names, Some(&has_plan))?;
    plain::<Int64Type, W>(group, &plans().map(|plan| plan.digest as i64).collect::<Vec<_>>(), Some(&has_plan))?;
    let mut experts = Lists::optional();
    for row in 0..rows.len() {
        let of_plan = |plan: &ultraep_trace::PlanRecord| {
            (0..plan.offsets.len().saturating_sub(1))
                .flat_map(|e| plan.range(e).map(move |_| e as i32))
                .collect::<Vec<_>>()
        };
        experts.push(after(row).map(of_plan));
    }
    experts.write(group)?;
    let parts: [fn(&ultraep_plan::Instance) -> i32; 3] =
        [|i| i.rank.index() as i32, |i| i.physical.index() as i32, |i| i.quota as i32];
    for part in parts {
        let mut list = Lists::optional();
        (0..rows.len()).for_each(|row| list.push(after(row).map(|plan| plan.instances.iter().map(part))));
        list.write(group)?;
    }
    let mut split = Lists::optional();
    let split_of = |row| after(row)?.split.as_ref().map(|split| split.iter().map(|&n| n as i32));
    (0..rows.len()).for_each(|row| split.push(split_of(row)));
    split.write(group)?;
    let mut tokens = Lists::optional();
    (0..rows.len()).for_each(|row| tokens.push(top_k(row).map(|ids| ids.tokens.iter().map(|&n| n as i32))));
    tokens.write(group)?;
    let mut ids = Lists::optional();
    (0..rows.len()).for_each(|row| ids.push(top_k(row).map(|ids| ids.ids.iter().map(|&id| i32::from(id)))));
    ids.write(group)
}

/// A column of single values; `present` says for each row whether it has one, 1 or 0.
fn plain<T: DataType, W: Write + Send>(
    group: &mut Group<'_, W>,
    values: &[T::T],
    present: Option<&[i16]>,
) -> Result<()> {
    let Some(mut column) = group.next_column()? else { return Ok(()) };
    column.typed::<T>().write_batch(values, present, None)?;
    column.close()
}

/// A column of lists of 32-bit numbers, as values and levels: a definition level of `deepest` is a value, one less an empty
/// list, 0 in an optional column no list; a repetition level of 0 begins a row.
struct Lists {
    deepest: i16,
    values: Vec<i32>,
    definitions: Vec<i16>,
    repetitions: Vec<i16>,
}

impl Lists {
    fn required() -> Self {
        Self { deepest: 1, values: Vec::new(), definitions: Vec::new(), repetitions: Vec::new() }
    }

    fn optional() -> Self {
        Self { deepest: 2, ..Self::required() }
    }

    fn push(&mut self, list: Option<impl IntoIterator<Item = i32>>) {
        let before = self.values.len();
        let is_there = list.is_some();
        self.values.extend(list.into_iter().flatten());
        let added = self.values.len() - before;
        if added == 0 {
            self.definitions.push(if is_there { self.deepest - 1 } else { 0 });
            self.repetitions.push(0);
            return;
        }
        self.definitions.extend(std::iter::repeat_n(self.deepest, added));
        self.repetitions.push(0);
        self.repetitions.extend(std::iter::repeat_n(1, added - 1));
    }

    fn write<W: Write + Send>(self, group: &mut Group<'_, W>) -> Result<()> {
        let Some(mut column) = group.next_column()? else { return Ok(()) };
        let (definitions, repetitions) = (Some(self.definitions.as_slice()), Some(self.repetitions.as_slice()));
        column.typed::<Int32Type>().write_batch(&self.values, definitions, repetitions)?;
        column.close()
    }
}
