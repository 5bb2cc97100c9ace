//! Causal attention of new tokens over a cache of keys and values: the forward of training and of serving.
//!
//! ```text
//! append the new tokens' rotated keys and values
//! for each head, for each tile of 32 new tokens:
//!     for each block of 64 keys:    scores = q kᵀ            4 rows at a time
//!     for each row at position p:   softmax over 0..=p       in `math::softmax`'s fixed order
//!     for each block of 64 values:  out += scores v          summed inside the block, then added to the row
//! ```
//!
//! **A token's result depends on its own query and on the keys and values up to its position alone, bit for bit**: blocks lie
//! at fixed positions, every sum has one order, and what lies behind a token's position in its last block counts as exact
//! zeros. So it does not matter in how many chunks a sequence is computed, what else is in the batch, or how wide the
//! machine's vectors are (products and additions are fused on all of them).
//!
//! Memory: a head's keys lie transposed inside blocks, `[blocks, head_dim, 64]`, its values by position,
//! `[blocks * 64, head_dim]`, widths rounded up to 16; all taken when the cache is made.

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
    keys: Vec<f32>,
    values: Vec<f32>,
}

/// Scratch memory of [`KvCache::attend`]; grows to the longest context seen.
#[derive(Debug, Default)]
pub struct CacheWorkspace {
    queries: Vec<f32>,
    scores: Vec<f32>,
    out: Vec<f32>,
    rotated: Vec<f32>,
}

impl KvCache {
    /// Room for `capacity` tokens of `heads` heads, each `head_dim` wide (even).
    pub fn new(heads: usize, head_dim: usize, capacity: usize) -> Self {
        let tokens = capacity.next_multiple_of(BLOCK);
        let keys = vec![0.0; heads * tokens * head_dim];
        let values = vec![0.0; heads * tokens * head_dim.next_multiple_of(LANES)];
        Self { heads, head_dim, capacity, len: 0, keys, values }
    }

    /// Tokens in it.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no token yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Tokens that it has room for.
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
        self.values.fill(0.0);
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

    fn append(&mut self, rotary: &Rotary, qkv: &[f32], tokens: usize, ws: &mut CacheWorkspace) {
        let (dim, padded) = (self.head_dim, self.padded_dim());
        let width = self.heads * dim;
        let room = self.capacity.next_multiple_of(BLOCK);
        ws.rotated.resize(dim, 0.0);
        for (position, row) in (self.len..self.len + tokens).zip(qkv.chunks_exact(3 * width)) {
            let (block, column) = (position / BLOCK, position % BLOCK);
            for head in 0..self.heads {
                let at = head * dim..(head + 1) * dim;
                rotary.rotate(position, &row[width..][at.clone()], &mut ws.rotated, 1.0);
                let keys = &mut self.keys[(head * room + block * BLOCK) * dim..][..BLOCK * dim];
                for (i, &x) in ws.rotated.iter().enumerate() {
                    keys[i * BLOCK + column] = x;
                }
                self.values[(head * room + position) * padded..][..dim].copy_from_slice(&row[2 * width..][at]);
            }
        }
    }

