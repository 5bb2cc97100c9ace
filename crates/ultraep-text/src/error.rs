//! Why there is no text, or no batch of it.

use std::io;
use std::path::PathBuf;

use crate::{MAX_SEQUENCE_TOKENS, Skipped};

/// Why a corpus or a sampler was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// A given path does not exist.
    #[error("{}: no such file or folder", path.display())]
    NotFound {
        /// As given.
        path: PathBuf,
    },
    /// A file or folder could not be read.
    #[error("{}: cannot be read: {source}", path.display())]
    Unreadable {
        /// Which one.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A given file has no bytes.
    #[error("{}: the file is empty", path.display())]
    Empty {
        /// As given.
        path: PathBuf,
    },
    /// A given file is not UTF-8 text.
    #[error("{}: not text: {reason} at byte {offset}", path.display())]
    NotText {
        /// As given.
        path: PathBuf,
        /// First byte that no text has.
        offset: usize,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A file that a text was taken from, and that cannot give it again.
    #[error("{}: {what}", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
        /// What became of it.
        what: &'static str,
    },
    /// Nothing given, or only folders without text.
    #[error("no text found in {searched}{}", skipped.in_brackets())]
    NoText {
        /// Where it was looked for.
        searched: String,
        /// What was seen there and left out.
        skipped: Skipped,
    },
    /// A folder with more files than [`crate::Limits::files_max`].
    #[error("{}: more than {files_max} files; name a smaller folder", path.display())]
    TooManyFiles {
        /// The given folder.
        path: PathBuf,
        /// The limit.
        files_max: usize,
    },
    /// No domain is long enough for one sequence to train on and one to validate with.
    #[error(
        "text too short for one batch: the longest domain ({domain}) has {got_bytes} bytes; sequences of \
         {sequence_tokens} tokens need {needed_bytes}"
    )]
    TooShort {
        /// Name of the longest domain.
        domain: String,
        /// Its size.
        got_bytes: usize,
        /// What one sequence to train on and one to validate with take.
        needed_bytes: usize,
        /// As asked.
        sequence_tokens: usize,
    },
    /// Sequence length outside the limits.
    #[error("{got} tokens a sequence: allowed are 1 to {MAX_SEQUENCE_TOKENS}")]
    SequenceTokens {
        /// As asked.
        got: usize,
    },
    /// A turn of the mixture of no steps.
    #[error("a turn of the mixture takes at least 1 step, got 0")]
    TurnSteps,
    /// No such domain.
    #[error("no domain {name:?} in this text; it has: {}", known.join(", "))]
    UnknownDomain {
        /// As asked.
        name: String,
        /// The ones there are.
        known: Vec<String>,
    },
    /// A prompt longer than its domain, or of no bytes.
    #[error("a prompt of {got} bytes: domain {domain} can give 1 to {available}")]
    PromptBytes {
        /// The domain asked for.
        domain: String,
        /// As asked.
        got: usize,
        /// Its size.
        available: usize,
    },
    /// A snapshot that is none, or damaged.
    #[error("snapshot of a corpus: {reason}")]
    Snapshot {
        /// What is wrong.
        reason: &'static str,
    },
    /// A snapshot that could not be written or read.
    #[error("snapshot of a corpus: {0}")]
    SnapshotIo(#[from] io::Error),
}
