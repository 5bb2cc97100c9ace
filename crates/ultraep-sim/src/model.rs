//! A model as a workload: its shape, and from it operations, bytes and parameters.

use serde::{Deserialize, Deserializer, Serialize};

/// Reads a whole number of `LEAST..=MOST`; the error says what is allowed. For `#[serde(deserialize_with)]`.
pub fn bounded<'de, const LEAST: u64, const MOST: u64, T, D>(from: D) -> Result<T, D::Error>
where
    T: TryFrom<u64>,
    D: Deserializer<'de>,
{
    let got = i128::from(i64::deserialize(from)?);
    let fits = u64::try_from(got).ok().filter(|got| (LEAST..=MOST).contains(got));
    let value = fits.and_then(|got| T::try_from(got).ok());
    value.ok_or_else(|| serde::de::Error::custom(format!("{got}: allowed are {LEAST} to {MOST}")))
}

/// Shape of a mixture-of-experts transformer, as its published configuration gives it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSpec {
    /// For people.
    pub name: String,
    /// Layers in all.
    #[serde(deserialize_with = "bounded::<1, 1024, _, _>")]
    pub layers: u32,
    /// First layers without experts.
    #[serde(deserialize_with = "bounded::<0, 1024, _, _>")]
    pub dense_layers: u32,
    /// Width of the residual stream.
    #[serde(deserialize_with = "bounded::<1, 65536, _, _>")]
    pub hidden: u32,
    /// Width of the feed-forward part of layers without experts; 0 where there are none.
    #[serde(deserialize_with = "bounded::<0, 262144, _, _>")]
    pub dense_width: u32,
    /// Width of an expert.
    #[serde(deserialize_with = "bounded::<1, 65536, _, _>")]
    pub expert_width: u32,
    /// `E`, routed experts of a layer.
    #[serde(deserialize_with = "bounded::<1, 65535, _, _>")]
    pub experts: u32,
    /// Experts that every token visits, on its own rank.
    #[serde(deserialize_with = "bounded::<0, 64, _, _>")]
    pub shared_experts: u32,
    /// Routed experts that a token chooses.
    #[serde(deserialize_with = "bounded::<1, 256, _, _>")]
    pub top_k: u32,
    /// Tokens of the vocabulary.
    #[serde(deserialize_with = "bounded::<1, 4194304, _, _>")]
    pub vocabulary: u32,
    /// Shape of attention.
    pub attention: Attention,
    /// Where the numbers are from, in words; what is assumed says so.
    pub sources: Vec<String>,
}

/// Shape of attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attention {
    /// Query heads.
    #[serde(deserialize_with = "bounded::<1, 256, _, _>")]
    pub heads: u32,
    /// Key and value heads.
    #[serde(deserialize_with = "bounded::<1, 256, _, _>")]
    pub kv_heads: u32,
    /// Width of a head (without its rotary part, where attention is latent).
    #[serde(deserialize_with = "bounded::<1, 1024, _, _>")]
    pub head_width: u32,
    /// Multi-head latent attention.
    pub latent: Option<Latent>,
}

/// Ranks of multi-head latent attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Latent {
    /// Rank of queries.
    #[serde(deserialize_with = "bounded::<1, 65536, _, _>")]
    pub query_rank: u32,
    /// Rank of keys and values.
    #[serde(deserialize_with = "bounded::<1, 65536, _, _>")]
    pub kv_rank: u32,
    /// Rotary part of a head.
    #[serde(deserialize_with = "bounded::<1, 1024, _, _>")]
    pub rotary_width: u32,
}

impl Attention {
    /// Parameters of one layer's attention.
    pub fn parameters(&self, hidden: u32) -> u64 {
        let (h, heads, width) = (u64::from(hidden), u64::from(self.heads), u64::from(self.head_width));
        match self.latent {
            None => h * width * (2 * heads + 2 * u64::from(self.kv_heads)),
            Some(Latent { query_rank, kv_rank, rotary_width }) => {
                let (q, kv, rotary) = (u64::from(query_rank), u64::from(kv_rank), u64::from(rotary_width));
                h * q + q * heads * (width + rotary) + h * (kv + rotary) + kv * heads * 2 * width + heads * width * h
            }
        }
    }

