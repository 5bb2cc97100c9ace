//! Prompts of real text, by domain.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use ultraep_schedule::Lengths;
use ultraep_text::{Corpus, Sampler, SamplerSpec};

use crate::ServeError;

/// Which domains prompts come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mix {
    /// Source code alone: domains `rust` and `code`; all where there is neither.
    Stem,
    /// All domains in turn.
    Mixed,
}

/// What prompts are cut.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PromptSpec {
    /// From which domains.
    pub mix: Mix,
    /// How long.
    pub lengths: Lengths,
    /// How many distinct ones.
    pub count: usize,
    /// Names the draws.
    pub seed: u64,
}

/// A prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// Where it was cut from.
    pub domain: String,
    /// Its tokens.
    pub tokens: Vec<u8>,
}

/// Cuts prompts from held-out text; domains take turns. A domain shorter than a prompt is passed over for it.
pub fn prompts(corpus: &Arc<Corpus>, spec: &PromptSpec) -> Result<Vec<Prompt>, ServeError> {
    let sampler = Sampler::new(corpus.clone(), SamplerSpec { seed: spec.seed, ..SamplerSpec::default() })?;
    let all = || corpus.domains.iter().filter(|d| !d.bytes.is_empty());
    let technical = || all().filter(|d| ["rust", "code"].contains(&d.name.as_str()));
    let chosen: Vec<_> = match spec.mix {
        Mix::Stem if technical().next().is_some() => technical().collect(),
        Mix::Stem | Mix::Mixed => all().collect(),
    };
    let lengths = spec.lengths.draw(spec.count, spec.seed);
    let cut = |(index, length): (usize, u32)| {
        let length = length as usize;
        let long_enough: Vec<_> = chosen.iter().filter(|d| d.bytes.len() >= length).collect();
        let Some(domain) = long_enough.get(index % long_enough.len().max(1)) else {
            let longest = chosen.iter().map(|d| d.bytes.len()).max().unwrap_or(0);
            let reason = format!("a prompt of {length} tokens, but the longest domain has {longest} bytes of text");
            return Err(ServeError::Setting(reason));
        };
        let tokens = sampler.prompt(&domain.name, spec.seed.wrapping_add(index as u64), length)?;
        Ok(Prompt { domain: domain.name.clone(), tokens })
    };
    lengths.into_iter().enumerate().map(cut).collect()
}
