//! Files that are written: temporary ones that never stay behind, and results that are there whole or not at all.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};

use tempfile::{NamedTempFile, TempPath};

/// A temporary file. On Linux it has no name, so that it is gone with the process however that ends; elsewhere it is removed
/// when it is dropped.
#[derive(Debug)]
pub struct TemporaryFile {
    file: File,
    path: PathBuf,
    _named: Option<TempPath>,
}

impl TemporaryFile {
    /// An empty file in the system's folder for them.
    pub fn new() -> io::Result<Self> {
        #[cfg(target_os = "linux")]
        {
            use std::os::fd::AsRawFd;
            let file = tempfile::tempfile()?;
            let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
            if path.exists() {
                return Ok(Self { file, path, _named: None });
            }
        }
        let (file, named) = NamedTempFile::new()?.into_parts();
        Ok(Self { file, path: named.to_path_buf(), _named: Some(named) })
    }

    /// A path that opens it, in this process and as long as this lives.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A writer at its beginning.
    pub fn writer(&self) -> io::Result<BufWriter<File>> {
        Ok(BufWriter::new(self.file.try_clone()?))
    }
}

/// A file that is written beside its place and put there when it is whole. Nothing is overwritten; dropped before
/// [`OutputFile::finish`], it leaves nothing. Where the system can (Linux on most file systems) it has no name until then, so
/// that even a killed process leaves nothing.
#[derive(Debug)]
pub struct OutputFile {
    file: Unfinished,
    path: PathBuf,
}

#[derive(Debug)]
enum Unfinished {
    #[cfg(target_os = "linux")]
    Unnamed(File),
    Named(NamedTempFile),
}

impl OutputFile {
    /// Begins to write what will be at `path`, where nothing may be yet.
    pub fn new(path: &Path) -> io::Result<Self> {
        if path.symlink_metadata().is_ok() {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "exists: allowed is a name that is free"));
        }
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let name = path.file_name().ok_or_else(|| io::Error::other("no name of a file"))?;
        Ok(Self { file: Unfinished::new(folder, name)?, path: path.to_owned() })
    }

    /// The file, to be written through a buffer.
    pub fn file(&self) -> io::Result<File> {
        match &self.file {
            #[cfg(target_os = "linux")]
            Unfinished::Unnamed(file) => file.try_clone(),
            Unfinished::Named(file) => file.as_file().try_clone(),
        }
    }

    /// Puts the file in its place.
    pub fn finish(self) -> io::Result<()> {
        match self.file {
            #[cfg(target_os = "linux")]
            Unfinished::Unnamed(file) => {
                use std::os::fd::AsRawFd;
                let unnamed = format!("/proc/self/fd/{}", file.as_raw_fd());
                let flags = rustix::fs::AtFlags::SYMLINK_FOLLOW;
                Ok(rustix::fs::linkat(rustix::fs::CWD, unnamed, rustix::fs::CWD, &self.path, flags)?)
            }
            Unfinished::Named(file) => file.persist_noclobber(&self.path).map(drop).map_err(|error| error.error),
        }
    }
}

/// Several files that belong together: all are put in their places by [`OutputFiles::finish`], or none stays.
#[derive(Debug, Default)]
pub(crate) struct OutputFiles {
    waiting: Vec<OutputFile>,
    placed: Vec<PathBuf>,
}

impl OutputFiles {
    /// Most files that wait without a name: every one is an open file.
    const MAX_WAITING: usize = 256;

    /// Takes a written file. Of very many the first are put in their places at once.
    pub(crate) fn push(&mut self, file: OutputFile) -> Result<(), (PathBuf, io::Error)> {
        self.waiting.push(file);
        if self.waiting.len() > Self::MAX_WAITING { self.place() } else { Ok(()) }
    }

    /// Puts all files in their places, in the order they came.
    pub(crate) fn finish(mut self) -> Result<(), (PathBuf, io::Error)> {
        self.place()?;
        self.placed.clear();
        Ok(())
    }

    fn place(&mut self) -> Result<(), (PathBuf, io::Error)> {
        for file in self.waiting.drain(..) {
            let path = file.path.clone();
            file.finish().map_err(|error| (path.clone(), error))?;
            self.placed.push(path);
        }
        Ok(())
    }
}

impl Drop for OutputFiles {
    fn drop(&mut self) {
        for path in &self.placed {
            let _ = std::fs::remove_file(path); // the error that led here is the one to tell
        }
    }
}

impl Unfinished {
    fn new(folder: &Path, name: &OsStr) -> io::Result<Self> {
        #[cfg(target_os = "linux")]
        if let Some(file) = unnamed(folder) {
            return Ok(Self::Unnamed(file));
        }
        let mut prefix = OsString::from(".");
        prefix.push(name);
        prefix.push(".partial-");
        let mut builder = tempfile::Builder::new();
        builder.prefix(&prefix);
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // As any new file; what the user's mask takes away is taken away.
            builder.permissions(std::fs::Permissions::from_mode(0o666));
        }
        builder.tempfile_in(folder).map(Self::Named)
    }
}

/// A file without a name that can get one, where the file system has such.
#[cfg(target_os = "linux")]
fn unnamed(folder: &Path) -> Option<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = rustix::fs::OFlags::TMPFILE.bits().cast_signed();
    let file = File::options().read(true).write(true).custom_flags(flags).open(folder).ok()?;
    Path::new("/proc/self/fd").exists().then_some(file)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn names(folder: &Path) -> usize {
        std::fs::read_dir(folder).map(Iterator::count).unwrap_or(0)
    }

    #[test]
    fn a_result_is_there_whole_or_not_at_all() -> io::Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("out.bin");
        let dropped = OutputFile::new(&path)?;
        dropped.file()?.write_all(b"half")?;
        drop(dropped);
        assert_eq!(names(folder.path()), 0);
        let first = OutputFile::new(&path)?;
        let second = OutputFile::new(&path)?;
        first.file()?.write_all(b"whole")?;
        first.finish()?;
        assert_eq!(std::fs::read(&path)?, b"whole");
        assert!(second.finish().is_err(), "nothing is overwritten");
        assert_eq!(std::fs::read(&path)?, b"whole");
        assert!(OutputFile::new(&path).is_err());
        assert_eq!(names(folder.path()), 1);
        Ok(())
    }

    #[test]
    fn a_temporary_file_is_read_by_its_path_and_goes() -> io::Result<()> {
        let temporary = TemporaryFile::new()?;
        temporary.writer()?.write_all(b"content")?;
        let path = temporary.path().to_owned();
        assert_eq!(std::fs::read(&path)?, b"content");
        assert_eq!(std::fs::read(&path)?, b"content", "every opening begins at the beginning");
        drop(temporary);
        assert!(std::fs::read(&path).map_or(true, |bytes| bytes != b"content"));
        Ok(())
    }
}
