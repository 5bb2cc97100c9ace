//! A rank's doorbell: rung after each signal to it, heard while it waits for one.

use super::word::{FAILED, STEP, mark_failed};
use crate::sync::{self, AtomicU32, Ordering};
use core::time::Duration;

#[repr(C)]
#[derive(Default)]
pub(crate) struct Doorbell {
    /// Futex word: bit 0 is "the group has failed", the rest counts rings.
    event: AtomicU32,
    /// Whether the rank may be asleep on `event`.
    listening: AtomicU32,
}

impl Doorbell {
    /// After a signal word has been raised: wakes the rank if it may be asleep.
    pub(crate) fn ring(&self) {
        // SYNC POINT event: releases the signal word to who sees the event in `sleep_unless`.
        self.event.fetch_add(STEP, Ordering::Release);
        // Sequentially consistent, against the fence in `sleep_unless`: the sleeper sees the event or we see the sleeper.
        sync::fence(Ordering::SeqCst);
        if self.listening.load(Ordering::Relaxed) != 0 {
            sync::wake(&self.event, u32::MAX);
        }
    }

    /// Sleeps until the bell rings, at most `limit`, unless `reached` holds or the group has failed. Whether `reached` holds.
    pub(crate) fn sleep_unless(&self, reached: impl Fn() -> bool, limit: Duration) -> bool {
        self.listening.store(1, Ordering::Relaxed);
        sync::fence(Ordering::SeqCst);
        // SYNC POINT event: pairs with `ring`; whoever rang before this load is seen by `reached`.
        let event = self.event.load(Ordering::Acquire);
        if event & FAILED == 0 && !reached() {
            sync::sleep_while(&self.event, event, limit);
        }
        self.listening.store(0, Ordering::Relaxed);
        reached()
    }

    /// The group has failed: wakes the rank, for good.
    pub(crate) fn fail(&self) {
        mark_failed(&self.event);
    }
}
