//! Blocks: the unit of compression, of checking and of what a crash can cost; and the file's beginning and end.
//!
//! All numbers little-endian. A block is a header of 48 bytes and its payload:
//!
//! ```text
//!  0  marker          "UETB" records, "UETI" index
//!  4  record_count    u32   records; in an index: blocks
//!  8  first_record    u64   number of its first record; in an index: records in all
//! 16  first_step      u64   step of its first record
//! 24  last_step       u64   step of its last record
//! 32  payload_bytes   u32   bytes that follow the header
//! 36  raw_bytes       u32   bytes after decompression; equal to payload_bytes: stored as they are
//! 40  payload_crc     u32   CRC-32 (IEEE) of the payload
//! 44  header_crc      u32   CRC-32 of the 44 bytes above
//! ```
//!
//! The header has its own checksum so that sizes are trusted only after it passed, and a torn block still says how many
//! records it held.

use std::io::{self, Read};

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

use crate::{TraceError, TraceMeta};

/// Version of the format.
pub const VERSION: u32 = 1;
/// Longest header, in bytes of JSON.
pub const MAX_HEADER_BYTES: u32 = 1 << 20;
/// Most bytes of a block, compressed or not.
pub const MAX_BLOCK_BYTES: u32 = 32 << 20;
/// Most records in a block.
pub const MAX_BLOCK_RECORDS: u32 = 1 << 16;
/// Most blocks in a file (1 TiB at the default block size); an index entry takes 40 bytes of memory.
pub const MAX_BLOCKS: usize = 1 << 22;

