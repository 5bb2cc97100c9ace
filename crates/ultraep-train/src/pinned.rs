//! The text of a run, kept with the run, so that it can be taken up when the files it was read from have changed.
//!
//! ```text
//! runs/2026-11-24T14-39-16Z/
//!   text.json      which files the text was taken from, how much of each, their digests   [`Manifest`]
//!   text.uetext    the text itself, up to 64 MiB of it (ultraep-text's snapshot)
//! ```
//!
//! A text that is larger has no copy: it is read again from its files, and the first that is missing or has changed is an
//! error that names it.

use std::fs::{self, File};
use std::io::{BufReader, ErrorKind, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use ultraep_run::{Digest, write_atomically};
use ultraep_text::{Corpus, TextDomain, TextError, TextSource};

use crate::TrainError;

/// Most bytes of text of which a run keeps a copy.
pub const TEXT_COPY_BYTES_MAX: usize = 64 << 20;

const SCHEMA: &str = "ultraep.text/1";
const MANIFEST: &str = "text.json";
const COPY: &str = "text.uetext";
/// Largest `text.json`: that of the most files that a text is taken from.
const MANIFEST_BYTES_MAX: u64 = 256 << 20;

/// `text.json`.
#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    schema: String,
    /// Of the whole text, as in `run.json` and in checkpoints.
    digest: Digest,
    /// Whether `text.uetext` was written.
    copied: bool,
    domains: Vec<PinnedDomain>,
}

#[derive(Debug, Serialize, Deserialize)]
struct PinnedDomain {
    name: String,
    origin: String,
    /// In the order of the text.
    files: Vec<PinnedFile>,
}

#[derive(Debug, Serialize, Deserialize)]
struct PinnedFile {
    path: PathBuf,
    /// Bytes used, from the beginning.
    bytes: u64,
    /// FNV-1a of them.
    digest: Digest,
}

/// Keeps `corpus` in a run's folder. A text that is kept there already stays.
pub fn pin_text(run: &Path, corpus: &Corpus) -> Result<(), TrainError> {
    pin(run, corpus, TEXT_COPY_BYTES_MAX)
}

fn pin(run: &Path, corpus: &Corpus, copy_bytes_max: usize) -> Result<(), TrainError> {
    let path = run.join(MANIFEST);
    if path.exists() {
        return Ok(());
    }
    let copied = corpus.total_bytes() <= copy_bytes_max;
    if copied {
        let mut copy = Vec::with_capacity(corpus.total_bytes());
        corpus.write_snapshot(&mut copy)?;
        write_atomically(&run.join(COPY), &copy)?;
    }
    // Paths that were given from the folder the program ran in must mean the same from another.
    let file = |source: &TextSource| PinnedFile {
        path: std::path::absolute(&source.path).unwrap_or_else(|_| source.path.clone()),
        bytes: source.bytes,
        digest: Digest(source.digest),
    };
    let domain = |(index, domain): (usize, &TextDomain)| PinnedDomain {
        name: domain.name.clone(),
        origin: domain.origin.clone(),
        files: corpus.sources.iter().filter(|source| source.domain == index).map(file).collect(),
    };
    let manifest = Manifest {
        schema: SCHEMA.into(),
        digest: Digest(corpus.digest()),
        copied,
        domains: corpus.domains.iter().enumerate().map(domain).collect(),
    };
    let text = serde_json::to_vec_pretty(&manifest).map_err(|error| TrainError::Encode(error.to_string()))?;
    Ok(write_atomically(&path, &text)?)
}

/// The text that a run keeps; `None` of a run that keeps none, as those of earlier versions.
pub fn pinned_text(run: &Path) -> Result<Option<Corpus>, TrainError> {
    let path = run.join(MANIFEST);
    let refuse = |path: &Path, reason: String| TrainError::PinnedText { path: path.to_path_buf(), reason };
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(TrainError::file("read", &path)(error)),
    };
    let mut text = Vec::new();
    file.take(MANIFEST_BYTES_MAX).read_to_end(&mut text).map_err(TrainError::file("read", &path))?;
    let manifest: Manifest = serde_json::from_slice(&text).map_err(|error| refuse(&path, error.to_string()))?;
    if manifest.schema != SCHEMA {
        return Err(refuse(&path, format!("schema {:?}, this program reads {SCHEMA:?}", manifest.schema)));
    }
    let copy = run.join(COPY);
    let corpus = match File::open(&copy) {
        Ok(file) => {
            let read = Corpus::read_snapshot(&mut BufReader::with_capacity(1 << 20, file));
            read.map_err(|error| refuse(&copy, error.to_string()))?
        }
        Err(error) if error.kind() == ErrorKind::NotFound => read_files(&manifest).map_err(|error| {
            let why = if manifest.copied { "its copy is gone" } else { "it was too large for a copy" };
            refuse(&path, format!("{error}; the run's text is read from its files: {why}"))
        })?,
        Err(error) => return Err(TrainError::file("read", &copy)(error)),
    };
    if corpus.digest() != manifest.digest.0 {
        return Err(refuse(&copy, format!("its digest is {}, the run's {}", Digest(corpus.digest()), manifest.digest)));
    }
    Ok(Some(corpus))
}

