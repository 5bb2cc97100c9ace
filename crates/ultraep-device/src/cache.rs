//! Causal attention of new tokens over a cache of keys and values: the forward of training and of serving.
//!
//! ```text
//! append the new tokens' rotated keys and values
//! for each head, for each tile of 32 new tokens, for each block of 64 positions:
//!     scores = q kᵀ                                          4 rows at a time
//!     for each row at position p, the block's columns up to p:
//!         m' = max(m, scores);  scores = exp(scores - m')    the others are 0
//!         s = s exp(m - m') + sum of scores                  in 16 interleaved partial sums
//!         out = out exp(m - m')
//!     out += scores v                                        summed inside the block, then added to the row
//! out = out / s
//! ```
//!
//! Softmax over blocks as they come (Milakov and Gimelshein, Online normalizer calculation for softmax; Dao et al.,
//! FlashAttention): a tile's scores of one block stay in the first-level cache, however long the context is.
//!
//! **A token's result depends on its own query and on the keys and values up to its position alone, bit for bit**: blocks lie
//! at fixed positions, every sum has one order, and what lies behind a token's position in its last block counts as exact
//! zeros. So it does not matter in how many chunks a sequence is computed, what else is in the batch, or how wide the
//! machine's vectors are (products and additions of matrices are fused on all of them, those of softmax on none).
//!
//! Memory: a block of 64 positions at a time, when its first token comes. Blocks of all sequences have one size, so what one
//! gives back fits the next, and memory does not fragment under load. In a block a head's values lie by position,
//! `[64, head_dim]`, widths rounded up to 16, its keys transposed, `[head_dim, 64]`.

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};

use crate::attention::Rotary;
use crate::math;
use crate::matmul::Output;

/// Keys of a block.
const BLOCK: usize = 64;
/// New tokens computed at a time: a block of keys serves all of them while it is in the first-level cache.
const TILE: usize = 32;
/// Rows computed together: with four vectors each they fill the registers.
const GROUP: usize = 4;
/// Vectors of a row computed together.
const STRIP: usize = 4;
/// Widest vector of any machine, in elements.
const LANES: usize = 16;

/// Keys and values of one sequence in one layer.
#[derive(Clone, Debug)]
pub struct KvCache {
    heads: usize,
    head_dim: usize,
    capacity: usize,
    len: usize,
    /// All heads' values, then all heads' keys.
    blocks: Vec<Box<[f32]>>,
}

/// Scratch memory of [`KvCache::attend`]: a tile of one head.
#[derive(Debug, Default)]
pub struct CacheWorkspace {
    queries: Vec<f32>,
    scores: Vec<f32>,
    out: Vec<f32>,
    rotated: Vec<f32>,
}

impl KvCache {
    /// For up to `capacity` tokens of `heads` heads, each `head_dim` wide (even). Takes memory as tokens come.
    pub fn new(heads: usize, head_dim: usize, capacity: usize) -> Self {
        Self { heads, head_dim, capacity, len: 0, blocks: Vec::with_capacity(capacity.div_ceil(BLOCK)) }
    }

    /// Tokens in it.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no token yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Most tokens that it takes.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Whether it was made for these sizes, with room for this many tokens.
    pub(crate) fn fits(&self, heads: usize, head_dim: usize, tokens: usize) -> bool {
        (self.heads, self.head_dim) == (heads, head_dim) && self.capacity >= tokens
    }

    /// Forgets all tokens.
    pub fn clear(&mut self) {
        // What lies behind a token counts as zero only while it is a number.
        let values = self.heads * BLOCK * self.padded_dim();
        self.blocks.iter_mut().for_each(|block| block[..values].fill(0.0));
        self.len = 0;
    }

    /// Bytes that a token takes in one layer.
    pub fn bytes_per_token(heads: usize, head_dim: usize) -> usize {
        heads * (head_dim + head_dim.next_multiple_of(LANES)) * size_of::<f32>()
    }

