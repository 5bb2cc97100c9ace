//! A corpus: domains of text, where they came from, and what was left out.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::TextError;
use crate::gather::{self, Group, Origin};
use crate::kind::Kind;
use crate::mix::Fnv;
use crate::walk::{Found, OnUnreadable, Walk, WalkError};

/// Real text in domains.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Corpus {
    /// At least one where the corpus was read from files; in the order rust, code, prose, markup, data, text.
    pub domains: Vec<TextDomain>,
    /// The files that the text was taken from, in the order of the text; empty where it came from no file.
    pub sources: Vec<TextSource>,
    /// What was seen and left out.
    pub skipped: Skipped,
}

/// A file that text was taken from: enough to read the same text again, or to tell that it has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextSource {
    /// Index of its domain in [`Corpus::domains`].
    pub domain: usize,
    /// Where it was read.
    pub path: PathBuf,
    /// Bytes that were used, from the beginning of the file.
    pub bytes: u64,
    /// FNV-1a of those bytes.
    pub digest: u64,
}

/// Text of one kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TextDomain {
    /// `rust`, `code` (other languages), `prose`, `markup`, `data` or `text` (files whose names say nothing).
    pub name: String,
    /// The text of all files, UTF-8 unless a caller built it otherwise, each file ending in a line end. Files come in an
    /// order drawn from their names, so that any part of the domain (the held-out one, say) is a sample of the whole.
    pub bytes: Vec<u8>,
    /// How many files it was taken from.
    pub files: usize,
    /// Where they came from, in words.
    pub origin: String,
}

/// Bounds on what is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most text of one domain (line ends added to cut files come on top). Where there is more, it is shared evenly: over the given paths or, in discovery, over
    /// crates, books and the project; none gets more than an equal share unless others leave theirs.
    pub domain_bytes_max: u64,
    /// Least text of one domain; smaller ones are left out, unless all are smaller.
    pub domain_bytes_min: u64,
    /// Most text of one file; of a longer one the beginning is used.
    pub file_bytes_max: u64,
    /// Most files to look at below one root.
    pub files_max: usize,
}

impl Limits {
    /// For text that the user named: generous.
    pub const GIVEN: Self =
        Self { domain_bytes_max: 64 << 20, domain_bytes_min: 0, file_bytes_max: 64 << 20, files_max: 200_000 };
    /// For text that was looked for: enough to train on for minutes, read in about a second.
    pub const DISCOVERED: Self =
        Self { domain_bytes_max: 4 << 20, domain_bytes_min: 64 << 10, file_bytes_max: 1 << 20, files_max: 200_000 };
}

/// What was seen while reading and left out, in files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Skipped {
    /// Not UTF-8, or with zero bytes in it.
    pub binary: usize,
    /// Without any bytes.
    pub empty: usize,
    /// The same bytes as a file already taken (licences, above all).
    pub duplicates: usize,
    /// Symbolic links, which are not followed.
    pub links: usize,
    /// Read only in part, because of [`Limits::file_bytes_max`] or because the domain was full.
    pub cut: usize,
    /// Not read, because the domain was full without them.
    pub unused: usize,
    /// In domains smaller than [`Limits::domain_bytes_min`].
    pub in_small_domains: usize,
    /// Files and folders that the system refused to read (discovery only; in given folders that is an error).
    pub unreadable: usize,
    /// Roots with more files than [`Limits::files_max`], whose rest was not looked at (discovery only).
    pub cut_roots: usize,
}

impl Skipped {
    /// As words, `None` when nothing was left out.
    pub fn describe(&self) -> Option<String> {
        let parts: Vec<String> = [
            (self.binary, "binary"),
            (self.empty, "empty"),
            (self.duplicates, "with the same text as another"),
            (self.links, "symbolic links"),
            (self.in_small_domains, "of a kind with too little text"),
            (self.unused, "beyond a domain's size limit"),
            (self.cut, "in part"),
            (self.unreadable, "unreadable"),
        ]
        .iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, what)| format!("{count} {what}"))
        .collect();
        let cut = (self.cut_roots > 0).then(|| format!("the rest of {} large folders", self.cut_roots));
        let files = (!parts.is_empty()).then(|| format!("files {}", parts.join(", ")));
        match (files, cut) {
            (None, None) => None,
            (files, cut) => Some(files.into_iter().chain(cut).collect::<Vec<_>>().join("; ")),
        }
    }

    pub(crate) fn in_brackets(&self) -> String {
        self.describe().map(|words| format!(" (left out: {words})")).unwrap_or_default()
    }
}

