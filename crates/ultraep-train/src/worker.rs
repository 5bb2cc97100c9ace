//! One rank's model, gradients and optimizer state, and what a step does with them.

use std::sync::Arc;
use std::time::Instant;

use candle_core::{Device, Tensor};
use ultraep_baselines::PolicyKind;
use ultraep_fabric::Region;
use ultraep_model::{ExpertParameters, Parameters, SharedExperts, Transformer};
use ultraep_runtime::{Endpoint, ExpertParallel, History, LayerMasters, LayerRecord, Part, Pass, StepTime};
use ultraep_text::{BatchPosition, Corpus, Sampler, SamplerSpec};

use crate::optimizer::{Decay, Moments, Schedule};
use crate::{TrainConfig, TrainError};

/// Behind the dense gradients in the region that is all-reduced: the loss, and the wish to stop.
const EXTRAS: usize = 2;

/// One rank at work.
pub(crate) struct Worker {
    pub(crate) config: TrainConfig,
    pub(crate) parameters: Parameters,
    pub(crate) experts: SharedExperts,
    pub(crate) model: Transformer,
    /// All dense parameters, flat, in order; the variables hold copies.
    pub(crate) dense: Vec<f32>,
    pub(crate) dense_moments: Moments,
    /// Moments of this rank's masters, by layer.
    pub(crate) expert_moments: Vec<Moments>,
    dense_grads: Region,
    scalar: Region,
    sampler: Sampler,
    /// Numbers the forwards, so that virtual layers are distinct.
    next_microbatch: u64,
}

/// What a pass over a step's microbatches gave.
pub(crate) struct PassResult {
    pub(crate) loss: f32,
    pub(crate) stop: bool,
    pub(crate) time: StepTime,
    pub(crate) weight_sync_ns: u64,
    pub(crate) wall_ns: u64,
    pub(crate) records: Vec<LayerRecord>,
}

/// What a training step gave.
pub(crate) struct StepResult {
    pub(crate) pass: PassResult,
    pub(crate) gradient_norm: f32,
}

impl Worker {
    /// A rank at step 0.
    pub(crate) fn new(config: TrainConfig, endpoint: Endpoint, corpus: Arc<Corpus>) -> Result<Self, TrainError> {
        let model_config = config.model();
        let runtime = config.runtime()?;
        let rank = endpoint.rank();
        let own = runtime.topology.masters(rank);
        let init = ExpertParameters { shape: runtime.shape, layers: config.layers, seed: config.seed };
        let masters = |layer| LayerMasters {
            weights: Region::from_vec(init.weights(layer, own.clone())),
            grads: Region::zeroed(own.len() * runtime.shape.weight_bytes()),
        };
        let masters = (0..config.layers).map(masters).collect();
        let master_len = own.len() * runtime.shape.weight_len();
        let mut experts = ExpertParallel::new(runtime, endpoint, masters)?;
        if rank.index() == 0 {
            experts.record();
        }
        let experts = SharedExperts::new(experts);
        let parameters = Parameters::new(&model_config, config.seed)?;
        let model = Transformer::new(model_config, &parameters, experts.clone())?;
        let spec = SamplerSpec { sequence_tokens: config.sequence_tokens, seed: config.seed, ..SamplerSpec::default() };
        let elements = parameters.elements();
        let mut dense = Vec::with_capacity(elements);
        for parameter in parameters.all() {
            dense.extend(parameter.var.flatten_all()?.to_vec1::<f32>()?);
        }
        Ok(Self {
            dense,
            dense_moments: Moments::zeros(elements),
            expert_moments: (0..config.layers).map(|_| Moments::zeros(master_len)).collect(),
            dense_grads: Region::zeroed((elements + EXTRAS) * size_of::<f32>()),
            scalar: Region::zeroed(size_of::<f32>()),
            sampler: Sampler::new(corpus, spec)?,
            next_microbatch: 0,
            config,
            parameters,
            experts,
            model,
        })
    }

    /// The endpoint, when this worker is done with.
    pub(crate) fn into_endpoint(self) -> Option<Endpoint> {
        drop(self.model);
        self.experts.into_inner().map(ExpertParallel::into_endpoint)
    }

