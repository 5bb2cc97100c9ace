//! Reading from beginning to end, in constant memory, from anything that can be read.

use std::io::Read;
use std::ops::Range;

use flate2::Decompress;

use crate::block::{self, BLOCK_HEADER_BYTES, BlockHeader, BlockKind, END_MAGIC, FOOTER_BYTES, MAX_BLOCKS, fill};
use crate::codec::{LENGTH_BYTES_MAX, decode, decode_step};
use crate::index::ENTRY_BYTES;
use crate::{DecodeError, Record, TraceError, TraceMeta};

/// How a trace ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ending {
    /// Whether it was closed with an index. If not, its writer crashed, or is still writing.
    pub is_closed: bool,
    /// Bytes at the end that belong to no whole block.
    pub dropped_bytes: u64,
    /// Records that the torn block held, if its header is whole (0 where nothing, or only an index, is torn).
    pub dropped_records: Option<u32>,
}

impl Ending {
    pub(crate) const CLOSED: Self = Self { is_closed: true, dropped_bytes: 0, dropped_records: Some(0) };
    /// Ends after a whole block, without an index.
    pub(crate) const OPEN: Self = Self { is_closed: false, dropped_bytes: 0, dropped_records: Some(0) };

    pub(crate) fn torn(dropped_bytes: u64, dropped_records: Option<u32>) -> Self {
        Self { is_closed: false, dropped_bytes, dropped_records }
    }

    /// As words for the screen; `None` when nothing is missing.
    pub fn describe(&self) -> Option<String> {
        if self.is_closed {
            return None;
        }
        let records = match self.dropped_records {
            Some(records) => format!("{records} records"),
            None => "an unknown number of records".to_string(),
        };
        Some(match self.dropped_bytes {
            0 => "the trace was not closed; every block is whole".to_string(),
            bytes => format!("the trace was not closed; {bytes} bytes with {records} at its end are torn and left out"),
        })
    }
}

/// Reads records in order. Memory: one block, compressed and expanded (each at most [`crate::MAX_BLOCK_BYTES`]).
#[derive(Debug)]
pub struct TraceReader<R: Read> {
    input: R,
    meta: TraceMeta,
    offset: u64,
    block: LoadedBlock,
    blocks: u32,
    records: u64,
    last_step: u64,
    ending: Option<Ending>,
    has_failed: bool,
}

impl<R: Read> TraceReader<R> {
    /// Reads and checks the header. Give it a buffered input.
    pub fn new(mut input: R) -> Result<Self, TraceError> {
        let (meta, offset) = block::read_file_header(&mut input)?;
        Ok(Self {
            input,
            meta,
            offset,
            block: LoadedBlock::default(),
            blocks: 0,
            records: 0,
            last_step: 0,
            ending: None,
            has_failed: false,
        })
    }

    /// What was recorded.
    pub fn meta(&self) -> &TraceMeta {
        &self.meta
    }

    /// How the trace ends: known after the last record was read.
    pub fn ending(&self) -> Option<Ending> {
        self.ending
    }

    /// Reads the next record into memory that is reused; false at the end. After an error the reader stays at its end.
    pub fn read_into(&mut self, record: &mut Record) -> Result<bool, TraceError> {
        let result = self.try_read_into(record);
        self.has_failed |= result.is_err();
        result
    }

    fn try_read_into(&mut self, record: &mut Record) -> Result<bool, TraceError> {
        if self.has_failed {
            return Ok(false);
        }
        while self.ending.is_none() {
            if self.block.next(&self.meta, record)? {
                return Ok(true);
            }
            self.ending = self.next_block()?;
        }
        Ok(false)
    }

    /// Loads the next block of records, or says how the trace ends.
    fn next_block(&mut self) -> Result<Option<Ending>, TraceError> {
        let offset = self.offset;
        let io = || TraceError::io(offset);
        let mut bytes = [0; BLOCK_HEADER_BYTES];
        let got = fill(&mut self.input, &mut bytes).map_err(io())?;
        if got == 0 {
            return Ok(Some(Ending::OPEN));
        }
        if got < BLOCK_HEADER_BYTES {
            return Ok(Some(Ending::torn(got as u64, None)));
        }
        let Some(header) = BlockHeader::from_bytes(&bytes) else {
            let torn = rest_without_block(&mut self.input, bytes).map_err(io())?;
            return match torn {
                Some(rest) => Ok(Some(Ending::torn(rest, None))),
                None => Err(TraceError::Damaged { offset, reason: "no valid block header, but later ones follow" }),
            };
        };
        if header.kind == BlockKind::Index {
            return self.read_ending(&header).map(Some);
        }
        header.check_limits(offset)?;
        if self.blocks as usize == MAX_BLOCKS {
            return Err(TraceError::too_many_blocks(offset));
        }
        check_order(&header, offset, self.records, self.last_step)?;
        let got = self.block.read_payload(&header, &mut self.input).map_err(io())?;
        let dropped = (BLOCK_HEADER_BYTES as u64) + got as u64;
        if got < header.payload_bytes as usize {
            return Ok(Some(Ending::torn(dropped, Some(header.record_count))));
        }
        if !self.block.is_intact(&header) {
            return match fill(&mut self.input, &mut [0]).map_err(io())? {
                0 => Ok(Some(Ending::torn(dropped, Some(header.record_count)))),
                _ => Err(TraceError::Damaged { offset, reason: "the block's checksum is wrong" }),
            };
        }
        self.block.open(&header, offset)?;
        self.offset += dropped;
        self.blocks += 1;
        self.records += u64::from(header.record_count);
        self.last_step = header.last_step;
        Ok(None)
    }

