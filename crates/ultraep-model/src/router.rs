//! The router: scores, the choice of `k` experts, the weights of the chosen, and the auxiliary loss.

use candle_core::{D, Device, Result, Tensor};

use crate::RouterKind;
use crate::ops::{linear, with_elements};

/// A layer's router. The projection is a dense parameter of the model; the bias (for [`RouterKind::BiasUpdate`]) is state
/// of the router, changed between steps.
#[derive(Clone, Debug)]
pub struct Router {
    kind: RouterKind,
    weight: Tensor,
    top_k: usize,
    bias: Vec<f32>,
}

/// What a router decided for a batch.
pub(crate) struct Decision {
    /// `[tokens, top_k]`, by decreasing score, ties to the lower expert.
    pub(crate) experts: Vec<u32>,
    /// `[tokens, top_k]`; gradients flow to the router.
    pub(crate) gates: Tensor,
    /// `[tokens, E]`.
    scores: Tensor,
}

impl Router {
    /// Over the projection `weight`, `[d, E]`, a tensor that gradients flow to. Refused unless `top_k` is 1 to `E`.
    pub fn new(kind: RouterKind, weight: Tensor, top_k: usize) -> Result<Self> {
        let (_, experts) = weight.dims2()?;
        if top_k == 0 || top_k > experts {
            return Err(candle_core::Error::msg(format!("top-{top_k} of {experts} experts")));
        }
        Ok(Self { kind, weight, top_k, bias: vec![0.0; experts] })
    }

    /// No gradients flow to the projection any more.
    pub(crate) fn detach(&mut self) {
        self.weight = self.weight.detach();
    }

    /// The bias of every expert; zeros unless the router updates it.
    pub fn bias(&self) -> &[f32] {
        &self.bias
    }

    /// Sets the bias, from a checkpoint. Extra or missing values are refused.
    pub fn set_bias(&mut self, bias: &[f32]) -> Result<()> {
        if bias.len() != self.bias.len() {
            return Err(candle_core::Error::msg(format!("{} biases for {} experts", bias.len(), self.bias.len())));
        }
        self.bias.copy_from_slice(bias);
        Ok(())
    }

    /// After a step: moves the bias of every expert by the rate, up where its load (`[E]`, of the whole group) was below the
    /// mean, down where it was above.
    pub fn update_bias(&mut self, loads: &[u64]) {
        let RouterKind::BiasUpdate { rate } = self.kind else { return };
        let total: u64 = loads.iter().sum();
        let experts = loads.len() as u64;
        for (bias, &load) in self.bias.iter_mut().zip(loads) {
            *bias += match (load * experts).cmp(&total) {
                std::cmp::Ordering::Less => rate,
                std::cmp::Ordering::Equal => 0.0,
                std::cmp::Ordering::Greater => -rate,
            };
        }
    }

    /// Routes `x`, `[tokens, d]`.
    pub(crate) fn route(&self, x: &Tensor) -> Result<Decision> {
        let tokens = x.dim(0)?;
        if tokens == 0 {
            // A rank without tokens in a batch; reductions over nothing are errors of the tensor library.
            let gates = Tensor::zeros((0, self.top_k), x.dtype(), x.device())?;
            let scores = Tensor::zeros((0, self.bias.len()), x.dtype(), x.device())?;
            return Ok(Decision { experts: Vec::new(), gates, scores });
        }
        let logits = linear(x, &self.weight)?;
        let scores = match self.kind {
            RouterKind::Softmax { .. } => softmax(&logits)?,
            RouterKind::BiasUpdate { .. } => (logits.neg()?.exp()? + 1.0)?.recip()?,
        };
        let experts = with_elements(&scores, |scores| Ok(top_k(scores, &self.bias, self.top_k)))?;
        let ids = Tensor::from_slice(&experts, (tokens, self.top_k), &Device::Cpu)?;
        let chosen = scores.gather(&ids, 1)?;
        let gates = chosen.broadcast_div(&chosen.sum_keepdim(D::Minus1)?)?;
        Ok(Decision { experts, gates, scores })
    }

