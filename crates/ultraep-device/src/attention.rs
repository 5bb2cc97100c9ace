//! Causal multi-head self-attention with rotary position embedding, forward and backward.
//!
//! Input is the fused projection `qkv`, `[sequences * tokens, 3 * heads * head_dim]`, each row `q`, `k`, `v` side by side;
//! output is `[sequences * tokens, heads * head_dim]`. The forward is [`crate::cache`]'s, over a cache that starts empty.
//! Probabilities are not kept: backward recomputes them, head by head, so that the scratch memory is one head's.
//!
//! Rotary embedding (Su et al., RoFormer, section 3.2.2), in the half-split form: element `i` of the first half of a
//! head is rotated with element `i` of the second half by `position / 10000^(2i / head_dim)`.

use crate::cache::{CacheWorkspace, KvCache};
use crate::math;
use crate::matmul::{Matrix, MatrixMut, Output, multiply, multiply_transposed, transposed_multiply};

/// Sizes of an attention call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// Sequences in the batch.
    pub sequences: usize,
    /// Tokens in each.
    pub tokens: usize,
    /// Heads.
    pub heads: usize,
    /// Width of a head; even.
    pub head_dim: usize,
}

/// Cosines and sines of every (position, pair), `[tokens, head_dim / 2]`.
#[derive(Clone, Debug)]
pub struct Rotary {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

impl Rotary {
    /// Tables for positions `0..tokens`.
    pub fn new(tokens: usize, head_dim: usize) -> Self {
        let half = head_dim / 2;
        let angle = |position: usize, i: usize| position as f64 / 10_000f64.powf(2.0 * i as f64 / head_dim as f64);
        let angles = |of: fn(f64) -> f64| {
            (0..tokens).flat_map(|p| (0..half).map(move |i| of(angle(p, i)) as f32)).collect::<Vec<_>>()
        };
        Self { cos: angles(f64::cos), sin: angles(f64::sin), half }
    }

    /// Positions in the tables.
    pub fn positions(&self) -> usize {
        self.cos.len().checked_div(self.half).unwrap_or(0)
    }

    pub(crate) fn rotate(&self, position: usize, row: &[f32], out: &mut [f32], direction: f32) {
        let table = position * self.half..(position + 1) * self.half;
        let (cos, sin) = (&self.cos[table.clone()], &self.sin[table]);
        let ((a, b), (out_a, out_b)) = (row.split_at(self.half), out.split_at_mut(self.half));
        for i in 0..self.half {
            let s = sin[i] * direction;
            out_a[i] = a[i] * cos[i] - b[i] * s;
            out_b[i] = a[i] * s + b[i] * cos[i];
        }
    }
}

/// Scratch memory for one head.
#[derive(Debug, Default)]
pub struct AttentionWorkspace {
    q: Vec<f32>,
    k: Vec<f32>,
    probabilities: Vec<f32>,
    d_scores: Vec<f32>,
    d_q: Vec<f32>,
    d_k: Vec<f32>,
    cache: Option<KvCache>,
    forward: CacheWorkspace,
}

impl AttentionShape {
    fn width(self) -> usize {
        self.heads * self.head_dim
    }

    fn stride(self) -> usize {
        3 * self.width()
    }

    /// First element of `q` of a (sequence, head); `k` and `v` are one and two widths further.
    fn origin(self, sequence: usize, head: usize) -> usize {
        sequence * self.tokens * self.stride() + head * self.head_dim
    }

    fn resize(self, ws: &mut AttentionWorkspace) {
        let (rows, square) = (self.tokens * self.head_dim, self.tokens * self.tokens);
        for buffer in [&mut ws.q, &mut ws.k, &mut ws.d_q, &mut ws.d_k] {
            buffer.resize(rows, 0.0);
        }
        ws.probabilities.resize(square, 0.0);
        ws.d_scores.resize(square, 0.0);
    }

    /// Rotated queries and keys of one head and its attention probabilities, into the workspace.
    fn attend(self, rotary: &Rotary, qkv: &[f32], origin: usize, ws: &mut AttentionWorkspace) {
        let Self { tokens, head_dim, .. } = self;
        for (offset, out) in [(0, &mut ws.q), (self.width(), &mut ws.k)] {
            for (position, out) in out.chunks_exact_mut(head_dim).enumerate() {
                let at = origin + offset + position * self.stride();
                rotary.rotate(position, &qkv[at..at + head_dim], out, 1.0);
            }
        }
        let (q, k) = (Matrix::new(&ws.q, tokens, head_dim), Matrix::new(&ws.k, tokens, head_dim));
        multiply_transposed(q, k, MatrixMut::new(&mut ws.probabilities, tokens, tokens), Output::Replace);
        let scale = 1.0 / (head_dim as f32).sqrt();
        for (position, row) in ws.probabilities.chunks_exact_mut(tokens).enumerate() {
            let (seen, hidden) = row.split_at_mut(position + 1);
            math::softmax(seen, scale);
            hidden.fill(0.0);
        }
    }

