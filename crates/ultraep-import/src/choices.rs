//! The experts that a token chose, as they are recorded: which numbers are experts, and which are fill.
//!
//! Engines fill places without an expert with -1, with the number of experts, or with the largest number of the type. A
//! token all of whose places hold such a number was padding. A place that holds -1 beside experts is empty. Anything else
//! beyond the experts is refused: it is damage, or a count of experts that is wrong.

use ultraep_trace::NO_EXPERT;

use crate::Problem;
use crate::error::expert_below;

/// Largest numbers of integer types, which fill padding.
const FILLS: [i64; 5] = [255, 32_767, 65_535, i32::MAX as i64, u32::MAX as i64];

/// Appends a token's choices; what is fill becomes [`NO_EXPERT`]. `experts` is `E` where it is known.
pub(crate) fn push_choices(row: &[i64], experts: Option<usize>, out: &mut Vec<u16>) -> Result<(), Problem> {
    if is_fill(row, experts) {
        out.extend(std::iter::repeat_n(NO_EXPERT, row.len()));
        return Ok(());
    }
    for &id in row {
        out.push(if id == -1 { NO_EXPERT } else { expert_below(id, experts)? });
    }
    Ok(())
}

fn is_fill(row: &[i64], experts: Option<usize>) -> bool {
    let Some((&first, rest)) = row.split_first() else { return true };
    if rest.iter().any(|&id| id != first) {
        return false;
    }
    match experts.and_then(|experts| i64::try_from(experts).ok()) {
        Some(experts) => first == -1 || first == experts || (first > experts && FILLS.contains(&first)),
        // One choice alone may be any expert.
        None => first == -1 || (!rest.is_empty() && FILLS.contains(&first)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fill_is_told_from_experts_and_from_damage() {
        let read = |row: &[i64], experts| {
            let mut out = Vec::new();
            push_choices(row, experts, &mut out).map(|()| out)
        };
        const NO: u16 = NO_EXPERT;
        assert_eq!(read(&[3, 1], Some(16)), Ok(vec![3, 1]));
        assert_eq!(read(&[-1, -1], None), Ok(vec![NO, NO]));
        assert_eq!(read(&[3, -1], Some(16)), Ok(vec![3, NO]));
        assert_eq!(read(&[16, 16], Some(16)), Ok(vec![NO, NO]));
        assert_eq!(read(&[255, 255], Some(16)), Ok(vec![NO, NO]));
        assert_eq!(read(&[255, 255], None), Ok(vec![NO, NO]));
        assert_eq!(read(&[255], None), Ok(vec![255]));
        assert_eq!(read(&[255, 255], Some(256)), Ok(vec![255, 255]));
        assert!(read(&[3, 16], Some(16)).is_err(), "an expert too many beside a good one");
        assert!(read(&[17, 17], Some(16)).is_err());
        assert!(read(&[-2, -2], None).is_err());
        for id in [i64::MAX, i64::MIN, i64::from(u32::MAX), 1 << 40] {
            for experts in [None, Some(16)] {
                let refused = read(&[3, id], experts).expect_err("no expert").to_string();
                assert!(refused.contains(&id.to_string()), "{id}: {refused}");
            }
        }
        assert!(read(&[5000, 1], None).is_err());
    }
}
