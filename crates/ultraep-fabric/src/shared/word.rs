//! What all futex words have in common.

use crate::sync::{self, AtomicU32, Ordering};

/// Bit 0 of each futex word: the group has failed. The rest of the word counts in steps of [`STEP`].
pub(crate) const FAILED: u32 = 1;
pub(crate) const STEP: u32 = 2;

/// Marks a futex word, so that no one falls asleep on it any more, and wakes who sleeps.
pub(crate) fn mark_failed(word: &AtomicU32) {
    // SYNC POINT failure: a waiter that acquires a marked word sees the failure word set.
    word.fetch_or(FAILED, Ordering::AcqRel);
    sync::wake(word, u32::MAX);
}
