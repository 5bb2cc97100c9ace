//! Counts for a case from a recording, in any format that `ultraep replay` reads.

use std::path::Path;

use ultraep_import::{
    Grouping, Microbatch, Microbatches, OpenOptions, RecordingInfo, SourceRule, Survey, open_with, survey,
};
use ultraep_sim::RecordedLoads;

use super::plan_file::Case;
use crate::error::CliError;

/// Most microbatches kept, over all layers.
const MAX_MICROBATCHES: usize = 1 << 16;

/// What a case asks of a recording.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    /// Ranks of the group.
    pub(super) ranks: u32,
    /// Routed experts of a layer.
    pub(super) experts: u32,
    /// Experts that a token chooses.
    pub(super) top_k: u32,
}

/// The microbatches of a recording. It must be of a model with the case's experts and top-k.
pub(super) fn read(path: &Path, case: &Case, shape: Shape) -> Result<RecordedLoads, CliError> {
    let Shape { ranks, experts, .. } = shape;
    let refused =
        |why: &dyn std::fmt::Display| CliError::Input(format!("case {:?}: {}: {why}", case.name, path.display()));
    let open = || open_with(&[path.to_path_buf()], &OpenOptions::default()).map_err(|e| refused(&e));
    let mut recording = open()?;
    // Another model's routing says nothing about this one: look at all of it first.
    let found = survey(&mut *recording).map_err(|e| refused(&e))?;
    same_model(case, shape, recording.info(), &found).map_err(|why| refused(&why))?;
    let mut recording = open()?;
    let grouping = Grouping {
        ranks: ranks as usize,
        experts: experts as usize,
        microbatch_tokens: case.tokens.saturating_mul(ranks) as usize,
        rule: SourceRule::Blocks,
        scale: 1,
    };
    let mut microbatches = Microbatches::new(&mut *recording, grouping).map_err(|e| refused(&e))?;
    let mut layers: Vec<(u32, Vec<Vec<u32>>)> = Vec::new();
    let mut microbatch = Microbatch::default();
    let mut kept = 0;
    while kept < MAX_MICROBATCHES && microbatches.next(&mut microbatch).map_err(|e| refused(&e))? {
        let counts = std::mem::take(&mut microbatch.counts);
        match layers.iter_mut().find(|(layer, _)| *layer == microbatch.layer) {
            Some((_, all)) => all.push(counts),
            None => layers.push((microbatch.layer, vec![counts])),
        }
        kept += 1;
    }
    if layers.is_empty() {
        let tokens = grouping.microbatch_tokens;
        return Err(refused(&format!("no microbatch of {tokens} tokens is recorded in it: give fewer `tokens`")));
    }
    layers.sort_by_key(|(layer, _)| *layer);
    let layers = layers.into_iter().map(|(_, all)| all).collect();
    RecordedLoads::new((ranks as usize, experts as usize), case.microbatches, layers).map_err(|e| refused(&e))
}

/// Refuses a recording of another model: with other experts, or another top-k where that can be told.
fn same_model(case: &Case, shape: Shape, info: &RecordingInfo, found: &Survey) -> Result<(), String> {
    let (said, seen) = (case.load.recorded_experts.map(|e| e as usize).or(info.experts), found.experts);
    let experts = shape.experts as usize;
    if let Some(said) = said.filter(|&said| said != experts || seen > experts) {
        let said = said.max(seen);
        return Err(format!("{said} experts are recorded, the case has {experts}: give `experts = {said}`"));
    }
    // The last few experts may be idle; a whole sixteenth of them is another model.
    if said.is_none() && (seen > experts || (experts - seen) * 16 >= experts) {
        return Err(format!(
            "experts up to {} occur in it, the case has {experts}: give `experts` as the recorded model has them, or \
             `recorded_experts = {experts}` in `load` if it is a recording of such a model whose last experts never occur",
            seen.saturating_sub(1)
        ));
    }
    let tokens: u64 = found.layers.values().map(|layer| layer.tokens).sum();
    let choices: u64 = found.layers.values().map(|layer| layer.choices).sum();
    // Padding has fewer choices than the others, nothing has more.
    let top_k = info.top_k.or_else(|| usize::try_from(choices.div_ceil(tokens.max(1))).ok().filter(|_| tokens > 0));
    match top_k.filter(|&top_k| top_k != shape.top_k as usize) {
        Some(top_k) => {
            Err(format!("top-{top_k} is recorded, the case has top-{}: give `top_k = {top_k}`", shape.top_k))
        }
        None => Ok(()),
    }
}
