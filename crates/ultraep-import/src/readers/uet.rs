//! Our own traces and run folders: counts with their source axis, as recorded.

use std::path::{Path, PathBuf};

use ultraep_run::RunReader;
use ultraep_trace::{Record, TraceReader};

use crate::input::{Input, open_input};
use crate::{Format, ImportError, OpenOptions, Piece, Recording, RecordingInfo, Sources};

struct Uet {
    info: RecordingInfo,
    path: PathBuf,
    reader: TraceReader<Input>,
    record: Record,
}

pub(crate) fn open(path: &Path, options: &OpenOptions) -> Result<Box<dyn Recording>, ImportError> {
    open_as(Format::Uet, path, options)
}

/// The trace of a run, also of one that is still at work.
pub(crate) fn open_run(folder: &Path, options: &OpenOptions) -> Result<Box<dyn Recording>, ImportError> {
    let run = RunReader::open(folder)?;
    if run.trace()?.is_none() {
        return Err(ImportError::Unknown { path: folder.to_owned(), reason: "a run without a trace".to_owned() });
    }
    open_as(Format::RunFolder, &folder.join("loads.uet"), options)
}

fn open_as(format: Format, path: &Path, options: &OpenOptions) -> Result<Box<dyn Recording>, ImportError> {
    let input = open_input(path, options)?;
    let reader = TraceReader::new(input).map_err(|source| ImportError::Trace { path: path.to_owned(), source })?;
    let meta = reader.meta();
    let mut info = RecordingInfo::new(format, Sources::Ranks(meta.ranks));
    (info.experts, info.top_k) = (Some(meta.experts), meta.top_k);
    info.domain_ranks = Some(meta.domain_ranks);
    let slots = meta.slots_per_rank.first().copied();
    let are_equal = meta.slots_per_rank.iter().all(|&s| Some(s) == slots);
    info.slots_per_rank = slots.filter(|_| are_equal).map(|s| s as usize);
    info.metadata = meta.metadata.iter().map(|(key, value)| (key.clone(), shown(value))).collect();
    Ok(Box::new(Uet { info, path: path.to_owned(), reader, record: Record::default() }))
}

fn shown(value: &serde_json::Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

impl Recording for Uet {
    fn info(&self) -> &RecordingInfo {
        &self.info
    }

    fn next(&mut self, piece: &mut Piece) -> Result<bool, ImportError> {
        let read = self.reader.read_into(&mut self.record);
        if !read.map_err(|source| ImportError::Trace { path: self.path.clone(), source })? {
            return Ok(false);
        }
        let Record { step, microbatch, layer, ref before, .. } = self.record;
        (piece.step, piece.microbatch, piece.layer) = (step, microbatch, layer);
        piece.counts(self.reader.meta().ranks).extend_from_slice(before);
        Ok(true)
    }

    fn ending(&self) -> Option<String> {
        self.reader.ending().and_then(|ending| ending.describe())
    }
}