    /// `out = softmax(causal(q kᵀ / sqrt(head_dim))) v`, by the kernel that serving uses ([`crate::cache`]).
    pub fn forward(self, rotary: &Rotary, qkv: &[f32], out: &mut [f32], ws: &mut AttentionWorkspace) {
        let rows = self.tokens * self.width();
        let fits = |c: &KvCache| c.fits(self.heads, self.head_dim, self.tokens);
        let cache = ws.cache.take().filter(fits);
        let cache = ws.cache.insert(cache.unwrap_or_else(|| KvCache::new(self.heads, self.head_dim, self.tokens)));
        for (qkv, out) in qkv.chunks_exact(3 * rows).zip(out.chunks_exact_mut(rows)).take(self.sequences) {
            cache.clear();
            cache.attend(rotary, qkv, out, &mut ws.forward);
        }
    }

    /// Gradient of `qkv`, every element of which is written, from the gradient of the output.
    pub fn backward(self, rotary: &Rotary, qkv: &[f32], d_out: &[f32], d_qkv: &mut [f32], ws: &mut AttentionWorkspace) {
        let Self { tokens, head_dim, .. } = self;
        let (width, stride) = (self.width(), self.stride());
        self.resize(ws);
        let scale = 1.0 / (head_dim as f32).sqrt();
        for sequence in 0..self.sequences {
            for head in 0..self.heads {
                let origin = self.origin(sequence, head);
                self.attend(rotary, qkv, origin, ws);
                let at = sequence * tokens * width + head * head_dim;
                let d_out = Matrix::strided(&d_out[at..], tokens, head_dim, width);
                let v = Matrix::strided(&qkv[origin + 2 * width..], tokens, head_dim, stride);
                let p = Matrix::new(&ws.probabilities, tokens, tokens);
                let d_v = MatrixMut::strided(&mut d_qkv[origin + 2 * width..], tokens, head_dim, stride);
                transposed_multiply(p, d_out, d_v, Output::Replace);
                multiply_transposed(d_out, v, MatrixMut::new(&mut ws.d_scores, tokens, tokens), Output::Replace);
                let rows = ws.d_scores.chunks_exact_mut(tokens).zip(ws.probabilities.chunks_exact(tokens));
                for (d_row, p_row) in rows {
                    math::softmax_backward(d_row, p_row, scale);
                }
                let d_scores = Matrix::new(&ws.d_scores, tokens, tokens);
                let (q, k) = (Matrix::new(&ws.q, tokens, head_dim), Matrix::new(&ws.k, tokens, head_dim));
                multiply(d_scores, k, MatrixMut::new(&mut ws.d_q, tokens, head_dim), Output::Replace);
                transposed_multiply(d_scores, q, MatrixMut::new(&mut ws.d_k, tokens, head_dim), Output::Replace);
                for (offset, grad) in [(0, &ws.d_q), (width, &ws.d_k)] {
                    for (position, grad) in grad.chunks_exact(head_dim).enumerate() {
                        let at = origin + offset + position * stride;
                        rotary.rotate(position, grad, &mut d_qkv[at..at + head_dim], -1.0);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: AttentionShape = AttentionShape { sequences: 2, tokens: 5, heads: 2, head_dim: 4 };

    fn forward(qkv: &[f32]) -> Vec<f32> {
        let rotary = Rotary::new(SHAPE.tokens, SHAPE.head_dim);
        let mut out = vec![f32::NAN; SHAPE.sequences * SHAPE.tokens * SHAPE.width()];
        SHAPE.forward(&rotary, qkv, &mut out, &mut AttentionWorkspace::default());
        out
    }

    fn input() -> Vec<f32> {
        (0..SHAPE.sequences * SHAPE.tokens * SHAPE.stride()).map(|i| ((i as f32 + 1.0) * 0.61).sin()).collect()
    }

    #[test]
    fn a_token_sees_no_later_token_and_no_other_sequence() {
        let qkv = input();
        let base = forward(&qkv);
        let mut changed = qkv.clone();
        let row = 3 * SHAPE.stride();
        changed[row..row + SHAPE.stride()].iter_mut().for_each(|x| *x += 0.5);
        let out = forward(&changed);
        let width = SHAPE.width();
        assert_eq!(base[..3 * width], out[..3 * width]);
        assert_ne!(base[3 * width..4 * width], out[3 * width..4 * width]);
        assert_ne!(base[4 * width..5 * width], out[4 * width..5 * width]);
        assert_eq!(base[5 * width..], out[5 * width..]);
    }

    #[test]
    fn the_gradient_matches_central_differences() {
        let qkv = input();
        let d: Vec<f32> =
            (0..SHAPE.sequences * SHAPE.tokens * SHAPE.width()).map(|i| (i as f32 * 0.43).cos()).collect();
        let loss = |qkv: &[f32]| forward(qkv).iter().zip(&d).map(|(o, d)| f64::from(o * d)).sum::<f64>();
        let rotary = Rotary::new(SHAPE.tokens, SHAPE.head_dim);
        let mut grad = vec![f32::NAN; qkv.len()];
        SHAPE.backward(&rotary, &qkv, &d, &mut grad, &mut AttentionWorkspace::default());
        for (i, &got) in grad.iter().enumerate() {
            let (mut up, mut down) = (qkv.clone(), qkv.clone());
            up[i] += 1e-2;
            down[i] -= 1e-2;
            let numeric = (loss(&up) - loss(&down)) / 2e-2;
            assert!((numeric - f64::from(got)).abs() < 3e-3, "element {i}: {numeric} against {got}");
        }
    }
}
