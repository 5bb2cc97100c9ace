//! JSON of counts by rank and call: `{"ranks": {"0": [{"call": 0, "tokens_per_expert": [..]}, ..], ..}}`, with `layer` where
//! there are several. A call is a step; it has the source axis.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use ultraep_plan::{MAX_EXPERTS, MAX_RANKS};

use crate::error::{count, layer_id};
use crate::input::read_whole;
use crate::{Format, ImportError, OpenOptions, Piece, Place, Problem, Recording, RecordingInfo, Sources};

#[derive(Debug, Deserialize)]
struct File {
    ranks: BTreeMap<String, Vec<Call>>,
}

#[derive(Debug, Deserialize)]
struct Call {
    call: Option<u64>,
    #[serde(default)]
    layer: u64,
    tokens_per_expert: Vec<i64>,
}

struct Calls {
    info: RecordingInfo,
    ready: std::collections::btree_map::IntoIter<(u64, u32), Vec<Vec<u32>>>,
    experts: usize,
    incomplete: usize,
}

pub(crate) fn open(path: &Path, options: &OpenOptions) -> Result<Box<dyn Recording>, ImportError> {
    let bytes = read_whole(path, options)?;
    let file: File = serde_json::from_slice(&bytes)
        .map_err(|error| Problem::syntax(&error).at(path, Place::Line(error.line() as u64)))?;
    let ranks = file.ranks.len();
    if !(1..=MAX_RANKS).contains(&ranks) {
        let (got, max) = (ranks as u64, MAX_RANKS as u64);
        return Err(Problem::Limit { what: "ranks, at least 1:", got, max }.at(path, Place::File));
    }
    let mut all: BTreeMap<(u64, u32), Vec<Vec<u32>>> = BTreeMap::new();
    let mut experts = options.experts;
    for (name, calls) in &file.ranks {
        let refuse = |problem: Problem| problem.at(path, Place::Key(format!("ranks.{}", shown(name))));
        let rank = name.parse().ok().filter(|&rank: &usize| rank < ranks);
        let Some(rank) = rank else {
            return Err(refuse(Problem::differs("rank", shown(name), format!("0 to {}", ranks - 1))));
        };
        for (index, call) in calls.iter().enumerate() {
            let expected = *experts.get_or_insert(call.tokens_per_expert.len());
            if call.tokens_per_expert.len() != expected || !(1..=MAX_EXPERTS).contains(&expected) {
                return Err(refuse(Problem::differs("number of experts", call.tokens_per_expert.len(), expected)));
            }
            let counts = call.tokens_per_expert.iter().map(|&tokens| count(tokens.into()));
            let counts = counts.collect::<Result<Vec<u32>, Problem>>().map_err(refuse)?;
            let key = (call.call.unwrap_or(index as u64), layer_id(call.layer).map_err(refuse)?);
            let row = &mut all.entry(key).or_insert_with(|| vec![Vec::new(); ranks])[rank];
            if !std::mem::replace(row, counts).is_empty() {
                return Err(refuse(Problem::Syntax(format!("call {} of layer {} twice", key.0, key.1))));
            }
        }
    }
    let before = all.len();
    all.retain(|_, rows| rows.iter().all(|row| !row.is_empty()));
    let incomplete = before - all.len();
    let mut info = RecordingInfo::new(Format::CallLog, Sources::Ranks(ranks));
    info.experts = experts;
    info.notes.push("a call is a step".to_owned());
    Ok(Box::new(Calls { info, ready: all.into_iter(), experts: experts.unwrap_or(0), incomplete }))
}

fn shown(name: &str) -> String {
    name.chars().take(40).collect()
}

impl Recording for Calls {
    fn info(&self) -> &RecordingInfo {
        &self.info
    }

    fn next(&mut self, piece: &mut Piece) -> Result<bool, ImportError> {
        let Some(((step, layer), rows)) = self.ready.next() else { return Ok(false) };
        (piece.step, piece.microbatch, piece.layer) = (step, 0, layer);
        let counts = piece.counts(rows.len());
        counts.reserve(rows.len() * self.experts);
        rows.iter().for_each(|row| counts.extend_from_slice(row));
        Ok(true)
    }

    fn ending(&self) -> Option<String> {
        (self.incomplete > 0).then(|| format!("{} calls that some ranks lack are left out", self.incomplete))
    }
}
