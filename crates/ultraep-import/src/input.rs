//! Bounded reading of files: bytes counted, gzip expanded on the fly, lines and whole files up to a limit.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::bufread::MultiGzDecoder;

use crate::{ImportError, OpenOptions, Place, Problem};

/// Longest line of a text recording. A line may hold the choices of a rank's whole microbatch.
pub const MAX_LINE_BYTES: u64 = 16 << 20;
/// Largest file of the formats that are read whole (JSON of counts, plain matrices), after expansion.
pub const MAX_WHOLE_FILE_BYTES: u64 = 64 << 20;

pub(crate) type BoxedInput = Box<dyn BufRead + Send>;

/// A file whose bytes are counted for the progress bar.
pub(crate) struct Counted {
    file: File,
    options: OpenOptions,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.file.read(buffer)?;
        self.options.count(got);
        Ok(got)
    }
}

/// Opens a file; what is compressed with gzip is expanded while reading.
pub(crate) fn open_input(path: &Path, options: &OpenOptions) -> Result<BoxedInput, ImportError> {
    let file = File::open(path).map_err(ImportError::io(path))?;
    let mut input = BufReader::with_capacity(1 << 16, Counted { file, options: options.clone() });
    let is_gzip = input.fill_buf().map_err(ImportError::io(path))?.starts_with(&[0x1f, 0x8b]);
    if is_gzip {
        return Ok(Box::new(BufReader::with_capacity(1 << 16, MultiGzDecoder::new(input))));
    }
    Ok(Box::new(input))
}

/// Reads a whole file (expanded) up to [`MAX_WHOLE_FILE_BYTES`].
pub(crate) fn read_whole(path: &Path, options: &OpenOptions) -> Result<Vec<u8>, ImportError> {
    let mut bytes = Vec::new();
    let mut input = open_input(path, options)?.take(MAX_WHOLE_FILE_BYTES + 1);
    input.read_to_end(&mut bytes).map_err(ImportError::io(path))?;
    if bytes.len() as u64 > MAX_WHOLE_FILE_BYTES {
        let (got, max) = (bytes.len() as u64, MAX_WHOLE_FILE_BYTES);
        return Err(Problem::Limit { what: "bytes, at least", got, max }.at(path, Place::File));
    }
    Ok(bytes)
}

/// The first bytes of a file (expanded), to recognise it by.
pub(crate) fn read_head(path: &Path, bytes: usize) -> Result<Vec<u8>, ImportError> {
    let mut head = Vec::new();
    let mut input = open_input(path, &OpenOptions::default())?.take(bytes as u64);
    input.read_to_end(&mut head).map_err(ImportError::io(path))?;
    Ok(head)
}

/// The lines of a text file.
pub(crate) struct Lines {
    pub(crate) path: PathBuf,
    input: BoxedInput,
    line: Vec<u8>,
    number: u64,
}

impl Lines {
    pub(crate) fn open(path: &Path, options: &OpenOptions) -> Result<Self, ImportError> {
        Ok(Self { path: path.to_owned(), input: open_input(path, options)?, line: Vec::new(), number: 0 })
    }

    /// Reads the next line that is not empty; false at the end.
    pub(crate) fn advance(&mut self) -> Result<bool, ImportError> {
        loop {
            self.line.clear();
            self.number += 1;
            let mut limited = (&mut self.input).take(MAX_LINE_BYTES + 1);
            limited.read_until(b'\n', &mut self.line).map_err(ImportError::io(&self.path))?;
            if self.line.is_empty() {
                return Ok(false);
            }
            if self.line.len() as u64 > MAX_LINE_BYTES {
                let (got, max) = (self.line.len() as u64, MAX_LINE_BYTES);
                return Err(self.refuse(Problem::Limit { what: "bytes in a line, at least", got, max }));
            }
            if !self.line.trim_ascii().is_empty() {
                return Ok(true);
            }
        }
    }

    /// The line that was read, without white space around it.
    pub(crate) fn line(&self) -> &[u8] {
        self.line.trim_ascii()
    }

    /// What is wrong with this line.
    pub(crate) fn refuse(&self, problem: Problem) -> ImportError {
        problem.at(&self.path, Place::Line(self.number))
    }
}
