//! AdamW over flat parameters, on masters only, with a warm-up and cosine schedule.

use ultraep_device::math::AdamStep;

use crate::TrainConfig;

/// First and second moments of a run of parameters.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Moments {
    pub(crate) first: Vec<f32>,
    pub(crate) second: Vec<f32>,
}

impl Moments {
    pub(crate) fn zeros(len: usize) -> Self {
        Self { first: vec![0.0; len], second: vec![0.0; len] }
    }
}

/// What one step multiplies and moves by.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Schedule {
    step: AdamStep,
    weight_decay: f32,
}

const BETA1: f32 = 0.9;
const BETA2: f32 = 0.95;

impl Schedule {
    /// For step `step` (from 0) of `config`, with gradients to be multiplied by `gradient_scale` first.
    pub(crate) fn at(config: &TrainConfig, step: u64, gradient_scale: f32) -> Self {
        let t = i32::try_from(step + 1).unwrap_or(i32::MAX);
        let step = AdamStep {
            learning_rate: learning_rate(config, step),
            beta1: BETA1,
            beta2: BETA2,
            correction1: 1.0 - BETA1.powi(t),
            correction2: 1.0 - BETA2.powi(t),
            epsilon: 1e-8,
            weight_decay: 0.0,
            gradient_scale,
        };
        Self { step, weight_decay: config.weight_decay }
    }

    /// Updates `weights` of a matrix (`decay`) or of a norm (not).
    pub(crate) fn apply(&self, decay: Decay, weights: &mut [f32], gradient: &[f32], moments: (&mut [f32], &mut [f32])) {
        let weight_decay = if decay == Decay::Yes { self.weight_decay } else { 0.0 };
        AdamStep { weight_decay, ..self.step }.apply(weights, gradient, moments.0, moments.1);
    }
}

/// Whether weight decay applies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decay {
    Yes,
    No,
}

/// Linear warm-up, then a cosine from the largest rate to a tenth of it at the last step.
fn learning_rate(config: &TrainConfig, step: u64) -> f32 {
    let largest = config.learning_rate;
    if step < config.warmup_steps {
        return largest * (step + 1) as f32 / config.warmup_steps as f32;
    }
    let left = config.steps.saturating_sub(config.warmup_steps).max(1);
    let progress = (step - config.warmup_steps) as f32 / left as f32;
    let cosine = 0.5 * (1.0 + (std::f32::consts::PI * progress.min(1.0)).cos());
    largest * (0.1 + 0.9 * cosine)
}
