//! Batches of byte tokens: a stateless function of (corpus, seed, position).

use std::ops::Range;
use std::sync::Arc;

use crate::mix::{Draws, Fnv};
use crate::mixture::{DEFAULT_TURN_STEPS, Mixture, Schedule};
use crate::{Corpus, TextError};

/// Longest sequence.
pub const MAX_SEQUENCE_TOKENS: usize = 1 << 20;

/// The last `1 / HELD_OUT_ONE_IN` of each domain (5%) is for validation only.
const HELD_OUT_ONE_IN: usize = 20;

/// Names the streams of draws apart (the schedule has 1 and 2).
const SEQUENCE_STREAM: u64 = 3;
const VALIDATION_STREAM: u64 = 4;
const PROMPT_STREAM: u64 = 5;

/// What a [`Sampler`] is built from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SamplerSpec {
    /// Tokens (bytes) of a sequence; each comes with one byte more, the target of the last token.
    pub sequence_tokens: usize,
    /// Names the run: another seed, other batches.
    pub seed: u64,
    /// Steps after which the mixture has gone once round all domains; at least 1.
    pub turn_steps: u64,
}

impl Default for SamplerSpec {
    fn default() -> Self {
        Self { sequence_tokens: 256, seed: 0, turn_steps: DEFAULT_TURN_STEPS }
    }
}

/// Where a batch stands in a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BatchPosition {
    /// Optimizer step, from 0.
    pub step: u64,
    /// Microbatch within the step, from 0.
    pub microbatch: u32,
    /// The rank that reads it.
    pub rank: u32,
}

/// Cuts batches from a corpus. Holds no state: clones and other processes with the same corpus and spec give the same
/// batches, in any order.
#[derive(Clone, Debug)]
pub struct Sampler {
    corpus: Arc<Corpus>,
    spec: SamplerSpec,
    domains: Vec<DomainParts>,
    left_out: Vec<String>,
}

/// A domain long enough to sample from.
#[derive(Clone, Debug)]
struct DomainParts {
    /// Index in the corpus.
    index: usize,
    train: Range<usize>,
    held_out: Range<usize>,
}

impl Sampler {
    /// Checks that there is text enough. A domain is used when it has room for one training sequence and, behind it, one
    /// validation sequence: `2 * (sequence_tokens + 1)` bytes; shorter ones are left out ([`Sampler::left_out`]).
    pub fn new(corpus: Arc<Corpus>, spec: SamplerSpec) -> Result<Self, TextError> {
        let SamplerSpec { sequence_tokens, turn_steps, .. } = spec;
        if !(1..=MAX_SEQUENCE_TOKENS).contains(&sequence_tokens) {
            return Err(TextError::SequenceTokens { got: sequence_tokens });
        }
        if turn_steps == 0 {
            return Err(TextError::TurnSteps);
        }
        let span = sequence_tokens + 1;
        let (mut domains, mut left_out) = (Vec::new(), Vec::new());
        for (index, domain) in corpus.domains.iter().enumerate() {
            let length = domain.bytes.len();
            if length < 2 * span {
                left_out.push(domain.name.clone());
                continue;
            }
            let boundary = length - (length / HELD_OUT_ONE_IN).max(span);
            domains.push(DomainParts { index, train: 0..boundary, held_out: boundary..length });
        }
        if domains.is_empty() {
            let longest = corpus.domains.iter().max_by_key(|d| d.bytes.len());
            return Err(TextError::TooShort {
                domain: longest.map_or_else(|| "none".to_string(), |d| d.name.clone()),
                got_bytes: longest.map_or(0, |d| d.bytes.len()),
                needed_bytes: 2 * span,
                sequence_tokens,
            });
        }
        Ok(Self { corpus, spec, domains, left_out })
    }

    /// What it was built from.
    pub fn spec(&self) -> SamplerSpec {
        self.spec
    }

