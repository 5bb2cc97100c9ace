//! What the tests of readers share.
#![allow(dead_code)] // each test binary uses a part of it

use std::io::Write;
use std::path::PathBuf;

use tempfile::TempDir;
use ultraep_import::{Piece, Recording};
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

/// A folder that recordings are written into.
pub(crate) struct Folder(pub(crate) TempDir);

impl Folder {
    pub(crate) fn new() -> Self {
        Self(TempDir::new().expect("a folder"))
    }

    /// Writes a file, and the folders above it.
    pub(crate) fn with(&self, name: &str, contents: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::create_dir_all(path.parent().expect("a parent")).expect("folders");
        std::fs::write(&path, contents).expect("written");
        path
    }
}

/// Reads a recording to its end.
pub(crate) fn pieces(recording: &mut dyn Recording) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut piece = Piece::default();
    while recording.next(&mut piece).expect("a piece") {
        pieces.push(piece.clone());
    }
    pieces
}

/// A NumPy array as it is in a file.
pub(crate) fn npy(descr: &str, shape: &str, data: &[u8]) -> Vec<u8> {
    [&ultraep_load::npy_header(descr, shape), data].concat()
}

/// A zip archive, as `np.savez_compressed` writes it.
pub(crate) fn archive(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut zip = ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (name, data) in entries {
        let options = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Deflated);
        zip.start_file(*name, options).expect("an entry");
        zip.write_all(data).expect("written");
    }
    zip.finish().expect("finished").into_inner()
}

/// Packs with gzip.
pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gzip.write_all(bytes).expect("packed");
    gzip.finish().expect("packed")
}
