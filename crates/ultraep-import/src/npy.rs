//! NumPy arrays of whole numbers, read piece by piece: the header is parsed here, with limits, before anything is believed.

use std::io::{self, Read};

use crate::Problem;
use crate::numbers::{F16_EXACT, F32_EXACT, whole, whole_float};

/// Longest header; an honest one takes about 128 bytes.
const MAX_HEADER_BYTES: usize = 4096;
/// Most dimensions of an array that a recording may have.
const MAX_DIMENSIONS: usize = 4;
/// Largest dimension.
const MAX_DIMENSION: u64 = 1 << 40;

/// Element type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Element {
    /// Integers.
    Integer { bytes: usize, is_signed: bool, is_big_endian: bool },
    /// 0 and 1.
    Bool,
    /// Floats of 2, 4 or 8 bytes.
    Float { bytes: usize, is_big_endian: bool },
    /// UCS-4 text of a fixed length, as NumPy stores strings.
    Text { chars: usize, is_big_endian: bool },
}

impl Element {
    pub(crate) fn bytes(self) -> usize {
        match self {
            Self::Integer { bytes, .. } | Self::Float { bytes, .. } => bytes,
            Self::Bool => 1,
            Self::Text { chars, .. } => chars * 4,
        }
    }
}

/// What an array is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) element: Element,
    pub(crate) is_fortran: bool,
    pub(crate) shape: Vec<u64>,
}

impl Header {
    /// Number of elements; `None` over what a file can hold.
    pub(crate) fn elements(&self) -> Option<u64> {
        self.shape.iter().try_fold(1_u64, |product, &d| product.checked_mul(d)).filter(|&n| n <= MAX_DIMENSION)
    }
}

/// Reads magic, version and header; the input then stands at the data.
pub(crate) fn read_header(input: &mut impl Read) -> Result<Header, Problem> {
    let bad = |what: &str| Problem::Syntax(format!("not a NumPy array: {what}"));
    let mut start = [0; 10];
    input.read_exact(&mut start).map_err(|e| bad(&e.to_string()))?;
    let Some([major, _, low, high]) = start.strip_prefix(b"\x93NUMPY") else { return Err(bad("no magic")) };
    let mut length = usize::from(u16::from_le_bytes([*low, *high]));
    if !(1..=3).contains(major) {
        return Err(bad("unknown version"));
    }
    if *major > 1 {
        let mut more = [0; 2];
        input.read_exact(&mut more).map_err(|e| bad(&e.to_string()))?;
        length |= usize::from(u16::from_le_bytes(more)) << 16;
    }
    if length > MAX_HEADER_BYTES {
        return Err(Problem::Limit { what: "bytes of header", got: length as u64, max: MAX_HEADER_BYTES as u64 });
    }
    let mut text = vec![0; length];
    input.read_exact(&mut text).map_err(|e| bad(&e.to_string()))?;
    let text = std::str::from_utf8(&text).map_err(|_| bad("its header is no text"))?;
    parse_header(text).ok_or_else(|| bad(&format!("header {:?}", text.chars().take(120).collect::<String>())))?
}

/// The dictionary of the header, `None` where it is not as NumPy writes it.
fn parse_header(text: &str) -> Option<Result<Header, Problem>> {
    let mut rest = text.trim().strip_prefix('{')?.strip_suffix('}')?.trim();
    let (mut descr, mut fortran, mut shape) = (None, None, None);
    while !rest.is_empty() {
        let (key, behind) = rest.strip_prefix('\'')?.split_once('\'')?;
        rest = behind.trim_start().strip_prefix(':')?.trim_start();
        match key {
            "descr" => {
                let (value, behind) = rest.strip_prefix('\'')?.split_once('\'')?;
                (descr, rest) = (Some(value), behind);
            }
            "fortran_order" => {
                let is_true = rest.starts_with("True");
                rest = rest.strip_prefix(if is_true { "True" } else { "False" })?;
                fortran = Some(is_true);
            }
            "shape" => {
                let (values, behind) = rest.strip_prefix('(')?.split_once(')')?;
                rest = behind;
                let numbers = values.split(',').map(str::trim).filter(|v| !v.is_empty());
                shape = Some(numbers.map(|v| v.parse::<u64>().ok()).collect::<Option<Vec<u64>>>()?);
            }
            _ => return None,
        }
        rest = rest.trim_start();
        rest = rest.strip_prefix(',').unwrap_or(rest).trim_start();
    }
    let (descr, is_fortran, shape) = (descr?, fortran?, shape?);
    if shape.len() > MAX_DIMENSIONS {
        let (got, max) = (shape.len() as u64, MAX_DIMENSIONS as u64);
        return Some(Err(Problem::Limit { what: "dimensions", got, max }));
    }
    if let Some(&got) = shape.iter().find(|&&d| d > MAX_DIMENSION) {
        return Some(Err(Problem::Limit { what: "dimension", got, max: MAX_DIMENSION }));
    }
    Some(element(descr).map(|element| Header { element, is_fortran, shape }))
}