    fn attend_tile(&self, rotary: &Rotary, qkv: &[f32], out: &mut [f32], tile: Tile, ws: &mut CacheWorkspace) {
        let Tile { head, first, rows } = tile;
        let (dim, padded) = (self.head_dim, self.padded_dim());
        let width = self.heads * dim;
        let room = self.capacity.next_multiple_of(BLOCK);
        let position = self.len + first;
        let context = (position + rows).next_multiple_of(BLOCK);
        let groups = rows.div_ceil(GROUP);
        ws.queries.clear();
        ws.queries.resize(groups * GROUP * dim, 0.0);
        for (row, query) in ws.queries.chunks_exact_mut(dim).take(rows).enumerate() {
            rotary.rotate(position + row, &qkv[(first + row) * 3 * width + head * dim..][..dim], query, 1.0);
        }
        // What was there is overwritten before it is read.
        ws.scores.resize((groups * GROUP * context).max(ws.scores.len()), 0.0);
        ws.out.clear();
        ws.out.resize(groups * GROUP * padded, 0.0);
        let scores = &mut ws.scores[..groups * GROUP * context];
        let keys = &self.keys[head * room * dim..][..context * dim];
        Arch::new().dispatch(Scores { queries: &ws.queries, keys, scores, dim, context, position, rows });
        let scale = 1.0 / (dim as f32).sqrt();
        for (row, scores) in scores.chunks_exact_mut(context).enumerate() {
            let (seen, hidden) = scores.split_at_mut(if row < rows { position + row + 1 } else { 0 });
            if row < rows {
                math::softmax(seen, scale);
            }
            hidden.fill(0.0);
        }
        let values = &self.values[head * room * padded..][..context * padded];
        Arch::new().dispatch(Mix { scores, values, out: &mut ws.out, width: padded, context, position, rows });
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

/// `scores = queries keysᵀ` for all blocks that a group of rows sees any of.
struct Scores<'a> {
    /// `[groups * GROUP, dim]`.
    queries: &'a [f32],
    /// `[blocks, dim, BLOCK]`.
    keys: &'a [f32],
    /// `[groups * GROUP, context]`.
    scores: &'a mut [f32],
    dim: usize,
    context: usize,
    position: usize,
    rows: usize,
}

impl WithSimd for Scores<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for (block, keys) in self.keys.chunks_exact(self.dim * BLOCK).enumerate() {
            let groups = self.queries.chunks_exact(GROUP * self.dim);
            let targets = self.scores.chunks_exact_mut(GROUP * self.context);
            for (group, (queries, scores)) in groups.zip(targets).enumerate() {
                if block * BLOCK > last_position(self.position, self.rows, group) {
                    continue;
                }
                let target =
                    Target { out: scores, stride: self.context, column: block * BLOCK, output: Output::Replace };
                multiply_group(simd, Group { rows: queries, stride: self.dim, column: 0 }, keys, BLOCK, target);
            }
        }
    }
}

/// `out += scores values`, block by block.
struct Mix<'a> {
    /// `[groups * GROUP, context]`.
    scores: &'a [f32],
    /// `[context, width]`.
    values: &'a [f32],
    /// `[groups * GROUP, width]`.
    out: &'a mut [f32],
    width: usize,
    context: usize,
    position: usize,
    rows: usize,
}

impl WithSimd for Mix<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for (block, values) in self.values.chunks_exact(self.width * BLOCK).enumerate() {
            let groups = self.scores.chunks_exact(GROUP * self.context);
            let targets = self.out.chunks_exact_mut(GROUP * self.width);
            for (group, (scores, out)) in groups.zip(targets).enumerate() {
                if block * BLOCK > last_position(self.position, self.rows, group) {
                    continue;
                }
                let rows = Group { rows: scores, stride: self.context, column: block * BLOCK };
                let target = Target { out, stride: self.width, column: 0, output: Output::Accumulate };
                multiply_group(simd, rows, values, self.width, target);
            }
        }
    }
}

/// Position of the last token of a group of rows.
#[inline(always)]
fn last_position(position: usize, rows: usize, group: usize) -> usize {
    position + rows.min((group + 1) * GROUP) - 1
}

/// `GROUP` rows of the left operand, from `column` on.
#[derive(Clone, Copy)]
struct Group<'a> {
    rows: &'a [f32],
    stride: usize,
    column: usize,
}

/// `GROUP` rows of the output, from `column` on.
struct Target<'a> {
    out: &'a mut [f32],
    stride: usize,
    column: usize,
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
    let rows: [&[f32]; GROUP] = std::array::from_fn(|r| &left.rows[r * left.stride + left.column..][..inner]);
    let mut sums = [[simd.splat_f32s(0.0); V]; GROUP];
    for (i, row) in right.chunks_exact(width).enumerate() {
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
        let first = row * target.stride + target.column + at;
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
