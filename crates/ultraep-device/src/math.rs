//! Elementwise kernels. Every element is computed by the same sequence of IEEE operations on every machine and vector
//! width, so results do not depend on how the compiler vectorised them.

use pulp::Arch;

/// Partial sums of a reduction: fixed, so that the order of additions is the same on every machine.
const LANES: usize = 16;

/// `exp(x)` in `f32`, relative error under 2e-7 for `x` in `[-87, 88]`, clamped outside.
///
/// Range reduction to `x = n ln 2 + r` (Cody-Waite, two constants), the degree-7 Taylor polynomial for `exp(r)` on
/// `|r| <= ln 2 / 2`, and scaling by `2^n` through the exponent bits. Plain multiplications and additions only, no fused
/// operations, so that machines with and without FMA agree.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to the nearest integer
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * core::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN2_HI) - n * LN2_LO;
    let mut p = 1.984_127e-4;
    p = p * r + 1.388_888_9e-3;
    p = p * r + 8.333_334e-3;
    p = p * r + 4.166_666_8e-2;
    p = p * r + 0.166_666_67;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    // The low bits of `shifted` hold n in two's complement; adding the exponent bias gives 2^n.
    let scale = f32::from_bits(shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23);
    p * scale
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// SwiGLU: `out = silu(gate) * up`, where a row of `fc1` is `[gate, up]`, `[rows, 2 f]`, and `out` is `[rows, f]`.
pub fn swiglu(fc1: &[f32], out: &mut [f32], intermediate: usize) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for (row, out) in fc1.chunks_exact(2 * intermediate).zip(out.chunks_exact_mut(intermediate)) {
                let (gate, up) = row.split_at(intermediate);
                for ((o, &g), &u) in out.iter_mut().zip(gate).zip(up) {
                    *o = g * sigmoid(g) * u;
                }
            }
        },
    );
}

/// Backward of [`swiglu`]: recomputes the activation into `hidden` (`[rows, f]`) and turns `fc1` (`[rows, 2 f]`) into its own
/// gradient, given the gradient of the activation, `d_hidden` (`[rows, f]`).
pub fn swiglu_backward(fc1: &mut [f32], hidden: &mut [f32], d_hidden: &[f32], intermediate: usize) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            let rows = fc1.chunks_exact_mut(2 * intermediate);
            let rows = rows.zip(hidden.chunks_exact_mut(intermediate)).zip(d_hidden.chunks_exact(intermediate));
            for ((row, hidden), d_hidden) in rows {
                let (gate, up) = row.split_at_mut(intermediate);
                for (((g, u), h), &d) in gate.iter_mut().zip(up).zip(hidden).zip(d_hidden) {
                    let s = sigmoid(*g);
                    let silu = *g * s;
                    *h = silu * *u;
                    let d_silu = s + silu * (1.0 - s);
                    let d_gate = d * *u * d_silu;
                    *u = d * silu;
                    *g = d_gate;
                }
            }
        },
    );
}

/// `row = softmax(scale * row)`, with the largest element subtracted first; the sum runs in [`dot`]'s fixed order.
pub fn softmax(row: &mut [f32], scale: f32) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            let mut largest = [f32::NEG_INFINITY; LANES];
            let chunks = row.chunks_exact(LANES);
            chunks.remainder().iter().zip(&mut largest).for_each(|(&x, l)| *l = l.max(x));
            for chunk in chunks {
                largest.iter_mut().zip(chunk).for_each(|(l, &x)| *l = if x > *l { x } else { *l });
            }
            let largest = largest.iter().fold(f32::NEG_INFINITY, |m, &x| m.max(x));
            let mut partial = [0f32; LANES];
            let mut chunks = row.chunks_exact_mut(LANES);
            for chunk in &mut chunks {
                for (p, x) in partial.iter_mut().zip(chunk) {
                    *x = exp((*x - largest) * scale);
                    *p += *x;
                }
            }
            for (p, x) in partial.iter_mut().zip(chunks.into_remainder()) {
                *x = exp((*x - largest) * scale);
                *p += *x;
            }
            let inverse = 1.0 / partial.iter().sum::<f32>();
            row.iter_mut().for_each(|x| *x *= inverse);
        },
    );
}

/// Gradient of [`softmax`]'s input from that of its output `d` (overwritten) and its output `p`.
pub fn softmax_backward(d: &mut [f32], p: &[f32], scale: f32) {
    let pull = dot(d, p);
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for (d, &p) in d.iter_mut().zip(p) {
                *d = p * (*d - pull) * scale;
            }
        },
    );
}

/// `y += a x`.
#[inline]
pub fn add_scaled(y: &mut [f32], a: f32, x: &[f32]) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for (y, &x) in y.iter_mut().zip(x) {
                *y += a * x;
            }
        },
    );
}

/// `y += x`.
#[inline]
pub fn add(y: &mut [f32], x: &[f32]) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for (y, &x) in y.iter_mut().zip(x) {
                *y += x;
            }
        },
    );
}