    /// Appends the tokens of `qkv` (`[tokens, 3 * heads * head_dim]`, each row `q`, `k`, `v` side by side) and writes their
    /// attention over everything up to themselves into `out`, `[tokens, heads * head_dim]`.
    ///
    /// # Panics
    /// When the tokens do not fit the cache or the table of rotations, or sizes do not match: a bug of the caller.
    pub fn attend(&mut self, rotary: &Rotary, qkv: &[f32], out: &mut [f32], ws: &mut CacheWorkspace) {
        let width = self.heads * self.head_dim;
        let tokens = out.len() / width;
        assert_eq!((out.len(), qkv.len()), (tokens * width, tokens * 3 * width), "sizes of {tokens} tokens");
        assert!(self.len + tokens <= self.capacity, "{} + {tokens} tokens in {}", self.len, self.capacity);
        self.append(rotary, qkv, tokens, ws);
        for head in 0..self.heads {
            for first in (0..tokens).step_by(TILE) {
                let rows = TILE.min(tokens - first);
                self.attend_tile(rotary, qkv, out, Tile { head, first, rows }, ws);
            }
        }
        self.len += tokens;
    }

    /// Appends tokens without attending: keys and values of a context whose outputs nobody wants.
    ///
    /// # Panics
    /// As [`KvCache::attend`].
    pub fn append_only(&mut self, rotary: &Rotary, qkv: &[f32], ws: &mut CacheWorkspace) {
        let tokens = qkv.len() / (3 * self.heads * self.head_dim);
        assert!(self.len + tokens <= self.capacity, "{} + {tokens} tokens in {}", self.len, self.capacity);
        self.append(rotary, qkv, tokens, ws);
        self.len += tokens;
    }

    /// Forgets all tokens from position `len` on. Their values must have been finite numbers.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    fn padded_dim(&self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    /// Where a head's values and keys are in a block.
    fn parts(&self, head: usize) -> [Range<usize>; 2] {
        let (values, keys) = (BLOCK * self.padded_dim(), BLOCK * self.head_dim);
        let first_key = self.heads * values + head * keys;
        [head * values..(head + 1) * values, first_key..first_key + keys]
    }

    fn append(&mut self, rotary: &Rotary, qkv: &[f32], tokens: usize, ws: &mut CacheWorkspace) {
        let (dim, padded) = (self.head_dim, self.padded_dim());
        let width = self.heads * dim;
        let blocks = (self.len + tokens).div_ceil(BLOCK);
        let block = || vec![0.0; self.heads * BLOCK * (dim + padded)].into_boxed_slice();
        self.blocks.resize_with(blocks.max(self.blocks.len()), block);
        ws.rotated.resize(dim, 0.0);
        for (position, row) in (self.len..self.len + tokens).zip(qkv.chunks_exact(3 * width)) {
            let column = position % BLOCK;
            for head in 0..self.heads {
                let [values, keys] = self.parts(head);
                let block = &mut self.blocks[position / BLOCK];
                let at = head * dim..(head + 1) * dim;
                rotary.rotate(position, &row[width..][at.clone()], &mut ws.rotated, 1.0);
                for (keys, &x) in block[keys].chunks_exact_mut(BLOCK).zip(&ws.rotated) {
                    keys[column] = x;
                }
                block[values][column * padded..][..dim].copy_from_slice(&row[2 * width..][at]);
            }
        }
    }

    fn attend_tile(&self, rotary: &Rotary, qkv: &[f32], out: &mut [f32], tile: Tile, ws: &mut CacheWorkspace) {
        let Tile { head, first, rows } = tile;
        let (dim, padded) = (self.head_dim, self.padded_dim());
        let width = self.heads * dim;
        let position = self.len + first;
        let padded_rows = rows.next_multiple_of(GROUP);
        ws.queries.clear();
        ws.queries.resize(padded_rows * dim, 0.0);
        for (row, query) in ws.queries.chunks_exact_mut(dim).take(rows).enumerate() {
            rotary.rotate(position + row, &qkv[(first + row) * 3 * width + head * dim..][..dim], query, 1.0);
        }
        // What was there is overwritten before it is read.
        ws.scores.resize(TILE * BLOCK, 0.0);
        ws.out.clear();
        ws.out.resize(padded_rows * padded, 0.0);
        let scores = &mut ws.scores[..padded_rows * BLOCK];
        let blocks = &self.blocks[..(position + rows).div_ceil(BLOCK)];
        let (queries, parts, scale) = (&ws.queries, self.parts(head), 1.0 / (dim as f32).sqrt());
        Arch::new().dispatch(Attend {
            queries,
            blocks,
            parts,
            scores,
            out: &mut ws.out,
            dim,
            padded,
            position,
            rows,
            scale,
        });
        for (row, mixed) in ws.out.chunks_exact(padded).take(rows).enumerate() {
            out[(first + row) * width + head * dim..][..dim].copy_from_slice(&mixed[..dim]);
        }
    }
}

