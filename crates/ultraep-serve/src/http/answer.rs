//! What an answer is made of: the text of bytes that arrive one by one, log-probabilities, usage.

use serde::Serialize;

use crate::{FinishReason, ScoredToken};

/// An answer, or one part of a streamed one.
#[derive(Debug, Serialize)]
pub(super) struct Answer<'a> {
    pub(super) id: &'a str,
    pub(super) object: &'static str,
    pub(super) created: u64,
    pub(super) model: &'a str,
    pub(super) choices: Vec<Choice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) usage: Option<Usage>,
}

/// One prompt's output.
#[derive(Debug, Serialize)]
pub(super) struct Choice {
    pub(super) index: usize,
    pub(super) text: String,
    pub(super) logprobs: Option<Logprobs>,
    pub(super) finish_reason: Option<&'static str>,
}

/// Tokens used.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Usage {
    pub(super) prompt_tokens: usize,
    pub(super) completion_tokens: usize,
    pub(super) total_tokens: usize,
}

/// Log-probabilities in the form of OpenAI's completions: lists of equal lengths.
#[derive(Debug, Default, Serialize)]
pub(super) struct Logprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<serde_json::Map<String, serde_json::Value>>>,
    text_offset: Vec<usize>,
}

impl Logprobs {
    /// Adds a token that begins at character `offset`.
    pub(super) fn push(&mut self, scored: &ScoredToken, offset: usize) {
        self.tokens.push(token_text(scored.token));
        self.token_logprobs.push(scored.logprob);
        let top = scored.top.iter().map(|&(token, logprob)| (token_text(token), logprob.into()));
        self.top_logprobs.push(scored.logprob.map(|_| top.collect()));
        self.text_offset.push(offset);
    }
}

/// A token as text: the character, or its byte where it is only part of one.
fn token_text(token: u8) -> String {
    if token.is_ascii() { char::from(token).to_string() } else { format!("bytes:\\x{token:02x}") }
}

pub(super) fn reason_name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Length => "length",
        FinishReason::Stop => "stop",
    }
}

/// Turns bytes into text as they come: a character is given out when it is whole, and what is none becomes U+FFFD.
#[derive(Debug, Default)]
pub(super) struct Decoder {
    pending: Vec<u8>,
    /// Characters begun so far.
    characters: usize,
}

impl Decoder {
    /// The character at which the next byte will be, if it begins one.
    pub(super) fn offset(&self) -> usize {
        self.characters
    }

    /// Takes in bytes; gives the characters that they complete.
    pub(super) fn push(&mut self, bytes: &[u8]) -> String {
        self.characters += bytes.iter().filter(|b| (**b & 0b1100_0000) != 0b1000_0000).count();
        self.pending.extend_from_slice(bytes);
        self.whole()
    }

    /// What is left at the end.
    pub(super) fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        text
    }

    fn whole(&mut self) -> String {
        let mut text = String::new();
        let mut at = 0;
        loop {
            match std::str::from_utf8(&self.pending[at..]) {
                Ok(rest) => {
                    text.push_str(rest);
                    at = self.pending.len();
                    break;
                }
                Err(error) => {
                    let valid = at + error.valid_up_to();
                    text.push_str(&String::from_utf8_lossy(&self.pending[at..valid]));
                    at = valid;
                    // None: the beginning of a character; the rest may come.
                    let Some(wrong) = error.error_len() else { break };
                    text.push(char::REPLACEMENT_CHARACTER);
                    at += wrong;
                }
            }
        }
        self.pending.drain(..at);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// However bytes are cut, the text is the one of all of them.
        #[test]
        fn text_does_not_depend_on_how_it_arrives(bytes in proptest::collection::vec(any::<u8>(), 0..60), cut in 1usize..7) {
            let mut decoder = Decoder::default();
            let mut text: String = bytes.chunks(cut).map(|part| decoder.push(part)).collect();
            text.push_str(&decoder.finish());
            prop_assert_eq!(text, String::from_utf8_lossy(&bytes));
        }
    }

    #[test]
    fn a_character_comes_whole() {
        let mut decoder = Decoder::default();
        let parts: Vec<String> = "aé€".bytes().map(|b| decoder.push(&[b])).collect();
        assert_eq!(parts, ["a", "", "é", "", "", "€"]);
        assert_eq!((decoder.offset(), decoder.finish()), (3, String::new()));
    }
}
