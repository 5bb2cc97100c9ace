//! A decoder-only transformer whose feed-forward layers are all mixtures of experts.

use std::sync::Arc;

use candle_core::{Device, Result, Tensor};
use ultraep_device::attention::{AttentionShape, Rotary};
use ultraep_runtime::{Part, Pass};

use crate::ops;
use crate::{ModelConfig, MoeLayer, Parameters, Router, SharedExperts};

struct Block {
    attention_norm: Tensor,
    qkv: Tensor,
    out: Tensor,
    moe_norm: Tensor,
    moe: MoeLayer,
}

/// The model of one rank. Dense parameters are the same on all ranks; experts are spread over them.
pub struct Transformer {
    config: ModelConfig,
    embedding: Tensor,
    blocks: Vec<Block>,
    head_norm: Tensor,
    head: Tensor,
    rotary: Arc<Rotary>,
    experts: SharedExperts,
}

/// Losses of a microbatch on this rank.
pub struct Losses {
    /// Mean cross-entropy of the tokens, in nats.
    pub cross_entropy: f32,
    /// Cross-entropy plus weighted auxiliary losses; call `backward` on it.
    pub total: Tensor,
}

impl Transformer {
    /// Over `parameters` (made for the same `config`) and the runtime behind `experts`.
    pub fn new(config: ModelConfig, parameters: &Parameters, experts: SharedExperts) -> Result<Self> {
        let block = |layer: usize| {
            let of = |part: &str| parameters.tensor(&format!("layers.{layer}.{part}"));
            let router = Router::new(config.router, of("moe.router"), config.top_k)?;
            Ok(Block {
                attention_norm: of("attention.norm"),
                qkv: of("attention.qkv"),
                out: of("attention.out"),
                moe_norm: of("moe.norm"),
                moe: MoeLayer::new(layer, router, experts.clone()),
            })
        };
        Ok(Self {
            embedding: parameters.tensor("embedding"),
            blocks: (0..config.layers).map(block).collect::<Result<_>>()?,
            head_norm: parameters.tensor("head.norm"),
            head: parameters.tensor("head.out"),
            rotary: Arc::new(Rotary::new(config.sequence_tokens, config.hidden / config.heads)),
            config,
            experts,
        })
    }

    /// A model that only infers, with sequences as long as `rotary` has positions: nothing is recorded for a backward.
    pub fn for_inference(
        config: ModelConfig,
        parameters: &Parameters,
        experts: SharedExperts,
        rotary: Arc<Rotary>,
    ) -> Result<Self> {
        let mut model = Self::new(config, parameters, experts)?;
        model.rotary = rotary;
        for tensor in [&mut model.embedding, &mut model.head_norm, &mut model.head] {
            *tensor = tensor.detach();
        }
        for block in &mut model.blocks {
            for tensor in [&mut block.attention_norm, &mut block.qkv, &mut block.out, &mut block.moe_norm] {
                *tensor = tensor.detach();
            }
            block.moe.router_mut().detach();
        }
        Ok(model)
    }

    /// Sizes.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub(crate) fn rotary(&self) -> &Rotary {
        &self.rotary
    }

    pub(crate) fn moe_layer(&self, layer: usize) -> &MoeLayer {
        &self.blocks[layer].moe
    }

    /// The MoE layers, in order.
    pub fn moe_layers(&self) -> impl Iterator<Item = &MoeLayer> {
        self.blocks.iter().map(|b| &b.moe)
    }

    /// The MoE layers, to set or update routers' biases.
    pub fn moe_layers_mut(&mut self) -> impl Iterator<Item = &mut MoeLayer> {
        self.blocks.iter_mut().map(|b| &mut b.moe)
    }

    /// Logits `[sequences * sequence_tokens, 256]` for `tokens` (`[sequences, sequence_tokens]`), and the sum of auxiliary
    /// losses.
    pub fn forward(&self, tokens: &[u8], microbatch: u64, pass: Pass) -> Result<(Tensor, Option<Tensor>)> {
        let shape = AttentionShape {
            sequences: tokens.len() / self.config.sequence_tokens,
            tokens: self.config.sequence_tokens,
            heads: self.config.heads,
            head_dim: self.config.hidden / self.config.heads,
        };
        let mut aux: Option<Tensor> = None;
        let attend = |_, qkv: &Tensor| ops::attention(qkv, shape, self.rotary.clone());
        let x = self.run(tokens, attend, |layer, x| {
            let (y, loss) = self.blocks[layer].moe.forward(x, microbatch, pass)?;
            aux = match (aux.take(), loss) {
                (Some(sum), Some(loss)) => Some((sum + loss)?),
                (sum, loss) => sum.or(loss),
            };
            Ok(y)
        })?;
        Ok((self.head(&x)?, aux))
    }

    /// The blocks over `tokens`: `attend(layer, qkv)` and `moe(layer, x)` give what is added to the hidden states.
    pub(crate) fn run(
        &self,
        tokens: &[u8],
        mut attend: impl FnMut(usize, &Tensor) -> Result<Tensor>,
        mut moe: impl FnMut(usize, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        self.experts.lock().endpoint.clock.enter(Part::Dense);
        let ids = Tensor::from_iter(tokens.iter().map(|&b| u32::from(b)), &Device::Cpu)?;
        let mut x = self.embedding.index_select(&ids, 0)?;
        for (layer, block) in self.blocks.iter().enumerate() {
            let qkv = ops::linear(&ops::rms_norm(&x, &block.attention_norm)?, &block.qkv)?;
            x = (&x + ops::linear(&attend(layer, &qkv)?, &block.out)?)?;
            let y = moe(layer, &ops::rms_norm(&x, &block.moe_norm)?)?;
            x = (x + y)?;
        }
        Ok(x)
    }

    /// Logits of hidden states.
    pub(crate) fn head(&self, x: &Tensor) -> Result<Tensor> {
        ops::linear(&ops::rms_norm(x, &self.head_norm)?, &self.head)
    }

    /// Losses of a batch of `[sequences, sequence_tokens + 1]` bytes: each token predicts the next.
    pub fn losses(&self, batch: &[u8], microbatch: u64, pass: Pass) -> Result<Losses> {
        let length = self.config.sequence_tokens;
        let sequences = batch.chunks_exact(length + 1);
        let inputs: Vec<u8> = sequences.clone().flat_map(|s| s[..length].iter().copied()).collect();
        let targets: Vec<u32> = sequences.flat_map(|s| s[1..].iter().map(|&b| u32::from(b))).collect();
        let (logits, aux) = self.forward(&inputs, microbatch, pass)?;
        let loss = ops::cross_entropy(&logits, targets)?;
        let cross_entropy = loss.to_scalar::<f32>()?;
        let total = match aux {
            Some(aux) => (loss + aux)?,
            None => loss,
        };
        Ok(Losses { cross_entropy, total })
    }
}