/// New tokens of one head, computed together.
#[derive(Clone, Copy)]
struct Tile {
    head: usize,
    first: usize,
    rows: usize,
}

/// A tile over all blocks that it sees any of.
struct Attend<'a> {
    /// `[groups * GROUP, dim]`.
    queries: &'a [f32],
    blocks: &'a [Box<[f32]>],
    /// The head's values, `[BLOCK, padded]`, and keys, `[dim, BLOCK]`, in a block.
    parts: [Range<usize>; 2],
    /// Of one block, `[groups * GROUP, BLOCK]`.
    scores: &'a mut [f32],
    /// Zeros at first, `[groups * GROUP, padded]`.
    out: &'a mut [f32],
    dim: usize,
    padded: usize,
    /// Of the first row.
    position: usize,
    rows: usize,
    scale: f32,
}

impl WithSimd for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { queries, blocks, parts: [values, keys], scores, out, dim, padded, position, rows, scale } = self;
        let mut sums = [RowSum::default(); TILE];
        for (number, block) in blocks.iter().enumerate() {
            let (values, keys) = (&block[values.clone()], &block[keys.clone()]);
            // Rows before see nothing of this block: whole groups of them are passed over.
            let first = number * BLOCK;
            let group = first.saturating_sub(position) / GROUP;
            let (queries, scores) = (&queries[group * GROUP * dim..], &mut scores[group * GROUP * BLOCK..]);
            let out = &mut out[group * GROUP * padded..];
            for (rows, scores) in queries.chunks_exact(GROUP * dim).zip(scores.chunks_exact_mut(GROUP * BLOCK)) {
                let target = Target { out: scores, stride: BLOCK, output: Output::Replace };
                multiply_group(simd, Group { rows, stride: dim }, keys, BLOCK, target);
            }
            let parts =
                scores.chunks_exact_mut(BLOCK).zip(out.chunks_exact_mut(padded)).zip(&mut sums[group * GROUP..]);
            for (row, ((scores, out), sum)) in (group * GROUP..).zip(parts) {
                let seen = if row < rows { (position + row + 1).saturating_sub(first).min(BLOCK) } else { 0 };
                let shrink = sum.add(scores, seen, scale);
                // Most rows' largest score comes early; a factor of exactly 1 changes no bit.
                if shrink != 1.0 {
                    out.iter_mut().for_each(|x| *x *= shrink);
                }
            }
            for (rows, out) in scores.chunks_exact(GROUP * BLOCK).zip(out.chunks_exact_mut(GROUP * padded)) {
                let target = Target { out, stride: padded, output: Output::Accumulate };
                multiply_group(simd, Group { rows, stride: BLOCK }, values, padded, target);
            }
        }
        for (out, sum) in out.chunks_exact_mut(padded).zip(&sums).take(rows) {
            let inverse = 1.0 / sum.partial.iter().sum::<f32>();
            out.iter_mut().for_each(|x| *x *= inverse);
        }
    }
}

/// The denominator of a row's softmax over the blocks so far.
#[derive(Clone, Copy)]
struct RowSum {
    largest: f32,
    partial: [f32; LANES],
}

impl Default for RowSum {
    fn default() -> Self {
        Self { largest: f32::NEG_INFINITY, partial: [0.0; LANES] }
    }
}

