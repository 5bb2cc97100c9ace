//! What rank 0 tells about a run while it goes.

use std::path::Path;

use ultraep_baselines::PolicyKind;
use ultraep_runtime::{LayerRecord, StepTime};

use crate::TrainError;

/// Part of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The training itself.
    Training,
    /// The second training, without balancing, for its loss curve.
    Reference,
}

/// One optimizer step.
#[derive(Debug)]
pub struct StepReport<'a> {
    /// Which training.
    pub phase: Phase,
    /// Step, from 0.
    pub step: u64,
    /// Mean cross-entropy over all ranks and microbatches, nats a byte.
    pub loss: f32,
    /// Global norm of the gradient before clipping.
    pub gradient_norm: f32,
    /// Tokens of all ranks.
    pub tokens: u64,
    /// Parallel time.
    pub time: StepTime,
    /// Weight sync from its start to its end, hidden or not, over all layers.
    pub weight_sync_ns: u64,
    /// Wall time.
    pub wall_ns: u64,
    /// Every (layer, microbatch).
    pub records: &'a [LayerRecord],
}

/// One policy on the batch at hand: forward, backward and all-reduce from the same weights, nothing kept.
#[derive(Debug)]
pub struct Comparison<'a> {
    /// At which step.
    pub step: u64,
    /// The policy.
    pub policy: PolicyKind,
    /// Tokens of all ranks.
    pub tokens: u64,
    /// Mean cross-entropy.
    pub loss: f32,
    /// Parallel time, without the optimizer.
    pub time: StepTime,
    /// Weight sync from its start to its end, hidden or not, over all layers.
    pub weight_sync_ns: u64,
    /// Wall time, without the optimizer.
    pub wall_ns: u64,
    /// Relative difference of all gradients from those of the first policy compared, where it was measured.
    pub gradient_difference: Option<f64>,
    /// Every (layer, microbatch).
    pub records: &'a [LayerRecord],
}

/// Hears what happens on rank 0.
pub trait Observer {
    /// A training begins, at step `first_step`.
    fn begin(&mut self, phase: Phase, first_step: u64) -> Result<(), TrainError>;
    /// A step is over.
    fn step(&mut self, report: &StepReport<'_>) -> Result<(), TrainError>;
    /// A policy was compared.
    fn compared(&mut self, comparison: &Comparison<'_>) -> Result<(), TrainError>;
    /// A checkpoint is complete.
    fn saved(&mut self, step: u64, path: &Path) -> Result<(), TrainError>;
}

/// Hears nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Observer for Silent {
    fn begin(&mut self, _: Phase, _: u64) -> Result<(), TrainError> {
        Ok(())
    }

    fn step(&mut self, _: &StepReport<'_>) -> Result<(), TrainError> {
        Ok(())
    }

    fn compared(&mut self, _: &Comparison<'_>) -> Result<(), TrainError> {
        Ok(())
    }

    fn saved(&mut self, _: u64, _: &Path) -> Result<(), TrainError> {
        Ok(())
    }
}
