//! FLAME-MoE parquet: `actives/iter_NNNN/layer_NN.parquet`, a row a token, `indices` `list<i16>`; rows are aligned over layers.
//! Tokens only. Codecs: none, snappy and gzip; zstd, LZ4 and Brotli are refused with a word (they would need a C library, or
//! are not built in).
//!
//! Memory: a batch of rows and one page.

use std::fs::File;
use std::path::{Path, PathBuf};

use parquet::basic::Type;
use parquet::column::reader::ColumnReaderImpl;
use parquet::data_type::Int32Type;
use parquet::file::reader::{FileReader, SerializedFileReader};

use crate::detect::natural_key;
use crate::error::{expert_id, layer_id};
use crate::parquet_file::{MAX_CHUNK_VALUES, check_chunk, column, guarded};
use crate::{Format, ImportError, OpenOptions, Piece, Place, Problem, Recording, RecordingInfo, Sources};

/// Rows read at once.
const BATCH_ROWS: usize = 4096;
/// Most files of a recording.
const MAX_FILES: usize = 1_000_000;

struct Flame {
    info: RecordingInfo,
    path: PathBuf,
    layer: u32,
    file: SerializedFileReader<File>,
    column: usize,
    next_group: usize,
    reader: Option<ColumnReaderImpl<Int32Type>>,
    /// The batch: experts of all rows, where each row ends, and the next row to give out.
    ids: Vec<u16>,
    ends: Vec<usize>,
    at: usize,
    rows_before: u64,
}

/// The files of a folder that is such a recording (or its `actives`), by iteration and layer.
pub(crate) fn files_in(folder: &Path) -> Result<Vec<PathBuf>, ImportError> {
    let actives = folder.join("actives");
    let folder = if actives.is_dir() { actives.as_path() } else { folder };
    let mut files = Vec::new();
    for iteration in entries(folder, "iter_")?.into_iter().filter(|path| path.is_dir()) {
        files.extend(entries(&iteration, "layer_")?.into_iter().filter(|path| path.is_file()));
        if files.len() > MAX_FILES {
            let (got, max) = (files.len() as u64, MAX_FILES as u64);
            return Err(Problem::Limit { what: "files:", got, max }.at(folder, Place::File));
        }
    }
    Ok(files)
}

/// Entries of a folder whose names begin so, in the order of the numbers in their names.
fn entries(folder: &Path, prefix: &str) -> Result<Vec<PathBuf>, ImportError> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(ImportError::io(folder))? {
        let path = entry.map_err(ImportError::io(folder))?.path();
        if path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(prefix.as_bytes())) {
            found.push(path);
        }
    }
    found.sort_by_cached_key(|path| path.file_name().map(natural_key));
    Ok(found)
}

pub(crate) fn open(path: &Path, options: &OpenOptions) -> Result<Box<dyn Recording>, ImportError> {
    let refuse = |problem: Problem| problem.at(path, Place::File);
    let name = path.file_stem().and_then(|name| name.to_str()).unwrap_or_default();
    let Some(layer) = name.strip_prefix("layer_").and_then(|layer| layer.parse().ok()) else {
        return Err(refuse(Problem::differs("file name", name, "layer_NN.parquet")));
    };
    let layer = layer_id(layer).map_err(refuse)?;
    let file = File::open(path).map_err(ImportError::io(path))?;
    let file_bytes = file.metadata().map_err(ImportError::io(path))?.len();
    let file = guarded(|| SerializedFileReader::new(file)).map_err(refuse)?;
    let schema = file.metadata().file_metadata().schema_descr();
    let is_indices = |index: &usize| schema.column(*index).path().parts().first().is_some_and(|part| part == "indices");
    let Some(column) = (0..schema.num_columns()).find(is_indices) else {
        return Err(refuse(Problem::Missing("column indices".to_owned())));
    };
    let leaf = schema.column(column);
    if leaf.physical_type() != Type::INT32 || leaf.max_rep_level() != 1 {
        let got = format!("{:?} in {} lists", leaf.physical_type(), leaf.max_rep_level());
        return Err(refuse(Problem::differs("column indices:", got, "a list of small integers")));
    }
    for group in file.metadata().row_groups() {
        check_chunk(group.column(column), file_bytes).map_err(refuse)?;
    }
    options.count(usize::try_from(file_bytes).unwrap_or(usize::MAX));
    let info = RecordingInfo::new(Format::FlameMoe, Sources::Tokens);
    Ok(Box::new(Flame {
        info,
        path: path.to_owned(),
        layer,
        file,
        column,
        next_group: 0,
        reader: None,
        ids: Vec::new(),
        ends: Vec::new(),
        at: 0,
        rows_before: 0,
    }))
}

impl Flame {
    /// Reads the next batch of rows; false at the end.
    fn read_batch(&mut self) -> Result<bool, Problem> {
        self.rows_before += self.ends.len() as u64;
        self.ids.clear();
        self.ends.clear();
        self.at = 0;
        loop {
            if self.reader.is_none() {
                if self.next_group == self.file.num_row_groups() {
                    return Ok(false);
                }
                self.reader = Some(column(&self.file, (self.next_group, self.column), MAX_CHUNK_VALUES)?);
                self.next_group += 1;
            }
            let Some(reader) = self.reader.as_mut() else { continue };
            let (mut definitions, mut repetitions, mut values) = (Vec::new(), Vec::new(), Vec::new());
            let read = guarded(|| {
                reader.read_records(BATCH_ROWS, Some(&mut definitions), Some(&mut repetitions), &mut values)
            })?;
            if read.0 == 0 {
                self.reader = None;
                continue;
            }
            return self.take_rows(&definitions, &repetitions, &values).map(|()| true);
        }
    }

    /// Cuts the values into rows by their levels; nulls and empty lists give no experts.
    fn take_rows(&mut self, definitions: &[i16], repetitions: &[i16], values: &[i32]) -> Result<(), Problem> {
        let deepest = self.file.metadata().file_metadata().schema_descr().column(self.column).max_def_level();
        let mut values = values.iter();
        for (index, (&definition, &repetition)) in definitions.iter().zip(repetitions).enumerate() {
            if repetition == 0 && index > 0 {
                self.ends.push(self.ids.len());
            }
            if definition == deepest {
                let Some(&value) = values.next() else {
                    return Err(Problem::Syntax("fewer values than its levels say".to_owned()));
                };
                self.ids.push(expert_id(i64::from(value))?);
            }
        }
        self.ends.push(self.ids.len());
        Ok(())
    }
}

impl Recording for Flame {
    fn info(&self) -> &RecordingInfo {
        &self.info
    }

    fn next(&mut self, piece: &mut Piece) -> Result<bool, ImportError> {
        loop {
            while self.at < self.ends.len() {
                let start = if self.at == 0 { 0 } else { self.ends[self.at - 1] };
                let per_token = self.ends[self.at] - start;
                // As many rows as have equally many experts.
                let run =
                    self.ends[self.at..].iter().zip(1..).take_while(|&(&end, row)| end == start + row * per_token);
                let rows = run.count();
                self.at += rows;
                if per_token > 0 {
                    piece.layer = self.layer;
                    piece.choices(per_token).extend_from_slice(&self.ids[start..start + rows * per_token]);
                    return Ok(true);
                }
            }
            let row = self.rows_before + self.ends.len() as u64;
            if !self.read_batch().map_err(|problem| problem.at(&self.path, Place::Row(row)))? {
                return Ok(false);
            }
        }
    }
}
