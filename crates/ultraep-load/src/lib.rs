//! Expert loads to plan for: synthetic workloads made from a seed, and load files that people have.
//!
//! What it is for: one source of count matrices `lambda[r,e]` (rows = source ranks, columns = logical experts) for the
//! commands, benches, examples and tests.
//!
//! What it must never do: give two machines different loads for one seed (integers only, a random number generator whose
//! output is fixed by its specification), or trust a file (sizes are checked before memory is taken, every cell before
//! it is used; a bad file is a typed error that names row and column, never a panic).

#![forbid(unsafe_code)]

mod generate;
mod matrix;
mod read;
mod write;

pub use generate::{GenerateError, LoadParams, ParseWorkloadError, Workload, generate};
pub use matrix::{LoadMatrix, MatrixError};
pub use read::{Cell, FileError, Format, MAX_FILE_BYTES, ReadError, parse, read_file};
pub use write::write;
