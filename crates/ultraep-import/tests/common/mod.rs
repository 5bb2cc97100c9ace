//! What the tests of readers share.
#![allow(dead_code)] // each test binary uses a part of it

use std::path::PathBuf;

use tempfile::TempDir;
use ultraep_import::{Piece, Recording};

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
