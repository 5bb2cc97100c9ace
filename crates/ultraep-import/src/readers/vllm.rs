//! vLLM MoE logger JSONL: a `meta` row, then one `route` row a (layer, token).
//!
//! The first thousands of rows of a log are the engine's profiling run: passes in which every token is the same, so that
//! all choose the same experts. [`OpenOptions::drop_dummy_run`] leaves out such passes at the beginning: a pass is a run
//! of rows of one request and layer whose `token_idx` counts up from 0; the first pass of at least two tokens with two
//! different sets of experts ends the dummy run, and so does a pass of one token.

use std::borrow::Cow;
use std::path::Path;

use serde::Deserialize;

use crate::error::{expert_id, layer_id};
use crate::input::Lines;
use crate::{Format, ImportError, OpenOptions, Piece, Problem, Recording, RecordingInfo, Sources};

#[derive(Debug, Deserialize)]
struct Row<'a> {
    #[serde(borrow, rename = "type")]
    kind: Cow<'a, str>,
    #[serde(borrow, default)]
    req_id: Cow<'a, str>,
    #[serde(default)]
    token_idx: u64,
    #[serde(default)]
    layer: u64,
    #[serde(default)]
    topk_ids: Vec<i64>,
    top_k: Option<usize>,
    #[serde(borrow)]
    model_id: Option<Cow<'a, str>>,
}

struct VllmLogger {
    info: RecordingInfo,
    lines: Lines,
    /// While the dummy run is being left out.
    dummy: Option<Pass>,
    /// Tokens of a pass that turned out to be no dummy, to be given out again, all with `held.experts`.
    held: Option<Pass>,
    /// The token that ended it.
    held_next: Option<(u32, Vec<u16>)>,
    dropped: u64,
}

/// A pass all of whose tokens so far chose the same experts.
#[derive(Clone, Debug, Default)]
struct Pass {
    request: String,
    layer: u32,
    tokens: u64,
    /// In the first token's order.
    experts: Vec<u16>,
}

impl Pass {
    fn chose_the_same(&self, ids: &[u16]) -> bool {
        ids.len() == self.experts.len() && ids.iter().all(|id| self.experts.contains(id))
    }
}

pub(crate) fn open(path: &Path, options: &OpenOptions) -> Result<Box<dyn Recording>, ImportError> {
    let mut info = RecordingInfo::new(Format::VllmLogger, Sources::Tokens);
    read_meta(&mut Lines::open(path, &OpenOptions::default())?, &mut info)?;
    let dummy = options.drop_dummy_run.then(Pass::default);
    let lines = Lines::open(path, options)?;
    Ok(Box::new(VllmLogger { info, lines, dummy, held: None, held_next: None, dropped: 0 }))
}

fn read_meta(lines: &mut Lines, info: &mut RecordingInfo) -> Result<(), ImportError> {
    if lines.advance()? {
        let row: Row<'_> = serde_json::from_slice(lines.line()).map_err(|e| lines.refuse(Problem::syntax(e)))?;
        info.top_k = row.top_k;
        info.metadata.extend(row.model_id.map(|model| ("model".to_owned(), model.into_owned())));
    }
    Ok(())
}

impl VllmLogger {
    /// The next route row into `piece`; false at the end. Gives request and token index.
    fn read_route(&mut self, piece: &mut Piece) -> Result<Option<(String, u64)>, ImportError> {
        let lines = &mut self.lines;
        while lines.advance()? {
            let row: Row<'_> = serde_json::from_slice(lines.line()).map_err(|e| lines.refuse(Problem::syntax(e)))?;
            match &*row.kind {
                "meta" => continue,
                "route" => {}
                other => {
                    let got = other.chars().take(40).collect::<String>();
                    return Err(lines.refuse(Problem::differs("row type", got, "meta or route")));
                }
            }
            piece.layer = layer_id(row.layer).map_err(|p| lines.refuse(p))?;
            if row.topk_ids.is_empty() {
                return Err(lines.refuse(Problem::Missing("topk_ids".to_owned())));
            }
            let ids = piece.choices(row.topk_ids.len());
            for &id in &row.topk_ids {
                ids.push(expert_id(id).map_err(|p| lines.refuse(p))?);
            }
            return Ok(Some((row.req_id.into_owned(), row.token_idx)));
        }
        Ok(None)
    }

    /// Gives out what was held back and turned out to be real.
    fn give_held(&mut self, piece: &mut Piece) -> bool {
        if let Some(held) = self.held.as_mut().filter(|held| held.tokens > 0) {
            held.tokens -= 1;
            piece.layer = held.layer;
            piece.choices(held.experts.len()).extend_from_slice(&held.experts);
            return true;
        }
        self.held = None;
        match self.held_next.take() {
            Some((layer, ids)) => {
                piece.layer = layer;
                piece.choices(ids.len()).extend_from_slice(&ids);
                true
            }
            None => false,
        }
    }

    /// Reads over the dummy run; afterwards the first real tokens are held.
    fn skip_dummy(&mut self, mut pass: Pass) -> Result<(), ImportError> {
        let mut piece = Piece::default();
        while let Some((request, token_index)) = self.read_route(&mut piece)? {
            let crate::Load::Choices { ids, .. } = &piece.load else { continue };
            let continues = token_index == pass.tokens && request == pass.request && piece.layer == pass.layer;
            if continues && pass.tokens > 0 && pass.chose_the_same(ids) {
                pass.tokens += 1;
            } else if (token_index == 0 || pass.tokens == 0) && pass.tokens != 1 {
                // The pass before was a dummy; a new one begins.
                self.dropped += pass.tokens;
                pass = Pass { request, layer: piece.layer, tokens: 1, experts: ids.clone() };
            } else {
                self.held_next = Some((piece.layer, ids.clone()));
                self.held = Some(pass);
                return Ok(());
            }
        }
        // The log ends with the dummy run.
        self.dropped += pass.tokens;
        Ok(())
    }
}

impl Recording for VllmLogger {
    fn info(&self) -> &RecordingInfo {
        &self.info
    }

    fn next(&mut self, piece: &mut Piece) -> Result<bool, ImportError> {
        if let Some(pass) = self.dummy.take() {
            self.skip_dummy(pass)?;
        }
        if self.give_held(piece) {
            return Ok(true);
        }
        Ok(self.read_route(piece)?.is_some())
    }

    fn ending(&self) -> Option<String> {
        (self.dropped > 0).then(|| format!("{} rows of the engine's dummy run left out", self.dropped))
    }
}
