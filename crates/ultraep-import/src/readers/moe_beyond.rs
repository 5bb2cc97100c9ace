//! moe-beyond CSV: `Layer ID,Batch Number,Token,Activated Expert IDs`, one row a (layer, token); the last column is a quoted
//! list, the token's text may hold any character. Tokens only; which rank they were on is not recorded.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use csv::ByteRecord;

use crate::error::{expert_id, layer_id};
use crate::input::{BoxedInput, open_input};
use crate::{
    Format, ImportError, MAX_LINE_BYTES, OpenOptions, Piece, Place, Problem, Recording, RecordingInfo, Sources,
};

/// The first line.
pub(crate) const HEADER: &str = "Layer ID,Batch Number,Token,Activated Expert IDs";

struct MoeBeyond {
    info: RecordingInfo,
    path: PathBuf,
    reader: csv::Reader<Limited>,
    row: ByteRecord,
}

/// An input that ends with an error when one row takes more than a line may have.
struct Limited {
    input: BoxedInput,
    left: u64,
}

impl Read for Limited {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 {
            return Err(io::Error::other(format!("a row of over {MAX_LINE_BYTES} bytes: allowed are up to that")));
        }
        let room = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let got = self.input.read(&mut buffer[..room])?;
        self.left -= got as u64;
        Ok(got)
    }
}

pub(crate) fn open(path: &Path, options: &OpenOptions) -> Result<Box<dyn Recording>, ImportError> {
    let input = Limited { input: open_input(path, options)?, left: MAX_LINE_BYTES };
    let reader = csv::ReaderBuilder::new().has_headers(true).flexible(true).from_reader(input);
    let info = RecordingInfo::new(Format::MoeBeyond, Sources::Tokens);
    Ok(Box::new(MoeBeyond { info, path: path.to_owned(), reader, row: ByteRecord::new() }))
}

impl Recording for MoeBeyond {
    fn info(&self) -> &RecordingInfo {
        &self.info
    }

    fn next(&mut self, piece: &mut Piece) -> Result<bool, ImportError> {
        self.reader.get_mut().left = MAX_LINE_BYTES;
        let read = self.reader.read_byte_record(&mut self.row);
        let line = match &read {
            Ok(_) => self.row.position().map_or(0, csv::Position::line),
            Err(_) => self.reader.position().line(),
        };
        let refuse = |problem: Problem| problem.at(&self.path, Place::Line(line));
        match read {
            Ok(true) => {}
            Ok(false) => return Ok(false),
            Err(error) => return Err(refuse(Problem::syntax(format_args!("not CSV: {error}")))),
        }
        let row = &self.row;
        if row.len() != 4 {
            return Err(refuse(Problem::differs("number of columns", row.len(), 4)));
        }
        piece.layer = number(&row[0]).and_then(layer_id).map_err(refuse)?;
        read_experts(&row[3], piece).map_err(refuse)?;
        Ok(true)
    }
}

fn number<T: FromStr>(field: &[u8]) -> Result<T, Problem> {
    let text = std::str::from_utf8(field).ok().map(str::trim);
    let shown = || String::from_utf8_lossy(&field[..field.len().min(40)]).into_owned();
    text.and_then(|t| t.parse().ok()).ok_or_else(|| Problem::differs("field", shown(), "a number"))
}

/// Reads `[8, 26, 56]` into the piece.
fn read_experts(field: &[u8], piece: &mut Piece) -> Result<(), Problem> {
    let inside = field.trim_ascii().strip_prefix(b"[").and_then(|f| f.strip_suffix(b"]"));
    let Some(inside) = inside.filter(|f| !f.trim_ascii().is_empty()) else {
        let shown = String::from_utf8_lossy(&field[..field.len().min(40)]).into_owned();
        return Err(Problem::differs("activated experts", shown, "a list such as [8, 26, 56]"));
    };
    let count = inside.iter().filter(|&&b| b == b',').count() + 1;
    let ids = piece.choices(count);
    for id in inside.split(|&b| b == b',') {
        ids.push(expert_id(number(id)?)?);
    }
    Ok(())
}
