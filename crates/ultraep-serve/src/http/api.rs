//! The body of `POST /v1/completions`: what is read, what is refused.

use serde::Deserialize;

use super::HttpConfig;
use super::error::ApiError;
use crate::{Generation, Sampling, ServedModel};

/// Most prompts of one request.
const PROMPTS_MAX: usize = 16;
/// Most stop sequences, and most bytes of one.
const STOPS_MAX: usize = 4;
const STOP_BYTES_MAX: usize = 64;
/// Most alternatives with a token.
const TOP_MAX: u64 = 5;
/// Tokens produced when a request does not say.
const NEW_TOKENS_DEFAULT: u64 = 16;

/// The body. What OpenAI's clients may send and this server has no use for is ignored.
#[derive(Debug, Deserialize)]
pub(super) struct Body {
    model: Option<String>,
    prompt: Option<Prompts>,
    max_tokens: Option<u64>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    seed: Option<i64>,
    stop: Option<OneOrMore>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    echo: Option<bool>,
    logprobs: Option<u64>,
    n: Option<u64>,
    best_of: Option<u64>,
    suffix: Option<String>,
    presence_penalty: Option<f64>,
    frequency_penalty: Option<f64>,
    logit_bias: Option<serde_json::Map<String, serde_json::Value>>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "a text, a list of tokens (0 to 255), or a list of one of these")]
enum Prompts {
    Text(String),
    Tokens(Vec<u8>),
    Texts(Vec<String>),
    TokenLists(Vec<Vec<u8>>),
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "a text or a list of texts")]
enum OneOrMore {
    One(String),
    More(Vec<String>),
}

#[derive(Debug, Default, Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
}

/// A request that was found good.
#[derive(Debug)]
pub(super) struct Completion {
    pub(super) generations: Vec<Generation>,
    pub(super) echo: bool,
    /// Whether log-probabilities are part of the answer.
    pub(super) logprobs: bool,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
}

impl Body {
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, ApiError> {
        serde_json::from_slice(bytes).map_err(|error| ApiError::malformed(format!("the body: {error}")))
    }

    /// Checks every parameter.
    pub(super) fn check(self, model: &ServedModel, config: &HttpConfig) -> Result<Completion, ApiError> {
        if let Some(asked) = self.model.as_ref().filter(|asked| *asked != model.name()) {
            return Err(ApiError::no_model(asked, model.name()));
        }
        self.check_unsupported()?;
        let new_tokens = self.max_tokens.unwrap_or(NEW_TOKENS_DEFAULT);
        let limit = u64::from(config.new_tokens_max);
        if new_tokens > limit {
            return Err(ApiError::invalid("max_tokens", format!("{new_tokens} tokens: allowed are 0 to {limit}")));
        }
        if self.logprobs.is_some_and(|top| top > TOP_MAX) {
            return Err(ApiError::invalid("logprobs", format!("allowed are 0 to {TOP_MAX}")));
        }
        let (sampling, stop) = (self.sampling()?, self.stops()?);
        let (echo, logprobs) = (self.echo.unwrap_or(false), self.logprobs.is_some());
        let template = Generation {
            prompt: Vec::new(),
            // At most 32 bits: the limit has as many.
            new_tokens: new_tokens as u32,
            score_prompt: echo && logprobs,
            top: self.logprobs.unwrap_or(0) as usize,
            sampling,
            stop,
        };
        let generations = check_prompts(self.prompt, config)?;
        Ok(Completion {
            generations: generations.into_iter().map(|prompt| Generation { prompt, ..template.clone() }).collect(),
            echo,
            logprobs,
            stream: self.stream.unwrap_or(false),
            include_usage: self.stream_options.unwrap_or_default().include_usage.unwrap_or(false),
        })
    }

    fn check_unsupported(&self) -> Result<(), ApiError> {
        let one = |name, value: Option<u64>| match value {
            None | Some(1) => Ok(()),
            Some(_) => Err(ApiError::invalid(name, "only 1 is supported")),
        };
        one("n", self.n)?;
        one("best_of", self.best_of)?;
        let penalties = [("presence_penalty", self.presence_penalty), ("frequency_penalty", self.frequency_penalty)];
        if let Some((name, _)) = penalties.into_iter().find(|(_, p)| p.is_some_and(|p| p != 0.0)) {
            return Err(ApiError::invalid(name, "only 0 is supported"));
        }
        if self.suffix.as_ref().is_some_and(|s| !s.is_empty()) {
            return Err(ApiError::invalid("suffix", "only an empty one is supported"));
        }
        if self.logit_bias.as_ref().is_some_and(|b| !b.is_empty()) {
            return Err(ApiError::invalid("logit_bias", "only an empty one is supported"));
        }
        Ok(())
    }

    fn sampling(&self) -> Result<Sampling, ApiError> {
        let temperature = self.temperature.unwrap_or(1.0);
        if !(0.0..=2.0).contains(&temperature) {
            return Err(ApiError::invalid("temperature", "allowed is 0 to 2"));
        }
        if self.top_p.is_some_and(|p| !(0.0..=1.0).contains(&p)) {
            return Err(ApiError::invalid("top_p", "allowed is 0 to 1"));
        }
        let top_p = self.top_p.map(|p| p as f32);
        // Any whole number names a stream of draws.
        Ok(Sampling { temperature: temperature as f32, top_p, seed: self.seed.unwrap_or(0).cast_unsigned() })
    }

    fn stops(&self) -> Result<Vec<Vec<u8>>, ApiError> {
        let stops = match &self.stop {
            None => Vec::new(),
            Some(OneOrMore::One(stop)) => vec![stop.clone().into_bytes()],
            Some(OneOrMore::More(stops)) => stops.iter().map(|s| s.clone().into_bytes()).collect(),
        };
        if stops.len() > STOPS_MAX || stops.iter().any(|s| s.len() > STOP_BYTES_MAX) {
            let allowed = format!("allowed are up to {STOPS_MAX} texts of up to {STOP_BYTES_MAX} bytes");
            return Err(ApiError::invalid("stop", allowed));
        }
        Ok(stops)
    }
}

fn check_prompts(prompts: Option<Prompts>, config: &HttpConfig) -> Result<Vec<Vec<u8>>, ApiError> {
    let prompts = match prompts {
        None => return Err(ApiError::invalid("prompt", "there is none")),
        Some(Prompts::Text(text)) => vec![text.into_bytes()],
        Some(Prompts::Tokens(tokens)) => vec![tokens],
        Some(Prompts::Texts(texts)) => texts.into_iter().map(String::into_bytes).collect(),
        Some(Prompts::TokenLists(lists)) => lists,
    };
    if prompts.is_empty() || prompts.len() > PROMPTS_MAX {
        return Err(ApiError::invalid("prompt", format!("{} prompts: allowed are 1 to {PROMPTS_MAX}", prompts.len())));
    }
    let limit = config.prompt_tokens_max;
    for prompt in &prompts {
        if prompt.is_empty() {
            return Err(ApiError::invalid("prompt", "a prompt is empty"));
        }
        if prompt.len() > limit {
            return Err(ApiError::too_long(format!("a prompt of {} tokens: allowed are up to {limit}", prompt.len())));
        }
    }
    Ok(prompts)
}