    /// Auxiliary loss of a batch, weighted, where there is one.
    pub(crate) fn weighted_aux_loss(&self, decision: &Decision) -> Result<Option<Tensor>> {
        match self.kind {
            RouterKind::Softmax { aux_coefficient } if aux_coefficient > 0.0 && !decision.experts.is_empty() => {
                self.aux_loss(&decision.scores, &decision.experts, aux_coefficient).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// `coefficient * E * sum over e of f_e P_e`, with `f_e` the share of choices and `P_e` the mean probability of `e`.
    fn aux_loss(&self, probabilities: &Tensor, experts: &[u32], coefficient: f32) -> Result<Tensor> {
        let count = self.bias.len();
        let mut shares = vec![0f32; count];
        let share = 1.0 / experts.len() as f32;
        experts.iter().for_each(|&e| shares[e as usize] += share);
        let shares = Tensor::from_vec(shares, count, &Device::Cpu)?;
        (probabilities.mean(0)?.mul(&shares)?.sum_all()? * f64::from(coefficient * count as f32))?.contiguous()
    }
}

fn softmax(logits: &Tensor) -> Result<Tensor> {
    let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?.exp()?;
    shifted.broadcast_div(&shifted.sum_keepdim(D::Minus1)?)
}

/// The `k` largest `score + bias` of every row of `scores` (`[tokens, E]`), in order; ties to the lower expert.
fn top_k(scores: &[f32], bias: &[f32], k: usize) -> Vec<u32> {
    let mut chosen = Vec::with_capacity(scores.len() / bias.len() * k);
    let mut best: Vec<(f32, u32)> = Vec::with_capacity(k + 1);
    for row in scores.chunks_exact(bias.len()) {
        best.clear();
        for (expert, (&score, &bias)) in row.iter().zip(bias).enumerate() {
            let key = score + bias;
            if best.len() == k && key <= best[k - 1].0 {
                continue;
            }
            let at = best.iter().position(|&(other, _)| key > other).unwrap_or(best.len());
            best.insert(at, (key, expert as u32));
            best.truncate(k);
        }
        // Scores that compare with nothing (not a number) leave gaps; fill them so that the batch stays well formed and the
        // loss shows the trouble.
        let mut spare =
            (0..bias.len() as u32).filter(|e| !best.iter().any(|b| b.1 == *e)).collect::<Vec<_>>().into_iter();
        let missing = k - best.len();
        chosen.extend(best.iter().map(|&(_, expert)| expert));
        chosen.extend(spare.by_ref().take(missing));
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_are_chosen_in_order_with_ties_to_the_lower() {
        let none = [0.0; 4];
        assert_eq!(top_k(&[0.1, 0.4, 0.4, 0.2], &none, 3), [1, 2, 3]);
        assert_eq!(top_k(&[0.5, 0.5, 0.5, 0.5, 0.0, 0.0, 0.0, 1.0], &none, 2), [0, 1, 3, 0]);
        assert_eq!(top_k(&[0.1, 0.4, 0.3, 0.2], &[0.5, 0.0, 0.0, 0.0], 2), [0, 1]);
        let nan = f32::NAN;
        let chosen = top_k(&[nan; 4], &none, 2);
        assert!(chosen[0] != chosen[1] && chosen.iter().all(|&e| e < 4), "{chosen:?}");
    }

    #[test]
    fn the_bias_moves_against_the_load() {
        let weight = Tensor::zeros((2, 3), candle_core::DType::F32, &Device::Cpu).unwrap();
        let mut router = Router::new(RouterKind::BiasUpdate { rate: 0.5 }, weight, 1).unwrap();
        router.update_bias(&[10, 20, 30]);
        assert_eq!(router.bias(), [0.5, 0.0, -0.5]);
        assert!(router.set_bias(&[1.0]).is_err());
        let weight = router.weight.clone();
        assert!([0, 4].into_iter().all(|k| Router::new(router.kind, weight.clone(), k).is_err()));
    }

    #[test]
    fn a_balanced_batch_has_the_least_auxiliary_loss() {
        let weight = Tensor::zeros((1, 4), candle_core::DType::F32, &Device::Cpu).unwrap();
        let router = Router::new(RouterKind::Softmax { aux_coefficient: 1.0 }, weight, 1).unwrap();
        let even = Tensor::new(&[[0.25f32; 4]; 4], &Device::Cpu).unwrap();
        let skewed = Tensor::new(&[[0.7f32, 0.1, 0.1, 0.1]; 4], &Device::Cpu).unwrap();
        let loss = |p: &Tensor, experts: &[u32]| router.aux_loss(p, experts, 1.0).unwrap().to_scalar::<f32>().unwrap();
        assert!((loss(&even, &[0, 1, 2, 3]) - 1.0).abs() < 1e-6);
        assert!((loss(&skewed, &[0, 0, 0, 0]) - 2.8).abs() < 1e-6);
    }
}
