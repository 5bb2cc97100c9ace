//! Random access: the index of blocks, read from the file's end or rebuilt by scanning block headers.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use crate::block::{
    self, BLOCK_HEADER_BYTES, BlockHeader, BlockKind, END_MAGIC, FOOTER_BYTES, MAX_BLOCKS, fill, u32_at, u64_at,
};
use crate::reader::{Ending, LoadedBlock, check_order, rest_without_block};
use crate::{Record, TraceError, TraceMeta, TraceWriter};

/// Bytes of an index entry.
pub(crate) const ENTRY_BYTES: usize = 40;

/// Where a block lies and what it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockEntry {
    /// Where its header begins, in bytes from the file's beginning.
    pub offset: u64,
    /// Number of its first record.
    pub first_record: u64,
    /// Step of its first record.
    pub first_step: u64,
    /// Step of its last record.
    pub last_step: u64,
    /// Records in it.
    pub record_count: u32,
    /// Bytes behind its header.
    pub payload_bytes: u32,
}

impl BlockEntry {
    pub(crate) fn of(header: &BlockHeader, offset: u64) -> Self {
        let BlockHeader { first_record, first_step, last_step, record_count, payload_bytes, .. } = *header;
        Self { offset, first_record, first_step, last_step, record_count, payload_bytes }
    }

    /// As 40 bytes, little-endian, in the order of the fields.
    pub(crate) fn put(&self, out: &mut Vec<u8>) {
        for value in [self.offset, self.first_record, self.first_step, self.last_step] {
            out.extend_from_slice(&value.to_le_bytes());
        }
        out.extend_from_slice(&self.record_count.to_le_bytes());
        out.extend_from_slice(&self.payload_bytes.to_le_bytes());
    }

    fn get(bytes: &[u8; ENTRY_BYTES]) -> Self {
        Self {
            offset: u64_at(bytes, 0),
            first_record: u64_at(bytes, 8),
            first_step: u64_at(bytes, 16),
            last_step: u64_at(bytes, 24),
            record_count: u32_at(bytes, 32),
            payload_bytes: u32_at(bytes, 36),
        }
    }

    /// Number of the record behind its last.
    pub fn end_record(&self) -> u64 {
        self.first_record.saturating_add(u64::from(self.record_count))
    }

    fn end_offset(&self) -> u64 {
        self.offset.saturating_add(BLOCK_HEADER_BYTES as u64 + u64::from(self.payload_bytes))
    }
}

/// A trace with random access by record number. Memory: 40 bytes for each block of the file, and one block.
#[derive(Debug)]
pub struct TraceFile<R: Read + Seek> {
    input: R,
    meta: TraceMeta,
    header_bytes: u64,
    blocks: Vec<BlockEntry>,
    ending: Ending,
    /// Which block is loaded, if one is.
    loaded_index: Option<usize>,
    loaded: LoadedBlock,
}

impl<R: Read + Seek> TraceFile<R> {
    /// Reads header and index. Without an index (the writer crashed, or still writes) every block header is read, and of
    /// the last block the checksum; what belongs to no whole block is left out and told by [`TraceFile::ending`].
    pub fn open(mut input: R) -> Result<Self, TraceError> {
        let file_bytes = input.seek(SeekFrom::End(0)).map_err(TraceError::io(0))?;
        input.rewind().map_err(TraceError::io(0))?;
        let (meta, header_bytes) = block::read_file_header(&mut input)?;
        let mut file = Self {
            input,
            meta,
            header_bytes,
            blocks: Vec::new(),
            ending: Ending::OPEN,
            loaded_index: None,
            loaded: LoadedBlock::default(),
        };
        file.read_blocks(file_bytes)?;
        Ok(file)
    }

