//! Root-mean-square normalisation (Zhang and Sennrich, 2019), forward and backward, and the softmax cross-entropy.

use pulp::Arch;

use crate::math;

const EPSILON: f32 = 1e-5;

/// `out = x / sqrt(mean(x^2) + 1e-5) * weight` for rows of `weight.len()`.
pub fn rms_norm(x: &[f32], weight: &[f32], out: &mut [f32]) {
    let width = weight.len();
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        let inverse = inverse_rms(x);
        Arch::new().dispatch(
            #[inline(always)]
            || {
                for ((o, &x), &w) in out.iter_mut().zip(x).zip(weight) {
                    *o = x * inverse * w;
                }
            },
        );
    }
}

fn inverse_rms(x: &[f32]) -> f32 {
    1.0 / (math::dot(x, x) / x.len() as f32 + EPSILON).sqrt()
}

/// Gradients of [`rms_norm`]: `d_x` is overwritten, `d_weight` is added to, rows in order.
pub fn rms_norm_backward(x: &[f32], weight: &[f32], d_out: &[f32], d_x: &mut [f32], d_weight: &mut [f32]) {
    let width = weight.len();
    let mut weighted = vec![0f32; width];
    for ((x, d_out), d_x) in x.chunks_exact(width).zip(d_out.chunks_exact(width)).zip(d_x.chunks_exact_mut(width)) {
        let inverse = inverse_rms(x);
        Arch::new().dispatch(
            #[inline(always)]
            || {
                for (((g, &d), &w), (dw, &x)) in
                    weighted.iter_mut().zip(d_out).zip(weight).zip(d_weight.iter_mut().zip(x))
                {
                    *g = d * w;
                    *dw += d * x * inverse;
                }
            },
        );
        let pull = math::dot(&weighted, x) * inverse * inverse / width as f32;
        Arch::new().dispatch(
            #[inline(always)]
            || {
                for ((dx, &g), &x) in d_x.iter_mut().zip(&weighted).zip(x) {
                    *dx = inverse * (g - x * pull);
                }
            },
        );
    }
}

/// Mean cross-entropy of `logits` (`[rows, classes]`) against `targets`, and its gradient into `d_logits`.
///
/// # Panics
/// When a target is not a class: a bug of the caller (tokens are bytes, classes are 256).
pub fn cross_entropy(logits: &[f32], targets: &[u32], d_logits: &mut [f32]) -> f32 {
    let rows = targets.len();
    let classes = logits.len() / rows.max(1);
    let mut loss = 0f64;
    let scale = 1.0 / rows as f32;
    for ((row, &target), d_row) in logits.chunks_exact(classes).zip(targets).zip(d_logits.chunks_exact_mut(classes)) {
        d_row.copy_from_slice(row);
        math::softmax(d_row, 1.0);
        let target = target as usize;
        // Unlike `max`, `clamp` lets a value that is no number through: the loss must show it.
        loss -= f64::from(d_row[target].clamp(f32::MIN_POSITIVE, 1.0)).ln();
        d_row[target] -= 1.0;
        d_row.iter_mut().for_each(|d| *d *= scale);
    }
    (loss / rows as f64) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn norm_gradients_match_central_differences() {
        let (width, rows) = (6, 3);
        let x: Vec<f32> = (0..rows * width).map(|i| ((i as f32 + 1.0) * 0.7).sin() * 2.0).collect();
        let w: Vec<f32> = (0..width).map(|i| 0.5 + i as f32 * 0.2).collect();
        let d: Vec<f32> = (0..rows * width).map(|i| (i as f32 * 0.4).cos()).collect();
        let loss = |x: &[f32], w: &[f32]| {
            let mut out = vec![0.0; rows * width];
            rms_norm(x, w, &mut out);
            out.iter().zip(&d).map(|(o, d)| f64::from(o * d)).sum::<f64>()
        };
        let (mut d_x, mut d_w) = (vec![f32::NAN; rows * width], vec![0.0; width]);
        rms_norm_backward(&x, &w, &d, &mut d_x, &mut d_w);
        let nudged = |v: &[f32], i: usize, by: f32| {
            let mut v = v.to_vec();
            v[i] += by;
            v
        };
        for (i, &got) in d_x.iter().enumerate() {
            let numeric = (loss(&nudged(&x, i, 1e-2), &w) - loss(&nudged(&x, i, -1e-2), &w)) / 2e-2;
            assert!((numeric - f64::from(got)).abs() < 2e-3, "x {i}: {numeric} against {got}");
        }
        for (i, &got) in d_w.iter().enumerate() {
            let numeric = (loss(&x, &nudged(&w, i, 1e-2)) - loss(&x, &nudged(&w, i, -1e-2))) / 2e-2;
            assert!((numeric - f64::from(got)).abs() < 2e-3, "weight {i}: {numeric} against {got}");
        }
    }

    #[test]
    fn cross_entropy_matches_its_definition_and_differences() {
        let logits: Vec<f32> = (0..12).map(|i| (i as f32 * 1.3).sin() * 3.0).collect();
        let targets = [1, 3, 0];
        let loss = |logits: &[f32]| cross_entropy(logits, &targets, &mut [0.0; 12]);
        let want: f64 = logits
            .chunks_exact(4)
            .zip(targets)
            .map(|(row, t)| {
                let sum: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
                sum.ln() - f64::from(row[t as usize])
            })
            .sum::<f64>()
            / 3.0;
        assert!((f64::from(loss(&logits)) - want).abs() < 1e-6);
        let mut grad = [0.0; 12];
        cross_entropy(&logits, &targets, &mut grad);
        for (i, &got) in grad.iter().enumerate() {
            let mut up = logits.clone();
            let mut down = logits.clone();
            up[i] += 1e-2;
            down[i] -= 1e-2;
            let numeric = (loss(&up) - loss(&down)) / 2e-2;
            assert!((numeric - got).abs() < 1e-3, "logit {i}: {numeric} against {got}");
        }
        let mut broken = logits.clone();
        broken[6] = f32::NAN;
        assert!(loss(&broken).is_nan(), "a loss over what is no number");
    }
}
