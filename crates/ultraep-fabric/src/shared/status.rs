//! Where a rank is in its life, as one word: absent, then running, then gone. Each step is taken once.

use crate::sync::{AtomicU32, Ordering};

const ABSENT: u32 = 0;
const RUNNING: u32 = 1;
const LEFT: u32 = 2;
const DROPPED: u32 = 3;

/// How a rank has gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Gone {
    /// Properly.
    Left,
    /// Its endpoint was dropped.
    Dropped,
}

#[repr(transparent)]
#[derive(Default)]
pub(crate) struct Status {
    word: AtomicU32,
}

impl Status {
    /// Takes the rank's place; false when it is taken already.
    pub(crate) fn start(&self) -> bool {
        // SYNC POINT status: pairs with `is_in_group`, and decides who is the rank if two try.
        self.word.compare_exchange(ABSENT, RUNNING, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// The rank goes, if it has not gone before; whether it does now.
    pub(crate) fn go(&self, gone: Gone) -> bool {
        let word = if gone == Gone::Left { LEFT } else { DROPPED };
        // SYNC POINT status: releases all that the rank did to who sees it gone in `gone` or `is_in_group`.
        self.word.compare_exchange(RUNNING, word, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// How the rank has gone, if it has.
    pub(crate) fn gone(&self) -> Option<Gone> {
        // SYNC POINT status: acquires what the rank released in `go`.
        match self.word.load(Ordering::Acquire) {
            LEFT => Some(Gone::Left),
            DROPPED => Some(Gone::Dropped),
            _ => None,
        }
    }

    /// Whether the rank may still come or is there.
    pub(crate) fn is_in_group(&self) -> bool {
        self.gone().is_none()
    }
}
