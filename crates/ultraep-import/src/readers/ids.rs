//! Arrays of experts by token: `topk_ids` `[tokens, K]`, `routed_experts` `[tokens, layers, K]` as vLLM gives them for a
//! sequence (its last token is missing), and routing maps `[tokens, E]` of 0 and 1. Tokens only; -1 and the like are fill.

use std::path::{Path, PathBuf};

use ultraep_plan::MAX_EXPERTS;

use crate::array::{Array, Numbers, index_of};
use crate::choices::push_choices;
use crate::error::layer_id;
use crate::{Format, ImportError, OpenOptions, Piece, Place, Problem, Recording, RecordingInfo, Sources};

/// Numbers of a block of tokens that is read at once.
const BLOCK_NUMBERS: u64 = 1 << 16;

struct Ids {
    info: RecordingInfo,
    path: PathBuf,
    numbers: Numbers,
    shape: Vec<u64>,
    /// `[tokens, layers, per_token]`.
    tokens: u64,
    layers: usize,
    per_token: usize,
    is_map: bool,
    experts: Option<usize>,
    /// Tokens read, the block of them being given out, and its next layer and token.
    read: u64,
    block: Vec<i32>,
    block_tokens: usize,
    at: (usize, usize),
    row: Vec<i64>,
}

/// Opens an array as experts of tokens.
pub(crate) fn open(array: Array, path: &Path, options: &OpenOptions) -> Result<Box<dyn Recording>, ImportError> {
    let (tokens, layers, per_token) = match *array.shape.as_slice() {
        [tokens, per_token] => (tokens, 1, per_token),
        [tokens, layers, per_token] => (tokens, layers, per_token),
        _ => {
            let got = format!("{:?}", array.shape);
            return Err(
                Problem::differs("shape", got, "[tokens, K] or [tokens, layers, K] of ids").at(path, Place::File)
            );
        }
    };
    let mut info = RecordingInfo::new(Format::ExpertIds, Sources::Tokens);
    info.experts = options.experts;
    info.top_k = usize::try_from(per_token).ok();
    open_as(array, path, (tokens, layers, per_token), info)
}

/// Opens an array as a routing map.
pub(crate) fn open_map(array: Array, path: &Path) -> Result<Box<dyn Recording>, ImportError> {
    let &[tokens, experts] = array.shape.as_slice() else {
        let got = format!("{:?}", array.shape);
        return Err(Problem::differs("shape", got, "[tokens, experts] of a routing map").at(path, Place::File));
    };
    let mut info = RecordingInfo::new(Format::RoutingMap, Sources::Tokens);
    info.experts = usize::try_from(experts).ok();
    open_as(array, path, (tokens, 1, experts), info)
}

fn open_as(
    array: Array,
    path: &Path,
    (tokens, layers, width): (u64, u64, u64),
    info: RecordingInfo,
) -> Result<Box<dyn Recording>, ImportError> {
    let refuse = |problem: Problem| problem.at(path, Place::File);
    if width == 0 || width > MAX_EXPERTS as u64 {
        return Err(refuse(Problem::Limit { what: "columns, at least 1:", got: width, max: MAX_EXPERTS as u64 }));
    }
    if layers == 0 {
        return Err(refuse(Problem::Missing("layers".to_owned())));
    }
    layer_id(layers - 1).map_err(refuse)?;
    let is_map = info.format == Format::RoutingMap;
    Ok(Box::new(Ids {
        experts: info.experts,
        info,
        path: path.to_owned(),
        numbers: array.numbers,
        shape: array.shape,
        tokens,
        layers: layers as usize,
        per_token: width as usize,
        is_map,
        read: 0,
        block: Vec::new(),
        block_tokens: 0,
        at: (0, 0),
        row: Vec::new(),
    }))
}

impl Ids {
    fn refuse(&self, (at, problem): (u64, Problem)) -> ImportError {
        problem.at(&self.path, Place::Index(index_of(at, &self.shape)))
    }

    /// Reads the next block of tokens; false at the end.
    fn read_block(&mut self) -> Result<bool, ImportError> {
        let of_token = (self.layers * self.per_token) as u64;
        let tokens = (BLOCK_NUMBERS / of_token).max(1).min(self.tokens - self.read);
        if tokens == 0 {
            let end = self.numbers.end();
            return end.map(|()| false).map_err(|problem| problem.at(&self.path, Place::File));
        }
        let read = self.numbers.take((tokens * of_token) as usize, &mut self.block);
        read.map_err(|refused| self.refuse(refused))?;
        (self.read, self.block_tokens, self.at) = (self.read + tokens, tokens as usize, (0, 0));
        Ok(true)
    }

    /// Fills the piece with tokens of the block's next layer; false when the block is used up.
    fn fill(&mut self, piece: &mut Piece) -> Result<bool, ImportError> {
        let (layer, mut token) = self.at;
        if layer == self.layers || self.block_tokens == 0 {
            return Ok(false);
        }
        piece.layer = layer as u32;
        let mut ids = std::mem::take(piece.choices(self.per_token));
        let mut width = None;
        while token < self.block_tokens {
            let start = (token * self.layers + layer) * self.per_token;
            let before = ids.len();
            let first = self.read - self.block_tokens as u64;
            let at = (first * self.layers as u64 * self.per_token as u64) + start as u64;
            self.push(start, &mut ids).map_err(|problem| self.refuse((at, problem)))?;
            let got = ids.len() - before;
            if *width.get_or_insert(got) != got || got == 0 {
                ids.truncate(before);
                // A token without experts in a map chose none; another number of experts is another piece.
                token += usize::from(got == 0);
                if before == 0 {
                    width = None;
                    continue;
                }
                break;
            }
            token += 1;
        }
        self.at = if token == self.block_tokens { (layer + 1, 0) } else { (layer, token) };
        let is_empty = ids.is_empty();
        *piece.choices(width.filter(|&w| w > 0).unwrap_or(1)) = ids;
        Ok(!is_empty)
    }

    /// Appends the experts of the row that starts at `start` of the block.
    fn push(&mut self, start: usize, out: &mut Vec<u16>) -> Result<(), Problem> {
        let row = &self.block[start..start + self.per_token];
        if !self.is_map {
            self.row.clear();
            self.row.extend(row.iter().map(|&id| i64::from(id)));
            return push_choices(&self.row, self.experts, out);
        }
        for (expert, &chosen) in row.iter().enumerate() {
            match chosen {
                0 => {}
                1 => out.push(expert as u16), // below MAX_EXPERTS
                other => return Err(Problem::differs("cell of a routing map", other, "0 or 1")),
            }
        }
        Ok(())
    }
}

impl Recording for Ids {
    fn info(&self) -> &RecordingInfo {
        &self.info
    }

    fn next(&mut self, piece: &mut Piece) -> Result<bool, ImportError> {
        (piece.step, piece.microbatch) = (0, 0);
        loop {
            if self.fill(piece)? {
                return Ok(true);
            }
            if self.at.0 < self.layers && self.block_tokens > 0 {
                continue;
            }
            if !self.read_block()? {
                return Ok(false);
            }
        }
    }
}
