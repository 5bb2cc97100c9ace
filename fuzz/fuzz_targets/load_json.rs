//! Any bytes as a `.json` load file: an error or a matrix within the limits, never a panic.

#![no_main]

use libfuzzer_sys::fuzz_target;
use ultraep_load::{Format, LoadMatrix, parse};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(matrix) = parse(Format::Json, bytes) {
        let again = LoadMatrix::new(matrix.ranks(), matrix.experts(), matrix.counts().to_vec());
        assert_eq!(again.as_ref(), Ok(&matrix));
    }
});
