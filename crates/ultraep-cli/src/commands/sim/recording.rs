//! Counts for a case from a recording, in any format that `ultraep replay` reads.

use std::path::Path;

use ultraep_import::{Grouping, Microbatch, Microbatches, OpenOptions, SourceRule, open_with};
use ultraep_sim::RecordedLoads;

use super::plan_file::Case;
use crate::error::CliError;

/// Most microbatches kept, over all layers.
const MAX_MICROBATCHES: usize = 1 << 16;

/// The microbatches of a recording, for a group of `ranks` ranks. The recording must have the model's experts.
pub(super) fn read(path: &Path, case: &Case, ranks: u32, experts: u32) -> Result<RecordedLoads, CliError> {
    let refused =
        |why: &dyn std::fmt::Display| CliError::Input(format!("case {:?}: {}: {why}", case.name, path.display()));
    let mut recording = open_with(&[path.to_path_buf()], &OpenOptions::default()).map_err(|e| refused(&e))?;
    if let Some(recorded) = recording.info().experts.filter(|&recorded| recorded != experts as usize) {
        return Err(refused(&format!("{recorded} experts are recorded, the case has {experts}: give `experts`")));
    }
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
