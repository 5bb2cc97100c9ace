//! Round-robin dealing of tokens to copies, in closed form ([`crate::SplitRule::RoundRobin`]).

/// The turns of one instance among all copies of its expert. Copies are numbered in the order of the plan's instances.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turns {
    /// Copies of the expert in all; at least 1.
    pub all: u32,
    /// Copies of the instances before this one.
    pub first: u32,
    /// Copies this instance stands for; `first + mine <= all`.
    pub mine: u32,
}

/// How many of `tokens` tokens of source rank `source` fall to `turns`, when token `j` goes to copy
/// `(source + j) mod all`. Constant time.
///
/// Over a partition of the copies the results sum to `tokens`.
#[inline]
pub fn dealt(tokens: u32, source: usize, turns: Turns) -> u32 {
    let Turns { all, first, mine } = turns;
    debug_assert!(all > 0 && first + mine <= all, "{turns:?}");
    let (rounds, rest) = (tokens / all, tokens % all);
    let start = (source % all as usize) as u32;
    // The block as seen from the first copy dealt to: [from, from + mine), wrapping at `all`; the last, incomplete round
    // reaches the copies [0, rest).
    let from = if first >= start { first - start } else { first + all - start };
    let to = from + mine;
    rounds * mine + (to.min(all).min(rest) - from.min(rest)) + to.saturating_sub(all).min(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Deals one token after another.
    fn naive(tokens: u32, source: usize, turns: Turns) -> u32 {
        let copy = |j: u32| (source as u32 + j) % turns.all;
        (0..tokens).filter(|&j| (turns.first..turns.first + turns.mine).contains(&copy(j))).count() as u32
    }

    #[test]
    fn closed_form_is_dealing_one_by_one() {
        for all in 1..7 {
            for first in 0..all {
                for mine in 0..=all - first {
                    for (source, tokens) in (0..9).flat_map(|s| (0..20).map(move |n| (s, n))) {
                        let turns = Turns { all, first, mine };
                        assert_eq!(
                            dealt(tokens, source, turns),
                            naive(tokens, source, turns),
                            "{turns:?} {source} {tokens}"
                        );
                    }
                }
            }
        }
    }
}