fn element(descr: &str) -> Result<Element, Problem> {
    let unknown = || {
        let shown: String = descr.chars().take(40).collect();
        Problem::Unsupported(format!("elements of type {shown:?}: allowed are integers, bools and whole-number floats"))
    };
    let mut chars = descr.chars();
    let is_big_endian = match chars.next() {
        Some('>') => true,
        Some('<' | '|' | '=') => false,
        _ => return Err(unknown()),
    };
    let (kind, size) = (chars.next(), chars.as_str().parse::<usize>());
    match (kind, size) {
        (Some(kind @ ('i' | 'u')), Ok(bytes @ (1 | 2 | 4 | 8))) => {
            Ok(Element::Integer { bytes, is_signed: kind == 'i', is_big_endian })
        }
        (Some('b'), Ok(1)) => Ok(Element::Bool),
        (Some('f'), Ok(bytes @ (2 | 4 | 8))) => Ok(Element::Float { bytes, is_big_endian }),
        (Some('U'), Ok(chars)) if chars <= 1 << 24 => Ok(Element::Text { chars, is_big_endian }),
        _ => Err(unknown()),
    }
}

/// One integer from its bytes.
pub(crate) fn integer(bytes: &[u8], element: Element) -> i128 {
    let Element::Integer { is_signed, is_big_endian, .. } = element else { return 0 };
    let digit = |value: u64, &byte: &u8| value << 8 | u64::from(byte);
    let value = if is_big_endian { bytes.iter().fold(0, digit) } else { bytes.iter().rev().fold(0, digit) };
    let unused = 64 - 8 * bytes.len().clamp(1, 8) as u32;
    if is_signed { i128::from((value << unused) as i64 >> unused) } else { i128::from(value) }
}

/// A whole number from its bytes: from -1 (fill) to the largest count. Floats must be whole, and small enough for their type
/// to hold every whole number.
pub(crate) fn number(bytes: &[u8], element: Element) -> Result<i32, Problem> {
    match element {
        Element::Integer { .. } => whole(integer(bytes, element)),
        Element::Bool => match bytes {
            [value @ (0 | 1)] => Ok(i32::from(*value)),
            _ => Err(Problem::Syntax("a bool that is neither 0 nor 1".to_owned())),
        },
        Element::Float { .. } => {
            let (value, most) = float(bytes, element);
            if value.fract() == 0.0 && value.is_finite() && value > most {
                let width = bytes.len();
                return Err(Problem::Rounded(format!(
                    "{value} as f{width}, which holds whole numbers exactly up to {most}"
                )));
            }
            whole_float(value)
        }
        Element::Text { .. } => Err(Problem::differs("elements", "text", "numbers")),
    }
}

/// A float, and the number up to which its type holds every whole number.
fn float(bytes: &[u8], element: Element) -> (f64, f64) {
    let is_big_endian = matches!(element, Element::Float { is_big_endian: true, .. });
    let digit = |value: u64, &byte: &u8| value << 8 | u64::from(byte);
    let bits = if is_big_endian { bytes.iter().fold(0, digit) } else { bytes.iter().rev().fold(0, digit) };
    match bytes.len() {
        2 => (half(bits as u16), F16_EXACT),
        4 => (f64::from(f32::from_bits(bits as u32)), F32_EXACT),
        _ => (f64::from_bits(bits), f64::MAX),
    }
}

/// The value of a half float.
fn half(bits: u16) -> f64 {
    let (exponent, fraction) = (i32::from(bits >> 10 & 0x1f), f64::from(bits & 0x3ff) / 1024.0);
    let magnitude = match exponent {
        0 => fraction * 2_f64.powi(-14),
        31 if fraction == 0.0 => f64::INFINITY,
        31 => f64::NAN,
        _ => (1.0 + fraction) * 2_f64.powi(exponent - 15),
    };
    if bits >> 15 == 1 { -magnitude } else { magnitude }
}

/// Text of a 0-dimensional array of text, up to `max_chars`.
pub(crate) fn read_text(input: &mut impl Read, header: &Header, max_chars: usize) -> Result<String, Problem> {
    let Element::Text { chars, is_big_endian } = header.element else {
        return Err(Problem::differs("elements", format!("{:?}", header.element), "text"));
    };
    if chars > max_chars || header.elements() != Some(1) {
        return Err(Problem::Limit { what: "characters of text", got: chars as u64, max: max_chars as u64 });
    }
    let mut bytes = vec![0; chars * 4];
    input.read_exact(&mut bytes).map_err(short)?;
    let unit = |b: &[u8]| {
        let bytes = [b[0], b[1], b[2], b[3]];
        char::from_u32(if is_big_endian { u32::from_be_bytes(bytes) } else { u32::from_le_bytes(bytes) })
    };
    let text: Option<String> = bytes.chunks_exact(4).map(unit).collect();
    text.map(|t| t.trim_end_matches('\0').to_owned()).ok_or_else(|| Problem::Syntax("text that is no Unicode".into()))
}

/// The array ends before its shape says.
pub(crate) fn short(error: io::Error) -> Problem {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => Problem::Syntax("the data ends before the shape says".to_owned()),
        _ => Problem::syntax(error),
    }
}
