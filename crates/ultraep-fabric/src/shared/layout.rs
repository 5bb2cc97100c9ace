//! The one table that gives the shared segment's size and every offset in it.
//!
//! | section   | entries               | holds                                                        |
//! |-----------|-----------------------|--------------------------------------------------------------|
//! | header    | 1                     | identity, turnstile, permits, the first failure              |
//! | control   | N                     | what each rank says about itself; its signal event           |
//! | signals   | N x `SIGNALS` words   | signal words                                                 |
//! | sizes     | N x 3N words          | all-to-all: bytes to each rank, from each, where those land  |
//! | records   | N x `RECORD_WORDS`    | details of a failure that the rank reports                   |
//! | credits w | N x one line          | window w: the epoch up to which the rank lets peers into its slots |
//! | staging   | N x 2 x `STAGING_BYTES` | chunks of all-gather and all-reduce, two in turn           |
//! | reduced   | N x 2 x share         | sums of the rank's share of a chunk, two in turn             |
//! | window w  | N x bytes             | the ranks' parts, each on a page of its own                  |
//!
//! References between ranks are (section, rank, offset); addresses never cross.

use super::segment::{Control, Header, RECORD_WORDS};
use crate::stream::Credit;
use crate::{FabricError, GroupSpec, SIGNALS};
use core::mem::size_of;

/// Bytes of one staging chunk. Any size of operation works: it goes chunk by chunk. Of 64, 256 and 1024 KiB this one
/// was the fastest for an all-reduce of 1 MiB on 16 ranks and 2 cores (`examples/2_measure_fabric.rs`): fewer phases than the
/// first, and unlike the last it stays in the cache.
pub(crate) const STAGING_BYTES: usize = 256 * 1024;
const LINE_BYTES: usize = 128;
const PAGE_BYTES: usize = 4096;

/// Equal entries, one a rank, at a constant stride.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Section {
    /// Of rank 0's entry, from the start of the segment.
    pub(crate) offset: usize,
    /// From one rank's entry to the next.
    pub(crate) stride: usize,
    /// Usable bytes of an entry.
    pub(crate) bytes: usize,
}

#[derive(Clone, Debug)]
pub(crate) struct Layout {
    pub(crate) ranks: usize,
    pub(crate) header: Section,
    pub(crate) control: Section,
    pub(crate) signals: Section,
    pub(crate) sizes: Section,
    pub(crate) records: Section,
    pub(crate) staging: [Section; 2],
    pub(crate) reduced: [Section; 2],
    /// One for each window.
    pub(crate) credits: Vec<Section>,
    pub(crate) windows: Vec<Section>,
    pub(crate) total_bytes: usize,
    /// Equal for equal tables.
    pub(crate) digest: u64,
}

/// Hands out sections one after another.
struct Table {
    ranks: usize,
    end: usize,
    digest: u64,
}

impl Table {
    fn section(&mut self, entries: usize, bytes: usize, align: usize) -> Option<Section> {
        let offset = self.end.checked_next_multiple_of(align)?;
        let stride = bytes.checked_next_multiple_of(align)?;
        self.end = offset.checked_add(stride.checked_mul(entries)?)?;
        for word in [offset as u64, stride as u64, bytes as u64] {
            // FNV-1a over words: tells tables apart, nothing more.
            self.digest = (self.digest ^ word).wrapping_mul(0x0000_0100_0000_01b3);
        }
        Some(Section { offset, stride, bytes })
    }

    fn per_rank(&mut self, bytes: usize, align: usize) -> Option<Section> {
        self.section(self.ranks, bytes, align)
    }
}

impl Layout {
    /// The table for `spec`.
    pub(crate) fn new(spec: &GroupSpec) -> Result<Self, FabricError> {
        spec.check()?;
        let largest = spec.windows.iter().map(|window| window.bytes).max().unwrap_or(0);
        let limit = isize::MAX as usize;
        let too_large = FabricError::Spec { what: "bytes of all windows together", asked: largest, limit };
        Self::build(spec).filter(|layout| layout.total_bytes <= limit).ok_or(too_large)
    }

    fn build(spec: &GroupSpec) -> Option<Self> {
        let ranks = spec.ranks;
        let mut table = Table { ranks, end: 0, digest: 0xcbf2_9ce4_8422_2325 };
        let word = size_of::<u64>();
        let share = share_elements(STAGING_BYTES / size_of::<f32>(), ranks) * size_of::<f32>();
        let mut layout = Self {
            ranks,
            header: table.section(1, size_of::<Header>(), LINE_BYTES)?,
            control: table.per_rank(size_of::<Control>(), LINE_BYTES)?,
            signals: table.per_rank(SIGNALS * word, LINE_BYTES)?,
            sizes: table.per_rank(3 * ranks * word, LINE_BYTES)?,
            records: table.per_rank(RECORD_WORDS * word, LINE_BYTES)?,
            staging: [table.per_rank(STAGING_BYTES, PAGE_BYTES)?, table.per_rank(STAGING_BYTES, PAGE_BYTES)?],
            reduced: [table.per_rank(share, LINE_BYTES)?, table.per_rank(share, LINE_BYTES)?],
            credits: Vec::new(),
            windows: Vec::new(),
            total_bytes: 0,
            digest: 0,
        };
        for _ in &spec.windows {
            layout.credits.push(table.per_rank(size_of::<Credit>(), LINE_BYTES)?);
        }
        for window in &spec.windows {
            layout.windows.push(table.per_rank(window.bytes, PAGE_BYTES)?);
        }
        layout.total_bytes = table.end.checked_next_multiple_of(PAGE_BYTES)?;
        layout.digest = table.digest;
        Some(layout)
    }
}

/// Elements of the largest share when `elements` are shared among `ranks` (rounded up).
pub(crate) fn share_elements(elements: usize, ranks: usize) -> usize {
    elements.div_ceil(ranks)
}