    /// Numbers of a token in queries, keys, values and the sum over values.
    pub(crate) fn activations(&self) -> u64 {
        let (heads, kv, width) = (u64::from(self.heads), u64::from(self.kv_heads), u64::from(self.head_width));
        let rotary = self.latent.map_or(0, |l| u64::from(l.rotary_width));
        heads * (width + rotary) + kv * (width + rotary) + kv * width + heads * width
    }

    /// Numbers of a token that one layer's KV cache keeps.
    pub(crate) fn kv_width(&self) -> u64 {
        match self.latent {
            None => 2 * u64::from(self.kv_heads) * u64::from(self.head_width),
            Some(latent) => u64::from(latent.kv_rank) + u64::from(latent.rotary_width),
        }
    }

    /// Operations of one token's scores and their sum over values, causal, in sequences of `sequence` tokens.
    pub fn score_flops(&self, sequence: u32) -> u64 {
        let rotary = self.latent.map_or(0, |l| u64::from(l.rotary_width));
        // Two matrix products, two operations each, over half of the sequence on average.
        u64::from(sequence) * u64::from(self.heads) * (2 * u64::from(self.head_width) + rotary)
    }
}

impl ModelSpec {
    /// Layers with experts.
    pub fn moe_layers(&self) -> u32 {
        self.layers.saturating_sub(self.dense_layers)
    }

    /// Parameters of one expert: three matrices.
    pub fn expert_parameters(&self) -> u64 {
        3 * u64::from(self.hidden) * u64::from(self.expert_width)
    }

    /// Bytes of one expert's weights, bf16.
    pub fn expert_bytes(&self) -> u64 {
        2 * self.expert_parameters()
    }

    /// Operations of a row (a token through one routed expert), forward.
    pub fn row_flops(&self) -> u64 {
        2 * self.expert_parameters()
    }

    /// Operations of a token in the parts of an expert layer that balancing does not move (attention, shared experts,
    /// router), forward.
    pub fn rest_flops(&self, sequence: u32) -> u64 {
        let shared = u64::from(self.shared_experts) * self.expert_parameters();
        let router = u64::from(self.hidden) * u64::from(self.experts);
        2 * (self.attention.parameters(self.hidden) + shared + router) + self.attention.score_flops(sequence)
    }

    /// Operations of a token in a layer without experts, forward.
    pub fn dense_layer_flops(&self, sequence: u32) -> u64 {
        let feed_forward = 3 * u64::from(self.hidden) * u64::from(self.dense_width);
        2 * (self.attention.parameters(self.hidden) + feed_forward) + self.attention.score_flops(sequence)
    }

    /// Operations of a token in the output head, forward.
    pub fn head_flops(&self) -> u64 {
        2 * u64::from(self.hidden) * u64::from(self.vocabulary)
    }

    /// Operations of a token in a training step: forward once, backward twice as many. Recomputed ones do not count.
    pub fn token_flops(&self, sequence: u32) -> u64 {
        let moe = self.rest_flops(sequence) + u64::from(self.top_k) * self.row_flops();
        let layers =
            u64::from(self.moe_layers()) * moe + u64::from(self.dense_layers) * self.dense_layer_flops(sequence);
        3 * (layers + self.head_flops())
    }

    /// Parameters in all, embeddings and head apart from each other.
    pub fn parameters(&self) -> u64 {
        let expert_layer = (u64::from(self.experts) + u64::from(self.shared_experts)) * self.expert_parameters()
            + u64::from(self.hidden) * u64::from(self.experts);
        let dense_layer = 3 * u64::from(self.hidden) * u64::from(self.dense_width);
        u64::from(self.layers) * self.attention.parameters(self.hidden)
            + u64::from(self.moe_layers()) * expert_layer
            + u64::from(self.dense_layers) * dense_layer
            + 2 * u64::from(self.hidden) * u64::from(self.vocabulary)
    }

    /// Parameters that a token meets: as [`ModelSpec::parameters`], with the chosen experts only.
    pub fn active_parameters(&self) -> u64 {
        let idle = u64::from(self.experts.saturating_sub(self.top_k)) * self.expert_parameters();
        self.parameters() - u64::from(self.moe_layers()) * idle
    }
}
