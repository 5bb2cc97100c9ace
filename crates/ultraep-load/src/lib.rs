//! Expert loads to plan for: synthetic workloads made from a seed, and the matrix that holds them.
//!
//! What it is for: one source of count matrices `lambda[r,e]` (rows = source ranks, columns = logical experts) for the
//! commands, benches, examples and tests.
//!
//! What it must never do: give two machines different loads for one seed (integers only, a random number generator whose
//! output is fixed by its specification), or read a file: `ultraep-import` reads whatever people have.

#![forbid(unsafe_code)]

mod generate;
mod matrix;
mod write;

pub use generate::{GenerateError, LoadParams, ParseWorkloadError, Workload, generate};
pub use matrix::{LoadMatrix, MatrixError};
pub use write::{Format, UnknownExtension, npy_header, write};
