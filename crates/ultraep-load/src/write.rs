//! Writes load files; `ultraep-import` reads them, and everything else that people have.

use std::fmt;
use std::io::{self, Write};
use std::path::Path;

use crate::LoadMatrix;

/// A format of load files. Rows = source ranks, columns = experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `{"loads": [[...], ...]}`.
    Json,
    /// One line a source rank, no header.
    Csv,
    /// A two-dimensional NumPy array of `u4`.
    Npy,
}

/// A file whose extension names no format.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path}: unknown extension: allowed are .json, .csv, .npy")]
pub struct UnknownExtension {
    path: String,
}

impl Format {
    /// By the file's extension.
    pub fn of(path: &Path) -> Result<Self, UnknownExtension> {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("json") => Ok(Self::Json),
            Some("csv") => Ok(Self::Csv),
            Some("npy") => Ok(Self::Npy),
            _ => Err(UnknownExtension { path: path.display().to_string() }),
        }
    }
}

/// Writes `matrix` in `format`.
pub fn write(matrix: &LoadMatrix, format: Format, out: &mut impl Write) -> io::Result<()> {
    match format {
        Format::Json => {
            serde_json::to_writer(&mut *out, &serde_json::json!({ "loads": rows(matrix).collect::<Vec<_>>() }))?;
            writeln!(out)
        }
        Format::Csv => rows(matrix).try_for_each(|row| {
            let fields: Vec<String> = row.iter().map(u32::to_string).collect();
            writeln!(out, "{}", fields.join(","))
        }),
        Format::Npy => {
            let shape = format_args!("({}, {})", matrix.ranks(), matrix.experts());
            out.write_all(&npy_header("<u4", shape))?;
            matrix.counts().iter().try_for_each(|count| out.write_all(&count.to_le_bytes()))
        }
    }
}

fn rows(matrix: &LoadMatrix) -> impl Iterator<Item = &[u32]> {
    (0..matrix.ranks()).map(|source| matrix.row(source))
}

/// Magic, version and header of a NumPy array in C order, of up to a thousand characters; the data follows. `shape` is a
/// Python tuple.
pub fn npy_header(descr: &str, shape: impl fmt::Display) -> Vec<u8> {
    let mut header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}");
    // NumPy aligns the data to 64 bytes, and ends the header with a line end.
    let padding = (64 - (10 + header.len() + 1) % 64) % 64;
    header.extend(std::iter::repeat_n(' ', padding));
    header.push('\n');
    let length = (header.len() as u16).to_le_bytes();
    [b"\x93NUMPY\x01\x00", &length[..], header.as_bytes()].concat()
}
