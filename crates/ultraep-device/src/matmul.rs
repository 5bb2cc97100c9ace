//! Single-threaded row-major `f32` matrix products.
//!
//! The `independent_rows` forms give row results that do not depend on how many other rows are in the call. The GEMM
//! underneath accumulates each output element over the inner dimension in an order that depends on the inner dimension
//! alone, except that it takes shortcuts for outputs of few elements (dot products up to 256, other blocking up to
//! 64 by 64). Rows padded to [`ROW_TILE`] and, for narrow outputs, a fixed number of rows a call keep clear of those; a
//! test holds the GEMM to it.

/// Rows of activations come in multiples of this (padded with zeros).
pub const ROW_TILE: usize = 8;

/// What happens to the old content of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// It is overwritten.
    Replace,
    /// The product is added to it.
    Accumulate,
}

/// A row-major matrix, `[rows, cols]`, whose rows start `stride` elements apart.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    stride: usize,
}

/// A mutable row-major matrix, `[rows, cols]`, whose rows start `stride` elements apart.
#[derive(Debug)]
pub struct MatrixMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    cols: usize,
    stride: usize,
}

/// Elements that a `[rows, cols]` matrix spans in memory.
fn span(rows: usize, cols: usize, stride: usize) -> usize {
    if rows == 0 || cols == 0 { 0 } else { (rows - 1) * stride + cols }
}

impl<'a> Matrix<'a> {
    /// A view of `data` as `[rows, cols]` without gaps.
    ///
    /// # Panics
    /// When `data` has not exactly `rows * cols` elements: a bug of the caller.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "a [{rows}, {cols}] matrix over {} elements", data.len());
        Self { data, rows, cols, stride: cols }
    }

    /// A view of the start of `data` as `[rows, cols]` with rows `stride` elements apart.
    ///
    /// # Panics
    /// When rows overlap or `data` is too short: a bug of the caller.
    pub fn strided(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(stride >= cols && data.len() >= span(rows, cols, stride), "a strided matrix over its data's end");
        Self { data, rows, cols, stride }
    }
}

impl<'a> MatrixMut<'a> {
    /// As [`Matrix::new`].
    ///
    /// # Panics
    /// When `data` has not exactly `rows * cols` elements: a bug of the caller.
    pub fn new(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "a [{rows}, {cols}] matrix over {} elements", data.len());
        Self { data, rows, cols, stride: cols }
    }

    /// As [`Matrix::strided`].
    ///
    /// # Panics
    /// When rows overlap or `data` is too short: a bug of the caller.
    pub fn strided(data: &'a mut [f32], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(stride >= cols && data.len() >= span(rows, cols, stride), "a strided matrix over its data's end");
        Self { data, rows, cols, stride }
    }
}

/// A matrix as the GEMM sees it: pointer and strides after an optional transpose.
struct Operand {
    ptr: *const f32,
    rows: usize,
    cols: usize,
    row_stride: isize,
    col_stride: isize,
}

impl Operand {
    fn plain(m: Matrix<'_>) -> Self {
        Self { ptr: m.data.as_ptr(), rows: m.rows, cols: m.cols, row_stride: m.stride as isize, col_stride: 1 }
    }

    fn transposed(m: Matrix<'_>) -> Self {
        Self { ptr: m.data.as_ptr(), rows: m.cols, cols: m.rows, row_stride: 1, col_stride: m.stride as isize }
    }
}

/// `out = a b`, with `a` `[m, k]`, `b` `[k, n]`, `out` `[m, n]`.
pub fn multiply(a: Matrix<'_>, b: Matrix<'_>, out: MatrixMut<'_>, output: Output) {
    run(Operand::plain(a), Operand::plain(b), out, output);
}

/// `out = a bᵀ`, with `a` `[m, k]`, `b` `[n, k]`, `out` `[m, n]`.
pub fn multiply_transposed(a: Matrix<'_>, b: Matrix<'_>, out: MatrixMut<'_>, output: Output) {
    run(Operand::plain(a), Operand::transposed(b), out, output);
}

/// Outputs up to this wide are computed [`ROW_TILE`] rows at a time where rows must be independent.
const NARROW: usize = 64;

/// As [`multiply`], overwriting; the result of a row does not depend on the other rows. Rows come in multiples of
/// [`ROW_TILE`].
pub fn multiply_independent_rows(a: Matrix<'_>, b: Matrix<'_>, out: MatrixMut<'_>) {
    by_row_tiles(a, out, b.cols, |a, out| multiply(a, b, out, Output::Replace));
}

/// As [`multiply_transposed`], overwriting; the result of a row does not depend on the other rows. Rows come in multiples
/// of [`ROW_TILE`].
pub fn multiply_transposed_independent_rows(a: Matrix<'_>, b: Matrix<'_>, out: MatrixMut<'_>) {
    by_row_tiles(a, out, b.rows, |a, out| multiply_transposed(a, b, out, Output::Replace));
}

