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
    /// How many of the likeliest tokens come with every scored one.
    pub top: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Ends when the output ends with one of these; empty ones mean nothing.
    pub stop: Vec<Vec<u8>>,
}

/// How a token is chosen. Equal settings on equal prompts choose equal tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sampling {
    /// 0 takes the likeliest (the lowest of equals).
    pub temperature: f32,
    /// Share of probability that the candidates have; values outside 0 to 1 mean 1.
    pub top_p: Option<f32>,
    /// Names the draws.
    pub seed: u64,
}

/// A token with its log-probability, in nats.
#[derive(Clone, Debug, PartialEq)]
pub struct ScoredToken {
    /// The token.
    pub token: u8,
    /// None for the first of a sequence: nothing came before it.
    pub logprob: Option<f32>,
    /// The likeliest tokens in its place, by decreasing log-probability, ties to the lower token.
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

/// What happens to a request, in order: `Prompt` when it was asked for, a `Token` each, then one of the last three.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The prompt's tokens, scored.
    Prompt(Vec<ScoredToken>),
    /// A new token.
    Token(ScoredToken),
    /// It is complete.
    Finished(FinishReason),
    /// A rank was lost, or the engine stopped, before it was complete.
    Lost(String),
    /// It waited in the queue for as long as a request may; nothing of it was run.
    Expired,
}

/// Why the engine did not take a request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SubmitError {
    /// It can never run, or the queue is full.
    #[error(transparent)]
    Refused(#[from] Refusal),
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
    pub(crate) fn new(sampling: Sampling) -> Self {
        Self { sampling, draws: ChaCha8Rng::seed_from_u64(sampling.seed) }
    }

    /// A token by its logits, `[256]`.
    pub(crate) fn choose(&mut self, logits: &[f32]) -> u8 {
        let Sampling { temperature, top_p, .. } = self.sampling;
        let ranked = ranked(logits);
        if temperature <= 0.0 || !temperature.is_finite() {
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

/// Scores `token` by the logits in its place, `[256]`, with the `top` likeliest.
pub(crate) fn score(logits: &[f32], token: u8, top: usize) -> ScoredToken {
    let largest = logits.iter().fold(f32::NEG_INFINITY, |m, &x| m.max(x));
    let sum: f64 = logits.iter().map(|&x| f64::from(x - largest).exp()).sum();
    let of = |token: u8| (f64::from(logits[usize::from(token)] - largest) - sum.ln()) as f32;
    let top = if top == 0 { Vec::new() } else { ranked(logits).into_iter().take(top).map(|t| (t, of(t))).collect() };
    ScoredToken { token, logprob: Some(of(token)), top }
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
            let mut sampler = Sampler::new(Sampling { temperature, top_p, seed });
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
        let scored = score(&logits(), 3, 2);
        let expected = 1.0 - (2.0 * 2f64.exp() + 1f64.exp()).ln();
        assert!((f64::from(scored.logprob.unwrap()) - expected).abs() < 1e-5);
        assert_eq!(scored.top.iter().map(|t| t.0).collect::<Vec<_>>(), [7, 9]);
    }
}
