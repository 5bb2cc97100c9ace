//! Files that a recording is read from, also where they can be read once only: standard input and pipes are copied to a
//! temporary file first, for most commands read a recording twice.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::detect::open_files;
use crate::{ImportError, OpenOptions, Piece, Recording, RecordingInfo, TemporaryFile};

/// The name of standard input.
const STDIN: &str = "-";
/// Largest pipe that is copied.
const MAX_PIPE_BYTES: u64 = 64 << 30;

/// The files of a recording.
#[derive(Clone, Debug)]
pub struct Inputs {
    paths: Vec<PathBuf>,
    copies: Arc<Vec<Copied>>,
}

/// A pipe's content.
#[derive(Debug)]
struct Copied {
    file: TemporaryFile,
    name: PathBuf,
}

impl Inputs {
    /// Copies what can be read once only; the rest stays where it is.
    pub fn new(paths: &[PathBuf]) -> Result<Self, ImportError> {
        let (mut all, mut copies) = (Vec::new(), Vec::new());
        for path in paths {
            let copied = if path.as_os_str() == STDIN {
                let name = PathBuf::from("standard input");
                Some(Copied { file: copy(&mut io::stdin().lock(), &name)?, name })
            } else if is_pipe(path) {
                let mut pipe = File::open(path).map_err(ImportError::io(path))?;
                Some(Copied { file: copy(&mut pipe, path)?, name: path.clone() })
            } else {
                None
            };
            match copied {
                Some(copied) => {
                    all.push(copied.file.path().to_owned());
                    copies.push(copied);
                }
                None => all.push(path.clone()),
            }
        }
        Ok(Self { paths: all, copies: Arc::new(copies) })
    }

    /// Opens the recording from its beginning.
    pub fn open(&self, options: &OpenOptions) -> Result<Box<dyn Recording>, ImportError> {
        let recording = open_files(&self.paths, options).map_err(|error| self.named(error))?;
        if self.copies.is_empty() { Ok(recording) } else { Ok(Box::new(Copy { recording, inputs: self.clone() })) }
    }

    /// Where the files are; copies of pipes only as long as this lives.
    pub fn paths(&self) -> &[PathBuf] {
        &self.paths
    }

    /// An error that names what the user named.
    fn named(&self, error: ImportError) -> ImportError {
        error.renamed(|path| {
            let copied = self.copies.iter().find(|copied| copied.file.path() == path);
            copied.map_or(path, |copied| copied.name.clone())
        })
    }
}

fn is_pipe(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| !metadata.is_file() && !metadata.is_dir())
}

fn copy(from: &mut impl Read, name: &Path) -> Result<TemporaryFile, ImportError> {
    let file = TemporaryFile::new().map_err(ImportError::io(name))?;
    let mut out = file.writer().map_err(ImportError::io(name))?;
    let copied = io::copy(&mut from.take(MAX_PIPE_BYTES + 1), &mut out).and_then(|bytes| out.flush().map(|()| bytes));
    let bytes = copied.map_err(ImportError::io(name))?;
    if bytes > MAX_PIPE_BYTES {
        let problem = crate::Problem::Limit { what: "bytes, at least", got: bytes, max: MAX_PIPE_BYTES };
        return Err(problem.at(name, crate::Place::File));
    }
    Ok(file)
}

/// A recording that keeps the copies it is read from.
struct Copy {
    recording: Box<dyn Recording>,
    inputs: Inputs,
}

impl Recording for Copy {
    fn info(&self) -> &RecordingInfo {
        self.recording.info()
    }

    fn next(&mut self, piece: &mut Piece) -> Result<bool, ImportError> {
        self.recording.next(piece).map_err(|error| self.inputs.named(error))
    }

    fn ending(&self) -> Option<String> {
        self.recording.ending()
    }
}