/// `y = a x`.
#[inline]
pub fn scale_into(y: &mut [f32], a: f32, x: &[f32]) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for (y, &x) in y.iter_mut().zip(x) {
                *y = a * x;
            }
        },
    );
}

/// Dot product, summed in 16 interleaved partial sums that are then added in order: one fixed order on every machine.
#[inline]
pub fn dot(x: &[f32], y: &[f32]) -> f32 {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            let mut partial = [0f32; LANES];
            let (xs, ys) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
            let rest: f32 = xs.remainder().iter().zip(ys.remainder()).map(|(a, b)| a * b).sum();
            for (a, b) in xs.zip(ys) {
                for lane in 0..LANES {
                    partial[lane] += a[lane] * b[lane];
                }
            }
            partial.iter().sum::<f32>() + rest
        },
    )
}

/// One AdamW step (Loshchilov and Hutter, 2019).
#[derive(Clone, Copy, Debug)]
pub struct AdamStep {
    /// Learning rate.
    pub learning_rate: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// `1 - beta1^t` for step `t`, from 1.
    pub correction1: f32,
    /// `1 - beta2^t`.
    pub correction2: f32,
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// What gradients are multiplied with first.
    pub gradient_scale: f32,
}

impl AdamStep {
    /// Updates weights and moments of `gradient`'s length.
    pub fn apply(self, weights: &mut [f32], gradient: &[f32], first: &mut [f32], second: &mut [f32]) {
        let Self { learning_rate, beta1, beta2, epsilon, gradient_scale, .. } = self;
        let (inverse1, inverse2) = (1.0 / self.correction1, 1.0 / self.correction2);
        let keep = 1.0 - learning_rate * self.weight_decay;
        Arch::new().dispatch(
            #[inline(always)]
            || {
                let state = first.iter_mut().zip(second);
                for ((w, &g), (m, v)) in weights.iter_mut().zip(gradient).zip(state) {
                    let g = g * gradient_scale;
                    *m = beta1 * *m + (1.0 - beta1) * g;
                    *v = beta2 * *v + (1.0 - beta2) * g * g;
                    let step = *m * inverse1 / ((*v * inverse2).sqrt() + epsilon);
                    *w = *w * keep - learning_rate * step;
                }
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ten_millionths() {
        let mut worst = 0f64;
        for i in -86_000..=87_000 {
            let x = i as f32 / 1000.0;
            let want = f64::from(x).exp();
            worst = worst.max(((f64::from(exp(x)) - want) / want).abs());
        }
        assert!(worst < 2e-7, "worst relative error {worst:e}");
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::INFINITY).is_finite() && exp(f32::NEG_INFINITY) > 0.0);
    }

    #[test]
    fn swiglu_backward_matches_a_central_difference() {
        let f = 5;
        let fc1: Vec<f32> = (0..4 * f).map(|i| (i as f32 * 0.37).sin() * 2.0).collect();
        let d: Vec<f32> = (0..2 * f).map(|i| (i as f32 * 0.91).cos()).collect();
        let loss = |fc1: &[f32]| {
            let mut out = vec![0.0; 2 * f];
            swiglu(fc1, &mut out, f);
            out.iter().zip(&d).map(|(o, d)| f64::from(o * d)).sum::<f64>()
        };
        let (mut grad, mut hidden, mut want) = (fc1.clone(), vec![0.0; 2 * f], vec![0.0; 2 * f]);
        swiglu_backward(&mut grad, &mut hidden, &d, f);
        swiglu(&fc1, &mut want, f);
        assert_eq!(hidden, want, "the recomputed activation is the forward's");
        for i in 0..fc1.len() {
            let (mut up, mut down) = (fc1.clone(), fc1.clone());
            up[i] += 1e-2;
            down[i] -= 1e-2;
            let numeric = (loss(&up) - loss(&down)) / 2e-2;
            assert!((numeric - f64::from(grad[i])).abs() < 2e-3, "element {i}: {numeric} against {}", grad[i]);
        }
    }

    #[test]
    fn dot_handles_remainders() {
        for len in [0, 1, 15, 16, 17, 100] {
            let x: Vec<f32> = (0..len).map(|i| i as f32).collect();
            let want: f32 = (0..len).map(|i| (i * i) as f32).sum();
            assert_eq!(dot(&x, &x), want, "{len}");
        }
    }

    #[test]
    fn the_first_adam_step_moves_by_the_learning_rate_against_the_gradient() {
        let step = AdamStep {
            learning_rate: 0.1,
            beta1: 0.9,
            beta2: 0.99,
            correction1: 0.1,
            correction2: 0.01,
            epsilon: 1e-8,
            weight_decay: 0.5,
            gradient_scale: 2.0,
        };
        let (mut w, mut m, mut v) = ([1.0, 1.0], [0.0; 2], [0.0; 2]);
        step.apply(&mut w, &[3.0, -3.0], &mut m, &mut v);
        assert!((w[0] - (0.95 - 0.1)).abs() < 1e-5 && (w[1] - (0.95 + 0.1)).abs() < 1e-5, "{w:?}");
        assert!((m[0] - 0.6).abs() < 1e-6 && (v[0] - 0.36).abs() < 1e-5);
    }
}
