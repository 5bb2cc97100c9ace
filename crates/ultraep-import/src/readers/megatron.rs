//! Megatron router trace: `router_trace_rank{r}.jsonl`, a line a (step, layer) with `top_indices` `[[..]]` of that rank's
//! tokens. Several files have the source axis; one alone is a log of tokens.
//!
//! Files are read step by step: all lines of one step from all ranks, then its layers in order. Lines of one rank with the
//! same step, stage and router are microbatches, in order. Memory: the counts of one step.
//!
//! A *router* is a block (`decoder`, `mtp`), a layer in it and, for the heads of multi-token prediction, `mtp_idx`. Routers of
//! the decoder keep their layer; the others, in the order of their names in the first step, get the layers behind it.
//!
//! A record that some rank lacks because its file ended is left out; one that it lacks in the middle has no tokens from it.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use ultraep_plan::MAX_RANKS;
use ultraep_trace::NO_EXPERT;

use crate::choices::push_choices;
use crate::detect::natural_key;
use crate::error::layer_id;
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
    mtp_idx: Option<u64>,
    topk: Option<usize>,
    num_tokens: Option<usize>,
    top_indices: Vec<Vec<i64>>,
}

/// What a line is of, within its block.
type Router = (String, Option<u64>, u64);

/// The layer of every router that is not the decoder's.
#[derive(Clone, Debug, Default)]
struct Routers(BTreeMap<Router, u32>);

/// Which lines of different ranks belong together: layer first, so that layers come in order; then the microbatch.
type Key = (u32, usize, String);

struct Megatron {
    info: RecordingInfo,
    ranks: Vec<RankLines>,
    /// Of the step being given out, in order; counts `[rank][expert]`, as long as the highest expert seen.
    ready: std::collections::btree_map::IntoIter<Key, Vec<Option<Vec<u32>>>>,
    step: u64,
    microbatches: BTreeMap<u32, u32>,
    incomplete: u64,
    lacking: u64,
    padding: u64,
    twice: u64,
}

/// One rank's file and the line that was read ahead.
struct RankLines {
    lines: Lines,
    routers: Routers,
    experts: Option<usize>,
    ahead: Option<Choices>,
    last_step: u64,
    is_over: bool,
}

struct Choices {
    step: u64,
    layer: u32,
    stage: String,
    tokens: Vec<Vec<i64>>,
}

/// A single file.
struct OneRank {
    info: RecordingInfo,
    rank: RankLines,
    tokens: std::vec::IntoIter<Vec<i64>>,
    layer: u32,
}

impl Routers {
    /// From the first step of all files.
    fn find(paths: &[PathBuf]) -> Result<(Self, Vec<String>), ImportError> {
        let (mut others, mut decoder, mut blocks) = (BTreeMap::new(), 0, Vec::new());
        for path in paths {
            let mut lines = Lines::open(path, &OpenOptions::default())?;
            let mut first_step = None;
            while lines.advance()? {
                let Some(row) = lines.json::<Row<'_>>()? else { break };
                if *first_step.get_or_insert(row.step) != row.step {
                    break;
                }
                match Self::key(&row) {
                    None => decoder = decoder.max(layer_id(row.layer).map_err(|p| lines.refuse(p))? + 1),
                    Some(router) => drop(others.insert(router, 0)),
                }
            }
        }
        for (index, (router, layer)) in others.iter_mut().enumerate() {
            let place = paths.first().map_or_else(PathBuf::new, Clone::clone);
            let number = u64::from(decoder) + index as u64;
            *layer = layer_id(number).map_err(|problem| problem.at(&place, Place::File))?;
            let (block, head, of_block) = router;
            let head = head.map_or_else(String::new, |head| format!(" {head}"));
            blocks.push(format!("layer {layer} is {block}{head}, its layer {of_block}"));
        }
        Ok((Self(others), blocks))
    }

    /// The router of a line; `None` for a decoder's.
    fn key(row: &Row<'_>) -> Option<Router> {
        let block = row.block.as_deref().unwrap_or("decoder");
        if block == "decoder" && row.mtp_idx.is_none() {
            return None;
        }
        Some((block.chars().take(40).collect(), row.mtp_idx, row.layer))
    }

    fn layer(&self, row: &Row<'_>) -> Result<u32, Problem> {
        let Some(router) = Self::key(row) else {
            let layer = layer_id(row.layer)?;
            return match self.0.values().any(|&other| other == layer) {
                true => Err(Problem::differs("layer", layer, "one of the first step's decoder")),
                false => Ok(layer),
            };
        };
        let found = self.0.get(&router).copied();
        found.ok_or_else(|| Problem::differs("router", format!("{router:?}"), "one of the first step"))
    }
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
    info.experts = options.experts;
    let (routers, notes) = Routers::find(&[path.to_owned()])?;
    info.notes.extend(notes);
    let rank = RankLines::open(path, &routers, options)?;
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
    let (routers, notes) = Routers::find(paths)?;
    let ranks = paths.iter().map(|path| RankLines::open(path, &routers, options)).collect::<Result<Vec<_>, _>>()?;
    let mut info = RecordingInfo::new(Format::Megatron, Sources::Ranks(ranks.len()));
    info.top_k = paths.first().map_or(Ok(None), |path| top_k(path))?;
    info.experts = options.experts;
    info.notes.push("all ranks of the recording are taken as one EP group".to_owned());
    info.notes.extend(notes);
    Ok(Box::new(Megatron {
        info,
        ranks,
        ready: BTreeMap::new().into_iter(),
        step: 0,
        microbatches: BTreeMap::new(),
        incomplete: 0,
        lacking: 0,
        padding: 0,
        twice: 0,
    }))
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
    fn open(path: &Path, routers: &Routers, options: &OpenOptions) -> Result<Self, ImportError> {
        let (lines, routers, experts) = (Lines::open(path, options)?, routers.clone(), options.experts);
        let mut rank = Self { lines, routers, experts, ahead: None, last_step: 0, is_over: false };
        rank.ahead = rank.read()?;
        Ok(rank)
    }

