//! Any bytes as the pickle of a `.pt` archive: an error or tensors that fit their storage, never a panic or a call.

#![no_main]

use std::io::{Cursor, Write};
use std::path::PathBuf;

use libfuzzer_sys::fuzz_target;
use ultraep_fuzz::read_recording;
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

fuzz_target!(|pickle: &[u8]| {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    let storage = [1; 256];
    for (name, data) in [("a/data.pkl", pickle), ("a/data/0", &storage)] {
        let stored = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
        zip.start_file(name, stored).expect("an entry");
        zip.write_all(data).expect("written");
    }
    let bytes = zip.finish().expect("finished").into_inner();
    read_recording(&PathBuf::from("a.pt"), &bytes);
});
