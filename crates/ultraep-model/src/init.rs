//! Parameters and their initial values: a function of the seed and the parameter's name alone, so that every rank and
//! every number of ranks starts from the same model.

use std::ops::Range;

use candle_core::{Device, Result, Tensor, Var};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use ultraep_device::ExpertShape;

use crate::{ModelConfig, VOCABULARY};

/// A dense parameter: the same on all ranks.
#[derive(Clone, Debug)]
pub struct Parameter {
    /// Name in checkpoints, such as `layers.0.attention.qkv`.
    pub name: String,
    /// Its value.
    pub var: Var,
    /// Whether weight decay applies: to matrices, not to norm weights.
    pub decay: bool,
}

/// All dense parameters of a model, in a fixed order.
#[derive(Clone, Debug)]
pub struct Parameters {
    all: Vec<Parameter>,
}

impl Parameters {
    /// Initial values for `config`.
    pub fn new(config: &ModelConfig, seed: u64) -> Result<Self> {
        let d = config.hidden;
        let mut parameters = Self { all: Vec::new() };
        parameters.push(seed, "embedding".into(), &[VOCABULARY, d], 1.0)?;
        // Residual branches start small enough that the sum of 2 L of them does not grow with depth.
        let residual = 1.0 / (2.0 * config.layers as f32).sqrt();
        for layer in 0..config.layers {
            let name = |part: &str| format!("layers.{layer}.{part}");
            parameters.push_ones(name("attention.norm"), d)?;
            parameters.push(seed, name("attention.qkv"), &[d, 3 * d], fan_in(d))?;
            parameters.push(seed, name("attention.out"), &[d, d], fan_in(d) * residual)?;
            parameters.push_ones(name("moe.norm"), d)?;
            parameters.push(seed, name("moe.router"), &[d, config.experts], fan_in(d))?;
        }
        parameters.push_ones("head.norm".into(), d)?;
        parameters.push(seed, "head.out".into(), &[d, VOCABULARY], fan_in(d))?;
        Ok(parameters)
    }

    fn push(&mut self, seed: u64, name: String, shape: &[usize], deviation: f32) -> Result<()> {
        let mut values = vec![0.0; shape.iter().product()];
        fill(seed, &name, deviation, &mut values);
        let var = Var::from_tensor(&Tensor::from_vec(values, shape, &Device::Cpu)?)?;
        self.all.push(Parameter { name, var, decay: true });
        Ok(())
    }

    fn push_ones(&mut self, name: String, len: usize) -> Result<()> {
        let var = Var::from_tensor(&Tensor::from_vec(vec![1f32; len], len, &Device::Cpu)?)?;
        self.all.push(Parameter { name, var, decay: false });
        Ok(())
    }

    /// All of them, in order.
    pub fn all(&self) -> &[Parameter] {
        &self.all
    }

    /// Elements in all.
    pub fn elements(&self) -> usize {
        self.all.iter().map(|p| p.var.elem_count()).sum()
    }

    /// The value of a parameter as a tensor that gradients flow to.
    pub(crate) fn tensor(&self, name: &str) -> Tensor {
        let found = self.all.iter().find(|p| p.name == name);
        found
            .unwrap_or_else(|| panic!("no parameter {name}: the model and its list of parameters differ"))
            .var
            .as_tensor()
            .clone()
    }
}

/// Initial values of experts.
#[derive(Clone, Copy, Debug)]
pub struct ExpertParameters {
    /// Sizes of an expert.
    pub shape: ExpertShape,
    /// Layers of the model; scales the output matrices.
    pub layers: usize,
    /// Seed of the model.
    pub seed: u64,
}

impl ExpertParameters {
    /// Name of an expert in checkpoints.
    pub fn name(layer: usize, expert: usize) -> String {
        format!("layers.{layer}.experts.{expert}")
    }

    /// Weights of the experts `experts` of a layer, one after another.
    pub fn weights(&self, layer: usize, experts: Range<usize>) -> Vec<f32> {
        let mut all = vec![0.0; experts.len() * self.shape.weight_len()];
        let residual = 1.0 / (2.0 * self.layers as f32).sqrt();
        for (expert, weights) in experts.zip(all.chunks_exact_mut(self.shape.weight_len())) {
            let name = Self::name(layer, expert);
            let (fc1, fc2) = weights.split_at_mut(self.shape.fc1_len());
            fill(self.seed, &format!("{name}.fc1"), fan_in(self.shape.hidden), fc1);
            fill(self.seed, &format!("{name}.fc2"), fan_in(self.shape.intermediate) * residual, fc2);
        }
        all
    }
}

fn fan_in(inputs: usize) -> f32 {
    1.0 / (inputs as f32).sqrt()
}

/// Uniform values of the given standard deviation: arithmetic only, so the same on every machine.
fn fill(seed: u64, name: &str, deviation: f32, values: &mut [f32]) {
    let hash =
        name.bytes().fold(0xCBF2_9CE4_8422_2325 ^ seed, |h: u64, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01B3));
    let mut rng = ChaCha8Rng::seed_from_u64(hash);
    let range = deviation * 3f32.sqrt();
    for value in values {
        let unit = (rng.next_u32() >> 8) as f32 / (1u32 << 23) as f32 - 1.0;
        *value = unit * range;
    }
}