    fn read(&mut self) -> Result<Option<Choices>, ImportError> {
        if !self.lines.advance()? {
            self.is_over = true;
            return Ok(None);
        }
        let refuse = |problem| self.lines.refuse(problem);
        let Some(row) = self.lines.json::<Row<'_>>()? else {
            self.is_over = true;
            return Ok(None);
        };
        let got = row.top_indices.len();
        if let Some(said) = row.num_tokens.filter(|&said| said != got) {
            return Err(refuse(Problem::differs("length of top_indices:", got, said)));
        }
        if row.step < self.last_step {
            return Err(refuse(Problem::differs("step", row.step, format!("{} or later", self.last_step))));
        }
        let layer = self.routers.layer(&row).map_err(refuse)?;
        let (step, stage, tokens) = (row.step, row.stage.to_string(), row.top_indices);
        self.last_step = step;
        Ok(Some(Choices { step, layer, stage, tokens }))
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
        let (mut of_step, mut kept) = (BTreeMap::<Key, Vec<Option<Vec<u32>>>>::new(), 0);
        let mut ids = Vec::new();
        for (index, rank) in self.ranks.iter_mut().enumerate() {
            let mut seen = BTreeMap::<(u32, String), usize>::new();
            while let Some(choices) = rank.take(step)? {
                let occurrence = seen.entry((choices.layer, choices.stage.clone())).or_default();
                let key = (choices.layer, *occurrence, choices.stage);
                *occurrence += 1;
                let of_ranks = of_step.entry(key).or_insert_with(|| vec![None; ranks]);
                let counts = of_ranks[index].get_or_insert_default();
                for token in &choices.tokens {
                    ids.clear();
                    push_choices(token, rank.experts, &mut ids).map_err(|problem| rank.lines.refuse(problem))?;
                    self.padding += u64::from(ids.iter().all(|&id| id == NO_EXPERT));
                    self.twice +=
                        u64::from((1..ids.len()).any(|at| ids[at] != NO_EXPERT && ids[..at].contains(&ids[at])));
                    for expert in ids.iter().filter(|&&id| id != NO_EXPERT).map(|&id| usize::from(id)) {
                        if expert >= counts.len() {
                            kept += expert + 1 - counts.len();
                            counts.resize(expert + 1, 0);
                        }
                        counts[expert] += 1;
                    }
                }
                if kept > MAX_STEP_COUNTS {
                    let (got, max) = (kept as u64, MAX_STEP_COUNTS as u64);
                    return Err(rank.lines.refuse(Problem::Limit { what: "counts of one step:", got, max }));
                }
            }
        }
        (self.ready, self.step) = (of_step.into_iter(), step);
        self.microbatches.clear();
        Ok(true)
    }
}

impl Recording for Megatron {
    fn info(&self) -> &RecordingInfo {
        &self.info
    }

    fn next(&mut self, piece: &mut Piece) -> Result<bool, ImportError> {
        loop {
            if let Some(((layer, _, _), rows)) = self.ready.next() {
                let is_missing = |row: &Option<Vec<u32>>| row.is_none();
                let mut ranks = rows.iter().zip(&self.ranks);
                if ranks.any(|(row, rank)| is_missing(row) && rank.is_over && rank.ahead.is_none()) {
                    self.incomplete += 1;
                    continue;
                }
                self.lacking += u64::from(rows.iter().any(is_missing));
                let microbatch = self.microbatches.entry(layer).or_default();
                (piece.step, piece.layer, piece.microbatch) = (self.step, layer, *microbatch);
                *microbatch += 1;
                let experts = rows.iter().flatten().map(Vec::len).max().unwrap_or(0);
                let experts = if experts > 0 { experts.max(self.info.experts.unwrap_or(0)) } else { 0 };
                let counts = piece.counts(rows.len());
                for row in &rows {
                    let row = row.as_deref().unwrap_or_default();
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

    fn ending(&self) -> Option<String> {
        let mut words: Vec<String> = self
            .ranks
            .iter()
            .filter_map(|rank| {
                let ending = rank.lines.ending()?;
                Some(format!("{}: {ending}", rank.lines.path.display()))
            })
            .collect();
        if self.incomplete > 0 {
            words.push(format!("{} records that some ranks lack at their end are left out", self.incomplete));
        }
        if self.lacking > 0 {
            words.push(format!("{} records lack some ranks, which count as having no tokens", self.lacking));
        }
        if self.padding > 0 {
            words.push(format!("{} tokens without any expert (padding) left out", self.padding));
        }
        if self.twice > 0 {
            words.push(format!("{} tokens with an expert twice, counted twice", self.twice));
        }
        if words.is_empty() { None } else { Some(words.join("; ")) }
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
                let pushed = push_choices(&token, self.rank.experts, piece.choices(token.len()));
                return pushed.map(|()| true).map_err(|problem| self.rank.lines.refuse(problem));
            }
            let Some(step) = self.rank.ahead.as_ref().map(|ahead| ahead.step) else { return Ok(false) };
            if let Some(choices) = self.rank.take(step)? {
                (self.layer, self.tokens) = (choices.layer, choices.tokens.into_iter());
            }
        }
    }

    fn ending(&self) -> Option<String> {
        self.rank.lines.ending()
    }
}
