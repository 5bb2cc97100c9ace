//! Copying bytes that another rank may touch at the same time.
//!
//! While a window is open, nothing but the ranks' own signals orders their puts and gets. Two ranks that write one place
//! at once make its content unspecified, and must not make the program undefined. So these copies are never plain
//! loads and stores of the language: on x86-64 they are one string instruction in inline assembly, which means what a
//! loop of relaxed atomic byte accesses means; elsewhere they are that loop.

/// Bytes of a tile: small enough to stay in the first-level cache while it is written to each destination.
const TILE_BYTES: usize = 16 * 1024;

/// Copies `bytes` bytes from `from` to `to`. Where the ranges overlap the result is unspecified bytes.
///
/// # Safety
/// Both ranges must be mapped for the whole call: `from` readable, `to` writable. Neither range may be borrowed as a
/// Rust reference that the copy would invalidate (no `&mut` on `from`, no reference at all on `to`).
pub(crate) unsafe fn copy(from: *const u8, to: *mut u8, bytes: usize) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: the caller vouches for both ranges. The direction flag is clear on entry to an asm block, so the
    // instruction walks upwards through exactly `bytes` bytes of each range. Memory is clobbered by default.
    unsafe {
        core::arch::asm!("rep movsb", inout("rcx") bytes => _, inout("rsi") from => _, inout("rdi") to => _,
            options(nostack, preserves_flags));
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    {
        use core::sync::atomic::{AtomicU8, Ordering::Relaxed};
        for index in 0..bytes {
            // SAFETY: within the two ranges that the caller vouches for; an AtomicU8 has no alignment to keep.
            let (source, target) =
                unsafe { (&*from.add(index).cast::<AtomicU8>(), &*to.add(index).cast::<AtomicU8>()) };
            target.store(source.load(Relaxed), Relaxed);
        }
    }
}

/// Copies one range to several places, tile by tile: each tile is read from memory once.
///
/// # Safety
/// As for [`copy`], for each of the `targets`.
pub(crate) unsafe fn copy_to_many(from: *const u8, targets: impl Iterator<Item = *mut u8> + Clone, bytes: usize) {
    let mut done = 0;
    while done < bytes {
        let tile = TILE_BYTES.min(bytes - done);
        for to in targets.clone() {
            // SAFETY: `done + tile <= bytes`, so both ends stay within the ranges that the caller vouches for.
            unsafe { copy(from.add(done), to.add(done), tile) };
        }
        done += tile;
    }
}
