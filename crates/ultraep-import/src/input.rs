//! Bounded reading of files: bytes counted, gzip expanded on the fly, lines and whole files up to a limit.
//!
//! A writer that was killed leaves a file that ends in the middle. Its whole lines are read, and the reader says so: a last
//! line without a line end that is no whole row is *torn*, a gzip stream that ends early is *cut*.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use flate2::bufread::MultiGzDecoder;

use crate::{ImportError, OpenOptions, Place, Problem};

/// Longest line of a text recording. A line may hold the choices of a rank's whole microbatch.
pub const MAX_LINE_BYTES: u64 = 16 << 20;
/// Largest file of the formats that are read whole (JSON of counts, plain matrices), after expansion.
pub const MAX_WHOLE_FILE_BYTES: u64 = 64 << 20;

/// A file being read, expanded where it is packed with gzip.
pub(crate) struct Input {
    reader: Box<dyn BufRead + Send>,
    is_cut: Arc<AtomicBool>,
}

impl Input {
    /// Whether a gzip stream ended before its end; known when all was read.
    pub(crate) fn is_cut(&self) -> bool {
        // One thread reads: no order with anything else.
        self.is_cut.load(Ordering::Relaxed)
    }
}

impl Read for Input {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.reader.read(buffer)
    }
}

impl BufRead for Input {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.reader.fill_buf()
    }

    fn consume(&mut self, amount: usize) {
        self.reader.consume(amount);
    }
}

/// A file whose bytes are counted for the progress bar.
struct Counted {
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

/// A gzip stream whose early end is an end, and remembered.
struct CutGzip<R: BufRead> {
    decoder: MultiGzDecoder<R>,
    is_cut: Arc<AtomicBool>,
}

impl<R: BufRead> Read for CutGzip<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.decoder.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                self.is_cut.store(true, Ordering::Relaxed);
                Ok(0)
            }
            other => other,
        }
    }
}

/// Opens a file; what is compressed with gzip is expanded while reading.
pub(crate) fn open_input(path: &Path, options: &OpenOptions) -> Result<Input, ImportError> {
    const BUFFER_BYTES: usize = 1 << 16;
    let file = File::open(path).map_err(ImportError::io(path))?;
    let mut input = BufReader::with_capacity(BUFFER_BYTES, Counted { file, options: options.clone() });
    let is_gzip = input.fill_buf().map_err(ImportError::io(path))?.starts_with(&[0x1f, 0x8b]);
    let is_cut = Arc::new(AtomicBool::new(false));
    if is_gzip {
        let gzip = CutGzip { decoder: MultiGzDecoder::new(input), is_cut: is_cut.clone() };
        return Ok(Input { reader: Box::new(BufReader::with_capacity(BUFFER_BYTES, gzip)), is_cut });
    }
    Ok(Input { reader: Box::new(input), is_cut })
}

/// Reads a whole file (expanded) up to [`MAX_WHOLE_FILE_BYTES`].
pub(crate) fn read_whole(path: &Path, options: &OpenOptions) -> Result<Vec<u8>, ImportError> {
    let mut bytes = Vec::new();
    let mut input = open_input(path, options)?;
    (&mut input).take(MAX_WHOLE_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(ImportError::io(path))?;
    if bytes.len() as u64 > MAX_WHOLE_FILE_BYTES {
        let (got, max) = (bytes.len() as u64, MAX_WHOLE_FILE_BYTES);
        return Err(Problem::Limit { what: "bytes, at least", got, max }.at(path, Place::File));
    }
    if input.is_cut() {
        return Err(Problem::Syntax("the gzip stream is cut off".to_owned()).at(path, Place::File));
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
    input: Input,
    line: Vec<u8>,
    number: u64,
    has_end: bool,
    torn: Cell<Option<u64>>,
}

impl Lines {
    pub(crate) fn open(path: &Path, options: &OpenOptions) -> Result<Self, ImportError> {
        let input = open_input(path, options)?;
        Ok(Self { path: path.to_owned(), input, line: Vec::new(), number: 0, has_end: true, torn: Cell::new(None) })
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
            self.has_end = self.line.ends_with(b"\n");
            if !self.line.trim_ascii().is_empty() {
                return Ok(true);
            }
        }
    }

    /// The line that was read, without white space around it.
    pub(crate) fn line(&self) -> &[u8] {
        self.line.trim_ascii()
    }

    /// The line's number, from 1.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// Whether the last line read has no end.
    pub(crate) fn ends_open(&self) -> bool {
        !self.has_end
    }

    /// What is wrong with this line.
    pub(crate) fn refuse(&self, problem: Problem) -> ImportError {
        problem.at(&self.path, Place::Line(self.number))
    }

    /// Parses the line as JSON; `None` where it is the last one and torn, which [`Lines::ending`] then says.
    pub(crate) fn json<'a, T: serde::Deserialize<'a>>(&'a self) -> Result<Option<T>, ImportError> {
        match serde_json::from_slice(self.line()) {
            Ok(row) => Ok(Some(row)),
            // A first line alone is no recording of which a part could be read.
            Err(error) if error.is_eof() && !self.has_end && self.number > 1 => {
                self.torn.set(Some(self.number));
                Ok(None)
            }
            Err(error) => Err(Problem::syntax(error).at(&self.path, Place::Line(self.number))),
        }
    }

    /// How the file ended, where that is not as it should.
    pub(crate) fn ending(&self) -> Option<String> {
        ending(self.torn.get(), self.input.is_cut())
    }
}

/// In words: a last line that was torn, a gzip stream that was cut.
pub(crate) fn ending(torn: Option<u64>, is_cut: bool) -> Option<String> {
    let packed = if is_cut { "the gzip stream is cut off" } else { "the file ends in the middle of a line" };
    match torn {
        Some(line) => Some(format!("{packed}: line {line} is torn and left out, all before it is read")),
        None => is_cut.then(|| format!("{packed}: what came before is read")),
    }
}
