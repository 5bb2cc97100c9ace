//! The replay against the real engine: the same batches, counts and plans compared exactly, times as they are.

use serde::{Deserialize, Serialize};
use ultraep_baselines::PolicyKind;
use ultraep_fabric::{Fabric, run_threads};
use ultraep_model::Wanted;
use ultraep_runtime::LayerRecord;
use ultraep_schedule::{Batch, BatchTime, Limits, Request, RequestId, Scheduler};

use super::prompts::Prompt;
use super::replay::{Replay, World};
use crate::rank::{ChunkInput, RankEngine};
use crate::{ServeError, ServedModel};

/// How the replay compares with the real engine.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SpotCheck {
    /// Batches run on both.
    pub batches: usize,
    /// Layers whose counts were compared; all were equal, or the check fails.
    pub layers: usize,
    /// Time of these batches by policy: replayed, and on the real engine's virtual clock, in nanoseconds.
    pub times_ns: Vec<(String, u64, u64)>,
}

/// Runs the first `batches` batches of all prompts at once on the real engine under every policy (but those that force
/// routing), and replays them. The engine's ranks are threads on `cores` cores; each batch runs twice and the faster counts.
pub fn spot_check(
    world: &World,
    model: &ServedModel,
    prompts: &[Prompt],
    limits: Limits,
    batches: usize,
    cores: usize,
) -> Result<SpotCheck, ServeError> {
    let kinds: Vec<_> = world.settings.policies.iter().copied().filter(|kind| !kind.forces_routing()).collect();
    let list = composed(limits, prompts, batches)?;
    let mut check = SpotCheck { batches: list.len(), ..SpotCheck::default() };
    for kind in kinds {
        let (first, records) = real(world, model, prompts, limits, &list, kind, cores)?;
        let (second, _) = real(world, model, prompts, limits, &list, kind, cores)?;
        let prompt_of = (0..prompts.len() as u32).collect();
        let mut replay = Replay::new(world, kind, prompt_of, u64::from(limits.chunk_tokens))?;
        let mut replayed_ns = 0;
        for (batch, layers) in list.iter().zip(&records) {
            for record in layers {
                if replay.counts_of(batch, record.at.layer) != record.counts {
                    let reason =
                        format!("batch {}: the replay's counts differ from the engine's", record.at.microbatch);
                    return Err(ServeError::Setting(reason));
                }
                check.layers += 1;
            }
            replayed_ns += replay.batch_ns(batch);
        }
        replay.finish()?;
        let real_ns = first.iter().zip(&second).map(|(a, b)| a.min(b)).sum();
        check.times_ns.push((kind.name().into(), replayed_ns, real_ns));
    }
    Ok(check)
}

fn composed(limits: Limits, prompts: &[Prompt], batches: usize) -> Result<Vec<Batch>, ServeError> {
    let mut scheduler = Scheduler::new(Limits { queue_max: limits.queue_max.max(prompts.len()), ..limits })?;
    for (id, prompt) in prompts.iter().enumerate() {
        let prompt_tokens = prompt.tokens.len() as u32;
        scheduler.admit(Request { id: RequestId(id as u64), prompt_tokens, new_tokens: 1 })?;
    }
    let mut list = Vec::new();
    while list.len() < batches {
        let mut batch = Batch::default();
        scheduler.compose(&mut batch);
        if batch.is_empty() {
            break;
        }
        list.push(batch);
    }
    Ok(list)
}

/// Virtual time of every batch, and what its layers did.
fn real(
    world: &World,
    model: &ServedModel,
    prompts: &[Prompt],
    limits: Limits,
    list: &[Batch],
    kind: PolicyKind,
    cores: usize,
) -> Result<(Vec<u64>, Vec<Vec<LayerRecord>>), ServeError> {
    let group = world.settings.group(vec![kind], limits.chunk_tokens_per_rank() as usize, cores);
    let runtime = group.runtime(model)?;
    let run = |fabric: Box<dyn Fabric>| -> Result<(Vec<u64>, Vec<Vec<LayerRecord>>), ServeError> {
        let rank = fabric.rank().index();
        let mut engine = RankEngine::new(fabric, model, &runtime)?;
        let (mut times, mut records) = (Vec::new(), Vec::new());
        for batch in list {
            let part = |chunk: &ultraep_schedule::Chunk| {
                let tokens = &prompts[chunk.request.0 as usize].tokens;
                let tokens = &tokens[chunk.start as usize..(chunk.start + chunk.tokens) as usize];
                let wanted = if chunk.produces.is_some() { Wanted::Last } else { Wanted::Nothing };
                ChunkInput { tokens, wanted }
            };
            let inputs: Vec<_> = batch.of_rank(rank).iter().map(part).collect();
            engine.run(batch, &inputs, kind)?.whole()?;
            let (time, _, layers) = engine.finish_batch()?;
            times.push(time.total_ns);
            records.push(layers);
        }
        engine.leave()?;
        Ok((times, records))
    };
    let results = run_threads(&group.group(&runtime), run).map_err(|error| ServeError::Ranks(error.to_string()))?;
    Ok(results.into_iter().next().unwrap_or_default())
}
