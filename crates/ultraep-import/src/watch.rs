//! Tokens as they are read, watched for what a person should know: padding, experts named twice, a top-k that changes, and
//! the profiling runs of an engine.
//!
//! # Profiling runs
//!
//! Before it serves, an engine runs passes of thousands of equal tokens to learn its memory; all of them choose the same
//! experts. In a layer, a *run* is a stretch of consecutive tokens that choose the same set of at least two experts. A run is
//! the engine's when it has
//!
//! * [`START_RUN`] tokens and every run of the layer since the engine's start was the engine's too. Where a log says when the
//!   engine started (its file, its `meta` line), the numbers of tokens need not restart;
//! * [`ANY_RUN`] tokens anywhere: a second start that the log does not tell. Real text repeats itself for tokens, not for
//!   hundreds of them.
//!
//! With [`OpenOptions::drop_dummy_run`] such runs are left out, otherwise they are counted and told. Tokens of a run wait for
//! its length: at most [`ANY_RUN`] tokens a layer are held.

use std::collections::{BTreeMap, VecDeque};

use ultraep_trace::NO_EXPERT;

use crate::{Format, ImportError, Load, OpenOptions, Piece, Recording, RecordingInfo, Sources};

/// Equal tokens that make a profiling run at an engine's start.
pub(crate) const START_RUN: u64 = 8;
/// Equal tokens that make a profiling run anywhere.
pub(crate) const ANY_RUN: u64 = 256;
/// Equal tokens at a layer's end that are told as padding.
const PADDED_END: u64 = 12;

/// A recording of tokens that is watched.
pub(crate) struct Watched {
    inner: Box<dyn Recording>,
    drops: bool,
    /// Whether steps are the engine's starts.
    has_starts: bool,
    input: Piece,
    ready: VecDeque<Segment>,
    layers: BTreeMap<u32, Layer>,
    seen: Seen,
    first_per_token: Option<usize>,
    is_over: bool,
}

/// Tokens to be given out.
struct Segment {
    step: u64,
    layer: u32,
    per_token: usize,
    ids: Vec<u16>,
}

/// The run that a layer is in.
#[derive(Default)]
struct Layer {
    /// Its experts in order; empty before the first token.
    experts: Vec<u16>,
    tokens: u64,
    /// Tokens of the run that wait, each `experts.len()` ids.
    held: Vec<u16>,
    step: u64,
    /// Whether every run since the start was the engine's.
    is_start: bool,
}

/// What was met, in tokens.
#[derive(Default)]
struct Seen {
    padding: u64,
    one_expert: u64,
    empty_places: u64,
    twice: u64,
    other_top_k: BTreeMap<usize, u64>,
    profiling: u64,
    tokens: u64,
}

impl Layer {
    fn run_is_profiling(&self) -> bool {
        self.experts.len() > 1 && self.tokens >= if self.is_start { START_RUN } else { ANY_RUN }
    }
}

/// Watches a recording of tokens; others pass as they are.
pub(crate) fn watch(inner: Box<dyn Recording>, options: &OpenOptions) -> Box<dyn Recording> {
    if inner.info().sources != Sources::Tokens {
        return if options.drop_dummy_run { Box::new(NoTokens(inner)) } else { inner };
    }
    let has_starts = inner.info().format == Format::VllmLogger;
    let first_per_token = inner.info().top_k;
    Box::new(Watched {
        inner,
        drops: options.drop_dummy_run,
        has_starts,
        input: Piece::default(),
        ready: VecDeque::new(),
        layers: BTreeMap::new(),
        seen: Seen::default(),
        first_per_token,
        is_over: false,
    })
}

impl Watched {
    /// Looks at all tokens of the piece that was read.
    fn take_piece(&mut self) {
        let piece = std::mem::take(&mut self.input);
        if let Load::Choices { per_token, ids } = &piece.load
            && *per_token > 0
        {
            let state = self.layers.entry(piece.layer).or_insert_with(|| Layer { is_start: true, ..Layer::default() });
            if state.step != piece.step && self.has_starts {
                end_run(&mut self.ready, piece.layer, state);
                (state.experts, state.tokens, state.is_start) = (Vec::new(), 0, true);
            }
            state.step = piece.step;
            for token in ids.chunks_exact(*per_token) {
                self.take_token(piece.layer, token);
            }
        }
        self.input = piece;
    }

    fn take_token(&mut self, layer: u32, token: &[u16]) {
        let Some(state) = self.layers.get_mut(&layer) else { return };
        let mut experts: Vec<u16> = token.iter().copied().filter(|&id| id != NO_EXPERT).collect();
        if experts.is_empty() {
            self.seen.padding += 1;
            return;
        }
        if experts.len() > 1 && experts.iter().all(|&id| id == experts[0]) {
            self.seen.one_expert += 1;
            return;
        }
        self.seen.tokens += 1;
        self.seen.empty_places += u64::from(experts.len() < token.len());
        if *self.first_per_token.get_or_insert(token.len()) != token.len() {
            *self.seen.other_top_k.entry(token.len()).or_default() += 1;
        }
        experts.sort_unstable();
        self.seen.twice += u64::from(experts.windows(2).any(|pair| pair[0] == pair[1]));
        if experts == state.experts {
            let was_profiling = state.run_is_profiling();
            state.tokens += 1;
            match (state.run_is_profiling(), was_profiling) {
                (true, true) => self.seen.profiling += 1,
                (true, false) => self.seen.profiling += state.tokens,
                (false, _) => {}
            }
        } else {
            end_run(&mut self.ready, layer, state);
            state.is_start &= state.experts.is_empty() || state.run_is_profiling();
            (state.experts, state.tokens) = (experts, 1);
        }
        if !self.drops {
            give(&mut self.ready, (state.step, layer), token);
        } else if state.run_is_profiling() {
            state.held.clear();
        } else if state.experts.len() == token.len() {
            state.held.extend_from_slice(token);
        } else {
            // A token with empty places is in no run of a known width: what waits goes first.
            end_run(&mut self.ready, layer, state);
            give(&mut self.ready, (state.step, layer), token);
        }
    }
}