    /// Checks index and footer as far as one pass can.
    fn read_ending(&mut self, header: &BlockHeader) -> Result<Ending, TraceError> {
        let offset = self.offset;
        let io = || TraceError::io(offset);
        if (header.record_count, header.first_record) != (self.blocks, self.records) {
            return Err(TraceError::Damaged { offset, reason: "the index counts other blocks or records" });
        }
        if u64::from(header.payload_bytes) != u64::from(header.record_count) * ENTRY_BYTES as u64 {
            return Err(TraceError::Damaged { offset, reason: "the index's size is wrong" });
        }
        let (mut left, mut crc, mut chunk) = (header.payload_bytes as usize, crc32fast::Hasher::new(), [0; 4096]);
        while left > 0 {
            let part = left.min(chunk.len());
            let got = fill(&mut self.input, &mut chunk[..part]).map_err(io())?;
            crc.update(&chunk[..got]);
            left -= got;
            if got < part {
                let read = header.payload_bytes as usize - left;
                return Ok(Ending::torn((BLOCK_HEADER_BYTES + read) as u64, Some(0)));
            }
        }
        let mut footer = [0; FOOTER_BYTES + 1];
        let got = fill(&mut self.input, &mut footer).map_err(io())?;
        let index_bytes = BLOCK_HEADER_BYTES as u64 + u64::from(header.payload_bytes);
        if got < FOOTER_BYTES {
            return Ok(Ending::torn(index_bytes + got as u64, Some(0)));
        }
        if got > FOOTER_BYTES {
            return Err(TraceError::Damaged { offset, reason: "bytes follow the end" });
        }
        let is_right = crc.finalize() == header.payload_crc
            && block::u64_at(&footer, 0) == offset
            && footer[8..FOOTER_BYTES] == END_MAGIC;
        // A damaged index costs no records: it can be rebuilt.
        Ok(if is_right { Ending::CLOSED } else { Ending::torn(index_bytes + FOOTER_BYTES as u64, Some(0)) })
    }
}

impl<R: Read> Iterator for TraceReader<R> {
    type Item = Result<Record, TraceError>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut record = Record::default();
        match self.read_into(&mut record) {
            Ok(true) => Some(Ok(record)),
            Ok(false) => None,
            Err(error) => Some(Err(error)),
        }
    }
}

/// Blocks must follow each other: a copied, lost or swapped one is found by its numbers.
pub(crate) fn check_order(header: &BlockHeader, offset: u64, records: u64, last_step: u64) -> Result<(), TraceError> {
    if header.first_record != records {
        return Err(TraceError::Damaged { offset, reason: "its first record does not follow the block before" });
    }
    if header.record_count == 0 || records.checked_add(u64::from(header.record_count)).is_none() {
        return Err(TraceError::Damaged { offset, reason: "a block of no records, or of too many" });
    }
    if header.first_step < last_step || header.last_step < header.first_step {
        return Err(TraceError::Damaged { offset, reason: "its steps go back" });
    }
    Ok(())
}

/// Reads to the end behind 48 bytes that are no block header: how many bytes that is, those included, or `None` when a
/// valid header lies in it, so that this is damage in the middle and no torn end.
pub(crate) fn rest_without_block(
    input: &mut impl Read,
    start: [u8; BLOCK_HEADER_BYTES],
) -> std::io::Result<Option<u64>> {
    const KEPT: usize = BLOCK_HEADER_BYTES - 1;
    let mut window = [0; 1 << 13];
    window[..KEPT].copy_from_slice(&start[1..]);
    let mut total = BLOCK_HEADER_BYTES as u64;
    loop {
        let got = fill(input, &mut window[KEPT..])?;
        total += got as u64;
        let found = window[..KEPT + got]
            .windows(BLOCK_HEADER_BYTES)
            .filter_map(|bytes| <&[u8; BLOCK_HEADER_BYTES]>::try_from(bytes).ok())
            .any(|bytes| BlockHeader::from_bytes(bytes).is_some());
        if found {
            return Ok(None);
        }
        if KEPT + got < window.len() {
            return Ok(Some(total));
        }
        window.copy_within(got.., 0);
    }
}

