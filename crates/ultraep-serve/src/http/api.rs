//! The body of `POST /v1/completions`: what is read, what is refused.

use serde_json::Value;

use super::HttpConfig;
use super::error::ApiError;
use super::fields::{Fields, kind, whole, wrong};
use crate::{EngineHandle, Generation, Sampling};

/// Most choices of one request: prompts times `n`.
const CHOICES_MAX: usize = 128;
/// Most stop sequences, and most bytes of one.
const STOPS_MAX: usize = 16;
const STOP_BYTES_MAX: usize = 64;
/// Most alternatives with a token.
const TOP_MAX: i64 = 5;
/// Tokens produced when a request does not say.
const NEW_TOKENS_DEFAULT: u32 = 16;

/// A request that was found good.
#[derive(Debug)]
pub(super) struct Completion {
    /// One for each choice: those of the first prompt, then those of the next.
    pub(super) generations: Vec<Generation>,
    /// Choices of each prompt.
    pub(super) n: usize,
    pub(super) echo: bool,
    /// Whether log-probabilities are part of the answer.
    pub(super) logprobs: bool,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
}

impl Completion {
    /// Reads a body and checks every parameter. What OpenAI's clients may send and this server has no use for is ignored.
    pub(super) fn parse(bytes: &[u8], engine: &EngineHandle, config: &HttpConfig) -> Result<Self, ApiError> {
        let mut fields = Fields::parse(bytes)?;
        let served = engine.model().name();
        if let Some(asked) = fields.text("model")?.filter(|asked| asked != served) {
            return Err(ApiError::no_model(&asked, served));
        }
        let n = counted(&mut fields)?;
        check_unsupported(&mut fields)?;
        let most = config.new_tokens_max;
        let new_tokens = fields.whole("max_tokens", 0, i64::from(most))?;
        let logprobs = fields.whole("logprobs", 0, TOP_MAX)?;
        let echo = fields.flag("echo")?.unwrap_or(false);
        let stream = fields.flag("stream")?.unwrap_or(false);
        let include_usage = fields.object("stream_options")?.flag("include_usage")?.unwrap_or(false);
        let sampling = sampling(&mut fields)?;
        let template = Generation {
            prompt: Vec::new(),
            // Within bounds of 32 bits, all of them.
            new_tokens: new_tokens.map_or(NEW_TOKENS_DEFAULT.min(most), |tokens| tokens as u32),
            score_prompt: echo && logprobs.is_some(),
            top: logprobs.map(|top| top as usize),
            sampling,
            stop: stops(&mut fields)?,
        };
        let prompts = prompts(&mut fields)?;
        let (choices, limit) = (prompts.len() * n, CHOICES_MAX.min(engine.limits().queue_max));
        if choices > limit {
            let reason =
                format!("{} prompts with n {n} are {choices} choices; allowed are up to {limit}", prompts.len());
            return Err(ApiError::invalid(if n > 1 { "n" } else { "prompt" }, reason));
        }
        for prompt in &prompts {
            engine.check_length(prompt.len(), template.new_tokens)?;
        }
        let of_prompt = |prompt: Vec<u8>| {
            let choice = |i| {
                // The i-th choice is what a request for it alone with this seed gives.
                let seed = sampling.seed.map(|seed| seed.wrapping_add(i));
                Generation { prompt: prompt.clone(), sampling: Sampling { seed, ..sampling }, ..template.clone() }
            };
            (0..n as u64).map(choice).collect::<Vec<_>>()
        };
        let generations = prompts.into_iter().flat_map(of_prompt).collect();
        Ok(Self { generations, n, echo, logprobs: logprobs.is_some(), stream, include_usage })
    }
}

/// Choices of each prompt.
fn counted(fields: &mut Fields) -> Result<usize, ApiError> {
    let n = fields.whole("n", 1, CHOICES_MAX as i64)?.unwrap_or(1);
    match fields.whole("best_of", 1, CHOICES_MAX as i64)? {
        Some(best_of) if best_of != n => {
            let reason = format!("{best_of} where n is {n}; choosing the best of more is not supported");
            Err(ApiError::invalid("best_of", reason))
        }
        _ => Ok(n as usize),
    }
}

