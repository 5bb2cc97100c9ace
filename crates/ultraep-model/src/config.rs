//! Sizes and choices of a model.

use ultraep_device::ExpertShape;

/// How tokens choose experts, and what keeps the router from collapsing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RouterKind {
    /// Softmax over all experts, the `k` largest, weights renormalised; GShard's auxiliary loss (Lepikhin et al., 2020) with
    /// this coefficient.
    Softmax {
        /// Weight of the auxiliary loss; 0 for none.
        aux_coefficient: f32,
    },
    /// Sigmoid scores; a bias per expert takes part in the choice only and moves by `rate` a step towards balance
    /// (DeepSeek-V3, section 2.1.2: auxiliary-loss-free balancing).
    BiasUpdate {
        /// Step of the bias.
        rate: f32,
    },
}

/// Sizes of a [`crate::Transformer`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ModelConfig {
    /// `d`, width of the hidden state.
    pub hidden: usize,
    /// Attention heads; must divide `hidden` into even widths.
    pub heads: usize,
    /// Transformer layers, each with an MoE layer.
    pub layers: usize,
    /// `E`, logical experts of a layer.
    pub experts: usize,
    /// Experts a token chooses.
    pub top_k: usize,
    /// `f`, inner width of an expert.
    pub intermediate: usize,
    /// Tokens of a sequence.
    pub sequence_tokens: usize,
    /// Router.
    pub router: RouterKind,
}

/// Why a configuration was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A size is zero.
    #[error("{0} is 0; it must be at least 1")]
    Zero(&'static str),
    /// Heads do not fit.
    #[error("{heads} heads do not divide hidden width {hidden} into even widths")]
    Heads {
        /// Heads asked for.
        heads: usize,
        /// Width.
        hidden: usize,
    },
    /// More choices than experts.
    #[error("top-{top_k} of {experts} experts")]
    TopK {
        /// Choices.
        top_k: usize,
        /// Experts.
        experts: usize,
    },
}

impl ModelConfig {
    /// Checks that the sizes fit together.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let sizes = [
            ("hidden", self.hidden),
            ("heads", self.heads),
            ("layers", self.layers),
            ("experts", self.experts),
            ("top-k", self.top_k),
            ("intermediate", self.intermediate),
            ("sequence tokens", self.sequence_tokens),
        ];
        if let Some((name, _)) = sizes.into_iter().find(|&(_, size)| size == 0) {
            return Err(ConfigError::Zero(name));
        }
        if !self.hidden.is_multiple_of(2 * self.heads) {
            return Err(ConfigError::Heads { heads: self.heads, hidden: self.hidden });
        }
        if self.top_k > self.experts {
            return Err(ConfigError::TopK { top_k: self.top_k, experts: self.experts });
        }
        Ok(())
    }

    /// Tokens of context whose attention is as much work as all else that is done for a token in a layer: `2 d + 3 k f / 2`, by
    /// multiplications (`4 d^2` for projections and `3 k d f` for experts against `2 d` a token of context).
    pub fn context_per_token(&self) -> usize {
        2 * self.hidden + 3 * self.top_k * self.intermediate / 2
    }

    /// Sizes of an expert.
    pub fn expert_shape(&self) -> ExpertShape {
        ExpertShape { hidden: self.hidden, intermediate: self.intermediate }
    }
}
