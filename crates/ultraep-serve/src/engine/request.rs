//! What is asked of the engine, and what comes back.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use ultraep_schedule::Refusal;

/// A prompt to complete.
#[derive(Clone, Debug, Default)]
pub struct Generation {
    /// The prompt's tokens (bytes); at least one.
    pub prompt: Vec<u8>,
    /// Tokens to produce; 0 for a prefill alone.
    pub new_tokens: u32,
    /// Whether the prompt's own log-probabilities come back.
    pub score_prompt: bool,
    /// How many of the likeliest tokens come with every scored one, at least; none at all come where none are asked for.
    pub top: Option<usize>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// The output ends before the first of these that comes in it; empty ones mean nothing.
    pub stop: Vec<Vec<u8>>,
}

/// How a token is chosen. Equal settings with a seed choose equal tokens on equal prompts.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sampling {
    /// 0 takes the likeliest (the lowest of equals).
    pub temperature: f32,
    /// Share of probability that the candidates have; values outside 0 to 1 mean 1.
    pub top_p: Option<f32>,
    /// Names the draws. Without one the engine takes [`drawn_seed`] of the request's number, another for each request.
    pub seed: Option<u64>,
}

impl Sampling {
    /// Whether chance has a part in it.
    pub(crate) fn draws(&self) -> bool {
        self.temperature > 0.0 && self.temperature.is_finite()
    }
}

/// The seed of request number `number` that named none: mixed (SplitMix64, Steele et al. 2014), below 2^53 so that every JSON
/// reader keeps it exactly. The same sequence of requests gives the same answers on every start.
pub(crate) fn drawn_seed(number: u64) -> u64 {
    let mut z = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)) >> 11
}

/// A token with its log-probability, in nats.
#[derive(Clone, Debug, PartialEq)]
pub struct ScoredToken {
    /// The token.
    pub token: u8,
    /// None for the first of a sequence: nothing came before it.
    pub logprob: Option<f32>,
    /// As many of the likeliest tokens in its place as were asked for, by decreasing log-probability, ties to the lower token;
    /// then the token itself, if it is none of them.
    pub top: Vec<(u8, f32)>,
}

/// Why output ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// As many tokens as asked for.
    Length,
    /// A stop sequence.
    Stop,
}

/// What happens to a request, in order: `Prompt` when it was asked for, a `Token` each, then one of the others.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// The prompt's tokens, scored.
    Prompt(Vec<ScoredToken>),
    /// A new token. It comes once it cannot be part of a stop sequence any more; those of the stop sequence never come.
    Token(ScoredToken),
    /// It is complete.
    Finished {
        /// Why.
        reason: FinishReason,
        /// Tokens produced, those of the stop sequence included.
        new_tokens: u32,
    },
    /// Something was wrong with this request alone; the ranks and all other requests go on.
    Failed(String),
    /// A rank was lost, or the engine stopped, before it was complete.
    Lost(String),
    /// It waited in the queue for as long as a request may; nothing of it was run.
    Expired,
}

/// Why the engine did not take a request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SubmitError {
    /// It is empty, or the queue is full.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Prompt and new tokens are more than a sequence may have.
    #[error(
        "this model's context holds {limit} tokens; asked for were {}: {prompt_tokens} of the prompt and {new_tokens} new \
         (max_tokens)", *prompt_tokens as u64 + u64::from(*new_tokens)
    )]
    TooLong {
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// Tokens to produce.
        new_tokens: u32,
        /// Most tokens of both together.
        limit: usize,
    },
    /// The ranks are not up, or the engine takes nothing any more.
    #[error("{0}")]
    Unavailable(String),
}

/// Chooses tokens of one request.
#[derive(Debug)]
pub(crate) struct Sampler {
    sampling: Sampling,
    draws: ChaCha8Rng,
}

impl Sampler {
    /// With the seed that was settled on, whatever `sampling` says.
    pub(crate) fn new(sampling: Sampling, seed: u64) -> Self {
        Self { sampling, draws: ChaCha8Rng::seed_from_u64(seed) }
    }

    /// A token by its logits, `[256]`.
    pub(crate) fn choose(&mut self, logits: &[f32]) -> u8 {
        let Sampling { temperature, top_p, .. } = self.sampling;
        let ranked = ranked(logits);
        if !self.sampling.draws() {
            return ranked[0];
        }
        let largest = f64::from(logits[usize::from(ranked[0])]);
        let weight = |&token: &u8| {
            let weight = ((f64::from(logits[usize::from(token)]) - largest) / f64::from(temperature)).exp();
            if weight.is_finite() { weight } else { 0.0 }
        };
        let weights: Vec<f64> = ranked.iter().map(weight).collect();
        let share = top_p.filter(|p| (0.0..1.0).contains(p)).map_or(1.0, f64::from);
        let bound = share * weights.iter().sum::<f64>();
        // The likeliest that together reach the share; one at least.
        let mut kept = 0.0;
        let candidates = weights.iter().take_while(|&&w| (kept < bound, kept += w).0).count().max(1);
        let unit = f64::from(self.draws.next_u32()) / 2f64.powi(32);
        let mut left = unit * weights[..candidates].iter().sum::<f64>();
        for (token, weight) in ranked.iter().zip(&weights[..candidates]) {
            left -= weight;
            if left < 0.0 {
                return *token;
            }
        }
        ranked[candidates - 1]
    }
}