    /// Looks for what the writer has added since: follows a run at work. Costs the headers of new blocks.
    pub fn refresh(&mut self) -> Result<(), TraceError> {
        let end = self.blocks_end();
        let file_bytes = self.input.seek(SeekFrom::End(0)).map_err(TraceError::io(end))?;
        if file_bytes < end {
            return Err(TraceError::Damaged { offset: file_bytes, reason: "the trace became shorter; open it again" });
        }
        self.read_blocks(file_bytes)
    }

    /// Takes the index, or scans on behind the blocks already known.
    fn read_blocks(&mut self, file_bytes: u64) -> Result<(), TraceError> {
        self.loaded_index = None; // a scan loads the last block to check it
        let all = Extent { start: self.header_bytes, end: file_bytes };
        if let Some(blocks) = read_index(&mut self.input, all)? {
            (self.blocks, self.ending) = (blocks, Ending::CLOSED);
            return Ok(());
        }
        let rest = Extent { start: self.blocks_end(), end: file_bytes };
        self.ending = scan(&mut self.input, rest, &mut self.blocks, &mut self.loaded)?;
        Ok(())
    }

    fn blocks_end(&self) -> u64 {
        self.blocks.last().map_or(self.header_bytes, BlockEntry::end_offset)
    }

    /// What was recorded.
    pub fn meta(&self) -> &TraceMeta {
        &self.meta
    }

    /// Number of records.
    pub fn records(&self) -> u64 {
        self.blocks.last().map_or(0, BlockEntry::end_record)
    }

    /// How the trace ends.
    pub fn ending(&self) -> Ending {
        self.ending
    }

    /// The blocks, in order.
    pub fn blocks(&self) -> &[BlockEntry] {
        &self.blocks
    }

    /// Reads record `number` into memory that is reused. Going forward within a block decodes nothing twice; elsewhere
    /// it costs one block.
    pub fn read(&mut self, number: u64, record: &mut Record) -> Result<(), TraceError> {
        if number >= self.records() {
            return Err(TraceError::NoSuchRecord { got: number, records: self.records() });
        }
        let index = self.blocks.partition_point(|b| b.end_record() <= number);
        if self.loaded_index != Some(index) || self.loaded.next_record() > number {
            self.load(index)?;
        }
        let result = self.read_loaded(number, record);
        if result.is_err() {
            self.loaded_index = None;
        }
        result
    }

    /// Number of the record of this (step, microbatch, layer), the first if there are several. Reads the blocks that hold
    /// the step.
    pub fn find(&mut self, step: u64, microbatch: u32, layer: u32) -> Result<Option<u64>, TraceError> {
        let first = self.blocks.partition_point(|b| b.last_step < step);
        let mut record = Record::default();
        for index in first..self.blocks.len() {
            let entry = self.blocks[index];
            if entry.first_step > step {
                break;
            }
            for number in entry.first_record..entry.end_record() {
                self.read(number, &mut record)?;
                if (record.step, record.microbatch, record.layer) == (step, microbatch, layer) {
                    return Ok(Some(number));
                }
            }
        }
        Ok(None)
    }

    fn read_loaded(&mut self, number: u64, record: &mut Record) -> Result<(), TraceError> {
        while self.loaded.next_record() < number {
            self.loaded.skip()?;
        }
        match self.loaded.next(&self.meta, record)? {
            true => Ok(()),
            false => Err(TraceError::NoSuchRecord { got: number, records: self.loaded.next_record() }),
        }
    }

    fn load(&mut self, index: usize) -> Result<(), TraceError> {
        self.loaded_index = None;
        let entry = self.blocks[index];
        let offset = entry.offset;
        let damaged = |reason| TraceError::Damaged { offset, reason };
        self.input.seek(SeekFrom::Start(offset)).map_err(TraceError::io(offset))?;
        let header = read_block_header(&mut self.input, offset)?;
        let header = header.filter(|h| h.kind == BlockKind::Records).ok_or(damaged("no valid block header"))?;
        header.check_limits(offset)?;
        if BlockEntry::of(&header, offset) != entry {
            return Err(damaged("the block is not what the index says"));
        }
        let got = self.loaded.read_payload(&header, &mut self.input).map_err(TraceError::io(offset))?;
        if got < header.payload_bytes as usize || !self.loaded.is_intact(&header) {
            return Err(damaged("the block's checksum is wrong"));
        }
        self.loaded.open(&header, offset)?;
        self.loaded_index = Some(index);
        Ok(())
    }
}

