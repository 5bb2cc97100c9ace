//! Huge pages for large memory: experts are streamed through, and with small pages a copy looks up an address every 4 KiB.

use core::ptr::NonNull;
use rustix::mm::{Advice, madvise};

/// A huge page on the common machines; elsewhere the advice is only rounded differently.
pub(crate) const HUGE_BYTES: usize = 2 << 20;

/// Asks for huge pages under the whole ones of `bytes` at `start`, mapped and not touched yet. Advice: a kernel without
/// them goes on with small ones.
pub(crate) fn advise_huge(start: NonNull<u8>, bytes: usize) {
    let skip = start.as_ptr().align_offset(HUGE_BYTES);
    let Some(whole) = bytes.checked_sub(skip).map(|rest| rest - rest % HUGE_BYTES).filter(|&whole| whole > 0) else {
        return;
    };
    let first = start.as_ptr().wrapping_add(skip);
    if cfg!(miri) {
        return;
    }
    // SAFETY: pages of a mapping that the caller has; which size they have changes nothing that a program can read.
    let _ = unsafe { madvise(first.cast(), whole, Advice::LinuxHugepage) };
}
