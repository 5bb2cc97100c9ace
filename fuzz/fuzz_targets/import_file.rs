//! Any bytes as a recording, under names that steer detection: an error or pieces that make microbatches, never a panic.

#![no_main]

use std::path::PathBuf;

use libfuzzer_sys::fuzz_target;
use ultraep_fuzz::read_recording;

const NAMES: [&str; 5] = ["a.bin", "t.manifest.json", "t.chunk000000.npz", "router_trace_rank0.jsonl", "layer_01.parquet"];

fuzz_target!(|input: (u8, &[u8])| {
    let (name, bytes) = input;
    read_recording(&PathBuf::from(NAMES[usize::from(name) % NAMES.len()]), bytes);
});
