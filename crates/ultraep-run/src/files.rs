//! Writing files so that a crash or a full disk never leaves half of one.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::RunError;

/// Largest JSON document read.
pub(crate) const DOCUMENT_BYTES_MAX: u64 = 16 << 20;

/// Writes a whole file: to a temporary file beside it, synced to the disk, then renamed over it. On any error the file is
/// as it was before, and the temporary one is removed.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), RunError> {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".part");
    let temporary = path.with_file_name(name);
    let written = write_and_sync(&temporary, bytes).and_then(|()| fs::rename(&temporary, path));
    if let Err(source) = written {
        let _ = fs::remove_file(&temporary); // the first error is the one to tell
        let kept = if path.exists() { "the file from before is still there" } else { "nothing of it is left behind" };
        return Err(RunError::write(path, kept)(source));
    }
    sync_folder_of(path).map_err(RunError::write(path, "the file is there, but may not survive a power cut"))
}

fn write_and_sync(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Makes a rename durable. Only Unix can open folders for that.
fn sync_folder_of(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(folder) if cfg!(unix) => {
            let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
            File::open(folder)?.sync_all()
        }
        _ => Ok(()),
    }
}

pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<(), RunError> {
    let refused = |e: serde_json::Error| RunError::Json { path: path.into(), line: None, reason: e.to_string() };
    let mut bytes = serde_json::to_vec_pretty(value).map_err(refused)?;
    bytes.push(b'\n');
    write_atomically(path, &bytes)
}

/// `None` where there is no such file.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, RunError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(RunError::read(path)(error)),
    };
    let mut bytes = Vec::new();
    file.take(DOCUMENT_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(RunError::read(path))?;
    if bytes.len() as u64 > DOCUMENT_BYTES_MAX {
        return Err(RunError::TooLarge { path: path.into(), what: "a file", max_bytes: DOCUMENT_BYTES_MAX });
    }
    let refused = |e: serde_json::Error| RunError::Json { path: path.into(), line: None, reason: e.to_string() };
    serde_json::from_slice(&bytes).map(Some).map_err(refused)
}