fn read_files(manifest: &Manifest) -> Result<Corpus, TextError> {
    let domain =
        |d: &PinnedDomain| TextDomain { name: d.name.clone(), origin: d.origin.clone(), ..TextDomain::default() };
    let domains: Vec<_> = manifest.domains.iter().map(domain).collect();
    let files = manifest.domains.iter().enumerate().flat_map(|(domain, of)| of.files.iter().map(move |f| (domain, f)));
    let source = |(domain, file): (usize, &PinnedFile)| TextSource {
        domain,
        path: file.path.clone(),
        bytes: file.bytes,
        digest: file.digest.0,
    };
    Corpus::from_sources(&domains, &files.map(source).collect::<Vec<_>>())
}

/// Why text that was given for a run is not the run's: the first file that differs, where the run knows its files.
pub(crate) fn text_difference(run: &Path, corpus: &Corpus) -> Option<String> {
    let text = fs::read(run.join(MANIFEST)).ok()?;
    let manifest: Manifest = serde_json::from_slice(&text).ok()?;
    let pinned = manifest.domains.iter().flat_map(|domain| &domain.files);
    let ours: std::collections::HashMap<_, _> = corpus
        .sources
        .iter()
        .map(|source| (std::path::absolute(&source.path).unwrap_or_default(), (source.bytes, source.digest)))
        .collect();
    let mut pinned = pinned.filter_map(|file| match ours.get(&file.path) {
        None => Some(format!("{} is not in it", file.path.display())),
        Some(&used) if used != (file.bytes, file.digest.0) => Some(format!("{} has changed", file.path.display())),
        Some(_) => None,
    });
    pinned.next()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;
    use ultraep_text::Limits;

    struct Bench {
        folder: TempDir,
        corpus: Corpus,
    }

    impl Bench {
        fn new() -> Self {
            let folder = TempDir::new().unwrap();
            for name in ["text/a.md", "text/b.rs", "text/c.md"] {
                fs::create_dir_all(folder.path().join("text")).unwrap();
                fs::write(folder.path().join(name), format!("the text of {name}, no end of line")).unwrap();
            }
            fs::create_dir(folder.path().join("run")).unwrap();
            let corpus = Corpus::from_paths(&[folder.path().join("text")], &Limits::GIVEN).unwrap();
            Self { folder, corpus }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.folder.path().join(name)
        }

        fn read(&self) -> Corpus {
            pinned_text(&self.path("run")).unwrap().unwrap()
        }

        fn error(&self) -> String {
            pinned_text(&self.path("run")).unwrap_err().to_string()
        }
    }

    #[test]
    fn a_copy_is_the_text_whatever_became_of_the_files() {
        let bench = Bench::new();
        assert!(pinned_text(&bench.path("run")).unwrap().is_none());
        pin_text(&bench.path("run"), &bench.corpus).unwrap();
        fs::remove_dir_all(bench.path("text")).unwrap();
        let read = bench.read();
        assert_eq!((&read.domains, &read.sources), (&bench.corpus.domains, &bench.corpus.sources));

        let mut damaged = fs::read(bench.path("run/text.uetext")).unwrap();
        damaged[60] ^= 1;
        fs::write(bench.path("run/text.uetext"), damaged).unwrap();
        assert!(bench.error().contains("text.uetext"), "{}", bench.error());
    }

    #[test]
    fn a_text_without_a_copy_is_read_from_its_files_or_the_file_is_named() {
        let bench = Bench::new();
        pin(&bench.path("run"), &bench.corpus, 0).unwrap();
        assert!(!bench.path("run/text.uetext").exists());
        // Files that were not there are no part of the text.
        fs::write(bench.path("text/d.md"), "another file").unwrap();
        let read = bench.read();
        assert_eq!((&read.domains, read.digest()), (&bench.corpus.domains, bench.corpus.digest()));
        fs::write(bench.path("text/b.rs"), "the text of text/b.rs, no end of lime").unwrap();
        assert!(bench.error().contains("b.rs: its text is not what it was"), "{}", bench.error());
        fs::remove_file(bench.path("text/b.rs")).unwrap();
        assert!(bench.error().contains("b.rs: it is not there any more"), "{}", bench.error());
    }

    #[test]
    fn the_file_that_differs_is_found() {
        let bench = Bench::new();
        pin_text(&bench.path("run"), &bench.corpus).unwrap();
        let again = |paths: &[PathBuf]| Corpus::from_paths(paths, &Limits::GIVEN).unwrap();
        assert_eq!(text_difference(&bench.path("run"), &again(&[bench.path("text")])), None);
        let one = again(&[bench.path("text/a.md")]);
        assert!(text_difference(&bench.path("run"), &one).unwrap().ends_with("is not in it"));
        fs::write(bench.path("text/c.md"), "other words").unwrap();
        let changed = text_difference(&bench.path("run"), &again(&[bench.path("text")])).unwrap();
        assert!(changed.ends_with("c.md has changed"), "{changed}");
    }
}