fn by_row_tiles(a: Matrix<'_>, out: MatrixMut<'_>, cols: usize, product: impl Fn(Matrix<'_>, MatrixMut<'_>)) {
    assert!(a.rows.is_multiple_of(ROW_TILE), "{} rows are not whole tiles of {ROW_TILE}", a.rows);
    if cols > NARROW {
        return product(a, out);
    }
    let tiles = a.data.chunks(ROW_TILE * a.stride).zip(out.data.chunks_mut(ROW_TILE * out.stride));
    for (a_tile, out_tile) in tiles.take(a.rows / ROW_TILE) {
        let a_tile = Matrix::strided(a_tile, ROW_TILE, a.cols, a.stride);
        product(a_tile, MatrixMut::strided(out_tile, ROW_TILE, out.cols, out.stride));
    }
}

/// `out = aᵀ b`, with `a` `[k, m]`, `b` `[k, n]`, `out` `[m, n]`: the weight gradient's form, summed over rows.
pub fn transposed_multiply(a: Matrix<'_>, b: Matrix<'_>, out: MatrixMut<'_>, output: Output) {
    run(Operand::transposed(a), Operand::plain(b), out, output);
}

fn run(a: Operand, b: Operand, out: MatrixMut<'_>, output: Output) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    assert_eq!(b.rows, k, "inner dimensions differ");
    assert_eq!((out.rows, out.cols), (m, n), "output shape");
    // SAFETY: each operand's pointer and strides stay within its `Matrix`, and the output's within its `MatrixMut`: their
    // constructors checked that the last row ends inside the data and that rows do not overlap. The output is borrowed
    // mutably, so it overlaps neither operand.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.data.as_mut_ptr(),
            1,
            out.stride as isize,
            output == Output::Accumulate,
            a.ptr,
            a.col_stride,
            a.row_stride,
            b.ptr,
            b.col_stride,
            b.row_stride,
            1.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(len: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        (0..len)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
            })
            .collect()
    }

    fn naive(a: &[f32], b: &[f32], (m, n, k): (usize, usize, usize)) -> Vec<f64> {
        let mut c = vec![0f64; m * n];
        for i in 0..m {
            for p in 0..k {
                for j in 0..n {
                    c[i * n + j] += f64::from(a[i * k + p]) * f64::from(b[p * n + j]);
                }
            }
        }
        c
    }

    fn transpose(a: &[f32], rows: usize, cols: usize) -> Vec<f32> {
        (0..cols).flat_map(|c| (0..rows).map(move |r| a[r * cols + c])).collect()
    }

    #[test]
    fn all_forms_agree_with_the_naive_product() {
        for &(m, n, k) in &[(8, 5, 3), (16, 64, 32), (40, 96, 130), (1, 1, 1), (0, 4, 4)] {
            let (a, b) = (noise(m * k, 1), noise(k * n, 2));
            let want = naive(&a, &b, (m, n, k));
            let close =
                |got: &[f32], times: f64| got.iter().zip(&want).all(|(g, w)| (f64::from(*g) - times * w).abs() < 1e-4);
            let mut out = vec![7.0; m * n];
            multiply(Matrix::new(&a, m, k), Matrix::new(&b, k, n), MatrixMut::new(&mut out, m, n), Output::Replace);
            assert!(close(&out, 1.0), "multiply {m} {n} {k}");
            let bt = transpose(&b, k, n);
            multiply_transposed(
                Matrix::new(&a, m, k),
                Matrix::new(&bt, n, k),
                MatrixMut::new(&mut out, m, n),
                Output::Replace,
            );
            assert!(close(&out, 1.0), "multiply_transposed {m} {n} {k}");
            let at = transpose(&a, m, k);
            transposed_multiply(
                Matrix::new(&at, k, m),
                Matrix::new(&b, k, n),
                MatrixMut::new(&mut out, m, n),
                Output::Accumulate,
            );
            assert!(close(&out, 2.0), "transposed_multiply {m} {n} {k}");
        }
    }

    /// The property that the whole project's "same outputs under any plan" rests on.
    #[test]
    fn a_rows_result_does_not_depend_on_the_other_rows() {
        for &(n, k) in &[(8, 16), (16, 8), (64, 32), (64, 1024), (65, 1024), (256, 128), (512, 256), (704, 1024)] {
            let rows = 400;
            let (a, b) = (noise(rows * k, 3), noise(k * n, 4));
            let bt = transpose(&b, k, n);
            let plain = |a: &[f32], m: usize| {
                let mut out = vec![0.0; m * n];
                let (a, b) = (Matrix::new(a, m, k), Matrix::new(&b, k, n));
                multiply_independent_rows(a, b, MatrixMut::new(&mut out, m, n));
                out
            };
            let transposed = |a: &[f32], m: usize| {
                let mut out = vec![0.0; m * n];
                let (a, b) = (Matrix::new(a, m, k), Matrix::new(&bt, n, k));
                multiply_transposed_independent_rows(a, b, MatrixMut::new(&mut out, m, n));
                out
            };
            let (all, all_t) = (plain(&a, rows), transposed(&a, rows));
            for m in (ROW_TILE..=rows / 2).step_by(ROW_TILE) {
                let first = (m * 7) % (rows / 2);
                let part = &a[first * k..(first + m) * k];
                assert!(plain(part, m)[..] == all[first * n..(first + m) * n], "plain: {m} rows, n {n}, k {k}");
                assert!(transposed(part, m)[..] == all_t[first * n..(first + m) * n], "transposed: {m}, n {n}, k {k}");
            }
        }
    }
}
