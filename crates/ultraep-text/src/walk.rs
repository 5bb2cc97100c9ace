//! Walking a folder in a fixed order.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::Skipped;
use crate::kind::Kind;

/// A file seen on a walk.
pub(crate) struct Found {
    pub(crate) path: PathBuf,
    /// Path below the root, `/` between parts: what order and choice depend on, so that they do not depend on where a
    /// machine keeps the root.
    pub(crate) relative: String,
    pub(crate) kind: Kind,
    pub(crate) bytes: u64,
}

/// What to do about a file or folder that cannot be read.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnUnreadable {
    /// The user named the folder: tell.
    Fail,
    /// It was only looked at: count it.
    Count,
}

pub(crate) struct Walk<'a> {
    /// Folders not to enter, as canonical paths.
    pub(crate) skip: &'a [PathBuf],
    pub(crate) files_max: usize,
    pub(crate) on_unreadable: OnUnreadable,
}

/// Why a walk ended early.
#[derive(Debug)]
pub(crate) enum WalkError {
    TooManyFiles,
    Unreadable(PathBuf, io::Error),
}

impl Walk<'_> {
    /// Appends the regular files below `root` to `found`, depth first, names in byte order. Hidden entries, folders named
    /// `target` and symbolic links are not entered. On [`WalkError::TooManyFiles`] the first `files_max` are in `found`.
    pub(crate) fn files(&self, root: &Path, found: &mut Vec<Found>, skipped: &mut Skipped) -> Result<(), WalkError> {
        let limit = found.len().saturating_add(self.files_max);
        let mut pending = vec![(root.to_path_buf(), String::new())];
        while let Some((folder, below)) = pending.pop() {
            let entries = match Self::entries(&folder) {
                Ok(entries) => entries,
                Err(error) => {
                    self.unreadable(folder, error, skipped)?;
                    continue;
                }
            };
            let mut folders = Vec::new();
            for entry in entries {
                let name = entry.file_name();
                let name = name.to_string_lossy();
                let path = entry.path();
                let metadata = match entry.metadata() {
                    Ok(metadata) => metadata, // of the entry itself: links are not followed
                    Err(error) => {
                        self.unreadable(path, error, skipped)?;
                        continue;
                    }
                };
                if name.starts_with('.') {
                    continue;
                }
                let relative = if below.is_empty() { name.to_string() } else { format!("{below}/{name}") };
                if metadata.is_symlink() {
                    skipped.links += 1;
                } else if metadata.is_dir() {
                    if name != "target" && !self.is_skipped(&path) {
                        folders.push((path, relative));
                    }
                } else if metadata.is_file() {
                    if found.len() == limit {
                        return Err(WalkError::TooManyFiles);
                    }
                    let kind = Kind::of(&path);
                    found.push(Found { path, relative, kind, bytes: metadata.len() });
                }
            }
            pending.extend(folders.into_iter().rev());
        }
        Ok(())
    }

    /// Folders directly below `root`, in name order: hidden ones, links and `target` left out; none if it cannot be read.
    pub(crate) fn folders(root: &Path) -> Vec<PathBuf> {
        let Ok(entries) = fs::read_dir(root) else { return Vec::new() };
        let mut folders: Vec<PathBuf> = entries
            .filter_map(Result::ok)
            .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()) && !e.file_name().to_string_lossy().starts_with('.'))
            .map(|e| e.path())
            .collect();
        folders.sort();
        folders
    }

    fn is_skipped(&self, folder: &Path) -> bool {
        let same_name = |skip: &&PathBuf| skip.file_name() == folder.file_name();
        self.skip.iter().filter(same_name).any(|skip| folder.canonicalize().is_ok_and(|canonical| canonical == *skip))
    }

    fn entries(folder: &Path) -> io::Result<Vec<fs::DirEntry>> {
        let mut entries = fs::read_dir(folder)?.collect::<io::Result<Vec<_>>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        Ok(entries)
    }

    fn unreadable(&self, path: PathBuf, error: io::Error, skipped: &mut Skipped) -> Result<(), WalkError> {
        match self.on_unreadable {
            OnUnreadable::Fail => Err(WalkError::Unreadable(path, error)),
            OnUnreadable::Count => {
                skipped.unreadable += 1;
                Ok(())
            }
        }
    }
}
