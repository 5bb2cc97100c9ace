//! Plain matrices of counts: `[ranks, experts]`, `[layers, ranks, experts]` or `[steps, layers, ranks, experts]`, as
//! `.npy`, `.npz` (one array, or one named `loads`), `.csv` (two dimensions) or `.json` (nested lists, or `{"loads": [[..]]}`).

use std::io::Read;
use std::path::{Path, PathBuf};

use ultraep_load::{Format as FileFormat, LoadMatrix, parse};
use ultraep_plan::{MAX_EXPERTS, MAX_RANKS};

use crate::archive::Archive;
use crate::error::{count, layer_id};
use crate::input::{BoxedInput, MAX_WHOLE_FILE_BYTES, open_input, read_whole};
use crate::npy::{self, Element};
use crate::{Format, ImportError, OpenOptions, Piece, Place, Problem, Recording, RecordingInfo, Sources};

/// Matrices that were read whole.
struct Whole {
    info: RecordingInfo,
    shape: Shape,
    counts: Vec<u32>,
    next: u64,
}

/// An array read one matrix at a time.
struct Streamed {
    info: RecordingInfo,
    path: PathBuf,
    input: BoxedInput,
    element: Element,
    shape: Shape,
    buffer: Vec<u8>,
    next: u64,
}

/// `[steps, layers, ranks, experts]`; missing leading dimensions are 1.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) steps: u64,
    pub(crate) layers: u64,
    pub(crate) ranks: usize,
    pub(crate) experts: usize,
}

impl Shape {
    pub(crate) fn of(dimensions: &[u64]) -> Result<Self, Problem> {
        let (steps, layers, ranks, experts) = match *dimensions {
            [ranks, experts] => (1, 1, ranks, experts),
            [layers, ranks, experts] => (1, layers, ranks, experts),
            [steps, layers, ranks, experts] => (steps, layers, ranks, experts),
            _ => {
                let allowed = "[ranks, experts], [layers, ranks, experts] or [steps, layers, ranks, experts]";
                return Err(Problem::differs("shape", format!("{dimensions:?}"), allowed));
            }
        };
        for (what, got, max) in [("source ranks:", ranks, MAX_RANKS), ("experts:", experts, MAX_EXPERTS)] {
            if got == 0 || got > max as u64 {
                return Err(Problem::Limit { what, got, max: max as u64 });
            }
        }
        layer_id(layers.saturating_sub(1))?;
        Ok(Self { steps, layers, ranks: ranks as usize, experts: experts as usize })
    }

    fn matrices(&self) -> u64 {
        self.steps.saturating_mul(self.layers)
    }

    fn cells(&self) -> usize {
        self.ranks * self.experts
    }

    pub(crate) fn info(&self) -> RecordingInfo {
        let mut info = RecordingInfo::new(Format::Matrices, Sources::Ranks(self.ranks));
        info.experts = Some(self.experts);
        info
    }
}

pub(crate) fn open_csv(path: &Path, options: &OpenOptions) -> Result<Box<dyn Recording>, ImportError> {
    open_parsed(FileFormat::Csv, path, options)
}

/// `{"loads": [[...]]}`.
pub(crate) fn open_json_object(path: &Path, options: &OpenOptions) -> Result<Box<dyn Recording>, ImportError> {
    open_parsed(FileFormat::Json, path, options)
}

fn open_parsed(format: FileFormat, path: &Path, options: &OpenOptions) -> Result<Box<dyn Recording>, ImportError> {
    let bytes = read_whole(path, options)?;
    let matrix = parse(format, &bytes).map_err(|error| Problem::syntax(error).at(path, Place::File))?;
    Ok(Box::new(whole(&matrix)))
}

fn whole(matrix: &LoadMatrix) -> Whole {
    let shape = Shape { steps: 1, layers: 1, ranks: matrix.ranks(), experts: matrix.experts() };
    Whole { info: shape.info(), shape, counts: matrix.counts().to_vec(), next: 0 }
}

