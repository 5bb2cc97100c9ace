//! Core permits: at most so many ranks compute at a time. A counting semaphore on one futex word.
//!
//! A rank holds a permit from the start of its main, gives it back while it is blocked, and has it again before its wait
//! returns. When the group fails permits end: a rank that died with one starves no one.

use super::word::{FAILED, STEP, mark_failed};
use crate::sync::{self, AtomicU32, Ordering};
use core::time::Duration;

#[repr(C)]
#[derive(Default)]
pub(crate) struct Permits {
    /// Futex word: bit 0 is "the group has failed", the rest counts free permits.
    pub(crate) word: AtomicU32,
    /// How often a permit was taken: shows waiters that there is progress.
    taken: AtomicU32,
}

/// What came of asking for a permit.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    Granted,
    /// None is free; the word was this.
    NoneFree(u32),
    GroupFailed,
}

impl Permits {
    pub(crate) fn initialise(&self, permits: usize) {
        // More permits than ranks (at most 1,024) are never asked for.
        self.word.store(u32::try_from(permits).unwrap_or(u32::MAX / STEP) * STEP, Ordering::Relaxed);
    }

    /// Takes a permit if one is free.
    pub(crate) fn ask(&self) -> Asked {
        let take = |word: u32| (word & FAILED == 0 && word >= STEP).then(|| word - STEP);
        // SYNC POINT permits: acquires what the one who gave it back released, so that ranks that take turns on a core
        // see each other's statistics in order. No data depends on it.
        // SYNC POINT failure: who is refused because the group has failed sees the failure word set, hence the second acquire.
        match self.word.fetch_update(Ordering::Acquire, Ordering::Acquire, take) {
            Ok(_) => {
                self.taken.fetch_add(1, Ordering::Relaxed);
                Asked::Granted
            }
            Err(word) if word & FAILED != 0 => Asked::GroupFailed,
            Err(word) => Asked::NoneFree(word),
        }
    }

    /// Gives a permit back and wakes one who sleeps for it.
    pub(crate) fn give_back(&self) {
        // SYNC POINT permits: pairs with `ask`.
        self.word.fetch_add(STEP, Ordering::Release);
        sync::wake(&self.word, 1);
    }

    /// Free permits now.
    pub(crate) fn free(&self) -> u32 {
        self.word.load(Ordering::Relaxed) / STEP
    }

    /// How often a permit was taken so far, modulo 2^32.
    pub(crate) fn taken(&self) -> u32 {
        self.taken.load(Ordering::Relaxed)
    }

    /// Sleeps while the word is `value`, at most `limit`.
    pub(crate) fn sleep(&self, value: u32, limit: Duration) {
        sync::sleep_while(&self.word, value, limit);
    }

    /// The group has failed: permits end, and whoever sleeps for one wakes.
    pub(crate) fn fail(&self) {
        mark_failed(&self.word);
    }
}