/// Tokens by decreasing logit, ties to the lower token.
fn ranked(logits: &[f32]) -> Vec<u8> {
    let mut tokens: Vec<u8> = (0..=u8::MAX).take(logits.len()).collect();
    tokens.sort_by(|&a, &b| logits[usize::from(b)].total_cmp(&logits[usize::from(a)]).then(a.cmp(&b)));
    tokens
}

/// Scores `token` by the logits in its place, `[256]`, with the `top` likeliest if asked for. None when the logits are no
/// numbers.
pub(crate) fn score(logits: &[f32], token: u8, top: Option<usize>) -> Option<ScoredToken> {
    let largest = logits.iter().fold(f32::NEG_INFINITY, |m, &x| m.max(x));
    let sum: f64 = logits.iter().map(|&x| (f64::from(x) - f64::from(largest)).exp()).sum();
    if !sum.is_finite() || logits.iter().any(|x| x.is_nan()) {
        return None;
    }
    // What is too small for a number is the smallest.
    let of = |token: u8| ((f64::from(logits[usize::from(token)]) - f64::from(largest) - sum.ln()) as f32).max(f32::MIN);
    let with_score = |token| (token, of(token));
    let mut likeliest = Vec::new();
    if let Some(top) = top {
        likeliest = if top == 0 { Vec::new() } else { ranked(logits).into_iter().take(top).map(with_score).collect() };
        if !likeliest.iter().any(|&(other, _)| other == token) {
            likeliest.push(with_score(token));
        }
    }
    Some(ScoredToken { token, logprob: Some(of(token)), top: likeliest })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logits() -> Vec<f32> {
        let mut logits = vec![-20.0; 256];
        (logits[3], logits[7], logits[9]) = (1.0, 2.0, 2.0);
        logits
    }

    #[test]
    fn temperature_zero_takes_the_likeliest_and_seeds_repeat() {
        let draw = |temperature, top_p, seed| {
            let mut sampler = Sampler::new(Sampling { temperature, top_p, seed: None }, seed);
            (0..400).map(|_| sampler.choose(&logits())).collect::<Vec<_>>()
        };
        assert!(draw(0.0, None, 1).iter().all(|&t| t == 7));
        assert_eq!(draw(1.0, None, 5), draw(1.0, None, 5));
        let drawn = draw(1.0, None, 5);
        let share = |token| drawn.iter().filter(|&&t| t == token).count() as f64 / 400.0;
        // e^2 : e^2 : e^1
        assert!((share(7) - 0.422).abs() < 0.08 && (share(3) - 0.155).abs() < 0.06, "{} {}", share(7), share(3));
        // Two likeliest alone have 84%.
        assert!(draw(1.0, Some(0.8), 5).iter().all(|t| [7, 9].contains(t)));
    }

    #[test]
    fn scores_are_log_probabilities() {
        let scored = score(&logits(), 3, Some(2)).unwrap();
        let expected = 1.0 - (2.0 * 2f64.exp() + 1f64.exp()).ln();
        assert!((f64::from(scored.logprob.unwrap()) - expected).abs() < 1e-5);
        // The token itself is always among them, with the same number.
        assert_eq!(scored.top.iter().map(|t| t.0).collect::<Vec<_>>(), [7, 9, 3]);
        assert_eq!(scored.top[2].1.to_bits(), scored.logprob.unwrap().to_bits());
        assert_eq!(score(&logits(), 9, Some(2)).unwrap().top.len(), 2);
        assert_eq!(score(&logits(), 9, Some(0)).unwrap().top.len(), 1);
        assert!(score(&logits(), 9, None).unwrap().top.is_empty());
    }

    #[test]
    fn what_is_no_number_has_no_score() {
        for wrong in [f32::NAN, f32::INFINITY] {
            let mut logits = logits();
            logits[200] = wrong;
            assert_eq!(score(&logits, 3, Some(2)), None, "{wrong}");
        }
        assert_eq!(score(&[f32::NEG_INFINITY; 256], 3, None), None);
    }

    #[test]
    fn seeds_of_requests_differ_and_are_exact_in_json() {
        let seeds: std::collections::BTreeSet<u64> = (0..10_000).map(drawn_seed).collect();
        assert!(seeds.len() == 10_000 && seeds.iter().all(|seed| *seed < 1 << 53));
    }
}
