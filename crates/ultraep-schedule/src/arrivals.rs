//! Open-loop arrivals and prompt lengths, as functions of a seed. Integers only: equal on every machine.
//!
//! Gaps of a Poisson process are exponential. They are drawn with von Neumann's method (1951, "Various techniques used in
//! connection with random digits"), which only compares uniform numbers: the number of whole failures plus the first number of
//! the first descending run of odd length. The unit gaps depend on the seed alone and are scaled by the mean, so arrivals
//! at different rates are the same ones, closer together.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

/// Names the streams of draws apart.
const GAPS: u64 = 1;
const PROMPTS: u64 = 2;
const LENGTHS: u64 = 3;

/// A request that arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// When, in nanoseconds from the start.
    pub at_ns: u64,
    /// Which prompt of the pool.
    pub prompt: usize,
    /// Tokens of its prompt.
    pub prompt_tokens: u32,
    /// Tokens to produce.
    pub new_tokens: u32,
}

/// A Poisson process of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArrivalSpec {
    /// How many.
    pub requests: usize,
    /// Mean time between two, in nanoseconds.
    pub mean_gap_ns: u64,
    /// Tokens that each is to produce.
    pub new_tokens: u32,
    /// Names the draws.
    pub seed: u64,
}

impl ArrivalSpec {
    /// The mean gap of `per_1000_s` requests in 1,000 seconds, rounded to whole nanoseconds; at least 1.
    pub fn mean_gap_ns(per_1000_s: u64) -> u64 {
        (1_000_000_000_000 / per_1000_s.max(1)).max(1)
    }
}

/// The arrivals of `spec`, each with a prompt drawn evenly from a pool whose lengths are `pool` (tokens). None from an empty
/// pool.
pub fn arrivals(spec: &ArrivalSpec, pool: &[u32]) -> Vec<Arrival> {
    if pool.is_empty() {
        return Vec::new();
    }
    let (mut gaps, mut prompts) = (stream(spec.seed, GAPS), stream(spec.seed, PROMPTS));
    let mut at_ns = 0u64;
    let mut next = || {
        let gap = (u128::from(exponential(&mut gaps)) * u128::from(spec.mean_gap_ns)) >> 32;
        at_ns = at_ns.saturating_add(u64::try_from(gap).unwrap_or(u64::MAX));
        let prompt = below(&mut prompts, pool.len() as u64) as usize;
        Arrival { at_ns, prompt, prompt_tokens: pool[prompt], new_tokens: spec.new_tokens }
    };
    (0..spec.requests).map(|_| next()).collect()
}

/// Prompt lengths over octaves: `least`, twice that, and so on up to `most` tokens. Of `K` octaves the `k`-th (from 0) has
/// weight `K - k`, and within an octave all lengths are equally likely: many short prompts, few long ones, and half of all
/// tokens in the long ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lengths {
    /// Least tokens; at least 1.
    pub least: u32,
    /// Most tokens; at least `least`.
    pub most: u32,
}

/// Bounds that no length meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("prompt lengths from {least} to {most} tokens: the least must be at least 1 and at most the most")]
pub struct LengthsError {
    /// Least tokens.
    pub least: u32,
    /// Most tokens.
    pub most: u32,
}

impl Lengths {
    /// Checks the bounds.
    pub fn new(least: u32, most: u32) -> Result<Self, LengthsError> {
        if least == 0 || least > most { Err(LengthsError { least, most }) } else { Ok(Self { least, most }) }
    }

    /// `count` lengths, a function of the seed.
    pub fn draw(&self, count: usize, seed: u64) -> Vec<u32> {
        let (least, most) = (u64::from(self.least.max(1)), u64::from(self.most.max(self.least).max(1)));
        let octaves = (0..).take_while(|k| least << k <= most).count() as u64;
        let mut draws = stream(seed, LENGTHS);
        let mut length = || {
            let mut ticket = below(&mut draws, octaves * (octaves + 1) / 2);
            let mut octave = 0;
            while ticket >= octaves - octave {
                ticket -= octaves - octave;
                octave += 1;
            }
            let first = least << octave;
            let end = (first * 2).min(most + 1);
            (first + below(&mut draws, end - first)) as u32
        };
        (0..count).map(|_| length()).collect()
    }
}

fn stream(seed: u64, name: u64) -> ChaCha8Rng {
    let mut draws = ChaCha8Rng::seed_from_u64(seed);
    draws.set_stream(name);
    draws
}

/// A number in `0..bound`; 0 when `bound` is 0. Biased by less than `bound / 2^64`.
fn below(draws: &mut ChaCha8Rng, bound: u64) -> u64 {
    ((u128::from(draws.next_u64()) * u128::from(bound)) >> 64) as u64
}

/// An exponential number of mean 1, in units of `2^-32`.
fn exponential(draws: &mut ChaCha8Rng) -> u64 {
    let mut whole = 0u64;
    loop {
        let first = draws.next_u32();
        let (mut last, mut run) = (first, 1u32);
        loop {
            let next = draws.next_u32();
            if next >= last {
                break;
            }
            (last, run) = (next, run + 1);
        }
        if !run.is_multiple_of(2) {
            return (whole << 32) | u64::from(first);
        }
        whole += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_exponential() {
        let mut draws = stream(1, GAPS);
        let unit = 2f64.powi(32);
        let mut gaps: Vec<f64> = (0..100_000).map(|_| exponential(&mut draws) as f64 / unit).collect();
        gaps.sort_by(f64::total_cmp);
        // The largest distance from the distribution function (Kolmogorov-Smirnov); 0.0052 is its 1% point.
        let distance = gaps.iter().enumerate().map(|(i, x)| ((i as f64 + 0.5) / 1e5 - (1.0 - (-x).exp())).abs());
        let worst = distance.fold(0.0, f64::max);
        assert!(worst < 0.0052, "{worst}");
    }

    #[test]
    fn the_rate_scales_the_same_arrivals() {
        let spec = ArrivalSpec { requests: 50, mean_gap_ns: 1 << 32, new_tokens: 1, seed: 9 };
        let slow = arrivals(&spec, &[10, 20, 30]);
        let fast = arrivals(&ArrivalSpec { mean_gap_ns: 1 << 30, ..spec }, &[10, 20, 30]);
        assert!(slow.iter().zip(&fast).all(|(s, f)| s.prompt == f.prompt && s.at_ns.abs_diff(f.at_ns * 4) <= 4 * 50));
        assert!(slow.windows(2).all(|w| w[0].at_ns <= w[1].at_ns));
        assert!(arrivals(&spec, &[]).is_empty());
    }

    #[test]
    fn lengths_stay_in_bounds_and_reach_every_octave() {
        let lengths = Lengths::new(128, 5000).unwrap();
        let drawn = lengths.draw(10_000, 3);
        assert!(drawn.iter().all(|n| (128..=5000).contains(n)));
        for octave in 0..6 {
            let (from, to) = (128 << octave, 256 << octave);
            let share = drawn.iter().filter(|n| (from..to).contains(*n)).count() as f64 / 10_000.0;
            let expected = f64::from(6 - octave) / 21.0;
            assert!((share - expected).abs() < 0.02, "octave {octave}: {share}, expected {expected}");
        }
        assert_eq!(Lengths::new(7, 7).unwrap().draw(3, 0), [7, 7, 7]);
        assert!(Lengths::new(0, 7).is_err() && Lengths::new(8, 7).is_err());
    }
}
