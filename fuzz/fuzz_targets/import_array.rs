//! Any bytes as an array or a table, read as counts, ids, a map or what content says: an error or microbatches within the
//! limits, never a panic.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use ultraep_fuzz::read_recording_with;
use ultraep_import::{OpenOptions, Reading};

fuzz_target!(|input: (u8, Option<u8>, &[u8])| {
    let (reading, experts, bytes) = input;
    let reading = [None, Some(Reading::Counts), Some(Reading::Ids), Some(Reading::Map)][usize::from(reading) % 4];
    let experts = experts.map(|experts| 1 + usize::from(experts));
    let options = OpenOptions { reading, experts, ..OpenOptions::default() };
    read_recording_with(Path::new("a.bin"), bytes, &options);
});