/// Nested lists.
pub(crate) fn open_json_list(path: &Path, options: &OpenOptions) -> Result<Box<dyn Recording>, ImportError> {
    let bytes = read_whole(path, options)?;
    let (dimensions, counts) =
        nested_lists(&bytes).map_err(|(at, problem)| problem.at(path, Place::Byte(at as u64)))?;
    let shape = Shape::of(&dimensions).map_err(|problem| problem.at(path, Place::File))?;
    Ok(Box::new(Whole { info: shape.info(), shape, counts, next: 0 }))
}

/// `.npy`.
pub(crate) fn open_npy(path: &Path, options: &OpenOptions) -> Result<Box<dyn Recording>, ImportError> {
    let refuse = |problem: Problem| problem.at(path, Place::File);
    let mut input = open_input(path, options)?;
    let header = npy::read_header(&mut input).map_err(refuse)?;
    if header.is_fortran && header.shape.len() == 2 {
        return open_parsed(FileFormat::Npy, path, options);
    }
    if header.is_fortran {
        return Err(refuse(Problem::Unsupported(
            "an array in Fortran order: save it with np.ascontiguousarray".into(),
        )));
    }
    if !matches!(header.element, Element::Integer { .. }) {
        return Err(refuse(Problem::differs("elements", "text", "integers")));
    }
    let shape = Shape::of(&header.shape).map_err(refuse)?;
    let buffer = vec![0; shape.cells() * header.element.bytes()];
    let (info, path) = (shape.info(), path.to_owned());
    Ok(Box::new(Streamed { info, path, input, element: header.element, shape, buffer, next: 0 }))
}

/// `.npz`: its one array, or the one named `loads`.
pub(crate) fn open_npz(path: &Path, options: &OpenOptions) -> Result<Box<dyn Recording>, ImportError> {
    let mut archive = Archive::open(path, options)?;
    let arrays: Vec<&str> = archive.names().filter(|name| name.ends_with(".npy")).collect();
    let name = match arrays.as_slice() {
        [one] => (*one).to_owned(),
        several if several.contains(&"loads.npy") => "loads.npy".to_owned(),
        several => {
            let got = several.iter().take(6).copied().collect::<Vec<_>>().join(", ");
            return Err(Problem::differs("arrays", got, "one array, or one named loads").at(path, Place::File));
        }
    };
    let bytes = archive.read(&name, MAX_WHOLE_FILE_BYTES)?;
    let refuse = |problem: Problem| archive.refuse(&name, problem);
    let mut data = bytes.as_slice();
    let header = npy::read_header(&mut data).map_err(refuse)?;
    if header.is_fortran || !matches!(header.element, Element::Integer { .. }) {
        return Err(refuse(Problem::Unsupported("other than integers in C order".to_owned())));
    }
    let shape = Shape::of(&header.shape).map_err(refuse)?;
    let expected = header.elements().and_then(|n| n.checked_mul(header.element.bytes() as u64)).unwrap_or(u64::MAX);
    if expected != data.len() as u64 {
        return Err(refuse(Problem::differs("bytes of data:", data.len(), expected)));
    }
    let counts = data.chunks_exact(header.element.bytes()).map(|bytes| count(npy::integer(bytes, header.element)));
    let counts = counts.collect::<Result<Vec<u32>, Problem>>().map_err(refuse)?;
    Ok(Box::new(Whole { info: shape.info(), shape, counts, next: 0 }))
}

impl Recording for Whole {
    fn info(&self) -> &RecordingInfo {
        &self.info
    }

    fn next(&mut self, piece: &mut Piece) -> Result<bool, ImportError> {
        let start = self.next as usize * self.shape.cells();
        let Some(matrix) = self.counts.get(start..start + self.shape.cells()) else { return Ok(false) };
        place(piece, self.next, &self.shape);
        piece.counts(self.shape.ranks).extend_from_slice(matrix);
        self.next += 1;
        Ok(true)
    }
}

impl Recording for Streamed {
    fn info(&self) -> &RecordingInfo {
        &self.info
    }