    /// Names of the domains sampled from, `[D]`, in the order of [`Mixture::weights`].
    pub fn domain_names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.domains.iter().map(|d| self.corpus.domains[d.index].name.as_str())
    }

    /// Names of the domains too short for these sequences.
    pub fn left_out(&self) -> &[String] {
        &self.left_out
    }

    /// Bytes to train on, over all domains used.
    pub fn train_bytes(&self) -> usize {
        self.domains.iter().map(|d| d.train.len()).sum()
    }

    /// The mixture at a position: the schedule that the crate's `mixture` module documents.
    pub fn mixture(&self, position: BatchPosition) -> Mixture {
        let SamplerSpec { seed, turn_steps, .. } = self.spec;
        Schedule { domains: self.domains.len(), turn_steps, seed }.at(position)
    }

    /// Bytes of one batch: `sequences * (sequence_tokens + 1)`.
    pub fn batch_bytes(&self, sequences: usize) -> usize {
        sequences * (self.spec.sequence_tokens + 1)
    }

    /// The batch at a position, `[sequences, sequence_tokens + 1]` bytes, row-major: inputs are the first
    /// `sequence_tokens` of a row, targets the last. Never touches the held-out part.
    pub fn batch(&self, position: BatchPosition, sequences: usize) -> Vec<u8> {
        let mut batch = vec![0; self.batch_bytes(sequences)];
        self.fill_batch(position, &mut batch);
        batch
    }

    /// As [`Sampler::batch`], into memory that the caller keeps: as many sequences as fit; a rest shorter than a
    /// sequence is left as it is.
    pub fn fill_batch(&self, position: BatchPosition, batch: &mut [u8]) {
        let BatchPosition { step, microbatch, rank } = position;
        let mixture = self.mixture(position);
        let span = self.spec.sequence_tokens + 1;
        for (sequence, row) in batch.chunks_exact_mut(span).enumerate() {
            let (seed, place) = (self.spec.seed, u64::from(microbatch));
            let mut draws = Draws::keyed(&[seed, SEQUENCE_STREAM, step, place, u64::from(rank), sequence as u64]);
            let domain = &self.domains[mixture.draw(&mut draws)];
            row.copy_from_slice(self.cut(domain.index, domain.train.clone(), span, &mut draws));
        }
    }

    /// A validation batch, `[sequences, sequence_tokens + 1]`, from the held-out parts: domains in turn, whatever the
    /// seed, so that runs with different seeds can be compared. `index` tells batches apart.
    pub fn validation_batch(&self, index: u64, sequences: usize) -> Vec<u8> {
        let span = self.spec.sequence_tokens + 1;
        let mut batch = Vec::with_capacity(self.batch_bytes(sequences));
        for sequence in 0..sequences {
            let domain = &self.domains[sequence % self.domains.len()];
            let mut draws = Draws::keyed(&[VALIDATION_STREAM, index, sequence as u64]);
            batch.extend_from_slice(self.cut(domain.index, domain.held_out.clone(), span, &mut draws));
        }
        batch
    }

    /// A prompt of exactly `bytes` bytes from one domain: from its held-out part where that is long enough, else from
    /// anywhere in it. Begins at a character, if one begins early enough; may end within one. Works for domains too short to sample from, too.
    pub fn prompt(&self, domain: &str, seed: u64, bytes: usize) -> Result<Vec<u8>, TextError> {
        let Some(index) = self.corpus.domains.iter().position(|d| d.name == domain) else {
            let known = self.corpus.domains.iter().map(|d| d.name.clone()).collect();
            return Err(TextError::UnknownDomain { name: domain.to_string(), known });
        };
        let text = &self.corpus.domains[index].bytes;
        if !(1..=text.len()).contains(&bytes) {
            return Err(TextError::PromptBytes { domain: domain.to_string(), got: bytes, available: text.len() });
        }
        let held_out = self.domains.iter().find(|d| d.index == index).map(|d| d.held_out.clone());
        let range = held_out.filter(|r| r.len() >= bytes).unwrap_or(0..text.len());
        let mut draws = Draws::keyed(&[PROMPT_STREAM, seed, Fnv::of(domain.as_bytes()), bytes as u64]);
        let last = range.end - bytes;
        let start = range.start + draws.below((last - range.start) as u64 + 1) as usize;
        let is_inside_character = |at: &usize| text[*at] & 0b1100_0000 == 0b1000_0000;
        let start = (start..=last).find(|at| !is_inside_character(at)).unwrap_or(start);
        Ok(text[start..start + bytes].to_vec())
    }

    /// `span` bytes from somewhere in `range`, which is at least that long.
    fn cut(&self, index: usize, range: Range<usize>, span: usize, draws: &mut Draws) -> &[u8] {
        let start = range.start + draws.below((range.len() - span) as u64 + 1) as usize;
        &self.corpus.domains[index].bytes[start..start + span]
    }
}
