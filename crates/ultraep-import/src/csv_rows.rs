//! Rows of a text table, separated by commas, semicolons, tabs or spaces, with quotes as spreadsheets write them.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use csv::ByteRecord;

use crate::input::{Input, Lines, ending, open_input};
use crate::{ImportError, MAX_LINE_BYTES, OpenOptions, Place, Problem};

/// What stands between fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Separator {
    Byte(u8),
    /// Any number of spaces and tabs.
    Spaces,
}

impl Separator {
    /// Of a table with this first line.
    pub(crate) fn of(line: &[u8]) -> Self {
        let line = line.trim_ascii();
        match [b';', b',', b'\t'].into_iter().find(|separator| line.contains(separator)) {
            Some(separator) => Self::Byte(separator),
            None if line.contains(&b' ') => Self::Spaces,
            None => Self::Byte(b','),
        }
    }
}

/// The rows of a table.
pub(crate) struct CsvRows {
    path: PathBuf,
    rows: Rows,
    row: ByteRecord,
    line: u64,
    torn: Option<u64>,
}

enum Rows {
    Csv(csv::Reader<Limited>),
    Spaces(Lines),
}

/// An input that ends with an error when one row takes more than a line may have.
struct Limited {
    input: Input,
    left: u64,
    last_byte: u8,
}

impl Read for Limited {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 {
            return Err(io::Error::other(format!("a row of over {MAX_LINE_BYTES} bytes: allowed are up to that")));
        }
        let room = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let got = self.input.read(&mut buffer[..room])?;
        self.left -= got as u64;
        if let Some(&byte) = buffer[..got].last() {
            self.last_byte = byte;
        }
        Ok(got)
    }
}

impl CsvRows {
    pub(crate) fn open(path: &Path, separator: Separator, options: &OpenOptions) -> Result<Self, ImportError> {
        let rows = match separator {
            Separator::Spaces => Rows::Spaces(Lines::open(path, options)?),
            Separator::Byte(separator) => {
                let input = Limited { input: open_input(path, options)?, left: MAX_LINE_BYTES, last_byte: b'\n' };
                let mut builder = csv::ReaderBuilder::new();
                Rows::Csv(builder.has_headers(false).flexible(true).delimiter(separator).from_reader(input))
            }
        };
        Ok(Self { path: path.to_owned(), rows, row: ByteRecord::new(), line: 0, torn: None })
    }

    /// Reads the next row that is not empty; false at the end.
    pub(crate) fn advance(&mut self) -> Result<bool, ImportError> {
        match &mut self.rows {
            Rows::Csv(reader) => {
                reader.get_mut().left = MAX_LINE_BYTES;
                let read = reader.read_byte_record(&mut self.row);
                self.line = match &read {
                    Ok(_) => self.row.position().map_or(0, csv::Position::line),
                    Err(_) => reader.position().line(),
                };
                read.map_err(|error| self.refuse(Problem::syntax(format_args!("not CSV: {error}"))))
            }
            Rows::Spaces(lines) => {
                if !lines.advance()? {
                    return Ok(false);
                }
                self.line = lines.number();
                self.row.clear();
                let fields = lines.line().split(|b| b" \t".contains(b)).filter(|field| !field.is_empty());
                fields.for_each(|field| self.row.push_field(field));
                Ok(true)
            }
        }
    }

    /// Number of fields.
    pub(crate) fn len(&self) -> usize {
        self.row.len()
    }

    /// A field, without the byte order mark that a first one may begin with.
    pub(crate) fn field(&self, index: usize) -> &[u8] {
        let field = self.row.get(index).unwrap_or_default();
        if self.line == 1 && index == 0 { field.strip_prefix(b"\xef\xbb\xbf").unwrap_or(field) } else { field }
    }

    /// What is wrong with this row.
    pub(crate) fn refuse(&self, problem: Problem) -> ImportError {
        problem.at(&self.path, Place::Line(self.line))
    }

    /// For a row that is not whole: fine where it is the last one of a file that ends in the middle of a line, which
    /// [`CsvRows::ending`] then says; refused otherwise.
    pub(crate) fn torn_or(&mut self, problem: Problem) -> Result<(), ImportError> {
        let (line, refused) = (self.line, self.refuse(problem));
        if line > 1 && !self.advance().unwrap_or(true) && self.ends_open() {
            self.torn = Some(line);
            return Ok(());
        }
        Err(refused)
    }

    /// Whether the file's last line has no end; known when all was read.
    pub(crate) fn ends_open(&self) -> bool {
        match &self.rows {
            Rows::Csv(reader) => !matches!(reader.get_ref().last_byte, b'\n' | b'\r'),
            Rows::Spaces(lines) => lines.ends_open(),
        }
    }

    /// How the file ended, where that is not as it should.
    pub(crate) fn ending(&self) -> Option<String> {
        match &self.rows {
            Rows::Csv(reader) => ending(self.torn, reader.get_ref().input.is_cut()),
            Rows::Spaces(lines) => lines.ending().or_else(|| ending(self.torn, false)),
        }
    }
}
