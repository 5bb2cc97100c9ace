//! From files seen to domains of text, within the limits.
//!
//! Problem: of each kind of text there may be far more than wanted, very unevenly spread (one crate of bindings can
//! outweigh a hundred others). Method: groups (a crate, a book, the project, a given path) share a domain's bytes by
//! filling them like vessels: every group gets the same level, or all it has where that is less. Within a group, files
//! are visited in an order drawn from their names until the group's share is used up, so the choice is an even sample and
//! not the alphabet's beginning. Cost: one sort of names and one read of the chosen bytes.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::kind::Kind;
use crate::mix::Fnv;
use crate::walk::{Found, OnUnreadable};
use crate::{Limits, Skipped, TextDomain, TextError, TextSource};

/// Files that share one place.
pub(crate) struct Group {
    /// Unique, and the same on every machine: part of the order of files.
    pub(crate) name: String,
    pub(crate) origin: Origin,
    pub(crate) files: Vec<Found>,
}

/// Where a group comes from, in words.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Origin {
    /// A crate of the build's lock file.
    LockedCrate,
    /// A crate in cargo's registry, where no lock file says which belong to the build.
    AnyCrate,
    Documentation,
    Project,
    Given(String),
}

impl Origin {
    /// Words for `groups` groups of this origin.
    fn describe(&self, groups: usize) -> String {
        match self {
            Self::LockedCrate => format!("{groups} crates unpacked by cargo for this build"),
            Self::AnyCrate => format!("{groups} crates unpacked by cargo"),
            Self::Documentation => "the toolchain's documentation".to_string(),
            Self::Project => "the project's own files".to_string(),
            Self::Given(path) => path.clone(),
        }
    }
}

/// One file's text, with what its place in the domain depends on.
struct Document {
    order: (u64, usize, String),
    text: Vec<u8>,
    path: PathBuf,
    used: Used,
}

/// What was taken of a file: the text without a line end that was added.
struct Used {
    bytes: u64,
    digest: u64,
}

/// The domains of `groups`, those without text left out, and the files that they were taken from.
pub(crate) fn gather(
    groups: Vec<Group>,
    limits: &Limits,
    on_unreadable: OnUnreadable,
    skipped: &mut Skipped,
) -> Result<(Vec<TextDomain>, Vec<TextSource>), TextError> {
    let mut reader = Reader { limits, on_unreadable, taken: BTreeSet::new(), skipped };
    let mut domains = Vec::new();
    for kind in Kind::ALL {
        let sizes: Vec<u64> = groups
            .iter()
            .map(|g| g.files.iter().filter(|f| f.kind == kind).map(|f| f.bytes.min(limits.file_bytes_max)).sum())
            .collect();
        let level = fill_level(&sizes, limits.domain_bytes_max);
        let mut documents = Vec::new();
        let mut origins = Vec::new();
        for (index, group) in groups.iter().enumerate().filter(|(index, _)| sizes[*index] > 0) {
            let before = documents.len();
            reader.read_group(index, group, kind, level, &mut documents)?;
            if documents.len() > before {
                origins.push(group.origin.clone());
            }
        }
        if !documents.is_empty() {
            documents.sort_by(|a, b| a.order.cmp(&b.order));
            domains.push((domain_of(kind, &documents, origins), sources_of(documents)));
        }
    }
    let large_enough = |(d, _): &(TextDomain, Vec<TextSource>)| d.bytes.len() as u64 >= limits.domain_bytes_min;
    if domains.iter().any(large_enough) {
        skipped.in_small_domains += domains.iter().filter(|d| !large_enough(d)).map(|(d, _)| d.files).sum::<usize>();
        domains.retain(large_enough);
    }
    let (domains, sources): (Vec<_>, Vec<_>) = domains.into_iter().unzip();
    let numbered =
        |(domain, files): (usize, Vec<TextSource>)| files.into_iter().map(move |f| TextSource { domain, ..f });
    Ok((domains, sources.into_iter().enumerate().flat_map(numbered).collect()))
}

/// The files of one domain, which gets its index when all domains are known.
fn sources_of(documents: Vec<Document>) -> Vec<TextSource> {
    let source = |d: Document| TextSource { domain: 0, path: d.path, bytes: d.used.bytes, digest: d.used.digest };
    documents.into_iter().map(source).collect()
}

fn domain_of(kind: Kind, documents: &[Document], mut origins: Vec<Origin>) -> TextDomain {
    origins.sort();
    let words: Vec<String> = origins.chunk_by(|a, b| a == b).map(|same| same[0].describe(same.len())).collect();
    TextDomain {
        name: kind.domain().to_string(),
        bytes: documents.iter().flat_map(|d| d.text.iter().copied()).collect(),
        files: documents.len(),
        origin: words.join(", "),
    }
}

/// The largest level at which groups of these sizes, each giving at most the level, stay within `total`.
fn fill_level(sizes: &[u64], total: u64) -> u64 {
    let mut sorted: Vec<u64> = sizes.iter().copied().filter(|&s| s > 0).collect();
    sorted.sort_unstable();
    let mut left = total;
    for (index, &size) in sorted.iter().enumerate() {
        let share = left / (sorted.len() - index) as u64; // rounded down: the limit holds
        if size > share {
            return share;
        }
        left -= size;
    }
    u64::MAX
}

