//! Zip archives (`.npz`, `.pt`), with limits: an entry is read up to the size it claims, and that size up to a limit.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use zip::ZipArchive;

use crate::{ImportError, OpenOptions, Place, Problem};

/// Most entries of an archive.
const MAX_ENTRIES: usize = 1 << 16;

/// An archive. Its entries are read by name; nothing is ever written by the names in it.
pub(crate) struct Archive {
    path: PathBuf,
    zip: ZipArchive<BufReader<File>>,
    names: Vec<String>,
    options: OpenOptions,
}

impl Archive {
    /// Reads the directory. An entry whose path would leave the archive's folder refuses the whole archive.
    pub(crate) fn open(path: &Path, options: &OpenOptions) -> Result<Self, ImportError> {
        let file = File::open(path).map_err(ImportError::io(path))?;
        let mut zip = ZipArchive::new(BufReader::new(file)).map_err(|error| {
            Problem::syntax(format_args!("cut off, or no zip archive: {error}")).at(path, Place::File)
        })?;
        if zip.len() > MAX_ENTRIES {
            let (got, max) = (zip.len() as u64, MAX_ENTRIES as u64);
            return Err(Problem::Limit { what: "entries", got, max }.at(path, Place::File));
        }
        let mut names = Vec::new();
        for index in 0..zip.len() {
            let entry = zip.by_index_raw(index);
            let entry = entry.map_err(|error| Problem::syntax(error).at(path, Place::File))?;
            let name = entry.name().map_err(|error| Problem::syntax(error).at(path, Place::File))?.into_owned();
            if entry.enclosed_name().is_none() || name.split(['/', '\\']).any(|part| part == "..") {
                return Err(Problem::Path(name.chars().take(80).collect()).at(path, Place::File));
            }
            names.push(name);
        }
        Ok(Self { path: path.to_owned(), zip, names, options: options.clone() })
    }

    /// Names of all entries.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.names.iter().map(String::as_str)
    }

    pub(crate) fn refuse(&self, name: &str, problem: Problem) -> ImportError {
        problem.at(&self.path, Place::Key(name.chars().take(80).collect()))
    }

    /// Reads an entry of at most `max` bytes.
    pub(crate) fn read(&mut self, name: &str, max: u64) -> Result<Vec<u8>, ImportError> {
        let Some(index) = self.zip.index_for_name(name) else {
            return Err(self.refuse(name, Problem::Missing("such entry".to_owned())));
        };
        let path = self.path.clone();
        let refuse = |problem: Problem| problem.at(&path, Place::Key(name.chars().take(80).collect()));
        let entry = self.zip.by_index(index).map_err(|error| refuse(Problem::syntax(error)))?;
        let size = entry.size();
        if size > max {
            return Err(refuse(Problem::Limit { what: "bytes of an entry:", got: size, max }));
        }
        // What is taken grows with what is there, not with what is claimed.
        let mut bytes = Vec::new();
        let got = entry.take(size + 1).read_to_end(&mut bytes).map_err(|error| refuse(Problem::syntax(error)))?;
        if got as u64 != size {
            return Err(refuse(Problem::differs("size of the entry:", format!("not {size}"), size)));
        }
        self.options.count(got);
        Ok(bytes)
    }
}
