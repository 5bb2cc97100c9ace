//! Megatron router trace: `router_trace_rank{r}.jsonl`, a line a (step, layer) with `top_indices` `[[..]]` of that rank's
//! tokens. Several files have the source axis; one alone is a log of tokens.
//!
//! Files are read step by step: all lines of one step from all ranks, then its layers in order. Lines of one rank with the
//! same step, stage, block and layer are microbatches, in order. Memory: the counts of one step.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use ultraep_plan::MAX_RANKS;

use crate::detect::natural_key;
use crate::error::{expert_id, layer_id};
use crate::input::Lines;
use crate::{Format, ImportError, OpenOptions, Piece, Place, Problem, Recording, RecordingInfo, Sources};

/// Most counts kept of one step.
const MAX_STEP_COUNTS: usize = 1 << 28;

#[derive(Debug, Deserialize)]
struct Row<'a> {
    step: u64,
    layer: u64,
    #[serde(default)]
    stage: serde_json::Value,
    #[serde(borrow)]
    block: Option<Cow<'a, str>>,
    topk: Option<usize>,
    num_tokens: Option<usize>,
    top_indices: Vec<Vec<i64>>,
}

/// Which lines of different ranks belong together: layer first, so that layers come in order.
type Key = (u32, usize, String);

struct Megatron {
    info: RecordingInfo,
    ranks: Vec<RankLines>,
    /// Of the step being given out, in order; counts `[rank][expert]`, as long as the highest expert seen.
    ready: std::collections::btree_map::IntoIter<Key, Vec<Vec<u32>>>,
    step: u64,
}

/// One rank's file and the line that was read ahead.
struct RankLines {
    lines: Lines,
    ahead: Option<Choices>,
    last_step: u64,
}

struct Choices {
    step: u64,
    layer: u32,
    scope: String,
    tokens: Vec<Vec<i64>>,
}

/// A single file.
struct OneRank {
    info: RecordingInfo,
    rank: RankLines,
    tokens: std::vec::IntoIter<Vec<i64>>,
    layer: u32,
}

/// The files of a folder that are such a recording.
pub(crate) fn files_in(folder: &Path) -> Result<Vec<PathBuf>, ImportError> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(ImportError::io(folder))? {
        let path = entry.map_err(ImportError::io(folder))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.starts_with("router_trace_rank") && (name.ends_with(".jsonl") || name.ends_with(".jsonl.gz")) {
            files.push(path);
        }
    }
    files.sort_by_cached_key(|path| path.file_name().map(natural_key));
    Ok(files)
}

/// One rank's log: its tokens, one after another.
pub(crate) fn open(path: &Path, options: &OpenOptions) -> Result<Box<dyn Recording>, ImportError> {
    let mut info = RecordingInfo::new(Format::Megatron, Sources::Tokens);
    info.top_k = top_k(path)?;
    let rank = RankLines::open(path, options)?;
    Ok(Box::new(OneRank { info, rank, tokens: Vec::new().into_iter(), layer: 0 }))
}

/// The logs of all ranks, in order of rank.
pub(crate) fn open_ranks(paths: &[PathBuf], options: &OpenOptions) -> Result<Box<dyn Recording>, ImportError> {
    if let [path] = paths {
        return open(path, options);
    }
    if let Some(path) = paths.get(MAX_RANKS) {
        let (got, max) = (paths.len() as u64, MAX_RANKS as u64);
        return Err(Problem::Limit { what: "ranks:", got, max }.at(path, Place::File));
    }
    let ranks = paths.iter().map(|path| RankLines::open(path, options)).collect::<Result<Vec<_>, _>>()?;
    let mut info = RecordingInfo::new(Format::Megatron, Sources::Ranks(ranks.len()));
    info.top_k = paths.first().map_or(Ok(None), |path| top_k(path))?;
    info.notes.push("all ranks of the recording are taken as one EP group".to_owned());
    Ok(Box::new(Megatron { info, ranks, ready: BTreeMap::new().into_iter(), step: 0 }))
}

fn top_k(path: &Path) -> Result<Option<usize>, ImportError> {
    let mut lines = Lines::open(path, &OpenOptions::default())?;
    if !lines.advance()? {
        return Ok(None);
    }
    let row: Row<'_> = serde_json::from_slice(lines.line()).map_err(|error| lines.refuse(Problem::syntax(error)))?;
    Ok(row.topk)
}

impl RankLines {
    fn open(path: &Path, options: &OpenOptions) -> Result<Self, ImportError> {
        let mut lines = Self { lines: Lines::open(path, options)?, ahead: None, last_step: 0 };
        lines.ahead = lines.read()?;
        Ok(lines)
    }

