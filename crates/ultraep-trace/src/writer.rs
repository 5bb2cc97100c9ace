//! Writing: append records, a block at a time reaches the file.

use std::io::Write;

use flate2::Compress;

use crate::block::{self, BLOCK_HEADER_BYTES, BlockHeader, BlockKind, END_MAGIC, MAX_BLOCK_BYTES, MAX_BLOCKS};
use crate::codec::{LENGTH_BYTES_MAX, encode, put_varint};
use crate::index::BlockEntry;
use crate::{MAX_BLOCK_RECORDS, Record, RecordError, TraceError, TraceMeta};

/// When a block is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSize {
    /// Bytes before compression; capped at [`MAX_BLOCK_BYTES`].
    pub raw_bytes: u32,
    /// Records; capped at [`MAX_BLOCK_RECORDS`].
    pub records: u32,
}

impl Default for BlockSize {
    /// 256 KiB or 4096 records: about a millisecond to write or read.
    fn default() -> Self {
        Self { raw_bytes: 256 << 10, records: 4096 }
    }
}

/// Writes a trace in one pass. Memory: one block, its compressed form, and 40 bytes for each block written.
///
/// Records reach the output when a block is full, at [`TraceWriter::flush`] and at [`TraceWriter::finish`]; a writer that
/// is dropped loses the records of its unfinished block, as a crash would. Each block is one `write_all`, so that an
/// output without its own buffer is right.
#[derive(Debug)]
pub struct TraceWriter<W: Write> {
    output: W,
    meta: TraceMeta,
    size: BlockSize,
    compressor: Compress,
    raw: Vec<u8>,
    encoded: Vec<u8>,
    block: Vec<u8>,
    block_records: u32,
    block_first_step: u64,
    last_step: u64,
    written_records: u64,
    offset: u64,
    index: Vec<BlockEntry>,
    is_ended: bool,
}

impl<W: Write> TraceWriter<W> {
    /// Writes the header. The output must be empty.
    pub fn new(output: W, meta: TraceMeta) -> Result<Self, TraceError> {
        Self::with_block_size(output, meta, BlockSize::default())
    }

    /// As [`TraceWriter::new`], with another block size.
    pub fn with_block_size(mut output: W, meta: TraceMeta, size: BlockSize) -> Result<Self, TraceError> {
        let header = block::file_header(&meta)?;
        output.write_all(&header).map_err(TraceError::io(0))?;
        let mut writer = Self::continuing(output, meta, header.len() as u64, Vec::new());
        writer.size = size;
        Ok(writer)
    }

    /// A writer whose output holds the header and the blocks of `index` and ends at `offset`.
    pub(crate) fn continuing(output: W, meta: TraceMeta, offset: u64, index: Vec<BlockEntry>) -> Self {
        let last = index.last();
        Self {
            output,
            meta,
            size: BlockSize::default(),
            compressor: block::compressor(),
            raw: Vec::new(),
            encoded: Vec::new(),
            block: Vec::new(),
            block_records: 0,
            block_first_step: 0,
            last_step: last.map_or(0, |b| b.last_step),
            written_records: last.map_or(0, BlockEntry::end_record),
            offset,
            index,
            is_ended: false,
        }
    }

    /// What is recorded.
    pub fn meta(&self) -> &TraceMeta {
        &self.meta
    }

    /// Records appended so far, those of the unfinished block included.
    pub fn records(&self) -> u64 {
        self.written_records + u64::from(self.block_records)
    }

    /// Records that have reached the output.
    pub fn written_records(&self) -> u64 {
        self.written_records
    }

    /// Bytes that have reached the output.
    pub fn written_bytes(&self) -> u64 {
        self.offset
    }

