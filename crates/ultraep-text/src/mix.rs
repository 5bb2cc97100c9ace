//! The two integer functions that everything deterministic here comes from: FNV-1a over bytes (order of files, digest of
//! a corpus) and SplitMix64 over counters (draws). Both are published and fixed for ever: a change would change every
//! batch of every run that resumes.

const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
const FNV_PRIME: u64 = 0x0000_0100_0000_01b3;
const GOLDEN_GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// FNV-1a, 64 bits.
pub(crate) struct Fnv(u64);

impl Fnv {
    pub(crate) const fn new() -> Self {
        Self(FNV_OFFSET)
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(FNV_PRIME);
        }
    }

    /// A length as eight bytes, so that neighbouring fields cannot run into each other.
    pub(crate) fn write_length(&mut self, length: usize) {
        self.write(&(length as u64).to_le_bytes());
    }

    pub(crate) const fn finish(self) -> u64 {
        self.0
    }

    pub(crate) fn of(bytes: &[u8]) -> u64 {
        let mut hash = Self::new();
        hash.write(bytes);
        hash.finish()
    }
}

/// A stream of draws named by a key; equal keys give equal streams.
pub(crate) struct Draws(u64);

impl Draws {
    /// The stream named by `key`. Each word is folded in by a full mix, so that (1, 0) and (0, 1) are unrelated.
    pub(crate) fn keyed(key: &[u64]) -> Self {
        Self(key.iter().fold(FNV_OFFSET, |state, &word| scramble(state ^ scramble(word.wrapping_add(GOLDEN_GAMMA)))))
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GOLDEN_GAMMA);
        scramble(self.0)
    }

    /// A number in `0..bound`, by the high half of a 128-bit product (bias below `bound / 2^64`). 0 when `bound` is 0.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }
}

/// SplitMix64's finaliser: a bijection on 64 bits.
const fn scramble(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_values_hold() {
        assert_eq!(Fnv::of(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(Fnv::of(b"a"), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(Fnv::of(b"foobar"), 0x8594_4171_f739_67e8);
        // SplitMix64 from state 0, as its author's reference prints.
        let mut draws = Draws(0);
        assert_eq!([draws.next(), draws.next()], [0xe220_a839_7b1d_cdaf, 0x6e78_9e6a_a1b9_65f4]);
    }

    #[test]
    fn bounded_draws_are_even() {
        let mut draws = Draws::keyed(&[1, 2, 3]);
        let mut seen = [0_u32; 7];
        for _ in 0..70_000 {
            seen[draws.below(7) as usize] += 1;
        }
        assert!(seen.iter().all(|&n| (9_600..10_400).contains(&n)), "{seen:?}");
        assert_eq!(draws.below(0), 0);
    }
}
