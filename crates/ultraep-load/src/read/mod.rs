//! Readers of load files: `.json` (`{"loads": [[...]]}`), `.csv`, `.npy`. Rows = source ranks, columns = experts.

mod csv_file;
mod json;
mod npy;

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use ultraep_plan::MAX_TOKENS;

use crate::matrix::{LoadMatrix, MatrixError, check_shape};

/// Largest load file that is read. The largest matrix takes less in every format.
pub const MAX_FILE_BYTES: u64 = 64 << 20;

/// A format of load files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `{"loads": [[...], ...]}`; other keys are ignored.
    Json,
    /// One line a source rank, no header.
    Csv,
    /// A two-dimensional NumPy array of integers of any width, byte and axis order.
    Npy,
}

impl Format {
    /// By the file's extension.
    pub fn of(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()? {
            "json" => Some(Self::Json),
            "csv" => Some(Self::Csv),
            "npy" => Some(Self::Npy),
            _ => None,
        }
    }
}

/// Place of a count in a file, both counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cell {
    /// Source rank.
    pub row: usize,
    /// Expert.
    pub column: usize,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "row {}, column {} (from 0)", self.row, self.column)
    }
}

/// Why the contents of a load file were refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// Not well-formed.
    #[error("{0}")]
    Syntax(String),
    /// The JSON has no `loads`.
    #[error("no key \"loads\": allowed is {{\"loads\": [[...], ...]}}")]
    NoLoads,
    /// A cell that is no count.
    #[error("{cell}: {got} is no count: allowed are integers from 0 to {MAX_TOKENS}")]
    NoCount {
        /// Where.
        cell: Cell,
        /// What is there.
        got: String,
    },
    /// Rows of different lengths.
    #[error("row {row} (from 0) has {got} columns: allowed are {expected}, as in the rows before")]
    Ragged {
        /// The row.
        row: usize,
        /// Its columns.
        got: usize,
        /// Columns of the rows before.
        expected: usize,
    },
    /// An array of another type than integers.
    #[error("array of {0}: allowed are integers (i1 to i8, u1 to u8)")]
    Type(String),
    /// An array of other than two dimensions.
    #[error("array of {0} dimensions: allowed are two, [source ranks, experts]")]
    Dimensions(usize),
    /// The data is shorter or longer than the header says.
    #[error("{got} bytes of data: allowed are {expected}, as the header says")]
    DataLength {
        /// Bytes there.
        got: u64,
        /// Bytes announced.
        expected: u64,
    },
    /// Shape or total out of limits.
    #[error(transparent)]
    Matrix(#[from] MatrixError),
}

/// Why a load file gave no matrix.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// No known extension.
    #[error("{}: unknown extension: allowed are .json, .csv, .npy", path.display())]
    Extension {
        /// The file.
        path: PathBuf,
    },
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Its reason.
        source: std::io::Error,
    },
    /// Over [`MAX_FILE_BYTES`].
    #[error("{}: over {MAX_FILE_BYTES} bytes: allowed are up to that", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// The contents were refused.
    #[error("{}: {error}", path.display())]
    Contents {
        /// The file.
        path: PathBuf,
        /// Why.
        error: ReadError,
    },
}

/// Reads a load file in the format that its extension names.
pub fn read_file(path: &Path) -> Result<LoadMatrix, FileError> {
    let format = Format::of(path).ok_or_else(|| FileError::Extension { path: path.to_owned() })?;
    let io = |source| FileError::Io { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    File::open(path).map_err(io)?.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(FileError::TooLarge { path: path.to_owned() });
    }
    parse(format, &bytes).map_err(|error| FileError::Contents { path: path.to_owned(), error })
}

/// Reads the contents of a load file.
pub fn parse(format: Format, bytes: &[u8]) -> Result<LoadMatrix, ReadError> {
    match format {
        Format::Json => json::parse(bytes),
        Format::Csv => csv_file::parse(bytes),
        Format::Npy => npy::parse(bytes),
    }
}

/// Collects rows into a matrix and refuses what does not fit, before taking memory for it.
#[derive(Debug, Default)]
struct Rows {
    counts: Vec<u32>,
    rows: usize,
    columns: usize,
    /// Columns of the row being read.
    column: usize,
}

impl Rows {
    fn cell(&self) -> Cell {
        Cell { row: self.rows, column: self.column }
    }

    /// Takes the next count of the row; `None` stands for what is no count and prints as `got`.
    fn push(&mut self, count: Option<u64>, got: impl fmt::Display) -> Result<(), ReadError> {
        let cell = self.cell();
        check_shape(self.rows + 1, self.column + 1)?;
        match count.and_then(|c| u32::try_from(c).ok()) {
            Some(count) if count <= MAX_TOKENS => {
                self.counts.push(count);
                self.column += 1;
                Ok(())
            }
            _ => Err(ReadError::NoCount { cell, got: got.to_string() }),
        }
    }

    fn end_row(&mut self) -> Result<(), ReadError> {
        if self.rows == 0 {
            self.columns = self.column;
        }
        if self.column != self.columns {
            return Err(ReadError::Ragged { row: self.rows, got: self.column, expected: self.columns });
        }
        self.rows += 1;
        self.column = 0;
        Ok(())
    }

    fn finish(self) -> Result<LoadMatrix, ReadError> {
        Ok(LoadMatrix::new(self.rows, self.columns, self.counts)?)
    }
}
