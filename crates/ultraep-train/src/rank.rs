//! One rank's whole part in a run.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ultraep_baselines::PolicyKind;
use ultraep_fabric::Fabric;
use ultraep_runtime::Endpoint;
use ultraep_text::Corpus;

use crate::report::{Comparison, Observer, Phase, StepReport};
use crate::worker::Worker;
use crate::{CheckpointInfo, TrainConfig, TrainError};

/// What a rank is to do; the same on all ranks.
#[derive(Clone, Debug)]
pub struct RankJob {
    /// The run.
    pub config: TrainConfig,
    /// Its text.
    pub corpus: Arc<Corpus>,
    /// Checkpoint to go on from.
    pub resume: Option<PathBuf>,
    /// Folder for checkpoints; none are saved without it.
    pub checkpoints: Option<PathBuf>,
    /// Set when the run is to stop after the step under way; one rank's wish is enough.
    pub stop: Arc<AtomicBool>,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Steps trained in all.
    pub steps: u64,
    /// Whether it stopped before all steps because it was asked to.
    pub stopped: bool,
    /// The last checkpoint.
    pub checkpoint: Option<PathBuf>,
}

/// Runs one rank over its endpoint. `observer` is heard on rank 0; pass [`crate::Silent`] elsewhere.
///
/// A rank is one core: its CPU time is what the virtual clock reads. So the tensor library must not hand work to threads of
/// its own, which it decides by the environment variables in [`crate::TENSOR_THREADS`] when it first computes.
///
/// # Errors
/// [`TrainError::TensorThreads`] when they are not set; everything that can fail on the way.
pub fn run_rank(fabric: Box<dyn Fabric>, job: &RankJob, observer: &mut dyn Observer) -> Result<Outcome, TrainError> {
    let threads = candle_core::utils::get_num_threads();
    if threads != 1 {
        return Err(TrainError::TensorThreads { threads });
    }
    let config = &job.config;
    let endpoint = Endpoint::new(fabric, config.runtime()?.link);
    let (mut outcome, worker) = train(endpoint, job, config.clone(), Phase::Training, observer)?;
    let mut endpoint = released(worker)?;
    if config.reference && !outcome.stopped {
        let reference = TrainConfig { policy: PolicyKind::None.name().into(), compare_every: 0, ..config.clone() };
        let (second, worker) = train(endpoint, job, reference, Phase::Reference, observer)?;
        outcome.stopped = second.stopped;
        endpoint = released(worker)?;
    }
    endpoint.leave()?;
    Ok(outcome)
}

fn released(worker: Worker) -> Result<Endpoint, TrainError> {
    worker.into_endpoint().ok_or_else(|| TrainError::Encode("a tensor still holds the experts".into()))
}

fn train(
    endpoint: Endpoint,
    job: &RankJob,
    config: TrainConfig,
    phase: Phase,
    observer: &mut dyn Observer,
) -> Result<(Outcome, Worker), TrainError> {
    let text_digest = job.corpus.digest();
    let mut worker = Worker::new(config.clone(), endpoint, job.corpus.clone())?;
    let first_step = match &job.resume {
        Some(path) => {
            let info = CheckpointInfo::read(path)?;
            info.check_against(&config, text_digest, path)?;
            worker.load(path, &info)?;
            info.step
        }
        None => 0,
    };
    observer.begin(phase, first_step)?;
    let mut outcome = Outcome { steps: first_step, stopped: false, checkpoint: None };
    let mut comparisons = 0;
    for step in first_step..config.steps {
        if config.compare_every > 0 && step % config.compare_every == config.compare_every / 2 {
            compare(&mut worker, step, comparisons, observer)?;
            comparisons += 1;
        }
        let result = worker.step(step, job.stop.load(Ordering::Relaxed))?;
        observer.step(&StepReport {
            phase,
            step,
            loss: result.pass.loss,
            gradient_norm: result.gradient_norm,
            tokens: config.tokens_per_step(),
            time: result.pass.time,
            weight_sync_ns: result.pass.weight_sync_ns,
            wall_ns: result.pass.wall_ns,
            records: &result.pass.records,
        })?;
        outcome.steps = step + 1;
        outcome.stopped = result.pass.stop && step + 1 < config.steps;
        let last = outcome.stopped || step + 1 == config.steps;
        let due = last || (config.save_every > 0 && (step + 1) % config.save_every == 0);
        if let (Some(folder), Phase::Training, true) = (&job.checkpoints, phase, due) {
            let path = save(&worker, folder, step + 1, text_digest, observer)?;
            outcome.checkpoint = Some(path);
        }
        if outcome.stopped {
            break;
        }
    }
    Ok((outcome, worker))
}

