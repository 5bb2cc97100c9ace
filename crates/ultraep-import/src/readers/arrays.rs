//! Files that are an array of numbers, `.npy`, `.npz` and JSON lists, opened as what the numbers are.

use std::path::Path;

use crate::archive::Archive;
use crate::array::{Array, Kind, looks_rounded};
use crate::classify::{self, Sample};
use crate::input::{MAX_WHOLE_FILE_BYTES, open_input, read_whole};
use crate::json_array;
use crate::npy::{self, Element};
use crate::readers::{ids, matrices};
use crate::{ImportError, OpenOptions, Place, Problem, Reading, Recording, RecordingInfo};

/// `.npy`.
pub(crate) fn open_npy(path: &Path, options: &OpenOptions) -> Result<Box<dyn Recording>, ImportError> {
    let refuse = |problem: Problem| problem.at(path, Place::File);
    let mut input = open_input(path, options)?;
    let header = npy::read_header(&mut input).map_err(refuse)?;
    if let Element::Text { .. } = header.element {
        return Err(refuse(Problem::differs("elements", "text", "numbers")));
    }
    if header.is_fortran && header.shape.len() > 1 {
        let data = read_whole(path, options)?;
        let mut rest = data.as_slice();
        npy::read_header(&mut rest).map_err(refuse)?;
        let array = Array::of_bytes(&header, rest);
        let array = array.map_err(|(index, problem)| problem.at(path, place_of(index)))?;
        return open(array, path, options);
    }
    // A first look, by a file of its own.
    let mut look = open_input(path, &options.unshown())?;
    npy::read_header(&mut look).map_err(refuse)?;
    let sample = Array::stream(&header, Box::new(look)).sample();
    let shape = &header.shape;
    // Numbers that end too early are told when they are read; numbers that are none, here.
    let sample = match sample {
        Err((_, Problem::Syntax(_))) => Vec::new(),
        Err((at, problem)) => return Err(problem.at(path, Place::Index(crate::array::index_of(at, shape)))),
        Ok(sample) => sample,
    };
    let array = Array::stream(&header, Box::new(input));
    open_sampled(array, &sample, path, options)
}

/// `.npz`: its one array, the one asked for, or the one whose name says what it is.
pub(crate) fn open_npz(path: &Path, options: &OpenOptions) -> Result<Box<dyn Recording>, ImportError> {
    let mut archive = Archive::open(path, options)?;
    let name = choose(&mut archive, options).map_err(|problem| problem.at(path, Place::File))?;
    let entry = format!("{name}.npy");
    let bytes = archive.read(&entry, MAX_WHOLE_FILE_BYTES)?;
    let refuse = |problem: Problem| archive.refuse(&entry, problem);
    let mut data = bytes.as_slice();
    let header = npy::read_header(&mut data).map_err(refuse)?;
    if let Element::Text { .. } = header.element {
        return Err(refuse(Problem::differs("elements", "text", "numbers")));
    }
    let array = Array::of_bytes(&header, data);
    let mut array = array.map_err(|(index, problem)| problem.at(path, Place::Key(format!("{name} {index:?}"))))?;
    array.name = Some(name);
    open(array, path, options)
}

