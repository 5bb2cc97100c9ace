//! Everything that is viewed together.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::entry::Entry;
use crate::{Settings, ViewError};

/// Most runs and recordings at a time.
const ENTRIES_MAX: usize = 64;

/// Runs and recordings, each followed by a thread of its own until this is dropped.
pub struct Viewer {
    entries: Vec<Arc<Entry>>,
    stop: Arc<AtomicBool>,
}

impl Viewer {
    /// Opens run folders, traces and recordings and begins to read them.
    pub fn open(paths: &[PathBuf], settings: &Settings) -> Result<Self, ViewError> {
        if !(1..=ENTRIES_MAX).contains(&paths.len()) {
            let (got, allowed) = (paths.len().to_string(), format!("1 to {ENTRIES_MAX}; a folder is one recording"));
            return Err(ViewError::Setting { what: "number of recordings", got, allowed });
        }
        let open = |path: &PathBuf| Entry::open(path, settings).map(Arc::new);
        let entries = paths.iter().map(open).collect::<Result<Vec<_>, _>>()?;
        let stop = Arc::new(AtomicBool::new(false));
        for entry in &entries {
            let (entry, stop) = (entry.clone(), stop.clone());
            std::thread::spawn(move || entry.follow(&stop));
        }
        Ok(Self { entries, stop })
    }

    pub(crate) fn entries(&self) -> &[Arc<Entry>] {
        &self.entries
    }

    pub(crate) fn entry(&self, index: usize) -> Result<Arc<Entry>, ViewError> {
        let known = format!("there are 0 to {}", self.entries.len() - 1);
        self.entries.get(index).cloned().ok_or(ViewError::NotFound { what: format!("recording {index}"), known })
    }
}

impl Drop for Viewer {
    fn drop(&mut self) {
        // Nothing else is told by it; a thread sees it within its pause.
        self.stop.store(true, Ordering::Relaxed);
    }
}