impl RowSum {
    /// Turns a block's scores into weights, of which the first `seen` count and the others are 0. Gives what everything before
    /// must be multiplied with.
    #[inline(always)]
    fn add(&mut self, scores: &mut [f32], seen: usize, scale: f32) -> f32 {
        if seen == 0 {
            scores.fill(0.0);
            return 1.0;
        }
        scores[seen..].fill(f32::NEG_INFINITY);
        let mut lanes = [f32::NEG_INFINITY; LANES];
        for chunk in scores.chunks_exact(LANES) {
            lanes.iter_mut().zip(chunk).for_each(|(l, &x)| *l = if x > *l { x } else { *l });
        }
        // In halves: a chain of sixteen would take as long as the exponentials.
        for half in [8, 4, 2, 1] {
            let (low, high) = lanes.split_at_mut(half);
            low.iter_mut().zip(high).for_each(|(l, h)| *l = if *h > *l { *h } else { *l });
        }
        let largest = if lanes[0] > self.largest { lanes[0] } else { self.largest };
        scores.iter_mut().for_each(|x| *x = math::exp((*x - largest) * scale));
        scores[seen..].fill(0.0);
        let shrink = if largest > self.largest { math::exp((self.largest - largest) * scale) } else { 1.0 };
        self.largest = largest;
        self.partial.iter_mut().for_each(|p| *p *= shrink);
        for chunk in scores.chunks_exact(LANES) {
            self.partial.iter_mut().zip(chunk).for_each(|(p, &x)| *p += x);
        }
        shrink
    }
}

/// `GROUP` rows of the left operand.
#[derive(Clone, Copy)]
struct Group<'a> {
    rows: &'a [f32],
    stride: usize,
}

/// `GROUP` rows of the output.
struct Target<'a> {
    out: &'a mut [f32],
    stride: usize,
    output: Output,
}

/// `GROUP` rows of the left operand times `right` (`[inner, width]`, `width` a multiple of [`LANES`]), summed over the inner
/// dimension in order and only then stored or added.
#[inline(always)]
fn multiply_group<S: Simd>(simd: S, left: Group<'_>, right: &[f32], width: usize, mut target: Target<'_>) {
    let mut at = 0;
    while at < width {
        if width - at >= STRIP * S::F32_LANES {
            let sums = strip::<S, STRIP>(simd, left, right, width, at);
            store(simd, sums, &mut target, at);
            at += STRIP * S::F32_LANES;
        } else {
            let sums = strip::<S, 1>(simd, left, right, width, at);
            store(simd, sums, &mut target, at);
            at += S::F32_LANES;
        }
    }
}

/// `V` vectors of every row's product, from column `at` of `right` on.
#[inline(always)]
fn strip<S: Simd, const V: usize>(
    simd: S,
    left: Group<'_>,
    right: &[f32],
    width: usize,
    at: usize,
) -> [[S::f32s; V]; GROUP] {
    let inner = right.len() / width;
    let rows: [&[f32]; GROUP] = std::array::from_fn(|r| &left.rows[r * left.stride..][..inner]);
    let mut sums = [[simd.splat_f32s(0.0); V]; GROUP];
    for (i, row) in right.chunks_exact(width).take(inner).enumerate() {
        let (vectors, _) = S::as_simd_f32s(&row[at..at + V * S::F32_LANES]);
        for (sums, row) in sums.iter_mut().zip(rows) {
            let x = simd.splat_f32s(row[i]);
            for (sum, &vector) in sums.iter_mut().zip(vectors) {
                *sum = simd.mul_add_f32s(x, vector, *sum);
            }
        }
    }
    sums
}