    fn next(&mut self, piece: &mut Piece) -> Result<bool, ImportError> {
        if self.next == self.shape.matrices() {
            return Ok(false);
        }
        let matrix = self.next;
        let refuse = |problem: Problem| problem.at(&self.path, Place::Key(format!("matrix {matrix}")));
        self.input.read_exact(&mut self.buffer).map_err(|error| refuse(npy::short(error)))?;
        place(piece, matrix, &self.shape);
        let counts = piece.counts(self.shape.ranks);
        for bytes in self.buffer.chunks_exact(self.element.bytes()) {
            counts.push(count(npy::integer(bytes, self.element)).map_err(refuse)?);
        }
        self.next += 1;
        Ok(true)
    }
}

fn place(piece: &mut Piece, matrix: u64, shape: &Shape) {
    piece.step = matrix / shape.layers;
    piece.microbatch = 0;
    piece.layer = (matrix % shape.layers) as u32;
}

/// Reads `[[1, 2], [3, 4]]` of two to four levels; every list of a level has the same length. Memory: four bytes a number.
fn nested_lists(bytes: &[u8]) -> Result<(Vec<u64>, Vec<u32>), (usize, Problem)> {
    const LEVELS: usize = 4;
    let mut lengths = [None::<u64>; LEVELS];
    let mut filled = [0_u64; LEVELS];
    let (mut level, mut deepest, mut counts, mut at) = (0, 0, Vec::new(), 0);
    // Whether a value may come now, or a comma or the list's end must.
    let mut wants_value = true;
    while at < bytes.len() {
        let refuse = |what: &str| Err((at, Problem::Syntax(what.to_owned())));
        match bytes[at] {
            b' ' | b'\n' | b'\r' | b'\t' => {}
            b'[' if wants_value && level < LEVELS && (deepest == 0 || level < deepest || counts.is_empty()) => {
                filled[level] = 0;
                level += 1;
                deepest = deepest.max(level);
            }
            b']' if level > 0 && !(wants_value && filled[level - 1] > 0) => {
                level -= 1;
                let got = filled[level];
                let expected = *lengths[level].get_or_insert(got);
                if got != expected || got == 0 {
                    return Err((at, Problem::differs("length of a list:", got, expected.max(1))));
                }
                if level == 0 {
                    let is_over = bytes[at + 1..].trim_ascii().is_empty();
                    let dimensions = lengths.iter().take(deepest).map(|l| l.unwrap_or(0)).collect();
                    return if is_over { Ok((dimensions, counts)) } else { refuse("more behind the list") };
                }
                filled[level - 1] += 1;
                wants_value = false;
            }
            b',' if !wants_value => wants_value = true,
            b'0'..=b'9' if wants_value && level > 0 && level == deepest => {
                let digits = bytes[at..].iter().take_while(|b| b.is_ascii_digit()).count();
                let text = std::str::from_utf8(&bytes[at..at + digits]).unwrap_or_default();
                let value = text.parse().map_err(|_| (at, Problem::Count { got: text.chars().take(40).collect() }))?;
                counts.push(count(value).map_err(|problem| (at, problem))?);
                filled[level - 1] += 1;
                wants_value = false;
                at += digits - 1;
            }
            _ => return refuse("neither a list of lists of counts nor an object with \"loads\""),
        }
        at += 1;
    }
    Err((at, Problem::Syntax("the list does not end".to_owned())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nested_lists_of_two_to_four_levels() {
        assert_eq!(nested_lists(b"[[1,2],[3,4],[5,6]]"), Ok((vec![3, 2], vec![1, 2, 3, 4, 5, 6])));
        assert_eq!(nested_lists(b" [ [[1 ,2]] ,[[3,4]]]\n"), Ok((vec![2, 1, 2], vec![1, 2, 3, 4])));
        for bad in [
            "[[1,2],[3]]",
            "[[1,2],3]",
            "[1,[2]]",
            "[[1,]]",
            "[[]]",
            "[[1 2]]",
            "[[-1]]",
            "[[1]",
            "[[1]]x",
            "[[[[[1]]]]]",
        ] {
            assert!(nested_lists(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