struct Reader<'a> {
    limits: &'a Limits,
    on_unreadable: OnUnreadable,
    /// (hash, length) of every text taken, over all domains.
    taken: BTreeSet<(u64, usize)>,
    skipped: &'a mut Skipped,
}

impl Reader<'_> {
    /// Appends documents of one kind until `level` bytes of this group are used.
    fn read_group(
        &mut self,
        index: usize,
        group: &Group,
        kind: Kind,
        level: u64,
        documents: &mut Vec<Document>,
    ) -> Result<(), TextError> {
        let mut files: Vec<(u64, &Found)> = group
            .files
            .iter()
            .filter(|f| f.kind == kind)
            .map(|f| (Fnv::of(format!("{}/{}", group.name, f.relative).as_bytes()), f))
            .collect();
        files.sort_by(|(a, f), (b, g)| (a, &f.relative, &f.path).cmp(&(b, &g.relative, &g.path)));
        let mut left = level;
        for (hash, file) in files {
            if left == 0 {
                self.skipped.unused += 1;
                continue;
            }
            let bytes_max = left.min(self.limits.file_bytes_max);
            if let Some((text, used)) = self.read_text(file, bytes_max)? {
                self.skipped.cut += usize::from(file.bytes > bytes_max);
                left -= (text.len() as u64).min(left);
                let order = (hash, index, file.relative.clone());
                documents.push(Document { order, text, path: file.path.clone(), used });
            }
        }
        Ok(())
    }

    /// A file's text with a line end, and how many bytes of the file it is with their digest.
    fn read_text(&mut self, file: &Found, bytes_max: u64) -> Result<Option<(Vec<u8>, Used)>, TextError> {
        let mut bytes = match read_beginning(&file.path, bytes_max) {
            Ok(bytes) => bytes,
            Err(_) if self.on_unreadable == OnUnreadable::Count => {
                self.skipped.unreadable += 1;
                return Ok(None);
            }
            Err(source) => return Err(TextError::Unreadable { path: file.path.clone(), source }),
        };
        if bytes.is_empty() {
            self.skipped.empty += 1;
            return Ok(None);
        }
        match text_length(&bytes, bytes.len() as u64 == bytes_max) {
            Ok(length) => bytes.truncate(length),
            Err(_) => {
                self.skipped.binary += 1;
                return Ok(None);
            }
        }
        let digest = Fnv::of(&bytes);
        if !self.taken.insert((digest, bytes.len())) {
            self.skipped.duplicates += 1;
            return Ok(None);
        }
        let used = Used { bytes: bytes.len() as u64, digest };
        if bytes.last() != Some(&b'\n') {
            bytes.push(b'\n');
        }
        Ok(Some((bytes, used)))
    }
}

/// Refuses a file named by itself when it is empty or not text.
pub(crate) fn check_named_file(path: &Path, limits: &Limits) -> Result<(), TextError> {
    let bytes = read_beginning(path, limits.file_bytes_max)
        .map_err(|source| TextError::Unreadable { path: path.to_path_buf(), source })?;
    if bytes.is_empty() {
        return Err(TextError::Empty { path: path.to_path_buf() });
    }
    match text_length(&bytes, bytes.len() as u64 == limits.file_bytes_max) {
        Ok(_) => Ok(()),
        Err((offset, reason)) => Err(TextError::NotText { path: path.to_path_buf(), offset, reason }),
    }
}

pub(crate) fn read_beginning(path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    let mut bytes = Vec::with_capacity(file.metadata()?.len().min(bytes_max) as usize);
    file.take(bytes_max).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// How much of `bytes` is text: all of it or, where reading may have stopped inside a character, all but that.
/// Otherwise the offset of the first byte that no text has, and why.
fn text_length(bytes: &[u8], may_be_cut: bool) -> Result<usize, (usize, &'static str)> {
    if let Some(offset) = bytes.iter().position(|&b| b == 0) {
        return Err((offset, "a zero byte"));
    }
    match std::str::from_utf8(bytes) {
        Ok(_) => Ok(bytes.len()),
        Err(error) if may_be_cut && error.error_len().is_none() && error.valid_up_to() > 0 => Ok(error.valid_up_to()),
        Err(error) => Err((error.valid_up_to(), "not UTF-8")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_level_fills_small_groups_and_caps_large_ones() {
        for (sizes, total, expected) in [
            (&[10_u64, 20, 30][..], 60, u64::MAX),
            (&[10, 20, 30], 59, 29),
            (&[10, 1000, 30], 100, 60),
            (&[0, 5, 0], 4, 4),
            (&[7, 7, 7], 20, 6),
            (&[], 10, u64::MAX),
        ] {
            let level = fill_level(sizes, total);
            assert_eq!(level, expected, "{sizes:?}");
            assert!(sizes.iter().map(|&s| s.min(level)).sum::<u64>() <= total);
        }
    }

    #[test]
    fn a_cut_character_is_dropped_and_other_bytes_are_refused() {
        let text = "aé".as_bytes();
        assert_eq!(text_length(text, false), Ok(3));
        assert_eq!(text_length(&text[..2], true), Ok(1));
        assert_eq!(text_length(&text[..2], false), Err((1, "not UTF-8")));
        assert_eq!(text_length(b"a\0b", true), Err((1, "a zero byte")));
        assert_eq!(text_length(b"\xff\xfe", true), Err((0, "not UTF-8")));
    }
}