/// What a trace kept when its writing was taken up again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resumed {
    /// Records kept: all before the step.
    pub kept_records: u64,
    /// Whole records removed: of the step and later ones.
    pub removed_records: u64,
    /// How the trace ended before.
    pub ending: Ending,
}

impl TraceWriter<File> {
    /// Takes up a trace again at `from_step`: removes the records of that step and later ones (a resumed run makes them
    /// anew), a torn end and the index. The file must be open for reading and writing. Blocks before the one that holds
    /// the step are not touched; that one is written again, shorter.
    pub fn resume(file: File, from_step: u64) -> Result<(Self, Resumed), TraceError> {
        let mut trace = TraceFile::open(file)?;
        let (records, ending) = (trace.records(), trace.ending());
        let kept_blocks = trace.blocks.partition_point(|b| b.last_step < from_step);
        let mut moved = Vec::new();
        if let Some(&entry) = trace.blocks.get(kept_blocks) {
            for number in entry.first_record..entry.end_record() {
                let mut record = Record::default();
                trace.read(number, &mut record)?;
                if record.step >= from_step {
                    break;
                }
                moved.push(record);
            }
        }
        trace.blocks.truncate(kept_blocks);
        let end = trace.blocks_end();
        let TraceFile { mut input, meta, blocks, .. } = trace;
        input.set_len(end).map_err(TraceError::io(end))?;
        input.seek(SeekFrom::Start(end)).map_err(TraceError::io(end))?;
        let mut writer = Self::continuing(input, meta, end, blocks);
        for record in &moved {
            writer.append(record)?;
        }
        writer.flush()?;
        let kept_records = writer.records();
        Ok((writer, Resumed { kept_records, removed_records: records - kept_records, ending }))
    }
}

/// Part of a file, in bytes from its beginning.
#[derive(Clone, Copy)]
struct Extent {
    start: u64,
    end: u64,
}

fn read_block_header(input: &mut impl Read, offset: u64) -> Result<Option<BlockHeader>, TraceError> {
    let mut bytes = [0; BLOCK_HEADER_BYTES];
    let got = fill(input, &mut bytes).map_err(TraceError::io(offset))?;
    Ok(if got == BLOCK_HEADER_BYTES { BlockHeader::from_bytes(&bytes) } else { None })
}

