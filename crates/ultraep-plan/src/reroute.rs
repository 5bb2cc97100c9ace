//! The dense reroute: a mask and probabilities over logical experts become ones over physical experts; its backward
//! gathers the probabilities' gradients back.
//!
//! Rows are tokens. Logical rows have `E` columns, physical rows [`RouteTable::physical_experts`]. A mask byte other than 0
//! means that the token chose the expert. Which instance a token goes to is decided as in the sparse form, experts of a
//! token in increasing order. Values are only moved, never computed with, so any `Copy` type serves.
//!
//! Cost: reads and writes every cell once; masks become bits, 64 columns at a time.

use crate::RouteTable;
use crate::assign::{AssignError, Cursor, length};

impl RouteTable {
    /// Scatters: `physical_mask` and `physical_values` (`[tokens, physical]`) get 1 and the value where a token's chosen
    /// expert went, 0 and `T::default()` elsewhere. `mask` and `values` are `[tokens, E]`.
    pub fn reroute_dense<T: Copy + Default>(
        &self,
        cursor: &mut Cursor,
        mask: &[u8],
        values: &[T],
        physical_mask: &mut [u8],
        physical_values: &mut [T],
    ) -> Result<(), AssignError> {
        let (experts, width) = (self.experts(), self.physical_experts());
        let tokens = mask.len() / experts;
        length("mask", mask.len(), tokens * experts)?;
        length("values", values.len(), mask.len())?;
        length("physical mask", physical_mask.len(), tokens * width)?;
        length("physical values", physical_values.len(), tokens * width)?;
        let rows = physical_mask.chunks_exact_mut(width).zip(physical_values.chunks_exact_mut(width));
        let tokens = mask.chunks_exact(experts).zip(values.chunks_exact(experts)).zip(rows).enumerate();
        for (token, ((mask, values), (physical_mask, physical_values))) in tokens {
            physical_mask.fill(0);
            physical_values.fill(T::default());
            self.for_chosen(cursor, token, mask, |expert, physical| {
                physical_mask[physical] = 1;
                physical_values[physical] = values[expert];
            })?;
        }
        Ok(())
    }

    /// The inverse gather: `gradient[token, e]` (`[tokens, E]`) becomes the physical gradient (`[tokens, physical]`) of the
    /// instance that the forward sent the token to, and `T::default()` where the expert was not chosen. `cursor` must be
    /// where it was before the forward.
    pub fn reroute_dense_backward<T: Copy + Default>(
        &self,
        cursor: &mut Cursor,
        mask: &[u8],
        physical_gradient: &[T],
        gradient: &mut [T],
    ) -> Result<(), AssignError> {
        let (experts, width) = (self.experts(), self.physical_experts());
        let tokens = mask.len() / experts;
        length("mask", mask.len(), tokens * experts)?;
        length("gradient", gradient.len(), mask.len())?;
        length("physical gradient", physical_gradient.len(), tokens * width)?;
        // Gathering many at a time lets their cache misses overlap.
        let mut pending = [(0, 0); 128];
        let mut waiting = 0;
        let gather = |gradient: &mut [T], pending: &[(usize, usize)]| {
            pending.iter().for_each(|&(to, from)| gradient[to] = physical_gradient[from]);
        };
        for (token, mask) in mask.chunks_exact(experts).enumerate() {
            gradient[token * experts..(token + 1) * experts].fill(T::default());
            self.for_chosen(cursor, token, mask, |expert, physical| {
                if waiting == pending.len() {
                    gather(gradient, &pending);
                    waiting = 0;
                }
                pending[waiting] = (token * experts + expert, token * width + physical);
                waiting += 1;
            })?;
        }
        gather(gradient, &pending[..waiting]);
        Ok(())
    }

    /// Calls `visit(expert, physical id)` for every expert that a token chose, in order. `mask` is the token's row.
    #[inline]
    fn for_chosen(
        &self,
        cursor: &mut Cursor,
        token: usize,
        mask: &[u8],
        mut visit: impl FnMut(usize, usize),
    ) -> Result<(), AssignError> {
        const STEP: usize = 64;
        for (step, bytes) in mask.chunks(STEP).enumerate() {
            let mut chosen = chosen_bits(bytes);
            while chosen != 0 {
                let expert = step * STEP + chosen.trailing_zeros() as usize;
                chosen &= chosen - 1;
                let physical = self.next(cursor, expert);
                let physical = physical.ok_or_else(|| self.more_than_counted(token * mask.len() + expert, expert))?;
                visit(expert, physical as usize);
            }
        }
        Ok(())
    }
}

/// Bit `i` is set where byte `i` of up to 64 is not 0; no branch depends on the bytes.
#[inline]
fn chosen_bits(bytes: &[u8]) -> u64 {
    const TOPS: u64 = 0x8080_8080_8080_8080;
    let (words, rest) = bytes.as_chunks::<8>();
    let mut bits = 0;
    for (at, word) in words.iter().enumerate() {
        let word = u64::from_le_bytes(*word);
        // The top bit of each byte that is not 0, then the eight of them side by side.
        let nonzero = (word | ((word & !TOPS) + !TOPS)) & TOPS;
        bits |= ((nonzero >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56) << (8 * at);
    }
    rest.iter().enumerate().fold(bits, |bits, (at, &byte)| bits | u64::from(byte != 0) << (8 * words.len() + at))
}

#[cfg(test)]
mod tests {
    use super::chosen_bits;

    #[test]
    fn bits_are_bytes_that_are_not_zero() {
        let bytes: std::vec::Vec<u8> = (0..64u8).map(|i| [0, 1, 0x80, 0xff, 0, 0x7f][usize::from(i % 6)]).collect();
        for length in 0..=64 {
            let expected = bytes[..length].iter().enumerate().fold(0, |b, (i, &v)| b | u64::from(v != 0) << i);
            assert_eq!(chosen_bits(&bytes[..length]), expected);
        }
    }
}