fn save(
    worker: &Worker,
    folder: &Path,
    step: u64,
    text_digest: u64,
    observer: &mut dyn Observer,
) -> Result<PathBuf, TrainError> {
    let path = worker.save(folder, step, text_digest)?;
    observer.saved(step, &path)?;
    Ok(path)
}

/// Rehearses the step under every policy compared, from the same weights on the same batch, and holds the outputs to be
/// equal. Each runs twice, the second time in reverse order, and the faster counts: other work on the machine only ever
/// adds time. The order rotates from comparison to comparison. The first time, gradients are compared too.
fn compare(worker: &mut Worker, step: u64, nth: usize, observer: &mut dyn Observer) -> Result<(), TrainError> {
    let mut kinds = worker.config.compared()?;
    let count = kinds.len();
    kinds.rotate_left(nth % count.max(1));
    let mut reference: Option<(PolicyKind, f32)> = None;
    let mut reference_gradients = None;
    let mut passes = Vec::with_capacity(count);
    for &kind in &kinds {
        let pass = worker.rehearse(step, kind)?;
        let mut gradient_difference = None;
        if !kind.forces_routing() {
            let (first, expected) = *reference.get_or_insert((kind, pass.loss));
            check_loss(kind, pass.loss, first, expected)?;
            if nth == 0 {
                let gradients = worker.gradients()?;
                match &reference_gradients {
                    None => reference_gradients = Some(gradients),
                    Some(reference) => gradient_difference = Some(difference(worker, &gradients, reference)?),
                }
            }
        }
        worker.clear_gradients()?;
        passes.push((pass, gradient_difference));
    }
    for (&kind, (pass, _)) in kinds.iter().zip(&mut passes).rev() {
        let again = worker.rehearse(step, kind)?;
        worker.clear_gradients()?;
        check_loss(kind, again.loss, kind, pass.loss)?;
        if again.time.total_ns < pass.time.total_ns {
            *pass = again;
        }
    }
    for (kind, (pass, gradient_difference)) in kinds.into_iter().zip(passes) {
        observer.compared(&Comparison {
            step,
            policy: kind,
            tokens: worker.config.tokens_per_step(),
            loss: pass.loss,
            time: pass.time,
            weight_sync_ns: pass.weight_sync_ns,
            wall_ns: pass.wall_ns,
            gradient_difference,
            records: &pass.records,
        })?;
    }
    Ok(())
}

/// Outputs must not depend on the policy, bit for bit.
fn check_loss(policy: PolicyKind, got: f32, reference: PolicyKind, expected: f32) -> Result<(), TrainError> {
    if got.to_bits() == expected.to_bits() {
        return Ok(());
    }
    let (policy, reference) = (policy.name(), reference.name());
    Err(TrainError::Differs { what: "loss", policy, got, reference, expected })
}

/// `|a - b| / |b|` over the gradients of all ranks; dense ones, which all ranks share, count once.
fn difference(worker: &Worker, a: &[f32], b: &[f32]) -> Result<f64, TrainError> {
    let rank = worker.experts.lock().manager.rank().index();
    let from = if rank == 0 { 0 } else { worker.dense.len() };
    let (mut squares, mut norm) = (0f64, 0f64);
    for (&a, &b) in a[from..].iter().zip(&b[from..]) {
        squares += (f64::from(a) - f64::from(b)).powi(2);
        norm += f64::from(b).powi(2);
    }
    let (squares, norm) = (worker.sum_over_ranks(squares as f32)?, worker.sum_over_ranks(norm as f32)?);
    Ok((f64::from(squares) / f64::from(norm).max(f64::MIN_POSITIVE)).sqrt())
}
