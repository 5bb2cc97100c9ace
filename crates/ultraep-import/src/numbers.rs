//! Whole numbers from whatever holds them: integers, floats and text. A number that is not whole, or was rounded on its way
//! into a small float, is refused: counts are exact or they are nothing.

use std::collections::BTreeSet;

use crate::Problem;

/// Largest whole number up to which a half float (f2) holds every whole number.
pub(crate) const F16_EXACT: f64 = 2048.0;
/// The same of a single float (f4).
pub(crate) const F32_EXACT: f64 = 16_777_216.0;
/// The same of bfloat16.
const BF16_EXACT: i32 = 256;

/// A whole number from -1 (fill) to the largest count.
pub(crate) fn whole(value: i128) -> Result<i32, Problem> {
    match i32::try_from(value) {
        Ok(value) if value >= -1 => Ok(value),
        _ => Err(Problem::Count { got: value.to_string() }),
    }
}

/// A float that is a whole number.
pub(crate) fn whole_float(value: f64) -> Result<i32, Problem> {
    if value.fract() == 0.0 && (-1.0..=f64::from(i32::MAX)).contains(&value) {
        return Ok(value as i32);
    }
    Err(Problem::Count { got: value.to_string() })
}

/// A number as text: digits, `5.0`, or `5.000000000000000000e+00` as NumPy's `savetxt` writes. `1e3` is refused: nothing
/// that counts writes it, and what rounds does.
pub(crate) fn whole_text(text: &[u8]) -> Result<i32, Problem> {
    let text = text.trim_ascii();
    let refused = || {
        let shown: String = String::from_utf8_lossy(&text[..text.len().min(40)]).into_owned();
        Problem::Count { got: format!("{shown:?}") }
    };
    let digits = text.strip_prefix(b"-").unwrap_or(text);
    let is_negative = digits.len() < text.len();
    let (mantissa, exponent) = match digits.iter().position(|b| b.eq_ignore_ascii_case(&b'e')) {
        Some(at) => (&digits[..at], Some(&digits[at + 1..])),
        None => (digits, None),
    };
    let point = mantissa.iter().position(|&b| b == b'.');
    let (before, behind) = point.map_or((mantissa, &mantissa[..0]), |at| (&mantissa[..at], &mantissa[at + 1..]));
    let is_number = |part: &[u8]| part.iter().all(u8::is_ascii_digit);
    if before.is_empty() || !is_number(before) || !is_number(behind) || (exponent.is_some() && point.is_none()) {
        return Err(refused());
    }
    let shift: usize = match exponent {
        None => 0,
        Some(exponent) => {
            let digits = exponent.strip_prefix(b"+").unwrap_or(exponent);
            let digits = std::str::from_utf8(digits).ok().filter(|d| d.bytes().all(|b| b.is_ascii_digit()));
            digits.and_then(|d| d.parse().ok()).filter(|&shift| shift <= 19).ok_or_else(refused)?
        }
    };
    let moved = (0..shift).map(|place| behind.get(place).copied().unwrap_or(b'0'));
    let value = before.iter().copied().chain(moved).try_fold(0_i128, |value, digit| {
        let next = value * 10 + i128::from(digit - b'0');
        (next < 1 << 100).then_some(next)
    });
    if behind.iter().skip(shift).any(|&digit| digit != b'0') {
        return Err(refused());
    }
    let value = value.ok_or_else(refused)?;
    whole(if is_negative { -value } else { value }).map_err(|_| refused())
}

/// Whether floats look as if counts were rounded to bfloat16 (8 significant bits) before: every number over 256 is one that
/// bfloat16 has, and together they are too many to be so by chance.
#[derive(Debug, Default)]
pub(crate) struct Rounding {
    has_exact: bool,
    rounded: BTreeSet<i32>,
}

impl Rounding {
    /// Different rounded numbers that are no chance.
    const LEAST: usize = 8;
    /// Bits that would have to be 0 by chance, over all of them.
    const LEAST_BITS: u32 = 16;

    pub(crate) fn see(&mut self, value: i32) {
        if value <= BF16_EXACT || self.has_exact {
            return;
        }
        if value.trailing_zeros() < lost_bits(value) {
            self.has_exact = true;
        } else if self.rounded.len() < 64 {
            self.rounded.insert(value);
        }
    }

    pub(crate) fn is_suspect(&self) -> bool {
        let bits: u32 = self.rounded.iter().map(|&value| lost_bits(value)).sum();
        !self.has_exact && self.rounded.len() >= Self::LEAST && bits >= Self::LEAST_BITS
    }
}

/// Bits of a whole number beyond the eight that bfloat16 keeps.
fn lost_bits(value: i32) -> u32 {
    (32 - value.leading_zeros()).saturating_sub(8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_taken_when_it_is_whole() {
        for (text, value) in [
            ("0", 0),
            (" 17 ", 17),
            ("1.0", 1),
            ("3.", 3),
            ("-1", -1),
            ("1.000000000000000000e+01", 10),
            ("1.230000000000000000e+02", 123),
            ("0.000000000000000000e+00", 0),
            ("2147483647", i32::MAX),
        ] {
            assert_eq!(whole_text(text.as_bytes()), Ok(value), "{text}");
        }
        for text in ["", "1.5", "1e3", "+2", "nan", "1.2345e+02", "1,000", "2147483648", "-2", "1.0e-1", "1.0e99", ".5"]
        {
            assert!(whole_text(text.as_bytes()).is_err(), "{text}");
        }
        assert!(whole_text(&[b'9'; 400]).is_err());
    }

    #[test]
    fn rounding_is_suspected_of_many_numbers_only() {
        let suspect = |values: &[i32]| {
            let mut rounding = Rounding::default();
            values.iter().for_each(|&value| rounding.see(value));
            rounding.is_suspect()
        };
        assert!(suspect(&[664, 644, 648, 640, 656, 616, 608, 620, 672]));
        assert!(!suspect(&[664, 644, 648, 640, 656, 616, 608, 620, 671]));
        assert!(!suspect(&[512; 100]));
        assert!(!suspect(&[1024, 2048, 4096]));
        assert!(!suspect(&[1, 2, 3, 255, 256]));
    }
}
