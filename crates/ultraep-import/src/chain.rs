//! Several files of one format as one recording, in the order given.

use std::path::PathBuf;

use crate::detect::Reader;
use crate::{Format, ImportError, OpenOptions, Piece, Place, Problem, Recording, RecordingInfo, Sources};

/// Files read one after another. Steps of a file begin behind those of the file before, but for chunks of one recording.
pub(crate) struct Chain {
    info: RecordingInfo,
    paths: Vec<PathBuf>,
    next_path: usize,
    reader: Reader,
    options: OpenOptions,
    current: Option<Box<dyn Recording>>,
    /// Added to the steps of the file being read, and the first step behind it so far.
    first_step: u64,
    end_step: u64,
    endings: Vec<String>,
}

impl Chain {
    /// Opens every file once to learn what they have in common; one file only is read as it is.
    pub(crate) fn open(
        paths: Vec<PathBuf>,
        reader: Reader,
        options: &OpenOptions,
    ) -> Result<Box<dyn Recording>, ImportError> {
        if let [path] = paths.as_slice() {
            return reader.open(path, options);
        }
        let mut info: Option<RecordingInfo> = None;
        let unshown = options.unshown();
        for path in &paths {
            let of_file = reader.open(path, &unshown)?.info().clone();
            info = Some(match info {
                None => of_file,
                Some(so_far) => merge(so_far, of_file).map_err(|problem| problem.at(path, Place::File))?,
            });
        }
        let info = info.unwrap_or_else(|| RecordingInfo::new(Format::Matrices, Sources::Totals));
        let options = options.clone();
        let (current, endings) = (None, Vec::new());
        Ok(Box::new(Self { info, paths, next_path: 0, reader, options, current, first_step: 0, end_step: 0, endings }))
    }
}

fn merge(mut info: RecordingInfo, other: RecordingInfo) -> Result<RecordingInfo, Problem> {
    if info.experts.is_some() && other.experts.is_some() && info.experts != other.experts {
        let number = |experts: Option<usize>| experts.unwrap_or(0);
        return Err(Problem::differs("number of experts", number(other.experts), number(info.experts)));
    }
    if info.sources != other.sources {
        let (got, expected) = (format!("{:?}", other.sources), format!("{:?}", info.sources));
        return Err(Problem::differs("sources", got, expected));
    }
    let model = |info: &RecordingInfo| info.metadata.iter().find(|(key, _)| key == "model").map(|(_, m)| m.clone());
    if let (Some(first), Some(got)) = (model(&info), model(&other))
        && first != got
    {
        let expected = format!("{first}, as in the files before: two models are two recordings");
        return Err(Problem::differs("model", got, expected));
    }
    if let (Some(first), Some(got)) = (info.top_k, other.top_k)
        && first != got
    {
        let expected = format!("{first}, as in the files before: they are of different models");
        return Err(Problem::differs("top-k", got, expected));
    }
    info.experts = info.experts.or(other.experts);
    info.top_k = info.top_k.or(other.top_k);
    let new: Vec<String> = other.notes.into_iter().filter(|note| !info.notes.contains(note)).collect();
    info.notes.extend(new);
    info.metadata.retain(|entry| other.metadata.contains(entry));
    Ok(info)
}

impl Recording for Chain {
    fn info(&self) -> &RecordingInfo {
        &self.info
    }

    fn next(&mut self, piece: &mut Piece) -> Result<bool, ImportError> {
        loop {
            if let Some(current) = &mut self.current {
                if current.next(piece)? {
                    piece.step = piece.step.saturating_add(self.first_step);
                    self.end_step = self.end_step.max(piece.step.saturating_add(1));
                    return Ok(true);
                }
                self.endings.extend(current.ending());
                self.current = None;
                // UltraEP v1 numbers microbatches through all of its chunks.
                if self.info.format != Format::UltraEpV1 {
                    self.first_step = self.end_step;
                }
            }
            let Some(path) = self.paths.get(self.next_path) else { return Ok(false) };
            self.next_path += 1;
            self.current = Some(self.reader.open(path, &self.options)?);
        }
    }

    fn ending(&self) -> Option<String> {
        let mut told: Vec<(&str, usize)> = Vec::new();
        for ending in &self.endings {
            match told.iter_mut().find(|(words, _)| words == ending) {
                Some((_, files)) => *files += 1,
                None => told.push((ending, 1)),
            }
        }
        let words = |(words, files): (&str, usize)| match files {
            1 => words.to_owned(),
            _ => format!("{words} (in each of {files} files)"),
        };
        if told.is_empty() { None } else { Some(told.into_iter().map(words).collect::<Vec<_>>().join("; ")) }
    }
}