fn check_unsupported(fields: &mut Fields) -> Result<(), ApiError> {
    for name in ["presence_penalty", "frequency_penalty"] {
        if fields.number(name, -2.0, 2.0)?.is_some_and(|penalty| penalty != 0.0) {
            return Err(ApiError::invalid(name, "only 0 is supported"));
        }
    }
    if fields.text("suffix")?.is_some_and(|suffix| !suffix.is_empty()) {
        return Err(ApiError::invalid("suffix", "only an empty one is supported"));
    }
    if !fields.object("logit_bias")?.is_empty() {
        return Err(ApiError::invalid("logit_bias", "only an empty one is supported"));
    }
    Ok(())
}

fn sampling(fields: &mut Fields) -> Result<Sampling, ApiError> {
    let temperature = fields.number("temperature", 0.0, 2.0)?.unwrap_or(1.0) as f32;
    let top_p = fields.number("top_p", 0.0, 1.0)?.map(|p| p as f32);
    // Any whole number names a stream of draws.
    let seed = fields.whole("seed", i64::MIN, i64::MAX)?.map(i64::cast_unsigned);
    Ok(Sampling { temperature, top_p, seed })
}

fn stops(fields: &mut Fields) -> Result<Vec<Vec<u8>>, ApiError> {
    let expected = format!("a text or a list of up to {STOPS_MAX} texts, each of up to {STOP_BYTES_MAX} bytes,");
    let value = fields.take("stop");
    let stops = match value {
        None => Vec::new(),
        Some(Value::String(stop)) => vec![stop],
        Some(Value::Array(list)) => {
            let text = |value| match value {
                Value::String(stop) => Ok(stop),
                other => {
                    Err(ApiError::invalid("stop", format!("a list with {} where {expected} is expected", kind(&other))))
                }
            };
            list.into_iter().map(text).collect::<Result<_, _>>()?
        }
        Some(other) => return Err(wrong("stop", &other, expected)),
    };
    if stops.len() > STOPS_MAX {
        return Err(ApiError::invalid("stop", format!("{} texts; allowed are up to {STOPS_MAX}", stops.len())));
    }
    if let Some(long) = stops.iter().find(|stop| stop.len() > STOP_BYTES_MAX) {
        return Err(ApiError::invalid(
            "stop",
            format!("a text of {} bytes; allowed are up to {STOP_BYTES_MAX}", long.len()),
        ));
    }
    Ok(stops.into_iter().map(String::into_bytes).collect())
}

/// What a prompt may be, in words.
const PROMPT: &str = "a text, a list of tokens (0 to 255), or a list of one of these";

fn prompts(fields: &mut Fields) -> Result<Vec<Vec<u8>>, ApiError> {
    let invalid = |reason: String| ApiError::invalid("prompt", reason);
    let prompts = match fields.take("prompt") {
        None => return Err(invalid(format!("there is none; expected is {PROMPT}"))),
        Some(Value::String(text)) => vec![text.into_bytes()],
        Some(Value::Array(list)) => match list.first() {
            None => return Err(invalid("an empty list; at least one prompt is needed".into())),
            Some(Value::Number(_)) => vec![tokens(&list)?],
            Some(_) => list.into_iter().map(prompt).collect::<Result<_, _>>()?,
        },
        Some(other) => return Err(wrong("prompt", &other, PROMPT)),
    };
    match prompts.iter().position(Vec::is_empty) {
        Some(at) => Err(invalid(format!("prompt {at} is empty; at least one token is needed"))),
        None => Ok(prompts),
    }
}

/// One of a list of prompts.
fn prompt(value: Value) -> Result<Vec<u8>, ApiError> {
    match value {
        Value::String(text) => Ok(text.into_bytes()),
        Value::Array(list) => tokens(&list),
        other => Err(ApiError::invalid("prompt", format!("a list with {} where {PROMPT} is expected", kind(&other)))),
    }
}

fn tokens(list: &[Value]) -> Result<Vec<u8>, ApiError> {
    let token = |value: &Value| whole(value).and_then(|token| u8::try_from(token).ok()).ok_or_else(|| kind(value));
    let tokens: Result<_, String> = list.iter().map(token).collect();
    tokens.map_err(|wrong| ApiError::invalid("prompt", format!("{wrong} in a list of tokens; allowed are 0 to 255")))
}
