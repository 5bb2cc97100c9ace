//! The model that is served: weights once in memory, shared by all ranks and by every restart of them.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use ultraep_device::attention::Rotary;
use ultraep_model::{ExpertParameters, ModelConfig, Parameters};
use ultraep_train::{CheckpointInfo, TrainError, Weights, find_checkpoint};

use crate::ServeError;

/// A model for inference. Cheap to clone.
#[derive(Clone)]
pub struct ServedModel {
    inner: Arc<Inner>,
}

struct Inner {
    name: String,
    config: ModelConfig,
    weights: Weights,
    rotary: Arc<Rotary>,
}

impl ServedModel {
    /// Of `weights`, called `name`, for sequences of up to `context_tokens` tokens.
    pub fn new(name: String, config: ModelConfig, weights: Weights, context_tokens: usize) -> Self {
        let rotary = Arc::new(Rotary::new(context_tokens, config.hidden / config.heads));
        Self { inner: Arc::new(Inner { name, config, weights, rotary }) }
    }

    /// The latest checkpoint of a run folder, or a checkpoint itself. It is called by the folder's name.
    pub fn load(path: &Path, context_tokens: usize) -> Result<Self, TrainError> {
        let checkpoint = find_checkpoint(path)?;
        let info = CheckpointInfo::read(&checkpoint)?;
        let weights = Weights::read(&checkpoint, &info)?;
        let folder = path.canonicalize().ok().and_then(|p| p.file_name().map(|n| n.to_string_lossy().into_owned()));
        let name = format!("ultraep-{}", folder.unwrap_or_else(|| "model".into()));
        Ok(Self::new(name, info.config.model(), weights, context_tokens))
    }

    /// A model with the initial weights of a training with this seed: for tests and measurements that need none trained.
    pub fn initial(config: ModelConfig, seed: u64, context_tokens: usize) -> Result<Self, ServeError> {
        config.validate().map_err(TrainError::from)?;
        let init = ExpertParameters { shape: config.expert_shape(), layers: config.layers, seed };
        let weights = Weights {
            parameters: Parameters::new(&config, seed).map_err(TrainError::from)?,
            router_biases: vec![vec![0.0; config.experts]; config.layers],
            experts: (0..config.layers).map(|layer| init.weights(layer, 0..config.experts)).collect(),
        };
        Ok(Self::new(format!("ultraep-initial-{seed}"), config, weights, context_tokens))
    }

    /// Its name, `id` in the list of models.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Its sizes.
    pub fn config(&self) -> &ModelConfig {
        &self.inner.config
    }

    /// Longest sequence.
    pub fn context_tokens(&self) -> usize {
        self.inner.rotary.positions()
    }

    pub(crate) fn rotary(&self) -> Arc<Rotary> {
        self.inner.rotary.clone()
    }

    pub(crate) fn parameters(&self) -> &Parameters {
        &self.inner.weights.parameters
    }

    pub(crate) fn router_bias(&self, layer: usize) -> &[f32] {
        &self.inner.weights.router_biases[layer]
    }

    /// Weights of some experts of a layer, one after another.
    pub(crate) fn experts(&self, layer: usize, experts: Range<usize>) -> &[f32] {
        let len = self.inner.config.expert_shape().weight_len();
        &self.inner.weights.experts[layer][experts.start * len..experts.end * len]
    }
}