/// The index at the end of a closed file; `None` where there is none, or a damaged one. One whose checksum is right and
/// that lies is an error.
fn read_index<R: Read + Seek>(input: &mut R, blocks: Extent) -> Result<Option<Vec<BlockEntry>>, TraceError> {
    let least = (BLOCK_HEADER_BYTES + FOOTER_BYTES) as u64;
    let Some(footer_offset) =
        blocks.end.checked_sub(FOOTER_BYTES as u64).filter(|_| blocks.end - blocks.start >= least)
    else {
        return Ok(None);
    };
    input.seek(SeekFrom::Start(footer_offset)).map_err(TraceError::io(footer_offset))?;
    let mut footer = [0; FOOTER_BYTES];
    fill(input, &mut footer).map_err(TraceError::io(footer_offset))?;
    let offset = u64_at(&footer, 0);
    if footer[8..] != END_MAGIC || offset < blocks.start || offset > blocks.end - least {
        return Ok(None);
    }
    input.seek(SeekFrom::Start(offset)).map_err(TraceError::io(offset))?;
    let Some(header) = read_block_header(input, offset)?.filter(|h| h.kind == BlockKind::Index) else {
        return Ok(None);
    };
    let payload_bytes = u64::from(header.payload_bytes);
    let is_sized = payload_bytes == blocks.end - least - offset
        && payload_bytes == u64::from(header.record_count) * ENTRY_BYTES as u64;
    let damaged = |reason| TraceError::Damaged { offset, reason };
    if !is_sized || header.record_count as usize > MAX_BLOCKS {
        return Err(damaged("the index's size is wrong"));
    }
    let mut bytes = Vec::new(); // grows as bytes arrive: no more than the file has
    input.take(payload_bytes).read_to_end(&mut bytes).map_err(TraceError::io(offset))?;
    if bytes.len() as u64 != payload_bytes || crc32fast::hash(&bytes) != header.payload_crc {
        return Ok(None);
    }
    let (entries, _) = bytes.as_chunks::<ENTRY_BYTES>();
    let entries: Vec<BlockEntry> = entries.iter().map(BlockEntry::get).collect();
    let (mut next_offset, mut next_record, mut last_step) = (blocks.start, 0, 0);
    for entry in &entries {
        let is_next = entry.offset == next_offset && entry.first_record == next_record && entry.record_count > 0;
        if !is_next || entry.first_step < last_step || entry.last_step < entry.first_step {
            return Err(damaged("the index's blocks do not follow each other"));
        }
        (next_offset, next_record, last_step) = (entry.end_offset(), entry.end_record(), entry.last_step);
    }
    if (next_offset, next_record) != (offset, header.first_record) {
        return Err(damaged("the index does not cover the blocks"));
    }
    Ok(Some(entries))
}

/// Finds the blocks of a file without index, in `extent` and behind `entries`, by their headers.
fn scan<R: Read + Seek>(
    input: &mut R,
    extent: Extent,
    entries: &mut Vec<BlockEntry>,
    loaded: &mut LoadedBlock,
) -> Result<Ending, TraceError> {
    let mut offset = extent.start;
    let torn = |offset: u64, records| Ending::torn(extent.end - offset, records);
    loop {
        input.seek(SeekFrom::Start(offset)).map_err(TraceError::io(offset))?;
        let mut bytes = [0; BLOCK_HEADER_BYTES];
        let got = fill(input, &mut bytes).map_err(TraceError::io(offset))?;
        if got < BLOCK_HEADER_BYTES {
            let ending = if got == 0 { Ending::OPEN } else { torn(offset, None) };
            return Ok(ending);
        }
        let Some(header) = BlockHeader::from_bytes(&bytes) else {
            return match rest_without_block(input, bytes).map_err(TraceError::io(offset))? {
                Some(_) => Ok(torn(offset, None)),
                None => Err(TraceError::Damaged { offset, reason: "no valid block header, but later ones follow" }),
            };
        };
        if header.kind == BlockKind::Index {
            let index_bytes = (BLOCK_HEADER_BYTES + FOOTER_BYTES) as u64 + u64::from(header.payload_bytes);
            return if extent.end - offset > index_bytes {
                Err(TraceError::Damaged { offset, reason: "bytes follow the end" })
            } else {
                Ok(torn(offset, Some(0)))
            };
        }
        header.check_limits(offset)?;
        let last = entries.last();
        check_order(&header, offset, last.map_or(0, BlockEntry::end_record), last.map_or(0, |b| b.last_step))?;
        let entry = BlockEntry::of(&header, offset);
        if entry.end_offset() > extent.end {
            return Ok(torn(offset, Some(header.record_count)));
        }
        if entry.end_offset() == extent.end {
            let got = loaded.read_payload(&header, input).map_err(TraceError::io(offset))?;
            if got < header.payload_bytes as usize || !loaded.is_intact(&header) {
                return Ok(torn(offset, Some(header.record_count)));
            }
        }
        if entries.len() == MAX_BLOCKS {
            return Err(TraceError::too_many_blocks(offset));
        }
        entries.push(entry);
        offset = entry.end_offset();
    }
}