impl Corpus {
    /// Text of the given files and folders.
    ///
    /// Folders are read recursively. Files that are not UTF-8 text are skipped and counted; hidden entries, folders named
    /// `target` and symbolic links found inside are not entered. A file named by itself is read whatever its name, and is
    /// an error when it is empty or not text. The domain is decided by the extension; see [`TextDomain::name`].
    pub fn from_paths(paths: &[PathBuf], limits: &Limits) -> Result<Self, TextError> {
        let mut skipped = Skipped::default();
        let groups = paths
            .iter()
            .enumerate()
            .map(|(index, path)| given_group(index, path, limits, &mut skipped))
            .collect::<Result<Vec<_>, _>>()?;
        let (domains, sources) = gather::gather(groups, limits, OnUnreadable::Fail, &mut skipped)?;
        let searched = match paths {
            [] => "no path at all".to_string(),
            _ => paths.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", "),
        };
        Self { domains, sources, skipped }.or_no_text(searched)
    }

    /// The text of `sources` again, in domains with these names and origins (their bytes and numbers of files are not
    /// looked at): byte for byte what it was, or an error that names the first file that is missing or has changed.
    pub fn from_sources(domains: &[TextDomain], sources: &[TextSource]) -> Result<Self, TextError> {
        let empty = |d: &TextDomain| TextDomain { bytes: Vec::new(), files: 0, ..d.clone() };
        let mut corpus = Self { domains: domains.iter().map(empty).collect(), ..Self::default() };
        for source in sources {
            let changed = |what| TextError::Changed { path: source.path.clone(), what };
            let Some(domain) = corpus.domains.get_mut(source.domain) else {
                return Err(changed("its domain is not among those of the text"));
            };
            let bytes = gather::read_beginning(&source.path, source.bytes).map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => changed("it is not there any more"),
                _ => TextError::Unreadable { path: source.path.clone(), source: error },
            })?;
            if (bytes.len() as u64, Fnv::of(&bytes)) != (source.bytes, source.digest) {
                return Err(changed("its text is not what it was"));
            }
            domain.bytes.extend_from_slice(&bytes);
            domain.files += 1;
            if domain.bytes.last() != Some(&b'\n') {
                domain.bytes.push(b'\n');
            }
        }
        corpus.sources = sources.to_vec();
        Ok(corpus)
    }

    pub(crate) fn or_no_text(self, searched: String) -> Result<Self, TextError> {
        if self.domains.is_empty() { Err(TextError::NoText { searched, skipped: self.skipped }) } else { Ok(self) }
    }

    /// Bytes of all domains.
    pub fn total_bytes(&self) -> usize {
        self.domains.iter().map(|d| d.bytes.len()).sum()
    }

    /// A 64-bit digest of names and bytes of all domains (FNV-1a, lengths included): a run that resumes on other text
    /// than it began with finds another digest. Not a defence against someone who wants a collision. About 1 ns a byte.
    pub fn digest(&self) -> u64 {
        let mut hash = Fnv::new();
        for domain in &self.domains {
            hash.write_length(domain.name.len());
            hash.write(domain.name.as_bytes());
            hash.write_length(domain.bytes.len());
            hash.write(&domain.bytes);
        }
        hash.finish()
    }

    /// Lines for the screen: one a domain (name, size, files, origin), and one for what was left out, if anything was.
    pub fn summary(&self) -> Vec<String> {
        let mut lines: Vec<String> = self
            .domains
            .iter()
            .map(|d| {
                let (size, files) = (words_of_bytes(d.bytes.len()), d.files);
                let noun = if files == 1 { "file" } else { "files" };
                format!("{:<7} {size:>9}  {files:>6} {noun:<5}  {}", d.name, d.origin)
            })
            .collect();
        lines.extend(self.skipped.describe().map(|words| format!("left out: {words}")));
        lines
    }
}

/// A size in words, rounded down to a tenth, with integers only.
fn words_of_bytes(bytes: usize) -> String {
    let (unit, name) = match bytes {
        0..1024 => return format!("{bytes} B"),
        1024..0x10_0000 => (1024, "KiB"),
        _ => (0x10_0000, "MiB"),
    };
    format!("{}.{} {name}", bytes / unit, bytes % unit * 10 / unit)
}

fn given_group(index: usize, path: &Path, limits: &Limits, skipped: &mut Skipped) -> Result<Group, TextError> {
    let unreadable = |path: PathBuf, source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => TextError::NotFound { path },
        _ => TextError::Unreadable { path, source },
    };
    let metadata = fs::metadata(path).map_err(|e| unreadable(path.to_path_buf(), e))?;
    let origin = Origin::Given(path.display().to_string());
    let mut files = Vec::new();
    if metadata.is_dir() {
        let walk = Walk { skip: &[], files_max: limits.files_max, on_unreadable: OnUnreadable::Fail };
        walk.files(path, &mut files, skipped).map_err(|e| match e {
            WalkError::TooManyFiles => {
                TextError::TooManyFiles { path: path.to_path_buf(), files_max: limits.files_max }
            }
            WalkError::Unreadable(path, source) => unreadable(path, source),
        })?;
    } else {
        gather::check_named_file(path, limits)?;
        let relative = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        files.push(Found { path: path.to_path_buf(), relative, kind: Kind::of(path), bytes: metadata.len() });
    }
    Ok(Group { name: format!("{index:08}"), origin, files })
}
