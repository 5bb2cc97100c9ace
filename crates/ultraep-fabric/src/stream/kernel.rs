//! The instructions that move tiles.
//!
//! As in `copy.rs`, memory that other ranks may touch at the same time is never read or written by plain loads and stores of
//! the language, but by inline assembly, which means what a loop of relaxed atomic accesses means; where there is no
//! assembly for a machine, it is that loop. So a wrong plan makes wrong bytes, never undefined behaviour.
//!
//! Two ways to store, because neither wins everywhere (measured with `ultraep bench weight-sync`, see the engine's
//! `streaming_from_bytes`): *cached*, one string instruction, which is the fastest while source and destinations fit the
//! last-level cache; *streaming* (non-temporal), which does not fetch the lines it overwrites and wins beyond it.

use crate::copy;

/// How a copy stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stores {
    Cached,
    Streaming,
}

/// The widest vectors that the processor has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Vectors {
    Portable,
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    Avx,
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    Avx512,
}

/// Streaming stores need destinations on lines.
const LINE: usize = 64;

impl Vectors {
    /// Asks the processor.
    pub(crate) fn detect() -> Self {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        {
            if std::is_x86_feature_detected!("avx512f") {
                return Self::Avx512;
            }
            if std::is_x86_feature_detected!("avx") {
                return Self::Avx;
            }
        }
        Self::Portable
    }

    /// Copies `bytes` bytes. After streaming stores [`fence`] must come before anyone is told.
    ///
    /// # Safety
    /// As for [`copy::copy`].
    pub(crate) unsafe fn copy(self, from: *const u8, to: *mut u8, bytes: usize, stores: Stores) {
        let head = to.align_offset(LINE).min(bytes);
        let body = match stores {
            Stores::Cached => 0,
            Stores::Streaming => (bytes - head) / BLOCK * BLOCK,
        };
        if body == 0 || self == Self::Portable {
            // SAFETY: the caller's promise.
            return unsafe { copy::copy(from, to, bytes) };
        }
        // SAFETY: head, body and rest make up the range that the caller vouches for; the body starts on a line at its
        // destination and is whole blocks; the processor has the vectors, or `self` would not be what it is.
        unsafe {
            copy::copy(from, to, head);
            match self {
                Self::Portable => {}
                #[cfg(all(target_arch = "x86_64", not(miri)))]
                Self::Avx => avx::stream(from.add(head), to.add(head), body),
                #[cfg(all(target_arch = "x86_64", not(miri)))]
                Self::Avx512 => avx512::stream(from.add(head), to.add(head), body),
            }
            copy::copy(from.add(head + body), to.add(head + body), bytes - head - body);
        }
    }

    /// `sum[i] += part[i]`, then `part[i] = 0`, for `values` `f32`: one IEEE addition each, whatever the vectors.
    ///
    /// # Safety
    /// Both ranges are mapped, writable, aligned for `f32` and do not overlap; no Rust reference to either is alive.
    pub(crate) unsafe fn add_and_zero(self, sum: *mut f32, part: *mut f32, values: usize) {
        let body = values / BLOCK_VALUES * BLOCK_VALUES;
        let done = match self {
            Self::Portable => 0,
            #[cfg(all(target_arch = "x86_64", not(miri)))]
            Self::Avx | Self::Avx512 if body == 0 => 0,
            #[cfg(all(target_arch = "x86_64", not(miri)))]
            Self::Avx => {
                // SAFETY: the caller's promise for whole blocks; the processor has the vectors.
                unsafe { avx::add_and_zero(sum, part, body) };
                body
            }
            #[cfg(all(target_arch = "x86_64", not(miri)))]
            Self::Avx512 => {
                // SAFETY: as above.
                unsafe { avx512::add_and_zero(sum, part, body) };
                body
            }
        };
        for index in done..values {
            // SAFETY: within the ranges that the caller vouches for, aligned.
            unsafe { add_and_zero_one(sum.add(index), part.add(index)) };
        }
    }
}

