//! Who may touch a region: so many readers, or one writer, or peers. One atomic word.

use crate::sync::{AtomicU32, Ordering};

/// The states; smaller values count readers.
pub(crate) const WRITER: u32 = u32::MAX;
/// Peers may put and get.
pub(crate) const OPEN: u32 = u32::MAX - 1;
/// A collective in flight lets peers write.
pub(crate) const RECEIVING: u32 = u32::MAX - 2;
const READERS_MAX: u32 = u32::MAX - 3;

#[derive(Default)]
pub(crate) struct Borrow {
    state: AtomicU32,
}

impl Borrow {
    /// One more reader, or the state that forbids it.
    pub(crate) fn begin_read(&self) -> Result<(), u32> {
        let count_up = |state: u32| (state < READERS_MAX).then(|| state + 1);
        // SYNC POINT borrow: acquires what the last writer (or epoch) released in `end`.
        self.state.fetch_update(Ordering::Acquire, Ordering::Relaxed, count_up).map(drop)
    }

    /// One reader less; by one that had begun.
    pub(crate) fn end_read(&self) {
        // SYNC POINT borrow: releases the reads to the next writer, which acquires in `begin`.
        self.state.fetch_sub(1, Ordering::Release);
    }

    /// From unused to `state` (one of the constants), or the state that forbids it.
    pub(crate) fn begin(&self, state: u32) -> Result<(), u32> {
        // SYNC POINT borrow: acquires what the last user released in `end_read` or `end`.
        self.state.compare_exchange(0, state, Ordering::Acquire, Ordering::Relaxed).map(drop)
    }

    /// Back to unused; by the one that had begun.
    pub(crate) fn end(&self) {
        // SYNC POINT borrow: releases the writes to the next user, which acquires in `begin_read` or `begin`.
        self.state.store(0, Ordering::Release);
    }
}
