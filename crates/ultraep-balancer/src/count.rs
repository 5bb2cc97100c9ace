//! Tokens of every expert, from what a router chose.

use crate::BalancerError;

/// An integer that frameworks keep expert ids in. -1 means no expert.
pub trait TokenId: Copy {
    /// Its value; what does not fit is no expert either way.
    fn value(self) -> i64;

    /// The ids as they are, where they are `i32` already.
    fn as_i32(_ids: &[Self]) -> Option<&[i32]> {
        None
    }
}

macro_rules! token_ids {
    ($($kind:ty)*) => {
        $(impl TokenId for $kind {
            fn value(self) -> i64 {
                i64::try_from(self).unwrap_or(i64::MAX)
            }
        })*
    };
}

token_ids! { i8 i16 i64 u8 u16 u32 u64 usize }

impl TokenId for i32 {
    fn value(self) -> i64 {
        self.into()
    }

    fn as_i32(ids: &[Self]) -> Option<&[i32]> {
        Some(ids)
    }
}

/// Adds the choices in `ids` (`[tokens, top_k]`, any shape will do) to `counts`, `[E]`. -1 is skipped.
///
/// # Errors
/// [`BalancerError::Id`] names the first id that is neither -1 nor an expert; `counts` is then partly added to.
pub fn count_ids<I: TokenId>(ids: &[I], counts: &mut [u32]) -> Result<(), BalancerError> {
    let experts = counts.len();
    for (at, id) in ids.iter().enumerate() {
        match usize::try_from(id.value()) {
            Ok(expert) if expert < experts => counts[expert] += 1,
            _ if id.value() == -1 => {}
            _ => return Err(BalancerError::Id { at, id: id.value(), experts }),
        }
    }
    Ok(())
}

/// Adds the choices in `map` (`[tokens, E]`; a byte other than 0 is a choice) to `counts`, `[E]`.
///
/// # Errors
/// [`BalancerError::Size`] when the map has no whole number of rows.
pub fn count_map(map: &[u8], counts: &mut [u32]) -> Result<(), BalancerError> {
    let experts = counts.len().max(1);
    if !map.len().is_multiple_of(experts) {
        let expected = map.len() / experts * experts;
        return Err(BalancerError::Size { what: "map of choices", got: map.len(), expected });
    }
    for row in map.chunks_exact(experts) {
        counts.iter_mut().zip(row).for_each(|(count, &chosen)| *count += u32::from(chosen != 0));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_width_counts_alike_and_padding_is_skipped() {
        fn counts<I: TokenId>(ids: &[I]) -> Vec<u32> {
            let mut counts = vec![0; 4];
            count_ids(ids, &mut counts).expect("experts of the group");
            counts
        }
        assert_eq!(counts(&[0_i64, 3, -1, 3]), [1, 0, 0, 2]);
        assert_eq!(counts(&[0_i32, 3, -1, 3]), [1, 0, 0, 2]);
        assert_eq!(counts(&[0_i16, 3, -1, 3]), [1, 0, 0, 2]);
        assert_eq!(counts(&[0_u8, 3, 3]), [1, 0, 0, 2]);
        let mut dense = vec![0; 2];
        count_map(&[1, 0, 0, 1, 255, 1], &mut dense).expect("three rows of two");
        assert_eq!(dense, [2, 2]);
    }

    #[test]
    fn what_is_no_expert_is_named_with_its_place() {
        let refused = |id: i64| count_ids(&[0, id], &mut [0; 4]).expect_err("no expert").to_string();
        assert_eq!(refused(4), "value 1: expert 4; allowed are -1 (padding) and 0 to 3");
        assert_eq!(refused(-2), "value 1: expert -2; allowed are -1 (padding) and 0 to 3");
        assert!(count_ids(&[u64::MAX], &mut [0; 4]).is_err());
        assert!(count_map(&[1, 0, 0], &mut [0; 2]).is_err());
    }
}
