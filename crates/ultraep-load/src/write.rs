//! Writes load files in every format that is read.

use std::io::{self, Write};

use npyz::WriterBuilder;

use crate::{Format, LoadMatrix};

/// Writes `matrix` in `format`; [`crate::parse`] reads the same matrix back.
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
            let shape = [matrix.ranks() as u64, matrix.experts() as u64];
            let mut writer = npyz::WriteOptions::new().default_dtype().shape(&shape).writer(&mut *out).begin_nd()?;
            writer.extend(matrix.counts())?;
            writer.finish()
        }
    }
}

fn rows(matrix: &LoadMatrix) -> impl Iterator<Item = &[u32]> {
    (0..matrix.ranks()).map(|source| matrix.row(source))
}
