//! How a recording is read: what the user decides where content cannot tell.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What the numbers of an array are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reading {
    /// Tokens by source rank and expert: `[ranks, experts]`, `[layers, ranks, experts]`, `[steps, layers, ranks, experts]`.
    Counts,
    /// Experts of tokens: `[tokens, K]` or `[tokens, layers, K]`.
    Ids,
    /// A routing map of one layer: `[tokens, experts]`, 1 where the token chose the expert.
    Map,
}

impl Reading {
    /// All readings.
    pub const ALL: [Self; 3] = [Self::Counts, Self::Ids, Self::Map];

    /// Name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Counts => "counts",
            Self::Ids => "ids",
            Self::Map => "map",
        }
    }
}

impl fmt::Display for Reading {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Reading {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|reading| reading.name() == text);
        found.ok_or_else(|| "allowed are counts, ids and map".to_owned())
    }
}

/// How to read.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// Leave out an engine's profiling (dummy) runs, wherever they are in a log of tokens.
    pub drop_dummy_run: bool,
    /// What the numbers of an array are; `None` finds it out by content, and refuses what content cannot tell.
    pub reading: Option<Reading>,
    /// Which array of an archive of several.
    pub array: Option<String>,
    /// Experts of a layer. An id beyond them is refused where it is read; `None` takes what the recording says.
    pub experts: Option<usize>,
    /// Grows by the bytes read from files: for a progress bar.
    pub bytes_read: Arc<AtomicU64>,
}

impl OpenOptions {
    pub(crate) fn count(&self, bytes: usize) {
        // Only shown to people: no order with anything else.
        self.bytes_read.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// These options with a counter of bytes of their own: for a look at a file that is no part of reading it.
    pub(crate) fn unshown(&self) -> Self {
        Self { bytes_read: Arc::default(), ..self.clone() }
    }
}
