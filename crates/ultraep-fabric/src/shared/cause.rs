//! The group's first failure as one word, set once.

use crate::sync::{AtomicU64, Ordering};

#[repr(transparent)]
#[derive(Default)]
pub(crate) struct Cause {
    /// 0, or the first failure's code, which is not 0.
    word: AtomicU64,
}

impl Cause {
    /// The group has failed for this reason, unless it had failed before. The caller has written its record.
    pub(crate) fn set(&self, code: u64) {
        // SYNC POINT failure: releases the record to whoever acquires the word in `get`.
        let _ = self.word.compare_exchange(0, code, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Whether the group has failed.
    pub(crate) fn is_set(&self) -> bool {
        self.word.load(Ordering::Relaxed) != 0
    }

    /// The first failure's code.
    pub(crate) fn get(&self) -> Option<u64> {
        // SYNC POINT failure: acquires the record that was released in `set`.
        Some(self.word.load(Ordering::Acquire)).filter(|&code| code != 0)
    }
}