fn choose(archive: &mut Archive, options: &OpenOptions) -> Result<String, Problem> {
    let names: Vec<String> = archive.names().filter_map(|name| name.strip_suffix(".npy")).map(str::to_owned).collect();
    let asked = options.array.as_deref();
    let found = match (asked, names.as_slice()) {
        (Some(asked), _) => names.iter().find(|name| *name == asked),
        (None, [one]) => Some(one),
        (None, _) => {
            let mut known = classify::known_names().into_iter().filter_map(|known| names.iter().find(|n| *n == known));
            let first = known.next();
            // The counts that are called so go before; of several others none is taken for the user.
            first.filter(|name| *name == "loads" || known.next().is_none() && is_alone(&names, name))
        }
    };
    if let Some(found) = found {
        return Ok(found.clone());
    }
    let mut shown = Vec::new();
    for name in names.iter().take(8) {
        let bytes = archive.read(&format!("{name}.npy"), MAX_WHOLE_FILE_BYTES);
        let header = bytes.ok().and_then(|bytes| npy::read_header(&mut bytes.as_slice()).ok());
        shown.push(header.map_or_else(|| name.clone(), |header| format!("{name} {:?}", header.shape)));
    }
    let more =
        if names.len() > shown.len() { format!(" and {} more", names.len() - shown.len()) } else { String::new() };
    let what = if asked.is_some() { "no array of that name" } else { "several arrays" };
    Err(Problem::Ambiguous(format!("{what}: choose one with --array: {}{more}", shown.join(", "))))
}

/// Whether the other arrays cannot be meant: nothing but this one is called as something that is read.
fn is_alone(names: &[String], name: &str) -> bool {
    // logical_count beside other arrays may be one of several counts.
    name != "logical_count" || names.len() == 1
}

/// Nested lists, or an object with one of the names that say what an array is.
pub(crate) fn open_json(path: &Path, options: &OpenOptions) -> Result<Box<dyn Recording>, ImportError> {
    let bytes = read_whole(path, options)?;
    let array =
        json_array::parse(&bytes, options.array.as_deref()).map_err(|(place, problem)| problem.at(path, place))?;
    open(array, path, options)
}

/// Opens an array that is in memory.
pub(crate) fn open(mut array: Array, path: &Path, options: &OpenOptions) -> Result<Box<dyn Recording>, ImportError> {
    let sample = array.sample().map_err(|(_, problem)| problem.at(path, Place::File))?;
    open_sampled(array, &sample, path, options)
}

fn open_sampled(
    array: Array,
    values: &[i32],
    path: &Path,
    options: &OpenOptions,
) -> Result<Box<dyn Recording>, ImportError> {
    let refuse = |problem: Problem| problem.at(path, Place::File);
    let sample = Sample { name: array.name.as_deref(), shape: &array.shape, kind: array.kind, values };
    let found = classify::find(&sample, options.reading).map_err(refuse)?;
    let (shape, is_float) = (array.shape.clone(), array.kind == Kind::Floats);
    let recording = match found.reading {
        Reading::Counts => {
            if is_float && options.reading != Some(Reading::Counts) && looks_rounded(values) {
                let words = "floats over 256 all of which bfloat16 has: they look rounded to it";
                return Err(refuse(Problem::Rounded(words.to_owned())));
            }
            matrices::open(array, path)?
        }
        Reading::Ids => ids::open(array, path, options)?,
        Reading::Map => ids::open_map(array, path)?,
    };
    let note = format!(
        "{shape:?} is read as the experts of tokens, for no row names an expert twice; --as counts reads counts"
    );
    Ok(noted(recording, found.by_content.then_some(note)))
}

fn place_of(index: Vec<u64>) -> Place {
    if index.is_empty() { Place::File } else { Place::Index(index) }
}

/// A recording with notes of its opener.
struct Noted {
    recording: Box<dyn Recording>,
    info: RecordingInfo,
}

/// Adds notes to a recording.
pub(crate) fn noted<S: Into<String>>(
    recording: Box<dyn Recording>,
    notes: impl IntoIterator<Item = S>,
) -> Box<dyn Recording> {
    let mut info = recording.info().clone();
    let before = info.notes.len();
    info.notes.extend(notes.into_iter().map(Into::into));
    if info.notes.len() == before { recording } else { Box::new(Noted { recording, info }) }
}

impl Recording for Noted {
    fn info(&self) -> &RecordingInfo {
        &self.info
    }

    fn next(&mut self, piece: &mut crate::Piece) -> Result<bool, ImportError> {
        self.recording.next(piece)
    }

    fn ending(&self) -> Option<String> {
        self.recording.ending()
    }
}
