//! moe-beyond CSV: `Layer ID,Batch Number,Token,Activated Expert IDs`, one row a (layer, token); the last column is a quoted
//! list, the token's text may hold any character. Tokens only; which rank they were on is not recorded.

use std::path::Path;
use std::str::FromStr;

use crate::choices::push_choices;
use crate::csv_rows::{CsvRows, Separator};
use crate::error::layer_id;
use crate::{Format, ImportError, OpenOptions, Piece, Problem, Recording, RecordingInfo, Sources};

/// The first line.
pub(crate) const HEADER: &str = "Layer ID,Batch Number,Token,Activated Expert IDs";

struct MoeBeyond {
    info: RecordingInfo,
    rows: CsvRows,
    row: Vec<i64>,
}

pub(crate) fn open(path: &Path, options: &OpenOptions) -> Result<Box<dyn Recording>, ImportError> {
    let mut rows = CsvRows::open(path, Separator::Byte(b','), options)?;
    rows.advance()?;
    let mut info = RecordingInfo::new(Format::MoeBeyond, Sources::Tokens);
    info.experts = options.experts;
    Ok(Box::new(MoeBeyond { info, rows, row: Vec::new() }))
}

impl MoeBeyond {
    fn read(&mut self, piece: &mut Piece) -> Result<(), Problem> {
        let rows = &self.rows;
        if rows.len() != 4 {
            return Err(Problem::differs("number of columns", rows.len(), 4));
        }
        piece.layer = number(rows.field(0)).and_then(layer_id)?;
        read_list(rows.field(3), &mut self.row)?;
        push_choices(&self.row, self.info.experts, piece.choices(self.row.len()))
    }
}

impl Recording for MoeBeyond {
    fn info(&self) -> &RecordingInfo {
        &self.info
    }

    fn next(&mut self, piece: &mut Piece) -> Result<bool, ImportError> {
        if !self.rows.advance()? {
            return Ok(false);
        }
        match self.read(piece) {
            Ok(()) => Ok(true),
            // Only what was cut can be the end; a number that is wrong is wrong.
            Err(problem @ Problem::Differs { what: "number of columns" | "list", .. }) => {
                self.rows.torn_or(problem).map(|()| false)
            }
            Err(problem) => Err(self.rows.refuse(problem)),
        }
    }

    fn ending(&self) -> Option<String> {
        self.rows.ending()
    }
}

fn number<T: FromStr>(field: &[u8]) -> Result<T, Problem> {
    let text = std::str::from_utf8(field).ok().map(str::trim);
    let shown = || String::from_utf8_lossy(&field[..field.len().min(40)]).into_owned();
    text.and_then(|t| t.parse().ok()).ok_or_else(|| Problem::differs("field", shown(), "a number"))
}

/// Reads `[8, 26, 56]`.
pub(crate) fn read_list(field: &[u8], out: &mut Vec<i64>) -> Result<(), Problem> {
    let inside = field.trim_ascii().strip_prefix(b"[").and_then(|f| f.strip_suffix(b"]"));
    let Some(inside) = inside.filter(|f| !f.trim_ascii().is_empty()) else {
        let shown = String::from_utf8_lossy(&field[..field.len().min(40)]).into_owned();
        return Err(Problem::differs("list", shown, "a list such as [8, 26, 56]"));
    };
    out.clear();
    for id in inside.split(|&b| b == b',') {
        out.push(number(id)?);
    }
    Ok(())
}