/// Orders streaming stores before the release that follows.
pub(crate) fn fence(stores: Stores) {
    #[cfg(target_arch = "x86_64")]
    if stores == Stores::Streaming {
        // SAFETY: an instruction of every x86-64 processor, without operands.
        unsafe { core::arch::asm!("sfence", options(nostack, preserves_flags)) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = stores;
}

/// Asks the memory for the first lines of a tile.
pub(crate) fn prefetch(from: *const u8, bytes: usize) {
    const LINES: usize = 8;
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    for line in 0..LINES.min(bytes.div_ceil(LINE)) {
        use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint for an address; it reads nothing, and any address is allowed.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(line * LINE).cast()) };
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = (from, bytes, LINES);
}

/// # Safety
/// As for [`Vectors::add_and_zero`], for one value.
unsafe fn add_and_zero_one(sum: *mut f32, part: *mut f32) {
    use core::sync::atomic::{AtomicU32, Ordering::Relaxed};
    // SAFETY: mapped and aligned, by the caller's promise; atomics may race.
    let (sum, part) = unsafe { (&*sum.cast::<AtomicU32>(), &*part.cast::<AtomicU32>()) };
    let added = f32::from_bits(sum.load(Relaxed)) + f32::from_bits(part.load(Relaxed));
    sum.store(added.to_bits(), Relaxed);
    part.store(0, Relaxed);
}

/// Bytes of a loop's round: four registers of the widest kind.
const BLOCK: usize = 256;
const BLOCK_VALUES: usize = BLOCK / size_of::<f32>();

/// Both loops for one width of vectors: `$bytes` a register of class `$class`, all zero from `$zero`.
#[cfg(all(target_arch = "x86_64", not(miri)))]
macro_rules! kernels {
    ($module:ident, $feature:literal, $bytes:literal, $class:ident, $zero:ident) => {
        mod $module {
            use core::arch::{asm, x86_64};

            const ROUND: usize = 4 * $bytes;

            /// # Safety
            /// Ranges as for `copy::copy`; `to` on a line; `bytes` a multiple of `BLOCK`, not 0; the processor has the vectors.
            #[target_feature(enable = $feature)]
            pub(super) unsafe fn stream(from: *const u8, to: *mut u8, bytes: usize) {
                // SAFETY: walks through exactly `bytes` bytes of each range, ROUND at a time, which divides `bytes`.
                unsafe {
                    asm!(
                        "2:",
                        "vmovups {a}, [{from}]",
                        concat!("vmovups {b}, [{from} + ", $bytes, "]"),
                        concat!("vmovups {c}, [{from} + 2*", $bytes, "]"),
                        concat!("vmovups {d}, [{from} + 3*", $bytes, "]"),
                        "vmovntps [{to}], {a}",
                        concat!("vmovntps [{to} + ", $bytes, "], {b}"),
                        concat!("vmovntps [{to} + 2*", $bytes, "], {c}"),
                        concat!("vmovntps [{to} + 3*", $bytes, "], {d}"),
                        "add {from}, {round}",
                        "add {to}, {round}",
                        "sub {left}, {round}",
                        "jnz 2b",
                        from = inout(reg) from => _, to = inout(reg) to => _, left = inout(reg) bytes => _,
                        round = const ROUND,
                        a = out($class) _, b = out($class) _, c = out($class) _, d = out($class) _,
                        options(nostack),
                    );
                }
            }

            /// # Safety
            /// Ranges as for `Vectors::add_and_zero`; `values` a multiple of `BLOCK_VALUES`, not 0; the processor has the
            /// vectors.
            #[target_feature(enable = $feature)]
            pub(super) unsafe fn add_and_zero(sum: *mut f32, part: *mut f32, values: usize) {
                // SAFETY: walks through exactly `values` values of each range, ROUND bytes at a time, which divides them.
                unsafe {
                    asm!(
                        "2:",
                        "vmovups {a}, [{sum}]",
                        concat!("vmovups {b}, [{sum} + ", $bytes, "]"),
                        concat!("vmovups {c}, [{sum} + 2*", $bytes, "]"),
                        concat!("vmovups {d}, [{sum} + 3*", $bytes, "]"),
                        "vaddps {a}, {a}, [{part}]",
                        concat!("vaddps {b}, {b}, [{part} + ", $bytes, "]"),
                        concat!("vaddps {c}, {c}, [{part} + 2*", $bytes, "]"),
                        concat!("vaddps {d}, {d}, [{part} + 3*", $bytes, "]"),
                        "vmovups [{sum}], {a}",
                        concat!("vmovups [{sum} + ", $bytes, "], {b}"),
                        concat!("vmovups [{sum} + 2*", $bytes, "], {c}"),
                        concat!("vmovups [{sum} + 3*", $bytes, "], {d}"),
                        "vmovups [{part}], {zero}",
                        concat!("vmovups [{part} + ", $bytes, "], {zero}"),
                        concat!("vmovups [{part} + 2*", $bytes, "], {zero}"),
                        concat!("vmovups [{part} + 3*", $bytes, "], {zero}"),
                        "add {sum}, {round}",
                        "add {part}, {round}",
                        "sub {left}, {round}",
                        "jnz 2b",
                        sum = inout(reg) sum => _, part = inout(reg) part => _,
                        left = inout(reg) values * size_of::<f32>() => _,
                        round = const ROUND, zero = in($class) x86_64::$zero(),
                        a = out($class) _, b = out($class) _, c = out($class) _, d = out($class) _,
                        options(nostack),
                    );
                }
            }
        }
    };
}

#[cfg(all(target_arch = "x86_64", not(miri)))]
kernels!(avx, "avx", 32, ymm_reg, _mm256_setzero_ps);
#[cfg(all(target_arch = "x86_64", not(miri)))]
kernels!(avx512, "avx512f", 64, zmm_reg, _mm512_setzero_ps);

#[cfg(test)]
mod tests {
    use super::*;

    /// All that this processor has.
    fn available() -> Vec<Vectors> {
        let mut all = vec![Vectors::Portable];
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        {
            all.extend(std::is_x86_feature_detected!("avx").then_some(Vectors::Avx));
            all.extend(std::is_x86_feature_detected!("avx512f").then_some(Vectors::Avx512));
        }
        all
    }

    #[test]
    fn every_length_and_alignment_is_copied_and_nothing_beside_it() {
        let source: Vec<u8> = (0..2000).map(|i| (i * 7 + i / 256) as u8).collect();
        for vectors in available() {
            for stores in [Stores::Cached, Stores::Streaming] {
                for (offset, bytes) in [(0, 0), (1, 1), (0, 256), (3, 256), (64, 1024), (61, 1500), (5, 63), (63, 513)]
                {
                    let mut target = vec![0xA5; 2000];
                    // SAFETY: both ranges lie within their vectors, which nothing else touches.
                    unsafe { vectors.copy(source.as_ptr().add(11), target.as_mut_ptr().add(offset), bytes, stores) };
                    fence(stores);
                    assert_eq!(target[offset..offset + bytes], source[11..11 + bytes], "{vectors:?} {stores:?}");
                    let beside = target[..offset].iter().chain(&target[offset + bytes..]);
                    assert!(beside.copied().all(|byte| byte == 0xA5), "{vectors:?} {stores:?} {offset} {bytes}");
                }
            }
        }
    }

    #[test]
    fn sums_are_those_of_one_addition_at_a_time() {
        let value = |i: usize, seed: usize| ((i * 2_654_435_761 + seed) % 1_000_003) as f32 * 1e-3 - 400.0;
        for vectors in available() {
            for values in [0, 1, 63, 64, 65, 200, 512] {
                let mut sum: Vec<f32> = (0..values + 1).map(|i| value(i, 1)).collect();
                let mut part: Vec<f32> = (0..values + 1).map(|i| value(i, 77)).collect();
                let mut want: Vec<f32> = sum.iter().zip(&part).map(|(a, b)| a + b).collect();
                want[values] = sum[values];
                let beside = part[values];
                // SAFETY: both ranges lie within their vectors, which nothing else touches.
                unsafe { vectors.add_and_zero(sum.as_mut_ptr(), part.as_mut_ptr(), values) };
                let bits = |all: &[f32]| all.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&sum), bits(&want), "{vectors:?} {values}");
                assert!(part[..values].iter().all(|v| v.to_bits() == 0) && part[values] == beside);
            }
        }
    }
}