/// As PNG's: a byte that is no ASCII, a name, and line ends that a text-mode copy would change.
pub(crate) const MAGIC: [u8; 8] = *b"\x89UET\r\n\x1a\n";
pub(crate) const END_MAGIC: [u8; 8] = *b"UETEND\r\n";
pub(crate) const BLOCK_HEADER_BYTES: usize = 48;
pub(crate) const FOOTER_BYTES: usize = 16;
const RECORDS_MARKER: [u8; 4] = *b"UETB";
const INDEX_MARKER: [u8; 4] = *b"UETI";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BlockKind {
    Records,
    Index,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockHeader {
    pub(crate) kind: BlockKind,
    pub(crate) record_count: u32,
    pub(crate) first_record: u64,
    pub(crate) first_step: u64,
    pub(crate) last_step: u64,
    pub(crate) payload_bytes: u32,
    pub(crate) raw_bytes: u32,
    pub(crate) payload_crc: u32,
}

impl BlockHeader {
    pub(crate) fn to_bytes(self) -> [u8; BLOCK_HEADER_BYTES] {
        let mut bytes = [0; BLOCK_HEADER_BYTES];
        let marker = match self.kind {
            BlockKind::Records => RECORDS_MARKER,
            BlockKind::Index => INDEX_MARKER,
        };
        bytes[..4].copy_from_slice(&marker);
        bytes[4..8].copy_from_slice(&self.record_count.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.first_record.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.first_step.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.last_step.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.payload_bytes.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.raw_bytes.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.payload_crc.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..44]);
        bytes[44..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// `None` unless marker and checksum are right.
    pub(crate) fn from_bytes(bytes: &[u8; BLOCK_HEADER_BYTES]) -> Option<Self> {
        let kind = match [bytes[0], bytes[1], bytes[2], bytes[3]] {
            RECORDS_MARKER => BlockKind::Records,
            INDEX_MARKER => BlockKind::Index,
            _ => return None,
        };
        (u32_at(bytes, 44) == crc32fast::hash(&bytes[..44])).then(|| Self {
            kind,
            record_count: u32_at(bytes, 4),
            first_record: u64_at(bytes, 8),
            first_step: u64_at(bytes, 16),
            last_step: u64_at(bytes, 24),
            payload_bytes: u32_at(bytes, 32),
            raw_bytes: u32_at(bytes, 36),
            payload_crc: u32_at(bytes, 40),
        })
    }

    /// Checks the sizes of a block of records at `offset` against the limits, before anything is allocated for it.
    pub(crate) fn check_limits(&self, offset: u64) -> Result<(), TraceError> {
        let limits = [
            ("payload bytes of a block:", self.payload_bytes, MAX_BLOCK_BYTES),
            ("bytes of a block:", self.raw_bytes, MAX_BLOCK_BYTES),
            ("records in a block:", self.record_count, MAX_BLOCK_RECORDS),
        ];
        match limits.into_iter().find(|(_, got, max)| got > max) {
            Some((what, got, max)) => Err(TraceError::Limit { offset, what, got: u64::from(got), max: u64::from(max) }),
            None => Ok(()),
        }
    }
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().rev().fold(0, |value, &byte| value << 8 | u32::from(byte))
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

/// Reads until `buffer` is full or the input ends; how much was read.
pub(crate) fn fill(reader: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match reader.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// The beginning of a file: magic, version, length and checksum of the JSON, the JSON.
pub(crate) fn file_header(meta: &TraceMeta) -> Result<Vec<u8>, TraceError> {
    meta.check()?;
    let json = serde_json::to_vec(meta).map_err(|e| TraceError::Header(e.to_string()))?;
    if json.len() > MAX_HEADER_BYTES as usize {
        let (got, max) = (json.len() as u64, u64::from(MAX_HEADER_BYTES));
        return Err(TraceError::Limit { offset: 0, what: "bytes of the header:", got, max });
    }
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&(json.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&crc32fast::hash(&json).to_le_bytes());
    bytes.extend_from_slice(&json);
    Ok(bytes)
}

/// Reads what [`file_header`] wrote; also returns its length.
pub(crate) fn read_file_header(reader: &mut impl Read) -> Result<(TraceMeta, u64), TraceError> {
    const FIXED: usize = 20;
    let mut fixed = [0; FIXED];
    let got = fill(reader, &mut fixed).map_err(TraceError::io(0))?;
    if got < MAGIC.len() || fixed[..MAGIC.len()] != MAGIC {
        return Err(TraceError::NotATrace);
    }
    if got < FIXED {
        return Err(TraceError::Header(format!("the file ends after {got} bytes")));
    }
    let (version, length, crc) = (u32_at(&fixed, 8), u32_at(&fixed, 12), u32_at(&fixed, 16));
    if version != VERSION {
        return Err(TraceError::Version { got: version });
    }
    if length > MAX_HEADER_BYTES {
        let (got, max) = (u64::from(length), u64::from(MAX_HEADER_BYTES));
        return Err(TraceError::Limit { offset: 12, what: "bytes of the header:", got, max });
    }
    let mut json = vec![0; length as usize];
    let got = fill(reader, &mut json).map_err(TraceError::io(FIXED as u64))?;
    if got < json.len() {
        return Err(TraceError::Header(format!("{got} of {length} bytes are there")));
    }
    if crc32fast::hash(&json) != crc {
        return Err(TraceError::Header("its checksum is wrong".to_string()));
    }
    let meta: TraceMeta = serde_json::from_slice(&json).map_err(|e| TraceError::Header(e.to_string()))?;
    meta.check()?;
    Ok((meta, (FIXED + json.len()) as u64))
}

/// Compresses `raw` behind what is in `out`; as it is where compression does not help. Returns the payload's length.
pub(crate) fn compress(raw: &[u8], compressor: &mut Compress, out: &mut Vec<u8>) -> usize {
    let start = out.len();
    compressor.reset();
    out.resize(start + raw.len(), 0);
    // Room for less than `raw` on purpose: when the end is not reached in it, storing is no worse.
    match compressor.compress(raw, &mut out[start..], FlushCompress::Finish) {
        Ok(Status::StreamEnd) if (compressor.total_out() as usize) < raw.len() => {
            out.truncate(start + compressor.total_out() as usize);
        }
        _ => out[start..].copy_from_slice(raw),
    }
    out.len() - start
}

pub(crate) fn compressor() -> Compress {
    Compress::new(Compression::fast(), false)
}

/// Expands `payload` into `raw`, whose memory is reused and never grows beyond the header's (checked) size.
pub(crate) fn expand(
    header: &BlockHeader,
    payload: &[u8],
    decompressor: &mut Decompress,
    raw: &mut Vec<u8>,
) -> Result<(), &'static str> {
    raw.clear();
    if header.raw_bytes == header.payload_bytes {
        raw.extend_from_slice(payload);
        return Ok(());
    }
    raw.resize(header.raw_bytes as usize, 0);
    decompressor.reset(false);
    match decompressor.decompress(payload, raw, FlushDecompress::Finish) {
        Ok(Status::StreamEnd)
            if decompressor.total_out() == raw.len() as u64 && decompressor.total_in() == payload.len() as u64 =>
        {
            Ok(())
        }
        _ => Err("the block does not expand to the size it states"),
    }
}
