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

/// One output of a prompt.
#[derive(Debug, Serialize)]
pub(super) struct Choice {
    pub(super) index: usize,
    pub(super) text: String,
    pub(super) logprobs: Option<Logprobs>,
    pub(super) finish_reason: Option<&'static str>,
    /// With it the same request gives the same text again; once, with the reason, where anything was drawn.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) seed: Option<i64>,
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
    top_logprobs: Vec<Option<Top>>,
    text_offset: Vec<usize>,
}

/// The likeliest tokens in a place, and the token that is there: an object, by decreasing log-probability. Its numbers are of
/// one type with `token_logprobs`: clients compare them for equality.
#[derive(Debug)]
struct Top(Vec<(u8, f32)>);

impl Serialize for Top {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|&(token, logprob)| (token_text(token), logprob)))
    }
}

impl Logprobs {
    /// Whether no token is in it.
    pub(super) fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Adds a token of the character at `offset`.
    pub(super) fn push(&mut self, scored: &ScoredToken, offset: usize) {
        self.tokens.push(token_text(scored.token));
        self.token_logprobs.push(scored.logprob);
        self.top_logprobs.push(scored.logprob.map(|_| Top(scored.top.clone())));
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

/// Turns bytes into text as they come: a character is given out when it is whole, and what is none becomes U+FFFD, as in
/// [`String::from_utf8_lossy`].
#[derive(Debug, Default)]
pub(super) struct Decoder {
    /// The beginning of a character.
    pending: Vec<u8>,
    /// Characters given out so far.
    characters: usize,
}

impl Decoder {
    /// Takes in a byte; gives the characters that it completes, and at which character of the whole text it is: for a byte
    /// inside one, where that begins.
    pub(super) fn push(&mut self, byte: u8) -> (String, usize) {
        self.pending.push(byte);
        let text = self.whole();
        self.characters += text.chars().count();
        // It waits for the rest of its character, or was the last of the one given out last.
        let offset = if self.pending.is_empty() { self.characters.saturating_sub(1) } else { self.characters };
        (text, offset)
    }

    /// Takes in many.
    pub(super) fn extend(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let text = self.whole();
        self.characters += text.chars().count();
        text
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

    /// Bytes that are text, nearly text, or nothing.
    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        let part = prop_oneof![
            any::<u8>().prop_map(|b| vec![b]),
            any::<char>().prop_map(|c| c.to_string().into_bytes()),
            (any::<char>(), 1..4usize).prop_map(|(c, n)| c.to_string().into_bytes().into_iter().take(n).collect()),
            (0x80..0xc0u8).prop_map(|b| vec![b]),
        ];
        proptest::collection::vec(part, 0..30).prop_map(|parts| parts.concat())
    }

    proptest! {
        /// However bytes are cut, the text is the one of all of them.
        #[test]
        fn text_does_not_depend_on_how_it_arrives(bytes in bytes(), cut in 1usize..7) {
            let whole = String::from_utf8_lossy(&bytes);
            let mut decoder = Decoder::default();
            let mut text: String = bytes.chunks(cut).map(|part| decoder.extend(part)).collect();
            text.push_str(&decoder.finish());
            prop_assert_eq!(&text, &whole);
            let mut decoder = Decoder::default();
            let mut text: String = bytes.iter().map(|&byte| decoder.push(byte).0).collect();
            text.push_str(&decoder.finish());
            prop_assert_eq!(&text, &whole);
        }

        /// Every byte is at the character of the text that it is of.
        #[test]
        fn offsets_point_at_the_characters_of_the_text(bytes in bytes()) {
            let mut decoder = Decoder::default();
            let offsets: Vec<usize> = bytes.iter().map(|&byte| decoder.push(byte).1).collect();
            let mut expected = Vec::new();
            let mut character = 0;
            for chunk in bytes.utf8_chunks() {
                for c in chunk.valid().chars() {
                    expected.extend(std::iter::repeat_n(character, c.len_utf8()));
                    character += 1;
                }
                expected.extend(std::iter::repeat_n(character, chunk.invalid().len()));
                character += usize::from(!chunk.invalid().is_empty());
            }
            prop_assert_eq!(offsets, expected);
        }
    }

    #[test]
    fn a_character_comes_whole() {
        let mut decoder = Decoder::default();
        let parts: Vec<(String, usize)> = "aé€".bytes().map(|byte| decoder.push(byte)).collect();
        let expected = [("a", 0), ("", 1), ("é", 1), ("", 2), ("", 2), ("€", 2)];
        assert!(parts.iter().map(|(text, at)| (text.as_str(), *at)).eq(expected), "{parts:?}");
        assert_eq!(decoder.finish(), "");
    }

    #[test]
    fn a_log_probability_is_the_same_number_in_both_lists() {
        let mut logprobs = Logprobs::default();
        let value = -1.234_567_9_f32;
        logprobs.push(&ScoredToken { token: b'a', logprob: Some(value), top: vec![(b'z', -0.5), (b'a', value)] }, 0);
        let text = serde_json::to_string(&logprobs).unwrap_or_default();
        assert!(text.contains(&format!("\"token_logprobs\":[{value}]")), "{text}");
        assert!(text.contains(&format!("[{{\"z\":-0.5,\"a\":{value}}}]")), "{text}");
    }
}
