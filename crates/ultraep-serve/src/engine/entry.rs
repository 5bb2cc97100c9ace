//! One request while it runs: its tokens, what is known of them, and what is still held back from its reader.

use std::collections::VecDeque;
use std::time::Instant;

use tokio::sync::mpsc;
use ultraep_model::Wanted;
use ultraep_schedule::Chunk;

use super::request::{Event, FinishReason, Generation, Sampler, ScoredToken, score};
use crate::metrics::Metrics;

/// One request.
pub(super) struct Entry {
    generation: Generation,
    /// Prompt, then what was produced.
    tokens: Vec<u8>,
    scored: Vec<ScoredToken>,
    /// Produced, but it may turn out to be the start of a stop sequence.
    held: VecDeque<ScoredToken>,
    sampler: Sampler,
    events: mpsc::Sender<Event>,
    pub(super) arrived: Instant,
    /// It is to fail on its rank, for drills.
    pub(super) spoiled: bool,
}

/// What a chunk of a sequence that is not there any more, or that is to fail, asks of its rank: nothing, which a rank refuses.
const NOTHING: (Vec<u8>, Wanted) = (Vec::new(), Wanted::Nothing);

impl Entry {
    /// With the way to its reader.
    pub(super) fn new(generation: Generation, seed: u64) -> (Self, mpsc::Receiver<Event>) {
        // Room for all that can happen: sending never waits for a slow reader.
        let (events, receiver) = mpsc::channel(generation.new_tokens as usize + 3);
        let entry = Self {
            tokens: generation.prompt.clone(),
            scored: Vec::new(),
            held: VecDeque::new(),
            sampler: Sampler::new(generation.sampling, seed),
            events,
            arrived: Instant::now(),
            spoiled: false,
            generation,
        };
        (entry, receiver)
    }

    /// Tells the reader; one that went away needs no word.
    pub(super) fn tell(&self, event: Event) {
        let _ = self.events.try_send(event);
    }

    /// Tokens of a chunk, and the logits wanted.
    pub(super) fn input(entry: Option<&Self>, chunk: &Chunk) -> (Vec<u8>, Wanted) {
        let Some(entry) = entry.filter(|entry| !entry.spoiled) else { return NOTHING };
        let start = chunk.start as usize;
        let Some(tokens) = entry.tokens.get(start..start + chunk.tokens as usize) else { return NOTHING };
        let scores_prompt = entry.generation.score_prompt && start < entry.generation.prompt.len();
        let wanted = match (scores_prompt, chunk.produces) {
            (true, _) => Wanted::All,
            (false, Some(_)) => Wanted::Last,
            (false, None) => Wanted::Nothing,
        };
        (tokens.to_vec(), wanted)
    }

    /// Takes in a chunk's logits; gives the last event, if it is over.
    pub(super) fn take(&mut self, chunk: &Chunk, rows: &[&[f32]], metrics: &Metrics) -> Option<Event> {
        match self.try_take(chunk, rows, metrics) {
            Some(ended) => ended,
            None => Some(Event::Failed("the model gave something that is no number".into())),
        }
    }

    /// None when the logits are no numbers; else how the request ended, if it did.
    fn try_take(&mut self, chunk: &Chunk, rows: &[&[f32]], metrics: &Metrics) -> Option<Option<Event>> {
        let (prompt, top) = (self.generation.prompt.len(), self.generation.top);
        let start = chunk.start as usize;
        metrics.tokens(chunk.phase, chunk.tokens);
        if self.generation.score_prompt && start < prompt {
            if start == 0 {
                self.scored.push(ScoredToken { token: self.tokens[0], logprob: None, top: Vec::new() });
            }
            // Position p scores token p + 1, as far as it is of the prompt.
            for (logits, &token) in rows.iter().zip(&self.tokens[start + 1..prompt]) {
                self.scored.push(score(logits, token, top)?);
            }
        }
        if start < prompt && start + chunk.tokens as usize >= prompt {
            metrics.ttft(self.arrived.elapsed());
            if self.generation.score_prompt {
                let scored = std::mem::take(&mut self.scored);
                self.tell(Event::Prompt(scored));
            }
        }
        if let (Some(_), Some(logits)) = (chunk.produces, rows.last()) {
            let token = self.sampler.choose(logits);
            self.tokens.push(token);
            self.held.push_back(score(logits, token, top)?);
            let output = &self.tokens[prompt..];
            if let Some(stop) = ends_with(output, &self.generation.stop) {
                self.release(stop);
                return Some(Some(self.finished(FinishReason::Stop)));
            }
            self.release(may_begin(output, &self.generation.stop));
        }
        if !chunk.ends {
            return Some(None);
        }
        self.release(0);
        Some(Some(self.finished(FinishReason::Length)))
    }

    /// Gives out all tokens but the last `keep`.
    fn release(&mut self, keep: usize) {
        while self.held.len() > keep
            && let Some(token) = self.held.pop_front()
        {
            self.tell(Event::Token(token));
        }
    }

