//! The turnstile: what every phase of every collective passes. A phase ends when all ranks have entered it.
//!
//! One word counts who has entered and, in its upper half, who has gone for good, so that "the last one arrives" and "one
//! leaves while others wait" are decided by the order of read-modify-writes on one word. The last to arrive looks at what
//! all ranks have published (nobody can change it then), and turns the generation, on which the others wait.

use super::word::{STEP, mark_failed};
use crate::sync::{self, AtomicU32, AtomicU64, Ordering};
use core::time::Duration;

const GONE: u64 = 1 << 32;

#[repr(C)]
#[derive(Default)]
pub(crate) struct Turnstile {
    /// Low half: ranks that have entered the phase. High half: ranks that have gone.
    turn: AtomicU64,
    /// The largest stamp of the phase that ended last.
    stamp: AtomicU64,
    /// Futex word; its count is that of the ended phases, modulo 2^31.
    generation: AtomicU32,
    /// Ranks that may be asleep on `generation`.
    sleepers: AtomicU32,
}

/// What entering a phase means for the one who enters.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Entered {
    /// Others are still missing.
    Waiting,
    /// The caller is the last: it checks what all have published and calls [`Turnstile::turn`].
    Last,
    /// A rank has gone, so that this phase will never end.
    SomeoneGone,
}

impl Turnstile {
    /// Enters the current phase, as one of `ranks`.
    pub(crate) fn enter(&self, ranks: u64) -> Entered {
        // SYNC POINT turn: releases what this rank published (control, sizes, staging, puts) to the last one to enter, and
        // as the last one acquires what all others released. Also acquires the status of those who have gone.
        let before = self.turn.fetch_add(1, Ordering::AcqRel);
        if before >= GONE {
            Entered::SomeoneGone
        } else if before + 1 == ranks {
            Entered::Last
        } else {
            Entered::Waiting
        }
    }

    /// Says that the caller will enter no further phase. Whether others are waiting in one right now.
    pub(crate) fn go(&self) -> bool {
        // SYNC POINT turn: releases the caller's status; pairs with `enter`.
        let before = self.turn.fetch_add(GONE, Ordering::AcqRel);
        !before.is_multiple_of(GONE)
    }

    /// Ends the phase; only by the one who got [`Entered::Last`]. Wakes at most `awake` ranks and lets the rest sleep
    /// on at `queue` (the permits' word), where they are woken one by one as permits come free.
    pub(crate) fn turn(&self, ranks: u64, stamp: u64, queue: Option<(&AtomicU32, u32)>) {
        // Relaxed: ordered before the next phase's entries by the turn of the generation below.
        self.turn.fetch_sub(ranks, Ordering::Relaxed);
        self.stamp.store(stamp, Ordering::Relaxed);
        // SYNC POINT generation: releases what all ranks released to the caller; pairs with `look`.
        let generation = self.generation.fetch_add(STEP, Ordering::Release).wrapping_add(STEP);
        // Sequentially consistent, against the fence in `sleep`: the sleeper sees the new generation or we see the sleeper.
        sync::fence(Ordering::SeqCst);
        if self.sleepers.load(Ordering::Relaxed) == 0 {
            return;
        }
        match queue {
            Some((word, awake)) => sync::wake_and_requeue(&self.generation, generation, awake, word),
            None => sync::wake(&self.generation, u32::MAX),
        }
    }

    /// The generation word now.
    pub(crate) fn look(&self) -> u32 {
        // SYNC POINT generation: acquires what the last to enter released in `turn`.
        self.generation.load(Ordering::Acquire)
    }

    /// The largest stamp of the phase that the caller has just seen end. Stable until the caller enters the next one.
    pub(crate) fn stamp(&self) -> u64 {
        self.stamp.load(Ordering::Relaxed)
    }

    /// Sleeps while the generation word is `value`, at most `limit`.
    pub(crate) fn sleep(&self, value: u32, limit: Duration) {
        self.sleepers.fetch_add(1, Ordering::Relaxed);
        // Sequentially consistent, against the fence in `turn`.
        sync::fence(Ordering::SeqCst);
        if self.generation.load(Ordering::Relaxed) == value {
            sync::sleep_while(&self.generation, value, limit);
        }
        self.sleepers.fetch_sub(1, Ordering::Relaxed);
    }

    /// The group has failed: wakes every sleeper, for good.
    pub(crate) fn fail(&self) {
        mark_failed(&self.generation);
    }
}
