//! The dense reroute: a mask and probabilities over logical experts become ones over physical experts; its backward
//! gathers the probabilities' gradients back.
//!
//! Rows are tokens. Logical rows have `E` columns, physical rows [`RouteTable::physical_experts`]. A mask byte other than 0
//! means that the token chose the expert. Which instance a token goes to is decided as in the sparse form, experts of a
//! token in increasing order. Values are only moved, never computed with, so any `Copy` type serves.
//!
//! Cost: reads and writes every cell once; masks are scanned eight bytes at a time.

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
        physical_mask.fill(0);
        physical_values.fill(T::default());
        self.for_chosen(cursor, mask, |at, token, physical| {
            physical_mask[token * width + physical] = 1;
            physical_values[token * width + physical] = values[at];
        })
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
        gradient.fill(T::default());
        self.for_chosen(cursor, mask, |at, token, physical| gradient[at] = physical_gradient[token * width + physical])
    }

    /// Calls `visit(index into the mask, token, physical id)` for every chosen expert, in order.
    #[inline]
    fn for_chosen(
        &self,
        cursor: &mut Cursor,
        mask: &[u8],
        mut visit: impl FnMut(usize, usize, usize),
    ) -> Result<(), AssignError> {
        const STEP: usize = 8;
        let experts = self.experts();
        for (token, row) in mask.chunks_exact(experts).enumerate() {
            for (chunk, bytes) in row.chunks(STEP).enumerate() {
                let none = <[u8; STEP]>::try_from(bytes).is_ok_and(|b| u64::from_ne_bytes(b) == 0);
                if none {
                    continue;
                }
                for expert in (chunk * STEP..).zip(bytes).filter(|&(_, &chosen)| chosen != 0).map(|(e, _)| e) {
                    let at = token * experts + expert;
                    let physical = self.next(cursor, expert).ok_or_else(|| self.more_than_counted(at, expert))?;
                    visit(at, token, physical as usize);
                }
            }
        }
        Ok(())
    }
}
