//! Compute kernels of one rank: the grouped expert feed-forward over physical experts, forward and backward.
//!
//! What it is for: everything that would be a kernel on an accelerator and is not communication. Today there is one
//! device, the host, with [`gemm`](https://docs.rs/gemm) underneath; an accelerator's kernels go beside [`expert`].
//!
//! What it must never do: start threads (a rank is one core here; parallelism is over ranks), keep state between calls,
//! or let the result of one row depend on how many other rows are in the call. The last is what makes a model's outputs
//! bitwise equal whatever plan its tokens were balanced by; see [`ROW_TILE`].

pub mod attention;
pub mod cache;
pub mod expert;
pub mod math;
pub mod matmul;
pub mod norm;

pub use expert::{ExpertShape, ExpertWorkspace, Group};
pub use matmul::ROW_TILE;
