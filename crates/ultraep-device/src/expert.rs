//! The grouped expert feed-forward: each physical expert of a rank applies its SwiGLU network to its own rows.
//!
//! An expert's weights lie in one contiguous block of `f32`: `fc1` `[d, 2 f]` (gate and up side by side), then `fc2`
//! `[f, d]`; its gradient has the same layout. Rows of all physical experts lie in one buffer, expert after expert, each
//! expert's share padded with zero rows to a multiple of [`ROW_TILE`].

use crate::math;
use crate::matmul::{
    Matrix, MatrixMut, Output, ROW_TILE, multiply_independent_rows, multiply_transposed_independent_rows,
    transposed_multiply,
};

/// Sizes of one expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertShape {
    /// `d`, width of the model.
    pub hidden: usize,
    /// `f`, inner width of the expert.
    pub intermediate: usize,
}

impl ExpertShape {
    /// Elements of `fc1`.
    pub fn fc1_len(self) -> usize {
        2 * self.hidden * self.intermediate
    }

    /// Elements of `fc2`.
    pub fn fc2_len(self) -> usize {
        self.hidden * self.intermediate
    }

    /// Elements of one expert, `fc1` then `fc2`.
    pub fn weight_len(self) -> usize {
        self.fc1_len() + self.fc2_len()
    }

    /// Bytes of one expert.
    pub fn weight_bytes(self) -> usize {
        self.weight_len() * size_of::<f32>()
    }

    /// Floating-point operations of one row, forward.
    pub fn flops_per_row(self) -> u64 {
        2 * self.weight_len() as u64
    }
}

/// Rows of one physical expert in the grouped buffers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Group {
    /// First row.
    pub first_row: usize,
    /// Rows with tokens.
    pub rows: usize,
}

impl Group {
    /// Rows with padding.
    pub fn padded_rows(self) -> usize {
        self.rows.next_multiple_of(ROW_TILE)
    }

    /// Lays groups out one after another for the given row counts; returns the rows of the whole buffer.
    pub fn lay_out(rows: impl IntoIterator<Item = usize>, groups: &mut Vec<Group>) -> usize {
        groups.clear();
        let mut first_row = 0;
        for rows in rows {
            let group = Group { first_row, rows };
            first_row += group.padded_rows();
            groups.push(group);
        }
        first_row
    }
}

/// Scratch memory of [`ExpertShape::forward`] and [`ExpertShape::backward`]; grows to the largest group seen.
#[derive(Debug, Default)]
pub struct ExpertWorkspace {
    hidden: Vec<f32>,
    d_hidden: Vec<f32>,
}

fn scratch(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

/// What one expert's backward reads and writes, all for its own padded rows.
#[derive(Debug)]
pub struct Backward<'a> {
    /// Weights, [`ExpertShape::weight_len`].
    pub weights: &'a [f32],
    /// Weight gradient, added to.
    pub weight_grad: &'a mut [f32],
    /// Input rows of the forward, `[rows, d]`.
    pub input: &'a [f32],
    /// `fc1` output kept from the forward, `[rows, 2 f]`; overwritten with its gradient.
    pub fc1: &'a mut [f32],
    /// Gradient of the output rows, `[rows, d]`.
    pub d_output: &'a [f32],
    /// Gradient of the input rows, `[rows, d]`; overwritten.
    pub d_input: &'a mut [f32],
}

impl ExpertShape {
    /// `output = (silu(x W_gate) * (x W_up)) W_fc2` for one expert's padded rows; keeps `x [W_gate, W_up]` in `fc1`.
    pub fn forward(
        self,
        weights: &[f32],
        input: &[f32],
        fc1: &mut [f32],
        output: &mut [f32],
        ws: &mut ExpertWorkspace,
    ) {
        let Self { hidden: d, intermediate: f } = self;
        let rows = input.len() / d;
        let (w1, w2) = weights.split_at(self.fc1_len());
        multiply_independent_rows(
            Matrix::new(input, rows, d),
            Matrix::new(w1, d, 2 * f),
            MatrixMut::new(fc1, rows, 2 * f),
        );
        let hidden = scratch(&mut ws.hidden, rows * f);
        math::swiglu(fc1, hidden, f);
        multiply_independent_rows(Matrix::new(hidden, rows, f), Matrix::new(w2, f, d), MatrixMut::new(output, rows, d));
    }

