//! Why a trace could not be written or read.

use std::io;

use crate::{DecodeError, MAX_BLOCKS, MetaError, RecordError};

/// Why a trace could not be written or read. Offsets are bytes from the beginning of the file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TraceError {
    /// The system refused to read or write.
    #[error("at byte {offset}: {source}")]
    Io {
        /// Where in the file.
        offset: u64,
        /// What the system said.
        source: io::Error,
    },
    /// Not a trace at all.
    #[error("not a trace: the file does not begin as one")]
    NotATrace,
    /// A trace of another version.
    #[error("trace version {got}; this reader knows version {}", crate::VERSION)]
    Version {
        /// As read.
        got: u32,
    },
    /// The header's bytes are damaged or no valid JSON.
    #[error("header: {0}")]
    Header(String),
    /// The header's values are refused.
    #[error("header: {0}")]
    Meta(#[from] MetaError),
    /// A size over its limit, refused before anything was allocated.
    #[error("at byte {offset}: {what} {got}; allowed are up to {max}")]
    Limit {
        /// Where in the file.
        offset: u64,
        /// Of what.
        what: &'static str,
        /// As read or given.
        got: u64,
        /// The limit.
        max: u64,
    },
    /// Damage that is not just a torn end: good data follows, or the file was closed.
    #[error("damaged at byte {offset}: {reason}")]
    Damaged {
        /// Where the damaged block begins.
        offset: u64,
        /// What is wrong.
        reason: &'static str,
    },
    /// A record whose bytes passed the checksum but mean nothing: a faulty or hostile writer.
    #[error("record {record} in the block at byte {offset}: {source}")]
    Decode {
        /// Number of the record, from 0.
        record: u64,
        /// Where its block begins.
        offset: u64,
        /// What is wrong.
        source: DecodeError,
    },
    /// A record that does not fit the trace it is appended to.
    #[error("record {record}: {source}")]
    Record {
        /// Number it would have had.
        record: u64,
        /// What is wrong.
        source: RecordError,
    },
    /// No such record.
    #[error("record {got}: the trace has {records}")]
    NoSuchRecord {
        /// As asked.
        got: u64,
        /// Records there are.
        records: u64,
    },
    /// An earlier write failed; what was whole before it is on the disk, and nothing may follow.
    #[error("the trace ended with an earlier error; {records} records were written")]
    Ended {
        /// Records in whole blocks.
        records: u64,
    },
}

impl TraceError {
    pub(crate) fn io(offset: u64) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { offset, source }
    }

    pub(crate) fn too_many_blocks(offset: u64) -> Self {
        let max = MAX_BLOCKS as u64;
        Self::Limit { offset, what: "number of blocks:", got: max + 1, max }
    }
}
