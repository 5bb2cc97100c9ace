//! Routing recorded once, prompt by prompt.
//!
//! A token's choices depend on its prompt up to itself, bit for bit, and not on the batch it is computed in. So the routing
//! of any batch is put together from that of its prompts, exactly, and all policies replay the same recorded routing.

use std::sync::atomic::{AtomicU64, Ordering};

use ultraep_baselines::PolicyKind;
use ultraep_fabric::{Fabric, run_threads};
use ultraep_model::Wanted;
use ultraep_schedule::{Batch, Limits, Request, RequestId, Scheduler};

use super::prompts::Prompt;
use crate::rank::{ChunkInput, GroupConfig, RankEngine};
use crate::{ServeError, ServedModel};

/// What a prompt's tokens chose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordedPrompt {
    /// Tokens.
    pub tokens: u32,
    /// Experts by layer, `[layers][tokens * top_k]`.
    pub choices: Vec<Vec<u16>>,
}

/// Number of a prompt, and what its tokens chose by layer.
type Numbered = (usize, Vec<Vec<u16>>);

/// Tokens of a rank in one batch while recording.
const CHUNK: u32 = 512;

/// Runs the model over all prompts, spread over `cores` ranks, and records what their tokens chose. `done` hears the tokens
/// that are through.
pub fn record(
    model: &ServedModel,
    prompts: &[Prompt],
    cores: usize,
    done: &(dyn Fn(u64) + Sync),
) -> Result<Vec<RecordedPrompt>, ServeError> {
    let experts = model.config().experts;
    let ranks = (1..=cores.clamp(1, experts)).rev().find(|r| experts.is_multiple_of(*r)).unwrap_or(1);
    let longest = prompts.iter().map(|p| p.tokens.len()).max().unwrap_or(1);
    let limits = Limits {
        ranks,
        chunk_tokens: CHUNK * ranks as u32,
        context_per_token: 0,
        kv_tokens_per_rank: longest as u32,
        sequences_per_rank: 1,
        queue_max: prompts.len().max(1),
    };
    let group = GroupConfig {
        ranks,
        slots: 0,
        policies: vec![PolicyKind::None],
        params: Default::default(),
        tokens_per_rank: CHUNK as usize,
        link: Default::default(),
        checked: false,
        timeout: std::time::Duration::from_secs(600),
        cores,
    };
    let runtime = group.runtime(model)?;
    let tokens_done = AtomicU64::new(0);
    let run = |fabric: Box<dyn Fabric>| -> Result<Vec<Numbered>, ServeError> {
        let rank = fabric.rank().index();
        let mut engine = RankEngine::new(fabric, model, &runtime)?;
        // Every rank composes the same batches.
        let mut scheduler = Scheduler::new(limits)?;
        for (id, prompt) in prompts.iter().enumerate() {
            let prompt_tokens = prompt.tokens.len() as u32;
            scheduler.admit(Request { id: RequestId(id as u64), prompt_tokens, new_tokens: 0 })?;
        }
        let mut batch = Batch::default();
        let mut recorded: Vec<Numbered> = Vec::new();
        loop {
            scheduler.compose(&mut batch);
            if batch.is_empty() {
                break;
            }
            let part = |chunk: &ultraep_schedule::Chunk| {
                let tokens = &prompts[chunk.request.0 as usize].tokens;
                let tokens = &tokens[chunk.start as usize..(chunk.start + chunk.tokens) as usize];
                ChunkInput { tokens, wanted: Wanted::Nothing }
            };
            let own = batch.of_rank(rank);
            let inputs: Vec<_> = own.iter().map(part).collect();
            let inferred = engine.run(&batch, &inputs, PolicyKind::None)?.whole()?;
            engine.finish_batch()?;
            append(&mut recorded, own, &inferred.choices, model.config().top_k);
            if rank == 0 {
                done(tokens_done.fetch_add(batch.tokens(), Ordering::Relaxed) + batch.tokens());
            }
        }
        engine.leave()?;
        Ok(recorded)
    };
    let parts = run_threads(&group.group(&runtime), run).map_err(|error| ServeError::Ranks(error.to_string()))?;
    let mut all: Vec<_> = parts.into_iter().flatten().collect();
    all.sort_by_key(|(id, _)| *id);
    Ok(all
        .into_iter()
        .zip(prompts)
        .map(|((_, choices), p)| RecordedPrompt { tokens: p.tokens.len() as u32, choices })
        .collect())
}

/// Adds what the tokens of a rank's chunks chose.
fn append(recorded: &mut Vec<Numbered>, own: &[ultraep_schedule::Chunk], choices: &[Vec<u32>], top_k: usize) {
    let mut first = 0;
    for chunk in own {
        let id = chunk.request.0 as usize;
        if chunk.start == 0 {
            recorded.push((id, vec![Vec::new(); choices.len()]));
        }
        let end = first + chunk.tokens as usize * top_k;
        if let Some((_, layers)) = recorded.iter_mut().find(|(other, _)| *other == id) {
            for (layer, chosen) in layers.iter_mut().zip(choices) {
                // Experts have at most 16 bits: a topology holds no more.
                layer.extend(chosen[first..end].iter().map(|&expert| expert as u16));
            }
        }
        first = end;
    }
}