    fn tensor_error(&self, error: candle_core::Error) -> TrainError {
        self.experts.take_failure().map_or(TrainError::Tensor(error), TrainError::Runtime)
    }

    /// Forward and backward of all microbatches of `step`, and the all-reduce of dense gradients.
    fn pass(&mut self, step: u64, stop: bool) -> Result<PassResult, TrainError> {
        let began = Instant::now();
        self.experts.lock().endpoint.clock.enter(Part::Dense);
        let rank = self.experts.lock().manager.rank().index() as u32;
        let mut loss = 0.0;
        for microbatch in 0..self.config.microbatches {
            let position = BatchPosition { step, microbatch, rank };
            let batch = self.sampler.batch(position, self.config.sequences);
            let number = self.next_microbatch;
            self.next_microbatch += 1;
            let pass = Pass::Train(self.config.recompute());
            let losses = self.model.losses(&batch, number, pass).map_err(|error| self.tensor_error(error))?;
            loss += losses.cross_entropy;
            let grads = losses.total.backward().map_err(|error| self.tensor_error(error))?;
            self.accumulate(&grads)?;
        }
        let mut experts = self.experts.lock();
        experts.finish_backward()?;
        {
            let elements = self.dense.len();
            let mut all = self.dense_grads.write::<f32>()?;
            all[elements] = loss / (self.config.microbatches as usize * self.config.ranks) as f32;
            all[elements + 1] = if stop { 1.0 } else { 0.0 };
        }
        experts.endpoint.all_reduce(&self.dense_grads, Part::AllReduce)?;
        let all = self.dense_grads.read::<f32>()?;
        let (loss, stop) = (all[self.dense.len()], all[self.dense.len() + 1] > 0.0);
        let wall_ns = began.elapsed().as_nanos() as u64;
        let weight_sync_ns = experts.manager.take_synced_ns();
        let (time, records) = (StepTime::default(), experts.take_records());
        Ok(PassResult { loss, stop, time, weight_sync_ns, wall_ns, records })
    }

    fn accumulate(&self, grads: &candle_core::backprop::GradStore) -> Result<(), TrainError> {
        let mut all = self.dense_grads.write::<f32>()?;
        let mut at = 0;
        for parameter in self.parameters.all() {
            let len = parameter.var.elem_count();
            if let Some(grad) = grads.get(parameter.var.as_tensor()) {
                let grad = grad.flatten_all()?.to_vec1::<f32>()?;
                ultraep_device::math::add(&mut all[at..at + len], &grad);
            }
            at += len;
        }
        Ok(())
    }

    /// One training step; `stop` is this rank's wish to stop after it, the result's the group's.
    pub(crate) fn step(&mut self, step: u64, stop: bool) -> Result<StepResult, TrainError> {
        let mut pass = self.pass(step, stop)?;
        if !pass.loss.is_finite() {
            return Err(TrainError::Diverged { step, what: "loss", value: pass.loss });
        }
        let began = Instant::now();
        self.experts.lock().endpoint.clock.enter(Part::Optimizer);
        let scale = 1.0 / (self.config.microbatches as usize * self.config.ranks) as f32;
        let gradient_norm = scale * self.gradient_norm()?;
        if !gradient_norm.is_finite() {
            return Err(TrainError::Diverged { step, what: "norm of the gradient", value: gradient_norm });
        }
        let clip = if gradient_norm > self.config.clip_norm { self.config.clip_norm / gradient_norm } else { 1.0 };
        let schedule = Schedule::at(&self.config, step, scale * clip);
        self.update_dense(&schedule)?;
        self.update_experts(&schedule)?;
        self.update_routers();
        pass.time = self.experts.lock().endpoint.finish_step()?;
        pass.wall_ns += began.elapsed().as_nanos() as u64;
        Ok(StepResult { pass, gradient_norm })
    }

    /// Global norm of the gradient sums: dense ones are the same on all ranks, experts' are summed over ranks.
    fn gradient_norm(&self) -> Result<f32, TrainError> {
        let squares = |values: &[f32]| ultraep_device::math::dot(values, values);
        let dense = squares(&self.dense_grads.read::<f32>()?[..self.dense.len()]);
        let mut experts = self.experts.lock();
        let mut own = 0.0;
        for layer in 0..self.config.layers {
            own += squares(&experts.manager.masters(layer).grads.read::<f32>()?);
        }
        self.scalar.write::<f32>()?[0] = own;
        experts.endpoint.all_reduce(&self.scalar, Part::AllReduce)?;
        experts.endpoint.clock.enter(Part::Optimizer);
        Ok((dense + self.scalar.read::<f32>()?[0]).sqrt())
    }