/// The block being read, expanded; its memory is reused.
#[derive(Debug)]
pub(crate) struct LoadedBlock {
    payload: Vec<u8>,
    raw: Vec<u8>,
    decompressor: Decompress,
    /// Offset of the block in the file, for errors.
    offset: u64,
    /// Where in `raw` the next record lies.
    at: usize,
    next_record: u64,
    end_record: u64,
    last_step: u64,
    final_step: u64,
}

impl Default for LoadedBlock {
    fn default() -> Self {
        Self {
            payload: Vec::new(),
            raw: Vec::new(),
            decompressor: Decompress::new(false),
            offset: 0,
            at: 0,
            next_record: 0,
            end_record: 0,
            last_step: 0,
            final_step: 0,
        }
    }
}

impl LoadedBlock {
    /// Reads the payload of a header whose limits were checked; less than all where the input ends.
    pub(crate) fn read_payload(&mut self, header: &BlockHeader, input: &mut impl Read) -> std::io::Result<usize> {
        (self.next_record, self.end_record) = (0, 0);
        self.payload.clear();
        input.take(u64::from(header.payload_bytes)).read_to_end(&mut self.payload)
    }

    pub(crate) fn is_intact(&self, header: &BlockHeader) -> bool {
        crc32fast::hash(&self.payload) == header.payload_crc
    }

    /// Expands the payload and stands before the first record.
    pub(crate) fn open(&mut self, header: &BlockHeader, offset: u64) -> Result<(), TraceError> {
        block::expand(header, &self.payload, &mut self.decompressor, &mut self.raw)
            .map_err(|reason| TraceError::Damaged { offset, reason })?;
        self.offset = offset;
        self.at = 0;
        self.next_record = header.first_record;
        self.end_record = header.first_record + u64::from(header.record_count);
        (self.last_step, self.final_step) = (header.first_step, header.last_step);
        Ok(())
    }

    /// Number of the record that [`LoadedBlock::next`] reads next.
    pub(crate) fn next_record(&self) -> u64 {
        self.next_record
    }

    /// Reads the next record; false at the block's end.
    pub(crate) fn next(&mut self, meta: &TraceMeta, record: &mut Record) -> Result<bool, TraceError> {
        if self.next_record == self.end_record {
            return Ok(false);
        }
        let bytes = self.record_bytes().map_err(|source| self.decode_error(source))?;
        decode(&self.raw[bytes.clone()], self.last_step, meta, record).map_err(|source| self.decode_error(source))?;
        self.pass(bytes.end, record.step)?;
        Ok(true)
    }

    /// Passes over the next record; only its step is read, which the one behind it needs.
    pub(crate) fn skip(&mut self) -> Result<(), TraceError> {
        let bytes = self.record_bytes().map_err(|source| self.decode_error(source))?;
        let step = decode_step(&self.raw[bytes.clone()], self.last_step).map_err(|source| self.decode_error(source))?;
        self.pass(bytes.end, step)
    }

    fn pass(&mut self, end: usize, step: u64) -> Result<(), TraceError> {
        let is_last = self.next_record + 1 == self.end_record;
        if is_last && (end != self.raw.len() || step != self.final_step) {
            let reason = "the records do not end where the block does";
            return Err(TraceError::Damaged { offset: self.offset, reason });
        }
        self.at = end;
        self.next_record += 1;
        self.last_step = step;
        Ok(())
    }

    /// Where in `raw` the next record's bytes lie, behind their length.
    fn record_bytes(&self) -> Result<Range<usize>, DecodeError> {
        let mut length = 0_usize;
        for (index, &byte) in self.raw[self.at..].iter().enumerate().take(LENGTH_BYTES_MAX) {
            length |= usize::from(byte & 0x7f) << (7 * index);
            if byte < 0x80 {
                let start = self.at + index + 1;
                let is_inside = length <= self.raw.len() - start;
                return if is_inside { Ok(start..start + length) } else { Err(DecodeError::Short("its block")) };
            }
        }
        Err(DecodeError::Short("its length"))
    }

    fn decode_error(&self, source: DecodeError) -> TraceError {
        TraceError::Decode { record: self.next_record, offset: self.offset, source }
    }
}
