//! An MoE layer for candle: router in tensors, experts through the runtime, one custom operation with its own backward.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{CpuStorage, CustomOp2, Error, Layout, Result, Shape, Tensor};
use ultraep_runtime::{ExpertParallel, Part, Pass, Routing, RuntimeError, VirtualLayer};

use crate::Router;
use crate::ops::{operand, with_elements};
use crate::router::Decision;

/// A rank's expert-parallel runtime, shared by all its MoE layers.
#[derive(Clone)]
pub struct SharedExperts(Arc<Shared>);

struct Shared {
    experts: Mutex<ExpertParallel>,
    failure: Mutex<Option<RuntimeError>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl SharedExperts {
    /// Shares `experts`.
    pub fn new(experts: ExpertParallel) -> Self {
        Self(Arc::new(Shared { experts: Mutex::new(experts), failure: Mutex::new(None) }))
    }

    /// The runtime itself.
    pub fn lock(&self) -> MutexGuard<'_, ExpertParallel> {
        lock(&self.0.experts)
    }

    /// The runtime, when this is the last handle.
    pub fn into_inner(self) -> Option<ExpertParallel> {
        let shared = Arc::into_inner(self.0)?;
        Some(shared.experts.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    /// The runtime's error behind the tensor library's: candle's errors do not keep the type of what they wrap.
    pub fn take_failure(&self) -> Option<RuntimeError> {
        lock(&self.0.failure).take()
    }

    fn failed(&self, error: RuntimeError) -> Error {
        let message = error.to_string();
        *lock(&self.0.failure) = Some(error);
        Error::msg(message)
    }
}

/// One MoE layer of a model: [`Router::new`] over a projection of the model's, [`ultraep_runtime::ExpertParallel`] over a fabric
/// and registered masters, and [`MoeLayer::new`] for each layer. `tests/layer.rs` does it outside [`crate::Transformer`].
#[derive(Clone)]
pub struct MoeLayer {
    layer: usize,
    router: Router,
    experts: SharedExperts,
}

impl MoeLayer {
    /// Layer number `layer` of the runtime behind `experts`.
    pub fn new(layer: usize, router: Router, experts: SharedExperts) -> Self {
        Self { layer, router, experts }
    }

    /// The router.
    pub fn router(&self) -> &Router {
        &self.router
    }

    /// The router, to set or update its bias.
    pub fn router_mut(&mut self) -> &mut Router {
        &mut self.router
    }

    /// Routes `x` (`[tokens, d]`) and runs the experts; gives the layer's output (`[tokens, d]`) and the weighted auxiliary
    /// loss. All ranks must call it for the same layers in the same order, each with its own tokens; gradients flow to
    /// `x` and the router, and the experts' weight gradients into the registered masters.
    pub fn forward(&self, x: &Tensor, microbatch: u64, pass: Pass) -> Result<(Tensor, Option<Tensor>)> {
        let (y, decision) = self.route_and_run(x, microbatch, pass)?;
        let aux_loss = if pass == Pass::Inference { None } else { self.router.weighted_aux_loss(&decision)? };
        Ok((y, aux_loss))
    }

    /// The layer's output (`[tokens, d]`) without anything for a backward, and what the tokens chose, `[tokens, top_k]`. Any
    /// number of tokens, none included.
    pub fn infer(&self, x: &Tensor, microbatch: u64) -> Result<(Tensor, Vec<u32>)> {
        let (y, decision) = self.route_and_run(x, microbatch, Pass::Inference)?;
        Ok((y, decision.experts))
    }

    fn route_and_run(&self, x: &Tensor, microbatch: u64, pass: Pass) -> Result<(Tensor, Decision)> {
        self.experts.lock().endpoint.clock.enter(Part::Router);
        let decision = self.router.route(x)?;
        let op = ExpertsOp {
            at: VirtualLayer { layer: self.layer, microbatch },
            pass,
            chosen: decision.experts.clone(),
            experts: self.experts.clone(),
        };
        let y = x.contiguous()?.apply_op2(&decision.gates.contiguous()?, op)?;
        Ok((y, decision))
    }
}

/// `y[t] = sum over k of gates[t,k] * expert[chosen[t,k]](x[t])`.
struct ExpertsOp {
    at: VirtualLayer,
    pass: Pass,
    chosen: Vec<u32>,
    experts: SharedExperts,
}

impl CustomOp2 for ExpertsOp {
    fn name(&self) -> &'static str {
        "experts"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, gates: &CpuStorage, lg: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, gates) = (operand(x, lx)?, operand(gates, lg)?);
        let mut y = vec![0.0; x.len()];
        let mut experts = self.experts.lock();
        let routing = Routing { experts: &self.chosen, gates };
        experts.forward(self.at, self.pass, routing, x, &mut y).map_err(|error| self.experts.failed(error))?;
        experts.endpoint.clock.enter(Part::Dense);
        Ok((CpuStorage::F32(y), lx.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, gates: &Tensor, _: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (mut dx, mut d_gates) = (vec![0.0; x.elem_count()], vec![0.0; gates.elem_count()]);
        let mut experts = self.experts.lock();
        with_elements(x, |x| {
            with_elements(gates, |gates| {
                with_elements(dy, |dy| {
                    let done = experts.backward(self.at, gates, x, dy, &mut dx, &mut d_gates);
                    done.map_err(|error| self.experts.failed(error))
                })
            })
        })?;
        experts.endpoint.clock.enter(Part::Dense);
        let dx = Tensor::from_vec(dx, x.shape(), x.device())?;
        let d_gates = Tensor::from_vec(d_gates, gates.shape(), gates.device())?;
        Ok((Some(dx), Some(d_gates)))
    }
}
