//! The window that holds the ranks' slots: where each slot is, and where its chunks' ready flags are.
//!
//! | part of the window | bytes                          |
//! |--------------------|--------------------------------|
//! | slot 0, 1, ...     | `slots * layout.slot_bytes()`  |
//! | flags of slot 0, 1, ... | `slots * chunks * 4`      |
//!
//! A flag counts the tiles of its chunk that have been moved for the piece of work in hand: written by a weight sync, or added and
//! zeroed by a grad reduce.

use super::layout::{ExpertLayout, SHARD_ALIGN};
use super::schedule::Geometry;
use crate::WindowId;
use core::ops::Range;
use ultraep_plan::{PhysicalIndex, Rank, Topology, TransferModel, TransferModelError};

/// How experts are cut for transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TileSizes {
    /// The most bytes that a worker moves at a time.
    pub tile_bytes: usize,
    /// The most bytes that a relay waits for.
    pub chunk_bytes: usize,
}

impl TileSizes {
    /// Chunks of v1.0.0, 256 KiB, in tiles of 64 KiB; v1.0.0 has 32 KiB, which on a host are 8% slower at 1 MiB an expert and
    /// equal from 4 MiB. A tile stays in the second-level cache while it is written to all its destinations.
    pub const WEIGHTS: Self = Self { tile_bytes: 64 * 1024, chunk_bytes: 256 * 1024 };
    /// 64 KiB tiles, as in v1.0.0.
    pub const GRADIENTS: Self = Self { tile_bytes: 64 * 1024, chunk_bytes: 8 * 64 * 1024 };
}

/// The slots of all ranks: a window, and how its parts are divided.
#[derive(Clone, Debug)]
pub struct Slots {
    window: WindowId,
    layout: ExpertLayout,
    geometry: Geometry,
    slots: usize,
}

impl Slots {
    /// `slots` places for experts of `layout` on each rank, in the window `window`, which must have
    /// [`Slots::window_bytes`] bytes.
    #[must_use]
    pub fn new(window: WindowId, layout: ExpertLayout, sizes: TileSizes, slots: usize) -> Self {
        let geometry = Geometry::new(layout.bytes(), sizes.chunk_bytes, sizes.tile_bytes);
        Self { window, layout, geometry, slots }
    }

    /// The window.
    #[must_use]
    pub fn window(&self) -> WindowId {
        self.window
    }

    /// What is in a slot.
    #[must_use]
    pub fn layout(&self) -> &ExpertLayout {
        &self.layout
    }

    /// Places on each rank.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Bytes of a chunk as cut; the last may be shorter.
    #[must_use]
    pub fn chunk_bytes(&self) -> usize {
        self.geometry.chunk_bytes
    }

    /// The model of transfers of these experts over links that carry `link_bytes_per_s` in each direction.
    ///
    /// # Errors
    /// [`TransferModelError`] when an expert has too many chunks or a chunk takes too long.
    pub fn model(&self, link_bytes_per_s: u64, hop_ns: u64) -> Result<TransferModel, TransferModelError> {
        let (bytes, chunk) = (self.geometry.bytes as u64, self.geometry.chunk_bytes as u64);
        let model = TransferModel::of_link(bytes, chunk, link_bytes_per_s, hop_ns);
        model.check().map(|()| model)
    }

    /// Bytes of each rank's part of the window; `None` when there are not so many addresses.
    #[must_use]
    pub fn window_bytes(&self) -> Option<usize> {
        let flags = self.slots.checked_mul(self.geometry.chunks())?.checked_mul(size_of::<u32>())?;
        self.slots.checked_mul(self.layout.slot_bytes())?.checked_add(flags)
    }

    /// Where a slot's packed expert is, in a rank's part of the window.
    #[must_use]
    pub fn range(&self, slot: usize) -> Range<usize> {
        let start = slot * self.layout.slot_bytes();
        start..start + self.layout.bytes()
    }

    /// The slot of a physical expert; `None` for masters and where there is no such slot.
    #[must_use]
    pub fn slot(&self, topology: &Topology, rank: Rank, physical: PhysicalIndex) -> Option<usize> {
        let known = rank.index() < topology.ranks();
        let slot = physical.index().checked_sub(known.then(|| topology.masters(rank).len())?)?;
        (slot < self.slots).then_some(slot)
    }

    pub(crate) fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Offset of a slot's first flag.
    pub(crate) fn flags(&self, slot: usize) -> usize {
        let after_slots = self.slots * self.layout.slot_bytes();
        debug_assert!(after_slots.is_multiple_of(SHARD_ALIGN));
        after_slots + slot * self.geometry.chunks() * size_of::<u32>()
    }
}
