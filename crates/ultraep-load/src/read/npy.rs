//! `.npy`: a two-dimensional array of integers.

use npyz::{DType, Deserialize, NpyFile, Order, TypeChar};

use super::{Cell, ReadError};
use crate::matrix::{LoadMatrix, check_shape};
use ultraep_plan::MAX_TOKENS;

/// Longest header text that is parsed; an honest one takes under 128 bytes.
const MAX_HEADER_BYTES: usize = 1024;
/// Digits in an honest header: two dimensions of at most four, the element's width.
const MAX_HEADER_DIGITS: usize = 12;

pub(super) fn parse(bytes: &[u8]) -> Result<LoadMatrix, ReadError> {
    let data_start = check_header(bytes)?;
    let file = NpyFile::new(bytes).map_err(|e| ReadError::Syntax(format!("not NPY: {e}")))?;
    let shape = file.shape().to_vec();
    let &[rows, columns] = &shape[..] else { return Err(ReadError::Dimensions(shape.len())) };
    // Header digits are limited, so both fit.
    let (rows, columns) = (rows as usize, columns as usize);
    check_shape(rows, columns)?;
    let order = file.order();
    let DType::Plain(kind) = file.dtype() else { return Err(ReadError::Type(file.dtype().descr())) };
    let width = match (kind.type_char(), kind.num_bytes()) {
        (TypeChar::Int | TypeChar::Uint, Some(width @ (1 | 2 | 4 | 8))) => width,
        _ => return Err(ReadError::Type(kind.to_string())),
    };
    let (got, expected) = ((bytes.len() - data_start) as u64, (rows * columns * width) as u64);
    if got != expected {
        return Err(ReadError::DataLength { got, expected });
    }
    let stored = match (kind.type_char(), width) {
        (TypeChar::Int, 1) => values::<i8>(file)?,
        (TypeChar::Int, 2) => values::<i16>(file)?,
        (TypeChar::Int, 4) => values::<i32>(file)?,
        (TypeChar::Int, _) => values::<i64>(file)?,
        (_, 1) => values::<u8>(file)?,
        (_, 2) => values::<u16>(file)?,
        (_, 4) => values::<u32>(file)?,
        _ => values::<u64>(file)?,
    };
    let at = |row: usize, column: usize| match order {
        Order::C => row * columns + column,
        Order::Fortran => column * rows + row,
    };
    let mut counts = Vec::with_capacity(rows * columns);
    for (row, column) in (0..rows).flat_map(|r| (0..columns).map(move |c| (r, c))) {
        let value = stored[at(row, column)];
        match u32::try_from(value) {
            Ok(count) if count <= MAX_TOKENS => counts.push(count),
            _ => return Err(ReadError::NoCount { cell: Cell { row, column }, got: value.to_string() }),
        }
    }
    Ok(LoadMatrix::new(rows, columns, counts)?)
}

fn values<T: Deserialize>(file: NpyFile<&[u8]>) -> Result<Vec<i128>, ReadError>
where
    i128: From<T>,
{
    let values = file.into_vec::<T>().map_err(|e| ReadError::Syntax(format!("not NPY: {e}")))?;
    Ok(values.into_iter().map(i128::from).collect())
}

/// Checks magic, version, header length, and that the header text is too small to hold numbers that overflow or brackets
/// that nest deeply, before any parser sees it. Returns where the data starts.
fn check_header(bytes: &[u8]) -> Result<usize, ReadError> {
    let bad = |what: &str| Err(ReadError::Syntax(format!("not NPY: {what}")));
    let Some(rest) = bytes.strip_prefix(b"\x93NUMPY") else { return bad("no magic") };
    let (length, text_start) = match rest {
        [1, 0, low, high, ..] => (usize::from(u16::from_le_bytes([*low, *high])), 10),
        [2 | 3, 0, a, b, c, d, ..] => (u32::from_le_bytes([*a, *b, *c, *d]) as usize, 12),
        [_, _, _, _, ..] => return bad("unknown version"),
        _ => return bad("truncated header"),
    };
    if length > MAX_HEADER_BYTES {
        return bad(&format!("header of {length} bytes, allowed are up to {MAX_HEADER_BYTES}"));
    }
    let Some(text) = bytes.get(text_start..text_start + length) else { return bad("truncated header") };
    let count = |of: fn(&u8) -> bool| text.iter().filter(|b| of(b)).count();
    let hexadecimal = count(|b| b"xX".contains(b)) > 0;
    if hexadecimal || count(u8::is_ascii_digit) > MAX_HEADER_DIGITS || count(|b| b"([{".contains(b)) > 8 {
        return bad("header with larger numbers or more brackets than a matrix of counts has");
    }
    Ok(text_start + length)
}
