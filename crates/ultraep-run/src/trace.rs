//! The run's trace: a trace writer that knows its file.

use std::fs::{File, OpenOptions};
use std::path::PathBuf;

use ultraep_trace::{Record, Resumed, TraceError, TraceMeta, TraceWriter};

use crate::RunError;

/// Writes `loads.uet`. Independent of the [`crate::RunWriter`] that began it, so that another thread can hold it.
#[derive(Debug)]
pub struct RunTrace {
    path: PathBuf,
    writer: TraceWriter<File>,
}

impl RunTrace {
    pub(crate) fn new(file: File, path: PathBuf, meta: TraceMeta) -> Result<Self, RunError> {
        match TraceWriter::new(file, meta) {
            Ok(writer) => Ok(Self { path, writer }),
            Err(source) => Err(explain(path, 0, source)),
        }
    }

    pub(crate) fn resume(path: PathBuf, from_step: u64) -> Result<(Self, Resumed), RunError> {
        let file = OpenOptions::new().read(true).write(true).open(&path).map_err(RunError::read(&path))?;
        match TraceWriter::resume(file, from_step) {
            Ok((writer, resumed)) => Ok((Self { path, writer }, resumed)),
            Err(source) => Err(RunError::Trace { path, source }),
        }
    }

    pub(crate) fn path(&self) -> &std::path::Path {
        &self.path
    }

    /// What is recorded.
    pub fn meta(&self) -> &TraceMeta {
        self.writer.meta()
    }

    /// Records appended so far.
    pub fn records(&self) -> u64 {
        self.writer.records()
    }

    /// Appends a record; it reaches the file with its block.
    pub fn append(&mut self, record: &Record) -> Result<(), RunError> {
        let result = self.writer.append(record);
        result.map_err(|source| self.explain(source))
    }

    /// Ends the block: every record so far has left the process.
    pub fn flush(&mut self) -> Result<(), RunError> {
        let result = self.writer.flush();
        result.map_err(|source| self.explain(source))
    }

    /// As [`RunTrace::flush`], and waits until the disk has it: what a checkpoint needs.
    pub fn sync(&mut self) -> Result<(), RunError> {
        self.flush()?;
        let synced = self.writer.output().sync_data();
        synced.map_err(RunError::write(&self.path, "the last blocks may not survive a power cut"))
    }

    /// Closes the trace with its index and syncs it to the disk.
    pub fn finish(self) -> Result<(), RunError> {
        let Self { path, writer } = self;
        let records = writer.records();
        let file = writer.finish().map_err(|source| explain(path.clone(), records, source))?;
        file.sync_all().map_err(RunError::write(path, "the last blocks may not survive a power cut"))
    }

    fn explain(&self, source: TraceError) -> RunError {
        explain(self.path.clone(), self.writer.written_records(), source)
    }
}

fn explain(path: PathBuf, written_records: u64, error: TraceError) -> RunError {
    match error {
        TraceError::Io { source, .. } => {
            RunError::Write { path, kept: format!("up to {written_records} records of whole blocks are kept"), source }
        }
        source => RunError::Trace { path, source },
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use ultraep_plan::{Topology, TopologySpec};

    #[test]
    fn a_full_disk_names_the_file_and_what_is_kept() {
        let topology = Topology::new(TopologySpec { ranks: 1, experts: 1, domain_ranks: 1, slots_per_rank: 0 });
        let meta = TraceMeta::of_topology(&topology.expect("topology"), 1);
        let full = OpenOptions::new().write(true).open("/dev/full").expect("a device that is always full");
        let error = RunTrace::new(full, "loads.uet".into(), meta).expect_err("full");
        assert!(matches!(error, RunError::Write { .. }), "{error:?}");
        let words = error.to_string();
        assert!(words.starts_with("loads.uet: cannot be written: ") && words.contains("0 records"), "{words}");
    }
}