    fn update_dense(&mut self, schedule: &Schedule) -> Result<(), TrainError> {
        let mut grads = self.dense_grads.write::<f32>()?;
        let mut at = 0;
        for parameter in self.parameters.all() {
            let range = at..at + parameter.var.elem_count();
            at = range.end;
            let decay = if parameter.decay { Decay::Yes } else { Decay::No };
            let moments = (&mut self.dense_moments.first[range.clone()], &mut self.dense_moments.second[range.clone()]);
            schedule.apply(decay, &mut self.dense[range.clone()], &grads[range], moments);
        }
        grads.fill(0.0);
        self.publish_dense()
    }

    fn update_experts(&mut self, schedule: &Schedule) -> Result<(), TrainError> {
        let experts = self.experts.lock();
        for (layer, moments) in self.expert_moments.iter_mut().enumerate() {
            let masters = experts.manager.masters(layer);
            let (mut weights, mut grads) = (masters.weights.write::<f32>()?, masters.grads.write::<f32>()?);
            schedule.apply(Decay::Yes, &mut weights, &grads, (&mut moments.first, &mut moments.second));
            grads.fill(0.0);
        }
        Ok(())
    }

    fn update_routers(&mut self) {
        let mut experts = self.experts.lock();
        for (layer, moe) in self.model.moe_layers_mut().enumerate() {
            moe.router_mut().update_bias(&experts.manager.take_loads(layer));
        }
    }

    /// Copies the dense parameters into the variables.
    pub(crate) fn publish_dense(&self) -> Result<(), TrainError> {
        let mut at = 0;
        for parameter in self.parameters.all() {
            let range = at..at + parameter.var.elem_count();
            at = range.end;
            parameter.var.set(&Tensor::from_slice(&self.dense[range], parameter.var.shape(), &Device::Cpu)?)?;
        }
        Ok(())
    }

    /// The pass of `step` under another policy, from the same weights; nothing of it stays. Gives the gradients too when asked:
    /// they are what is left in the buffers, summed over microbatches and (dense ones) over ranks.
    pub(crate) fn rehearse(&mut self, step: u64, policy: PolicyKind) -> Result<PassResult, TrainError> {
        {
            let mut experts = self.experts.lock();
            experts.manager.set_policy(policy.name())?;
            experts.manager.set_history(History::Frozen);
        }
        let mut pass = self.pass(step, false)?;
        let mut experts = self.experts.lock();
        pass.time = experts.endpoint.finish_step()?;
        experts.manager.set_policy(self.config.policy()?.name())?;
        experts.manager.set_history(History::Record);
        Ok(pass)
    }

    /// All gradients as they stand: dense ones, then this rank's masters' by layer.
    pub(crate) fn gradients(&self) -> Result<Vec<f32>, TrainError> {
        let mut all = self.dense_grads.read::<f32>()?[..self.dense.len()].to_vec();
        let experts = self.experts.lock();
        for layer in 0..self.config.layers {
            all.extend_from_slice(&experts.manager.masters(layer).grads.read::<f32>()?);
        }
        Ok(all)
    }

    /// Forgets all gradients.
    pub(crate) fn clear_gradients(&self) -> Result<(), TrainError> {
        self.dense_grads.write::<f32>()?.fill(0.0);
        let experts = self.experts.lock();
        for layer in 0..self.config.layers {
            experts.manager.masters(layer).grads.write::<f32>()?.fill(0.0);
        }
        Ok(())
    }

    /// Sum of a number over all ranks, off the clock's books.
    pub(crate) fn sum_over_ranks(&self, value: f32) -> Result<f32, TrainError> {
        self.scalar.write::<f32>()?[0] = value;
        let mut experts = self.experts.lock();
        experts.endpoint.all_reduce(&self.scalar, Part::AllReduce)?;
        let sum = self.scalar.read::<f32>()?[0];
        experts.endpoint.finish_step()?;
        Ok(sum)
    }
}