#[inline(always)]
fn store<S: Simd, const V: usize>(simd: S, sums: [[S::f32s; V]; GROUP], target: &mut Target<'_>, at: usize) {
    for (row, sums) in sums.into_iter().enumerate() {
        let first = row * target.stride + at;
        let (out, _) = S::as_mut_simd_f32s(&mut target.out[first..first + V * S::F32_LANES]);
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = match target.output {
                Output::Replace => sum,
                Output::Accumulate => simd.add_f32s(*out, sum),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADS: usize = 2;

    fn noise(len: usize, seed: u32) -> Vec<f32> {
        (0..len).map(|i| ((i as f32 + 1.0) * 0.7391 + seed as f32).sin() * 1.7).collect()
    }

    /// Outputs of `qkv` computed in the chunks given.
    fn attend(qkv: &[f32], dim: usize, chunks: &[usize]) -> Vec<f32> {
        let tokens: usize = chunks.iter().sum();
        let rotary = Rotary::new(tokens, dim);
        let mut cache = KvCache::new(HEADS, dim, tokens);
        let mut ws = CacheWorkspace::default();
        let (mut out, mut done) = (vec![f32::NAN; tokens * HEADS * dim], 0);
        for &chunk in chunks {
            let rows = done..done + chunk;
            let qkv = &qkv[rows.start * 3 * HEADS * dim..rows.end * 3 * HEADS * dim];
            cache.attend(&rotary, qkv, &mut out[rows.start * HEADS * dim..rows.end * HEADS * dim], &mut ws);
            done += chunk;
        }
        assert_eq!(cache.len(), tokens);
        out
    }

    /// The definition, in 64 bits.
    fn oracle(qkv: &[f32], dim: usize) -> Vec<f64> {
        let width = HEADS * dim;
        let tokens = qkv.len() / (3 * width);
        let rotary = Rotary::new(tokens, dim);
        let part = |token: usize, head: usize, which: usize| {
            let row = &qkv[token * 3 * width + which * width + head * dim..][..dim];
            let mut out = vec![0.0; dim];
            rotary.rotate(token, row, &mut out, 1.0);
            if which == 2 { row.to_vec() } else { out }
        };
        let mut out = vec![0.0; tokens * width];
        for head in 0..HEADS {
            for p in 0..tokens {
                let q = part(p, head, 0);
                let dot =
                    |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
                let scores: Vec<f64> =
                    (0..=p).map(|j| (dot(&q, &part(j, head, 1)) / (dim as f64).sqrt()).exp()).collect();
                let sum: f64 = scores.iter().sum();
                for (j, score) in scores.iter().enumerate() {
                    for (c, v) in part(j, head, 2).iter().enumerate() {
                        out[p * width + head * dim + c] += score / sum * f64::from(*v);
                    }
                }
            }
        }
        out
    }

    #[test]
    fn it_is_softmax_attention_over_everything_up_to_the_token() {
        for (dim, tokens) in [(4, 70), (16, 33), (20, 130), (64, 65), (80, 10)] {
            let qkv = noise(tokens * 3 * HEADS * dim, dim as u32);
            let (got, want) = (attend(&qkv, dim, &[tokens]), oracle(&qkv, dim));
            let worst = got.iter().zip(&want).map(|(g, w)| (f64::from(*g) - w).abs()).fold(0.0, f64::max);
            assert!(worst < 3e-6, "dim {dim}, {tokens} tokens: {worst}");
        }
    }

    /// The property that serving's "same logits under every chunking" rests on.
    #[test]
    fn chunks_do_not_change_a_bit() {
        for dim in [12, 64] {
            let tokens = 203;
            let qkv = noise(tokens * 3 * HEADS * dim, 5);
            let whole = attend(&qkv, dim, &[tokens]);
            for chunks in [vec![1; tokens], vec![64, 64, 64, 11], vec![3, 100, 37, 63], vec![202, 1]] {
                assert!(attend(&qkv, dim, &chunks) == whole, "dim {dim}, chunks {chunks:?}");
            }
        }
    }

    #[test]
    fn a_cleared_cache_knows_nothing() {
        let (dim, tokens) = (8, 70);
        let (first, second) = (noise(tokens * 3 * HEADS * dim, 1), noise(tokens * 3 * HEADS * dim, 2));
        let rotary = Rotary::new(tokens, dim);
        let mut cache = KvCache::new(HEADS, dim, tokens);
        let mut ws = CacheWorkspace::default();
        let mut out = vec![0.0; tokens * HEADS * dim];
        cache.attend(&rotary, &first, &mut out, &mut ws);
        cache.clear();
        cache.attend(&rotary, &second[..40 * 3 * HEADS * dim], &mut out[..40 * HEADS * dim], &mut ws);
        assert!(out[..40 * HEADS * dim] == attend(&second[..40 * 3 * HEADS * dim], dim, &[40]));
    }
}
