//! `.csv`: one line a source rank, one field an expert.

use super::{ReadError, Rows};
use crate::LoadMatrix;

pub(super) fn parse(bytes: &[u8]) -> Result<LoadMatrix, ReadError> {
    let syntax = |e: csv::Error| ReadError::Syntax(format!("not CSV: {e}"));
    let mut reader =
        csv::ReaderBuilder::new().has_headers(false).flexible(true).trim(csv::Trim::All).from_reader(bytes);
    let mut record = csv::ByteRecord::new();
    let mut rows = Rows::default();
    while reader.read_byte_record(&mut record).map_err(syntax)? {
        for field in &record {
            let text = std::str::from_utf8(field).ok();
            let digits = text.filter(|t| t.bytes().all(|b| b.is_ascii_digit()));
            let shown = String::from_utf8_lossy(&field[..field.len().min(40)]);
            rows.push(digits.and_then(|t| t.parse().ok()), format_args!("{shown:?}"))?;
        }
        rows.end_row()?;
    }
    rows.finish()
}
