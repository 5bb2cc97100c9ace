//! Plain matrices of counts: `[ranks, experts]`, `[layers, ranks, experts]` or `[steps, layers, ranks, experts]`.

use std::path::{Path, PathBuf};

use ultraep_plan::{MAX_EXPERTS, MAX_RANKS};

use crate::array::{Array, Numbers, index_of};
use crate::error::layer_id;
use crate::{Format, ImportError, Piece, Place, Problem, Recording, RecordingInfo, Sources};

/// Matrices read one at a time.
struct Matrices {
    info: RecordingInfo,
    path: PathBuf,
    numbers: Numbers,
    shape: Shape,
    dimensions: Vec<u64>,
    buffer: Vec<i32>,
    next: u64,
}

/// `[steps, layers, ranks, experts]`; missing leading dimensions are 1.
#[derive(Clone, Copy, Debug)]
struct Shape {
    steps: u64,
    layers: u64,
    ranks: usize,
    experts: usize,
}

impl Shape {
    fn of(dimensions: &[u64]) -> Result<Self, Problem> {
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
            if got == 0 {
                return Err(Problem::Missing(format!("{what} the shape is {dimensions:?}").replace(':', "")));
            }
            if got > max as u64 {
                return Err(Problem::Limit { what, got, max: max as u64 });
            }
        }
        layer_id(layers.saturating_sub(1))?;
        Ok(Self { steps, layers, ranks: ranks as usize, experts: experts as usize })
    }

    fn matrices(&self) -> u64 {
        self.steps.saturating_mul(self.layers)
    }
}

/// Opens an array as counts.
pub(crate) fn open(array: Array, path: &Path) -> Result<Box<dyn Recording>, ImportError> {
    let shape = Shape::of(&array.shape).map_err(|problem| problem.at(path, Place::File))?;
    let mut info = RecordingInfo::new(Format::Matrices, Sources::Ranks(shape.ranks));
    info.experts = Some(shape.experts);
    let (numbers, dimensions, path) = (array.numbers, array.shape, path.to_owned());
    Ok(Box::new(Matrices { info, path, numbers, shape, dimensions, buffer: Vec::new(), next: 0 }))
}

impl Recording for Matrices {
    fn info(&self) -> &RecordingInfo {
        &self.info
    }

    fn next(&mut self, piece: &mut Piece) -> Result<bool, ImportError> {
        let cells = self.shape.ranks * self.shape.experts;
        if self.next == self.shape.matrices() {
            let end = self.numbers.end();
            return end.map(|()| false).map_err(|problem| problem.at(&self.path, Place::File));
        }
        let matrix = self.next;
        let refuse = |(at, problem): (u64, Problem)| {
            let whole = matches!(problem, Problem::Syntax(_));
            let place = if whole {
                Place::Key(format!("matrix {matrix}"))
            } else {
                Place::Index(index_of(at, &self.dimensions))
            };
            problem.at(&self.path, place)
        };
        self.numbers.take(cells, &mut self.buffer).map_err(refuse)?;
        piece.step = matrix / self.shape.layers;
        piece.microbatch = 0;
        piece.layer = (matrix % self.shape.layers) as u32;
        let counts = piece.counts(self.shape.ranks);
        for (cell, &value) in self.buffer.iter().enumerate() {
            let at = matrix * cells as u64 + cell as u64;
            counts.push(u32::try_from(value).map_err(|_| refuse((at, Problem::Count { got: value.to_string() })))?);
        }
        self.next += 1;
        Ok(true)
    }
}
