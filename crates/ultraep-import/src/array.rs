//! Arrays of whole numbers, from memory or read on the fly, whatever file they came from.

use std::io::Read;

use crate::Problem;
use crate::npy::{self, Element, Header};
use crate::numbers::Rounding;

/// Numbers that are looked at to find out what an array is.
const SAMPLE_NUMBERS: usize = 1 << 20;

/// An array with its numbers, or where to read them.
pub(crate) struct Array {
    /// Its name in its file, where it has one.
    pub(crate) name: Option<String>,
    /// Sizes of its dimensions.
    pub(crate) shape: Vec<u64>,
    /// What it was stored as.
    pub(crate) kind: Kind,
    /// The numbers in row-major order.
    pub(crate) numbers: Numbers,
}

/// How numbers were stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Integers,
    Bools,
    Floats,
}

/// Whole numbers from -1 on, one after another.
pub(crate) enum Numbers {
    Memory { values: Vec<i32>, next: usize },
    Stream { input: Box<dyn Read + Send>, element: Element, buffer: Vec<u8>, next: u64 },
}

impl Kind {
    pub(crate) fn of(element: Element) -> Self {
        match element {
            Element::Bool => Self::Bools,
            Element::Float { .. } => Self::Floats,
            Element::Integer { .. } | Element::Text { .. } => Self::Integers,
        }
    }
}

impl Array {
    /// An array in memory.
    pub(crate) fn whole(shape: Vec<u64>, kind: Kind, values: Vec<i32>) -> Self {
        Self { name: None, shape, kind, numbers: Numbers::Memory { values, next: 0 } }
    }

    /// An array whose data `input` stands at; `header` is in C order.
    pub(crate) fn stream(header: &Header, input: Box<dyn Read + Send>) -> Self {
        let (shape, element) = (header.shape.clone(), header.element);
        let numbers = Numbers::Stream { input, element, buffer: Vec::new(), next: 0 };
        Self { name: None, shape, kind: Kind::of(element), numbers }
    }

    /// Reads all data of an array, in C or Fortran order, which must be all of `data`.
    pub(crate) fn of_bytes(header: &Header, data: &[u8]) -> Result<Self, (Vec<u64>, Problem)> {
        let width = header.element.bytes();
        let elements = header.elements();
        let expected = elements.and_then(|n| n.checked_mul(width as u64)).unwrap_or(u64::MAX);
        if expected != data.len() as u64 || width == 0 {
            return Err((Vec::new(), Problem::differs("bytes of data:", data.len(), expected)));
        }
        let count = elements.unwrap_or(0) as usize;
        let mut values = Vec::with_capacity(count);
        let strides = if header.is_fortran { fortran_strides(&header.shape) } else { Vec::new() };
        for at in 0..count {
            let stored = if header.is_fortran { stored_at(at as u64, &header.shape, &strides) } else { at };
            let value = npy::number(&data[stored * width..][..width], header.element);
            values.push(value.map_err(|problem| (index_of(at as u64, &header.shape), problem))?);
        }
        Ok(Self::whole(header.shape.clone(), Kind::of(header.element), values))
    }

    /// The first numbers, as many as are looked at. A stream is used up to there.
    pub(crate) fn sample(&mut self) -> Result<Vec<i32>, (u64, Problem)> {
        if let Numbers::Memory { values, .. } = &self.numbers {
            return Ok(values.iter().copied().take(SAMPLE_NUMBERS).collect());
        }
        let all = self.shape.iter().try_fold(1_u64, |n, &d| n.checked_mul(d)).unwrap_or(u64::MAX);
        let count = all.min(SAMPLE_NUMBERS as u64) as usize;
        let mut sample = Vec::new();
        self.numbers.take(count, &mut sample)?;
        Ok(sample)
    }
}

/// Whether floats look rounded.
pub(crate) fn looks_rounded(sample: &[i32]) -> bool {
    let mut rounding = Rounding::default();
    sample.iter().for_each(|&value| rounding.see(value));
    rounding.is_suspect()
}

fn fortran_strides(shape: &[u64]) -> Vec<u64> {
    let mut stride = 1_u64;
    let mut strides = Vec::with_capacity(shape.len());
    for &size in shape {
        strides.push(stride);
        stride = stride.saturating_mul(size);
    }
    strides
}

fn stored_at(at: u64, shape: &[u64], strides: &[u64]) -> usize {
    index_of(at, shape).iter().zip(strides).map(|(i, stride)| i * stride).sum::<u64>() as usize
}

/// The index of the `at`-th number in row-major order.
pub(crate) fn index_of(mut at: u64, shape: &[u64]) -> Vec<u64> {
    let mut index = vec![0; shape.len()];
    for (place, &size) in index.iter_mut().zip(shape).rev() {
        *place = at % size.max(1);
        at /= size.max(1);
    }
    index
}

impl Numbers {
    /// Reads the next `count` numbers into `out`, emptied; a refusal says which number.
    pub(crate) fn take(&mut self, count: usize, out: &mut Vec<i32>) -> Result<(), (u64, Problem)> {
        /// Numbers read at once: memory grows with what is there, not with what a header says.
        const AT_ONCE: usize = 1 << 16;
        out.clear();
        match self {
            Self::Memory { values, next } => {
                let got = values.get(*next..next.saturating_add(count));
                let got = got.ok_or_else(|| (*next as u64, Problem::Missing("more numbers".to_owned())))?;
                out.extend_from_slice(got);
                *next += count;
            }
            Self::Stream { input, element, buffer, next } => {
                let width = element.bytes();
                while out.len() < count {
                    buffer.resize((count - out.len()).min(AT_ONCE) * width, 0);
                    input.read_exact(buffer).map_err(|error| (*next, npy::short(error)))?;
                    for bytes in buffer.chunks_exact(width) {
                        out.push(npy::number(bytes, *element).map_err(|problem| (*next, problem))?);
                        *next += 1;
                    }
                }
            }
        }
        Ok(())
    }

    /// Refuses what lies behind the last number.
    pub(crate) fn end(&mut self) -> Result<(), Problem> {
        let Self::Stream { input, .. } = self else { return Ok(()) };
        let mut byte = [0];
        match input.read(&mut byte) {
            Ok(0) => Ok(()),
            Ok(_) => Err(Problem::Syntax("more bytes behind the data than the shape says".to_owned())),
            Err(error) => Err(Problem::syntax(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fortran_order_is_put_right_in_any_dimension() {
        let element = Element::Integer { bytes: 1, is_signed: false, is_big_endian: false };
        let header = Header { element, is_fortran: true, shape: vec![2, 3, 2] };
        // value = 100 i + 10 j + k, first index fastest.
        let data: Vec<u8> =
            (0..2).flat_map(|k| (0..3).flat_map(move |j| (0..2).map(move |i| 100 * i + 10 * j + k))).collect();
        let Ok(array) = Array::of_bytes(&header, &data) else { panic!("refused") };
        let Numbers::Memory { values, .. } = array.numbers else { panic!("a stream") };
        assert_eq!(values, [0, 1, 10, 11, 20, 21, 100, 101, 110, 111, 120, 121]);
    }
}