    fn read(&mut self) -> Result<Option<Choices>, ImportError> {
        if !self.lines.advance()? {
            return Ok(None);
        }
        let refuse = |problem| self.lines.refuse(problem);
        let row: Row<'_> = serde_json::from_slice(self.lines.line()).map_err(|error| refuse(Problem::syntax(error)))?;
        let got = row.top_indices.len();
        if let Some(said) = row.num_tokens.filter(|&said| said != got) {
            return Err(refuse(Problem::differs("length of top_indices:", got, said)));
        }
        if row.step < self.last_step {
            return Err(refuse(Problem::differs("step", row.step, format!("{} or later", self.last_step))));
        }
        let layer = layer_id(row.layer).map_err(refuse)?;
        self.last_step = row.step;
        let scope = format!("{} {}", row.stage, row.block.unwrap_or_default());
        Ok(Some(Choices { step: row.step, layer, scope, tokens: row.top_indices }))
    }

    /// Takes the line read ahead if it is of `step`.
    fn take(&mut self, step: u64) -> Result<Option<Choices>, ImportError> {
        if self.ahead.as_ref().is_none_or(|ahead| ahead.step != step) {
            return Ok(None);
        }
        let next = self.read()?;
        Ok(std::mem::replace(&mut self.ahead, next))
    }
}

impl Megatron {
    /// Reads the next step of all ranks; false at the end.
    fn read_step(&mut self) -> Result<bool, ImportError> {
        let steps = self.ranks.iter().filter_map(|rank| rank.ahead.as_ref()).map(|ahead| ahead.step);
        let Some(step) = steps.min() else { return Ok(false) };
        let ranks = self.ranks.len();
        let (mut of_step, mut kept) = (BTreeMap::<Key, Vec<Vec<u32>>>::new(), 0);
        for (index, rank) in self.ranks.iter_mut().enumerate() {
            let mut seen = BTreeMap::<(u32, String), usize>::new();
            while let Some(choices) = rank.take(step)? {
                let occurrence = seen.entry((choices.layer, choices.scope.clone())).or_default();
                let key = (choices.layer, *occurrence, choices.scope);
                *occurrence += 1;
                let counts = &mut of_step.entry(key).or_insert_with(|| vec![Vec::new(); ranks])[index];
                for &expert in choices.tokens.iter().flatten() {
                    let expert = usize::from(expert_id(expert).map_err(|problem| rank.lines.refuse(problem))?);
                    if expert >= counts.len() {
                        kept += expert + 1 - counts.len();
                        counts.resize(expert + 1, 0);
                    }
                    counts[expert] += 1;
                }
                if kept > MAX_STEP_COUNTS {
                    let (got, max) = (kept as u64, MAX_STEP_COUNTS as u64);
                    return Err(rank.lines.refuse(Problem::Limit { what: "counts of one step:", got, max }));
                }
            }
        }
        (self.ready, self.step) = (of_step.into_iter(), step);
        Ok(true)
    }
}

impl Recording for Megatron {
    fn info(&self) -> &RecordingInfo {
        &self.info
    }

    fn next(&mut self, piece: &mut Piece) -> Result<bool, ImportError> {
        loop {
            if let Some(((layer, microbatch, _), rows)) = self.ready.next() {
                (piece.step, piece.layer) = (self.step, layer);
                piece.microbatch = u32::try_from(microbatch).unwrap_or(u32::MAX);
                let experts = rows.iter().map(Vec::len).max().unwrap_or(0);
                let counts = piece.counts(rows.len());
                for row in &rows {
                    counts.extend_from_slice(row);
                    counts.resize(counts.len() + experts - row.len(), 0);
                }
                return Ok(true);
            }
            if !self.read_step()? {
                return Ok(false);
            }
        }
    }
}

impl Recording for OneRank {
    fn info(&self) -> &RecordingInfo {
        &self.info
    }

    fn next(&mut self, piece: &mut Piece) -> Result<bool, ImportError> {
        loop {
            if let Some(token) = self.tokens.find(|token| !token.is_empty()) {
                piece.layer = self.layer;
                let ids = piece.choices(token.len());
                for expert in token {
                    ids.push(expert_id(expert).map_err(|problem| self.rank.lines.refuse(problem))?);
                }
                return Ok(true);
            }
            let Some(step) = self.rank.ahead.as_ref().map(|ahead| ahead.step) else { return Ok(false) };
            if let Some(choices) = self.rank.take(step)? {
                (self.layer, self.tokens) = (choices.layer, choices.tokens.into_iter());
            }
        }
    }
}
