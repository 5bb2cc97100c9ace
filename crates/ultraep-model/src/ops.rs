//! Custom operations of the dense part: RMS norm, linear map, causal attention, cross-entropy, each one kernel forward and one
//! backward. A row of a forward does not depend on the rows beside it, bit for bit.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Error, Layout, Result, Shape, Storage, Tensor};
use ultraep_device::attention::{AttentionShape, AttentionWorkspace, Rotary};
use ultraep_device::matmul::{
    Matrix, MatrixMut, Output, ROW_TILE, multiply_independent_rows, multiply_transposed, transposed_multiply,
};
use ultraep_device::norm;

/// The elements of a contiguous operand.
pub(crate) fn operand<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let (start, end) = layout.contiguous_offsets().ok_or_else(|| Error::msg("operand is not contiguous"))?;
    Ok(&storage.as_slice::<f32>()?[start..end])
}

/// Calls `with` on the elements of a tensor.
pub(crate) fn with_elements<R>(tensor: &Tensor, with: impl FnOnce(&[f32]) -> Result<R>) -> Result<R> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => with(operand(storage, layout)?),
        _ => Err(Error::msg("tensor is not in host memory")),
    }
}

fn like(values: Vec<f32>, tensor: &Tensor) -> Result<Tensor> {
    Tensor::from_vec(values, tensor.shape(), tensor.device())
}

struct RmsNorm;

/// `x / sqrt(mean(x^2) + 1e-5) * weight` over the last dimension of `x`.
pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op2(weight, RmsNorm)
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, w: &CpuStorage, lw: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, w) = (operand(x, lx)?, operand(w, lw)?);
        let mut out = vec![0.0; x.len()];
        norm::rms_norm(x, w, &mut out);
        Ok((CpuStorage::F32(out), lx.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (mut dx, mut dw) = (vec![0.0; x.elem_count()], vec![0.0; w.elem_count()]);
        with_elements(x, |x| {
            with_elements(w, |w| {
                with_elements(grad, |grad| {
                    norm::rms_norm_backward(x, w, grad, &mut dx, &mut dw);
                    Ok(())
                })
            })
        })?;
        Ok((Some(like(dx, x)?), Some(like(dw, w)?)))
    }
}

struct Linear;

/// `x w` for `x` `[rows, k]` and `w` `[k, n]`.
pub(crate) fn linear(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let ((_, k), (inner, _)) = (x.dims2()?, w.dims2()?);
    if k != inner {
        return Err(Error::msg(format!("rows of {k} elements for a matrix of {inner} rows")));
    }
    x.contiguous()?.apply_op2(w, Linear)
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, w: &CpuStorage, lw: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, w) = (operand(x, lx)?, operand(w, lw)?);
        let ((rows, k), (_, n)) = (lx.shape().dims2()?, lw.shape().dims2()?);
        let padded = rows.next_multiple_of(ROW_TILE);
        let mut out = vec![0.0; padded * n];
        let w = Matrix::new(w, k, n);
        if padded == rows {
            multiply_independent_rows(Matrix::new(x, rows, k), w, MatrixMut::new(&mut out, rows, n));
        } else {
            let mut tiles = x.to_vec();
            tiles.resize(padded * k, 0.0);
            multiply_independent_rows(Matrix::new(&tiles, padded, k), w, MatrixMut::new(&mut out, padded, n));
            out.truncate(rows * n);
        }
        Ok((CpuStorage::F32(out), Shape::from((rows, n))))
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let ((rows, k), (_, n)) = (x.dims2()?, w.dims2()?);
        let (mut dx, mut dw) = (vec![0.0; rows * k], vec![0.0; k * n]);
        with_elements(x, |x| {
            with_elements(w, |w| {
                with_elements(grad, |grad| {
                    let d_out = Matrix::new(grad, rows, n);
                    let (dx, dw) = (MatrixMut::new(&mut dx, rows, k), MatrixMut::new(&mut dw, k, n));
                    multiply_transposed(d_out, Matrix::new(w, k, n), dx, Output::Replace);
                    transposed_multiply(Matrix::new(x, rows, k), d_out, dw, Output::Replace);
                    Ok(())
                })
            })
        })?;
        Ok((Some(like(dx, x)?), Some(like(dw, w)?)))
    }
}

struct CausalAttention {
    shape: AttentionShape,
    rotary: Arc<Rotary>,
}

/// Causal attention over a fused projection `qkv`, `[sequences * tokens, 3 d]`; gives `[sequences * tokens, d]`.
pub(crate) fn attention(qkv: &Tensor, shape: AttentionShape, rotary: Arc<Rotary>) -> Result<Tensor> {
    qkv.contiguous()?.apply_op1(CausalAttention { shape, rotary })
}

impl CustomOp1 for CausalAttention {
    fn name(&self) -> &'static str {
        "causal_attention"
    }

    fn cpu_fwd(&self, qkv: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let qkv = operand(qkv, layout)?;
        let mut out = vec![0.0; qkv.len() / 3];
        self.shape.forward(&self.rotary, qkv, &mut out, &mut AttentionWorkspace::default());
        let rows = self.shape.sequences * self.shape.tokens;
        Ok((CpuStorage::F32(out), Shape::from((rows, self.shape.heads * self.shape.head_dim))))
    }

    fn bwd(&self, qkv: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let mut d_qkv = vec![0.0; qkv.elem_count()];
        with_elements(qkv, |qkv| {
            with_elements(grad, |grad| {
                self.shape.backward(&self.rotary, qkv, grad, &mut d_qkv, &mut AttentionWorkspace::default());
                Ok(())
            })
        })?;
        Ok(Some(like(d_qkv, qkv)?))
    }
}

struct CrossEntropy {
    targets: Vec<u32>,
}

/// Mean cross-entropy of `logits` (`[tokens, classes]`) against `targets`, a scalar.
pub(crate) fn cross_entropy(logits: &Tensor, targets: Vec<u32>) -> Result<Tensor> {
    let (tokens, classes) = logits.dims2()?;
    if targets.len() != tokens || targets.iter().any(|&t| t as usize >= classes) {
        return Err(Error::msg(format!("{} targets for {tokens} tokens of {classes} classes", targets.len())));
    }
    logits.contiguous()?.apply_op1(CrossEntropy { targets })
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross_entropy"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let logits = operand(logits, layout)?;
        let loss = norm::cross_entropy(logits, &self.targets, &mut vec![0.0; logits.len()]);
        Ok((CpuStorage::F32(vec![loss]), Shape::from(())))
    }

    fn bwd(&self, logits: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let scale = grad.to_scalar::<f32>()?;
        let mut d_logits = vec![0.0; logits.elem_count()];
        with_elements(logits, |logits| {
            norm::cross_entropy(logits, &self.targets, &mut d_logits);
            Ok(())
        })?;
        d_logits.iter_mut().for_each(|d| *d *= scale);
        Ok(Some(like(d_logits, logits)?))
    }
}