    /// Only the first half of [`ExpertShape::forward`]: recomputes what a backward needs.
    pub fn recompute(self, weights: &[f32], input: &[f32], fc1: &mut [f32]) {
        let rows = input.len() / self.hidden;
        let w1 = Matrix::new(&weights[..self.fc1_len()], self.hidden, 2 * self.intermediate);
        multiply_independent_rows(
            Matrix::new(input, rows, self.hidden),
            w1,
            MatrixMut::new(fc1, rows, 2 * self.intermediate),
        );
    }

    /// Gradients of one expert's padded rows: into its weight gradient and into `d_input`.
    pub fn backward(self, work: Backward<'_>, ws: &mut ExpertWorkspace) {
        let Self { hidden: d, intermediate: f } = self;
        let rows = work.input.len() / d;
        let (w1, w2) = work.weights.split_at(self.fc1_len());
        let (g1, g2) = work.weight_grad.split_at_mut(self.fc1_len());
        let d_output = Matrix::new(work.d_output, rows, d);
        let d_hidden = scratch(&mut ws.d_hidden, rows * f);
        multiply_transposed_independent_rows(d_output, Matrix::new(w2, f, d), MatrixMut::new(d_hidden, rows, f));
        let hidden = scratch(&mut ws.hidden, rows * f);
        math::swiglu_backward(work.fc1, hidden, d_hidden, f);
        transposed_multiply(Matrix::new(hidden, rows, f), d_output, MatrixMut::new(g2, f, d), Output::Accumulate);
        let d_fc1 = Matrix::new(work.fc1, rows, 2 * f);
        multiply_transposed_independent_rows(d_fc1, Matrix::new(w1, d, 2 * f), MatrixMut::new(work.d_input, rows, d));
        transposed_multiply(Matrix::new(work.input, rows, d), d_fc1, MatrixMut::new(g1, d, 2 * f), Output::Accumulate);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: ExpertShape = ExpertShape { hidden: 6, intermediate: 4 };

    fn wave(len: usize, step: f32) -> Vec<f32> {
        (0..len).map(|i| ((i as f32 + 1.0) * step).sin() * 0.7).collect()
    }

    fn forward(weights: &[f32], input: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let rows = input.len() / SHAPE.hidden;
        let (mut fc1, mut out) = (vec![0.0; rows * 2 * SHAPE.intermediate], vec![0.0; input.len()]);
        SHAPE.forward(weights, input, &mut fc1, &mut out, &mut ExpertWorkspace::default());
        (fc1, out)
    }

    #[test]
    fn gradients_match_central_differences() {
        let rows = ROW_TILE;
        let (weights, input, d) =
            (wave(SHAPE.weight_len(), 0.37), wave(rows * SHAPE.hidden, 0.53), wave(rows * SHAPE.hidden, 0.71));
        let loss = |w: &[f32], x: &[f32]| forward(w, x).1.iter().zip(&d).map(|(o, d)| f64::from(o * d)).sum::<f64>();
        let (mut fc1, _) = forward(&weights, &input);
        let mut recomputed = vec![0.0; fc1.len()];
        SHAPE.recompute(&weights, &input, &mut recomputed);
        assert_eq!(fc1, recomputed);
        let (mut weight_grad, mut d_input) = (vec![0.0; weights.len()], vec![0.0; input.len()]);
        let work = Backward {
            weights: &weights,
            weight_grad: &mut weight_grad,
            input: &input,
            fc1: &mut fc1,
            d_output: &d,
            d_input: &mut d_input,
        };
        SHAPE.backward(work, &mut ExpertWorkspace::default());
        let nudged = |v: &[f32], i: usize, by: f32| {
            let mut v = v.to_vec();
            v[i] += by;
            v
        };
        for (i, &got) in weight_grad.iter().enumerate() {
            let numeric = (loss(&nudged(&weights, i, 1e-2), &input) - loss(&nudged(&weights, i, -1e-2), &input)) / 2e-2;
            assert!((numeric - f64::from(got)).abs() < 2e-3, "weight {i}");
        }
        for (i, &got) in d_input.iter().enumerate() {
            let numeric = (loss(&weights, &nudged(&input, i, 1e-2)) - loss(&weights, &nudged(&input, i, -1e-2))) / 2e-2;
            assert!((numeric - f64::from(got)).abs() < 2e-3, "input {i}");
        }
    }

    #[test]
    fn groups_are_padded_and_disjoint() {
        let mut groups = Vec::new();
        let total = Group::lay_out([0, 1, 8, 9], &mut groups);
        assert_eq!(total, 8 + 8 + 16);
        assert_eq!(groups.iter().map(|g| g.first_row).collect::<Vec<_>>(), [0, 0, 8, 16]);
        assert_eq!(groups[3].padded_rows(), 16);
    }
}