    /// Appends a record. A record that does not fit the trace is refused and leaves the trace as it was; an error of the
    /// output ends it ([`TraceError::Ended`] from then on).
    pub fn append(&mut self, record: &Record) -> Result<(), TraceError> {
        self.check_open()?;
        let number = self.records();
        let refused = |source| TraceError::Record { record: number, source };
        record.check(&self.meta).map_err(refused)?;
        if record.step < self.last_step && number > 0 {
            return Err(refused(RecordError::StepBack { got: record.step, last: self.last_step }));
        }
        let base_step = if self.block_records == 0 { record.step } else { self.last_step };
        self.encoded.clear();
        encode(record, base_step, &self.meta, &mut self.encoded);
        let length = self.encoded.len() + LENGTH_BYTES_MAX;
        if length > MAX_BLOCK_BYTES as usize {
            let (got, max) = (length as u64, u64::from(MAX_BLOCK_BYTES));
            return Err(TraceError::Limit { offset: self.offset, what: "bytes of a record:", got, max });
        }
        if self.raw.len() + length > MAX_BLOCK_BYTES as usize {
            self.write_block()?;
            self.encoded.clear();
            encode(record, record.step, &self.meta, &mut self.encoded);
        }
        if self.block_records == 0 {
            self.block_first_step = record.step;
        }
        put_varint(&mut self.raw, self.encoded.len() as u64);
        self.raw.extend_from_slice(&self.encoded);
        self.block_records += 1;
        self.last_step = record.step;
        let is_full = self.raw.len() >= self.size.raw_bytes.min(MAX_BLOCK_BYTES) as usize
            || self.block_records >= self.size.records.min(MAX_BLOCK_RECORDS);
        if is_full { self.write_block() } else { Ok(()) }
    }

    /// Ends the block and flushes the output: everything appended so far is out.
    pub fn flush(&mut self) -> Result<(), TraceError> {
        self.check_open()?;
        self.write_block()?;
        let flushed = self.output.flush();
        self.ended_by(flushed)
    }

    /// Writes the last block, the index and the footer, and gives the output back.
    pub fn finish(mut self) -> Result<W, TraceError> {
        self.flush()?;
        let index_offset = self.offset;
        self.block.clear();
        self.block.resize(BLOCK_HEADER_BYTES, 0);
        for entry in &self.index {
            entry.put(&mut self.block);
        }
        let payload_bytes = (self.block.len() - BLOCK_HEADER_BYTES) as u32; // MAX_BLOCKS entries fit
        let header = BlockHeader {
            kind: BlockKind::Index,
            record_count: self.index.len() as u32,
            first_record: self.written_records,
            first_step: self.index.first().map_or(0, |b| b.first_step),
            last_step: self.last_step,
            payload_bytes,
            raw_bytes: payload_bytes,
            payload_crc: crc32fast::hash(&self.block[BLOCK_HEADER_BYTES..]),
        };
        self.block[..BLOCK_HEADER_BYTES].copy_from_slice(&header.to_bytes());
        self.block.extend_from_slice(&index_offset.to_le_bytes());
        self.block.extend_from_slice(&END_MAGIC);
        let written = self.output.write_all(&self.block).and_then(|()| self.output.flush());
        self.ended_by(written)?;
        Ok(self.output)
    }

    /// The output, for what only its owner can do, such as syncing a file to its disk. Nothing may be written to it.
    pub fn output(&self) -> &W {
        &self.output
    }

    fn write_block(&mut self) -> Result<(), TraceError> {
        if self.block_records == 0 {
            return Ok(());
        }
        if self.index.len() == MAX_BLOCKS {
            return Err(TraceError::too_many_blocks(self.offset));
        }
        self.block.clear();
        self.block.resize(BLOCK_HEADER_BYTES, 0);
        let payload_bytes = block::compress(&self.raw, &mut self.compressor, &mut self.block);
        let header = BlockHeader {
            kind: BlockKind::Records,
            record_count: self.block_records,
            first_record: self.written_records,
            first_step: self.block_first_step,
            last_step: self.last_step,
            payload_bytes: payload_bytes as u32,
            raw_bytes: self.raw.len() as u32,
            payload_crc: crc32fast::hash(&self.block[BLOCK_HEADER_BYTES..]),
        };
        self.block[..BLOCK_HEADER_BYTES].copy_from_slice(&header.to_bytes());
        let written = self.output.write_all(&self.block);
        self.ended_by(written)?;
        self.index.push(BlockEntry::of(&header, self.offset));
        self.offset += self.block.len() as u64;
        self.written_records += u64::from(self.block_records);
        self.block_records = 0;
        self.raw.clear();
        Ok(())
    }

    fn check_open(&self) -> Result<(), TraceError> {
        if self.is_ended { Err(TraceError::Ended { records: self.written_records }) } else { Ok(()) }
    }

    fn ended_by(&mut self, result: std::io::Result<()>) -> Result<(), TraceError> {
        self.is_ended |= result.is_err();
        result.map_err(TraceError::io(self.offset))
    }
}