/// Gives out what waits.
fn end_run(ready: &mut VecDeque<Segment>, layer: u32, state: &mut Layer) {
    let width = state.experts.len().max(1);
    for token in state.held.chunks_exact(width) {
        give(ready, (state.step, layer), token);
    }
    state.held.clear();
}

fn give(ready: &mut VecDeque<Segment>, (step, layer): (u64, u32), token: &[u16]) {
    match ready.back_mut().filter(|s| (s.step, s.layer, s.per_token) == (step, layer, token.len())) {
        Some(segment) => segment.ids.extend_from_slice(token),
        None => ready.push_back(Segment { step, layer, per_token: token.len(), ids: token.to_vec() }),
    }
}

impl Recording for Watched {
    fn info(&self) -> &RecordingInfo {
        self.inner.info()
    }

    fn next(&mut self, piece: &mut Piece) -> Result<bool, ImportError> {
        loop {
            if let Some(segment) = self.ready.pop_front() {
                (piece.step, piece.microbatch, piece.layer) = (segment.step, 0, segment.layer);
                piece.load = Load::Choices { per_token: segment.per_token, ids: segment.ids };
                return Ok(true);
            }
            if self.is_over {
                return Ok(false);
            }
            if self.inner.next(&mut self.input)? {
                self.take_piece();
                continue;
            }
            self.is_over = true;
            for (&layer, state) in &mut self.layers {
                if !state.run_is_profiling() {
                    end_run(&mut self.ready, layer, state);
                }
            }
        }
    }

    fn ending(&self) -> Option<String> {
        let mut words: Vec<String> = self.inner.ending().into_iter().collect();
        words.extend(self.seen.describe(self.drops, self.first_per_token));
        words.extend(self.padded_end());
        if words.is_empty() { None } else { Some(words.join("; ")) }
    }
}

impl Watched {
    /// Equal tokens at the end of layers: padding, most likely.
    fn padded_end(&self) -> Option<String> {
        let is_padded =
            |layer: &&Layer| layer.experts.len() > 1 && layer.tokens >= PADDED_END && !layer.run_is_profiling();
        let padded: Vec<(&u32, &Layer)> = self.layers.iter().filter(|(_, layer)| is_padded(layer)).collect();
        let (layer, first) = padded.first()?;
        let experts: Vec<String> = first.experts.iter().map(u16::to_string).collect();
        let more = if padded.len() > 1 { format!(", and in {} layers more", padded.len() - 1) } else { String::new() };
        let (tokens, experts) = (first.tokens, experts.join(", "));
        Some(format!(
            "{tokens} equal tokens at the end of layer {layer} (experts {experts}){more}: padding? they are counted"
        ))
    }
}

impl Seen {
    fn describe(&self, drops: bool, top_k: Option<usize>) -> Vec<String> {
        let mut words = Vec::new();
        let mut tell = |count: u64, text: &str| {
            if count > 0 {
                words.push(format!("{count} {} {text}", if count == 1 { "token" } else { "tokens" }));
            }
        };
        tell(self.padding, "without any expert (padding) left out");
        tell(self.one_expert, "with one expert in all places (padding) left out");
        tell(self.empty_places, "with fewer experts than places (-1)");
        tell(self.twice, "with an expert twice, counted twice");
        for (width, &count) in &self.other_top_k {
            tell(count, &format!("with {width} experts, not {}", top_k.unwrap_or(0)));
        }
        match (self.profiling, drops) {
            (0, false) => {}
            (0, true) => words.push("no profiling run of an engine found: nothing left out".to_owned()),
            (rows, true) => words.push(format!("{rows} rows of the engine's profiling (dummy) run left out")),
            (rows, false) => words.push(format!(
                "{rows} of {} rows are an engine's profiling run (all choose the same experts): --drop-dummy-run leaves them out",
                self.tokens
            )),
        }
        words
    }
}

/// A recording of counts, of which profiling runs were to be left out.
struct NoTokens(Box<dyn Recording>);

impl Recording for NoTokens {
    fn info(&self) -> &RecordingInfo {
        self.0.info()
    }

    fn next(&mut self, piece: &mut Piece) -> Result<bool, ImportError> {
        self.0.next(piece)
    }

    fn ending(&self) -> Option<String> {
        let none = "no profiling run of an engine can be found: counts are recorded, not tokens";
        Some(self.0.ending().map_or_else(|| none.to_owned(), |ending| format!("{ending}; {none}")))
    }
}
