//! Inference: parts of many sequences in one batch, each over its cache of keys and values.
//!
//! The blocks are those of training ([`Transformer::forward`]); only attention reads a cache instead of a batch of equal
//! sequences. All kernels treat rows alone, so a token's logits depend on its sequence up to itself, and not on the policy,
//! on how the sequence was cut into chunks, or on what else is in the batch, bit for bit.

use candle_core::{Device, Result, Tensor};
use ultraep_device::cache::{CacheWorkspace, KvCache};

use crate::ops::with_elements;
use crate::{ModelConfig, Transformer, VOCABULARY};

/// Keys and values of one sequence in all layers.
#[derive(Clone, Debug)]
pub struct SequenceCache {
    layers: Vec<KvCache>,
}

impl SequenceCache {
    /// Room for `tokens` tokens.
    pub fn new(config: &ModelConfig, tokens: usize) -> Self {
        let cache = || KvCache::new(config.heads, config.hidden / config.heads, tokens);
        Self { layers: (0..config.layers).map(|_| cache()).collect() }
    }

    /// Bytes that a token takes.
    pub fn bytes_per_token(config: &ModelConfig) -> usize {
        config.layers * KvCache::bytes_per_token(config.heads, config.hidden / config.heads)
    }

    /// Tokens in it.
    pub fn len(&self) -> usize {
        self.layers.first().map_or(0, KvCache::len)
    }

    /// Whether it has no token yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tokens that it has room for.
    pub fn capacity(&self) -> usize {
        self.layers.first().map_or(0, KvCache::capacity)
    }
}

/// For which of its tokens a chunk wants logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// None: more of the prompt follows.
    Nothing,
    /// The last.
    Last,
    /// All.
    All,
}

/// The next tokens of one sequence.
#[derive(Debug)]
pub struct SequenceChunk<'a> {
    /// The tokens; at least one.
    pub tokens: &'a [u8],
    /// Where they go on, with room for them.
    pub cache: &'a mut SequenceCache,
    /// Logits wanted.
    pub wanted: Wanted,
}

/// Why a chunk cannot run. It concerns its sequence alone: nothing of it was computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChunkError {
    /// There is nothing to run.
    #[error("a chunk without tokens")]
    Empty,
    /// It ends behind what its cache or the table of rotations has room for.
    #[error("a chunk up to token {end} in a cache of {capacity}")]
    Full {
        /// Tokens of the sequence after the chunk.
        end: usize,
        /// Tokens that there is room for.
        capacity: usize,
    },
}

/// What a batch gave on one rank.
#[derive(Clone, Debug, Default)]
pub struct Inferred {
    /// Logits of the wanted tokens, in the order of chunks, `[wanted, 256]`.
    pub logits: Vec<f32>,
    /// What every token chose, by layer, `[tokens, top_k]` each.
    pub choices: Vec<Vec<u32>>,
}

impl Transformer {
    /// Says whether a chunk can run: it has tokens, and its cache has room for them.
    pub fn check_chunk(&self, chunk: &SequenceChunk<'_>) -> std::result::Result<(), ChunkError> {
        let end = chunk.cache.len() + chunk.tokens.len();
        let capacity = chunk.cache.capacity().min(self.rotary().positions());
        match chunk.tokens.is_empty() {
            true => Err(ChunkError::Empty),
            false if end > capacity => Err(ChunkError::Full { end, capacity }),
            false => Ok(()),
        }
    }

    /// Runs `chunks`, this rank's part of batch number `batch`: none or many. All ranks must call it for the same batches, each
    /// with its own chunks.
    ///
    /// # Errors
    /// A chunk that [`Transformer::check_chunk`] refuses, before anything is computed (the other ranks then wait for this one
    /// until their timeout: leave such chunks out); what the runtime fails with.
    pub fn infer(&self, chunks: &mut [SequenceChunk<'_>], batch: u64) -> Result<Inferred> {
        chunks.iter().try_for_each(|chunk| self.check_chunk(chunk)).map_err(candle_core::Error::msg)?;
        let tokens: Vec<u8> = chunks.iter().flat_map(|c| c.tokens.iter().copied()).collect();
        let mut choices = Vec::with_capacity(self.config().layers);
        let mut ws = CacheWorkspace::default();
        let attend = |layer, qkv: &Tensor| self.attend_cached(layer, qkv, chunks, &mut ws);
        let x = self.run(&tokens, attend, |layer, x| {
            let (y, chosen) = self.moe_layer(layer).infer(x, batch)?;
            choices.push(chosen);
            Ok(y)
        })?;
        Ok(Inferred { logits: self.wanted_logits(&x, chunks)?, choices })
    }

    fn attend_cached(
        &self,
        layer: usize,
        qkv: &Tensor,
        chunks: &mut [SequenceChunk<'_>],
        ws: &mut CacheWorkspace,
    ) -> Result<Tensor> {
        let (rows, width) = (qkv.dim(0)?, self.config().hidden);
        let mut out = vec![0.0; rows * width];
        with_elements(qkv, |qkv| {
            let mut first = 0;
            for chunk in chunks {
                let rows = first..first + chunk.tokens.len();
                let qkv = &qkv[rows.start * 3 * width..rows.end * 3 * width];
                let out = &mut out[rows.start * width..rows.end * width];
                chunk.cache.layers[layer].attend(self.rotary(), qkv, out, ws);
                first = rows.end;
            }
            Ok(())
        })?;
        Tensor::from_vec(out, (rows, width), &Device::Cpu)
    }

    fn wanted_logits(&self, x: &Tensor, chunks: &[SequenceChunk<'_>]) -> Result<Vec<f32>> {
        let mut rows = Vec::new();
        let mut end = 0;
        for chunk in chunks {
            let first = end;
            end += chunk.tokens.len() as u32;
            match chunk.wanted {
                Wanted::Nothing => {}
                Wanted::Last => rows.push(end - 1),
                Wanted::All => rows.extend(first..end),
            }
        }
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let count = rows.len();
        let logits = self.head(&x.index_select(&Tensor::from_vec(rows, count, &Device::Cpu)?, 0)?)?;
        debug_assert_eq!(logits.dims(), [count, VOCABULARY]);
        logits.flatten_all()?.to_vec1::<f32>()
    }
}
