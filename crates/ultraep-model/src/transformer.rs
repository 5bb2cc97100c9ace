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
        self.experts.lock().endpoint.clock.enter(Part::Dense);
        let shape = AttentionShape {
            sequences: tokens.len() / self.config.sequence_tokens,
            tokens: self.config.sequence_tokens,
            heads: self.config.heads,
            head_dim: self.config.hidden / self.config.heads,
        };
        let ids = Tensor::from_iter(tokens.iter().map(|&b| u32::from(b)), &Device::Cpu)?;
        let mut x = self.embedding.index_select(&ids, 0)?;
        let mut aux: Option<Tensor> = None;
        for block in &self.blocks {
            let qkv = ops::rms_norm(&x, &block.attention_norm)?.matmul(&block.qkv)?;
            x = (x + ops::attention(&qkv, shape, self.rotary.clone())?.matmul(&block.out)?)?;
            let (y, loss) = block.moe.forward(&ops::rms_norm(&x, &block.moe_norm)?, microbatch, pass)?;
            x = (x + y)?;
            aux = match (aux, loss) {
                (Some(sum), Some(loss)) => Some((sum + loss)?),
                (sum, loss) => sum.or(loss),
            };
        }
        let logits = ops::rms_norm(&x, &self.head_norm)?.matmul(&self.head)?;
        Ok((logits, aux))
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
