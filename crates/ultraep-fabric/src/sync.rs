//! The one place atomics and the futex come from, so that a model checker can replace them: `tests/loom.rs` compiles the
//! files that synchronise (`borrow.rs`, `shared/{cause,doorbell,permits,status,turnstile,word}.rs`) against loom's.
//!
//! Every acquire/release pair of the crate is marked `SYNC POINT` at both ends; the crate's documentation has the table.

pub(crate) use core::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use core::time::Duration;
use rustix::thread::futex;

/// Sleeps while `word` holds `value`, at most `limit`. May return early for any reason: the caller looks again.
///
/// The futex is a shared one: ranks may be processes, and a private futex never wakes another process.
pub(crate) fn sleep_while(word: &AtomicU32, value: u32, limit: Duration) {
    let limit = futex::Timespec {
        tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: limit.subsec_nanos().into(),
    };
    // Woken, value changed, interrupted, timed out: in each case the caller rechecks its condition.
    let _ = futex::wait(word, futex::Flags::empty(), value, Some(&limit));
}

/// Wakes at most `count` sleepers of `word`.
pub(crate) fn wake(word: &AtomicU32, count: u32) {
    // The kernel reads the count as a signed number; it can only fail for a bad address, which a reference is not.
    let _ = futex::wake(word, futex::Flags::empty(), count.min(i32::MAX as u32));
}

/// Wakes at most `count` sleepers of `word`, and lets the rest sleep on `other`, provided `word` still holds `value`.
pub(crate) fn wake_and_requeue(word: &AtomicU32, value: u32, count: u32, other: &AtomicU32) {
    if futex::cmp_requeue(word, futex::Flags::empty(), count, i32::MAX as u32, other, value).is_err() {
        wake(word, i32::MAX as u32);
    }
}
