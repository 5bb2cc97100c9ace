//! The weights of a checkpoint alone, for inference: no moments, and experts whatever rank wrote them.

use std::path::Path;

use candle_core::{Device, Tensor};
use ultraep_model::{ExpertParameters, Parameters};

use crate::checkpoint::{DENSE, TensorFile, bias_name, refuse};
use crate::{CheckpointInfo, TrainError};

/// All weights of a model.
#[derive(Clone, Debug)]
pub struct Weights {
    /// Dense parameters.
    pub parameters: Parameters,
    /// Bias of every expert in each layer's router, `[layers][E]`.
    pub router_biases: Vec<Vec<f32>>,
    /// Experts of each layer, one after another, `[layers][E * weight_len]`.
    pub experts: Vec<Vec<f32>>,
}

impl Weights {
    /// Reads those of the checkpoint at `path`, whose manifest is `info`. Files are checked against their digests.
    pub fn read(path: &Path, info: &CheckpointInfo) -> Result<Self, TrainError> {
        let config = &info.config;
        config.validate()?;
        check_room(path, info)?;
        let dense = TensorFile::read(path.join(DENSE))?;
        let parameters = Parameters::new(&config.model(), config.seed)?;
        for parameter in parameters.all() {
            let mut values = vec![0.0; parameter.var.elem_count()];
            dense.copy(&parameter.name, &mut values)?;
            parameter.var.set(&Tensor::from_vec(values, parameter.var.shape(), &Device::Cpu)?)?;
        }
        let bias = |layer| {
            let mut bias = vec![0.0; config.experts];
            dense.copy(&bias_name(layer), &mut bias).map(|()| bias)
        };
        let router_biases = (0..config.layers).map(bias).collect::<Result<_, _>>()?;
        Ok(Self { parameters, router_biases, experts: read_experts(path, info)? })
    }
}

/// Refuses a manifest whose model has more weights than its files have room for, before memory is taken for them.
fn check_room(path: &Path, info: &CheckpointInfo) -> Result<(), TrainError> {
    let config = &info.config;
    let product = |sizes: &[usize]| sizes.iter().try_fold(4_u64, |product, &size| product.checked_mul(size as u64));
    let experts = product(&[config.experts, config.layers, config.model().expert_shape().weight_len()]);
    let attention = product(&[4, config.layers, config.hidden, config.hidden]);
    let needed = experts.zip(attention).and_then(|(experts, attention)| experts.checked_add(attention));
    let names = info.expert_files.iter().map(|(name, ..)| name.as_str()).chain([DENSE]);
    let there: u64 = names.filter_map(|name| std::fs::metadata(path.join(name)).ok()).map(|file| file.len()).sum();
    match needed {
        Some(needed) if needed <= there => Ok(()),
        _ => Err(refuse(path, format!("its files have {there} bytes, too few for the model"))),
    }
}

fn read_experts(path: &Path, info: &CheckpointInfo) -> Result<Vec<Vec<f32>>, TrainError> {
    let config = &info.config;
    let len = config.model().expert_shape().weight_len();
    let mut experts = vec![vec![0.0; config.experts * len]; config.layers];
    let mut found = vec![false; config.experts];
    for (name, first, end) in &info.expert_files {
        let file = TensorFile::read(path.join(name))?;
        found[*first..*end].fill(true);
        for expert in *first..*end {
            for (layer, weights) in experts.iter_mut().enumerate() {
                let at = expert * len..(expert + 1) * len;
                file.copy(&ExpertParameters::name(layer, expert), &mut weights[at])?;
            }
        }
    }
    match found.iter().position(|found| !found) {
        Some(expert) => Err(refuse(path, format!("expert {expert} is in none of its files"))),
        None => Ok(experts),
    }
}
