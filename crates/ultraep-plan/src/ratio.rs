//! Exact ratios, compared and applied in integers.

/// A positive ratio `num / den`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ratio {
    num: u32,
    den: u32,
}

impl Ratio {
    /// The paper's `beta`, 101/100.
    pub const BETA: Self = Self { num: 101, den: 100 };
    /// 1/1.
    pub const ONE: Self = Self { num: 1, den: 1 };

    /// `num / den`; `None` when either is 0.
    pub const fn new(num: u32, den: u32) -> Option<Self> {
        if num == 0 || den == 0 { None } else { Some(Self { num, den }) }
    }

    /// Numerator.
    pub const fn num(self) -> u32 {
        self.num
    }

    /// Denominator.
    pub const fn den(self) -> u32 {
        self.den
    }

    /// `value * self`, rounded up, at most `u32::MAX`.
    pub fn scale_ceil(self, value: u32) -> u32 {
        let scaled = (u64::from(value) * u64::from(self.num)).div_ceil(u64::from(self.den));
        u32::try_from(scaled).unwrap_or(u32::MAX)
    }

    /// `total * self / parts`, rounded down, at most `u32::MAX`: the largest rank load whose ratio to the mean over `parts`
    /// is still within `self`.
    pub fn of_mean_floor(self, total: u64, parts: u64) -> u32 {
        let scaled = u128::from(total) * u128::from(self.num) / (u128::from(self.den) * u128::from(parts.max(1)));
        u32::try_from(scaled).unwrap_or(u32::MAX)
    }
}

impl Default for Ratio {
    fn default() -> Self {
        Self::BETA
    }
}

/// `7` or `num/den`, as in configuration files.
impl core::fmt::Display for Ratio {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        if self.den == 1 { write!(f, "{}", self.num) } else { write!(f, "{}/{}", self.num, self.den) }
    }
}

/// Why a text is no [`Ratio`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a positive ratio: allowed are decimals (1.01) and fractions (101/100) of up to nine digits")]
pub struct ParseRatioError;

impl core::str::FromStr for Ratio {
    type Err = ParseRatioError;

    /// A decimal (`1.01`, read exactly) or a fraction (`101/100`).
    fn from_str(text: &str) -> Result<Self, ParseRatioError> {
        let digits = |part: &str| match part.bytes().all(|b| b.is_ascii_digit()) && !part.is_empty() && part.len() <= 9
        {
            true => part.parse::<u32>().map_err(|_| ParseRatioError),
            false => Err(ParseRatioError),
        };
        let ratio = if let Some((num, den)) = text.split_once('/') {
            Self::new(digits(num)?, digits(den)?)
        } else if let Some((whole, fraction)) = text.split_once('.') {
            let den = 10u32.checked_pow(fraction.len() as u32).ok_or(ParseRatioError)?;
            let num = digits(whole)?.checked_mul(den).and_then(|w| w.checked_add(digits(fraction).ok()?));
            Self::new(num.ok_or(ParseRatioError)?, den)
        } else {
            Self::new(digits(text)?, 1)
        };
        ratio.ok_or(ParseRatioError)
    }
}
