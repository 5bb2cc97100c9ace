//! The least quota of a replica, `u_min`, where nobody gave one: relative to the load.
//!
//! The paper's 1024 tokens are 1/32 of what a rank has at the paper's loads (4096 tokens, top-8). On a small load that is more
//! than any rank's overload: nothing can be moved, and the planner rightly says that no plan does better, which is no answer
//! to anybody's question. So the default keeps the share:
//!
//! ```text
//! u_min = largest power of two <= mean rank load / 32, within 1..=1024
//! ```
//!
//! A power of two, so that microbatches of nearly the same size have the same one; 1024 from 32,768 tokens a rank on, so that
//! published settings stay what they are. Why 1/32: docs/recordings.md.

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};

/// What a mean rank load is divided by.
const SHARE: u64 = 32;
/// The published value, the most that a load asks for.
const MOST: u32 = 1024;

/// Least quota of a replica.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LeastQuota {
    /// 1/32 of the mean rank load of each microbatch, in powers of two from 1 to 1024.
    #[default]
    OfLoad,
    /// So many tokens.
    Tokens(u32),
}

impl LeastQuota {
    /// Its tokens for a microbatch of `total_tokens` on `ranks` ranks.
    pub fn tokens(self, ranks: usize, total_tokens: u64) -> u32 {
        match self {
            Self::Tokens(tokens) => tokens.max(1),
            Self::OfLoad => {
                let share = (total_tokens / ranks.max(1) as u64 / SHARE).clamp(1, u64::from(MOST)) as u32;
                1 << share.ilog2()
            }
        }
    }
}

impl fmt::Display for LeastQuota {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OfLoad => f.pad("auto"),
            Self::Tokens(tokens) => fmt::Display::fmt(tokens, f),
        }
    }
}

/// Text that is no least quota.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("least quota {got:?}: allowed are auto and 1 to {}", u32::MAX)]
pub struct ParseLeastQuotaError {
    /// What was given.
    pub got: String,
}

impl FromStr for LeastQuota {
    type Err = ParseLeastQuotaError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.parse() {
            _ if text == "auto" => Ok(Self::OfLoad),
            Ok(tokens @ 1..) => Ok(Self::Tokens(tokens)),
            _ => Err(ParseLeastQuotaError { got: text.chars().take(80).collect() }),
        }
    }
}

/// A number, or "auto".
impl Serialize for LeastQuota {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::OfLoad => serializer.serialize_str("auto"),
            Self::Tokens(tokens) => tokens.serialize(serializer),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_a_share_of_the_load_up_to_the_published_value() {
        let of = |mean: u64| LeastQuota::OfLoad.tokens(64, 64 * mean);
        assert_eq!([0, 31, 64, 95, 2048, 4095].map(of), [1, 1, 2, 2, 64, 64]);
        // 4096 tokens, top-8, and twice that: the published settings.
        assert_eq!([32_767, 32_768, 65_536, 1 << 24].map(of), [512, 1024, 1024, 1024]);
        assert_eq!(LeastQuota::Tokens(7).tokens(64, 1 << 30), 7);
    }

    #[test]
    fn it_is_written_and_read() {
        for text in ["auto", "1", "1024"] {
            assert_eq!(text.parse::<LeastQuota>().unwrap().to_string(), text);
        }
        let refused = "0".parse::<LeastQuota>().unwrap_err().to_string();
        assert_eq!(refused, "least quota \"0\": allowed are auto and 1 to 4294967295");
    }
}