    fn finished(&self, reason: FinishReason) -> Event {
        // At most as many as asked for, which has 32 bits.
        Event::Finished { reason, new_tokens: (self.tokens.len() - self.generation.prompt.len()) as u32 }
    }
}

/// Length of the longest of `stops` that the output ends with.
fn ends_with(output: &[u8], stops: &[Vec<u8>]) -> Option<usize> {
    stops.iter().filter(|stop| !stop.is_empty() && output.ends_with(stop)).map(Vec::len).max()
}

/// How many of the last tokens of the output may be the start of one of `stops`.
fn may_begin(output: &[u8], stops: &[Vec<u8>]) -> usize {
    let starts = |stop: &Vec<u8>| (1..stop.len()).rev().find(|&len| output.ends_with(&stop[..len]));
    stops.iter().filter_map(starts).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use ultraep_model::VOCABULARY;
    use ultraep_schedule::{Phase, RequestId};

    use super::super::request::Sampling;
    use super::*;

    /// Runs a request that produces `output`, token by token; gives what its reader saw after each.
    fn run(output: &[u8], stop: &[Vec<u8>]) -> (Vec<Vec<u8>>, Option<(FinishReason, u32)>) {
        let new_tokens = output.len() as u32;
        let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
        let generation =
            Generation { prompt: b"p".to_vec(), new_tokens, stop: stop.to_vec(), sampling, ..Generation::default() };
        let (mut entry, mut events) = Entry::new(generation, 0);
        let (mut seen, mut parts, mut end) = (Vec::new(), Vec::new(), None);
        for (number, &token) in output.iter().enumerate() {
            let mut logits = vec![0.0; VOCABULARY];
            logits[usize::from(token)] = 9.0;
            let chunk = Chunk {
                request: RequestId(0),
                rank: 0,
                start: number as u32,
                tokens: 1,
                phase: Phase::Decode,
                reserves: None,
                produces: Some(number as u32),
                ends: number + 1 == output.len(),
            };
            let last = entry.take(&chunk, &[&logits], &Metrics::default());
            while let Ok(event) = events.try_recv() {
                let Event::Token(token) = event else { panic!("{event:?}") };
                seen.push(token.token);
            }
            parts.push(seen.clone());
            if let Some(Event::Finished { reason, new_tokens }) = last {
                end = Some((reason, new_tokens));
                break;
            }
        }
        (parts, end)
    }

    /// Where the text ends, and how many tokens were produced, by looking at every prefix.
    fn oracle(output: &[u8], stops: &[Vec<u8>]) -> Option<(usize, usize)> {
        (1..=output.len()).find_map(|end| {
            let matching = stops.iter().filter(|s| !s.is_empty() && output[..end].ends_with(s));
            matching.map(|s| end - s.len()).min().map(|cut| (cut, end))
        })
    }

    #[test]
    fn what_may_be_a_stop_sequence_is_held_back_until_it_is_known() {
        let stops = [b"END".to_vec(), b"\n\n".to_vec(), Vec::new()];
        let (parts, end) = run(b"aEENx\nEND!", &stops);
        let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
        let expected: [&[u8]; 9] = [b"a", b"a", b"aE", b"aE", b"aEENx", b"aEENx", b"aEENx\n", b"aEENx\n", b"aEENx\n"];
        assert_eq!(parts, expected);
        assert_eq!(end, Some((FinishReason::Stop, 9)));
        // At the end nothing is held back any more.
        let (parts, end) = run(b"aEN", &stops);
        assert_eq!((parts.last().unwrap().as_slice(), end), (&b"aEN"[..], Some((FinishReason::Length, 3))));
    }

    proptest! {
        #[test]
        fn text_ends_before_the_first_stop_sequence_and_nothing_of_it_was_ever_shown(
            output in proptest::collection::vec(0..3u8, 1..24),
            stops in proptest::collection::vec(proptest::collection::vec(0..3u8, 0..5), 0..4),
        ) {
            let (parts, end) = run(&output, &stops);
            let (cut, produced, reason) = match oracle(&output, &stops) {
                Some((cut, produced)) => (cut, produced, FinishReason::Stop),
                None => (output.len(), output.len(), FinishReason::Length),
            };
            prop_assert_eq!(end, Some((reason, produced as u32)));
            prop_assert_eq!(parts.last().unwrap(), &output[..cut]);
            // What is shown early is never taken back.
            prop_assert!(parts.iter().all(|part| output[..cut].starts_with(part)));
        }
    }

    #[test]
    fn logits_that_are_no_numbers_end_the_request() {
        let generation = Generation { prompt: b"p".to_vec(), new_tokens: 2, ..Generation::default() };
        let (mut entry, _events) = Entry::new(generation, 0);
        let chunk = Chunk {
            request: RequestId(0),
            rank: 0,
            start: 0,
            tokens: 1,
            phase: Phase::Prefill,
            reserves: Some(2),
            produces: Some(0),
            ends: false,
        };
        let last = entry.take(&chunk, &[&[f32::NAN; VOCABULARY]], &Metrics::default());
        assert!(matches!(last, Some(Event::Failed(_))), "{last:?}");
    }
}
