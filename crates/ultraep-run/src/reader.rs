//! Reading a run folder, also while the run is at work.

use std::fs::{File, TryLockError};
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use ultraep_trace::TraceFile;

use crate::files::read_json;
use crate::info::RUN_SCHEMA;
use crate::table::TABLE_SCHEMA;
use crate::writer::{CHECKPOINTS_FOLDER, INFO_FILE, LOCK_FILE, METRICS_FILE, TABLE_FILE, TRACE_FILE};
use crate::{Metric, PolicyTable, RunError, RunInfo};

/// Longest line of the metrics.
pub const LINE_BYTES_MAX: u64 = 1 << 20;

/// Reads one run.
#[derive(Debug)]
pub struct RunReader {
    folder: PathBuf,
    info: RunInfo,
}

impl RunReader {
    /// Reads `run.json`.
    pub fn open(folder: &Path) -> Result<Self, RunError> {
        let path = folder.join(INFO_FILE);
        // The schema first: a later version may have other fields.
        let value: serde_json::Value = read_json(&path)?.ok_or_else(|| RunError::NotARun { path: folder.into() })?;
        check_schema(&path, &value, RUN_SCHEMA)?;
        let refused = |e: serde_json::Error| RunError::Json { path: path.clone(), line: None, reason: e.to_string() };
        let info = serde_json::from_value(value).map_err(refused)?;
        Ok(Self { folder: folder.into(), info })
    }

    /// What `run.json` held when it was opened.
    pub fn info(&self) -> &RunInfo {
        &self.info
    }

    pub(crate) fn into_info(self) -> RunInfo {
        self.info
    }

    /// The run's folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where checkpoints are.
    pub fn checkpoints_folder(&self) -> PathBuf {
        self.folder.join(CHECKPOINTS_FOLDER)
    }

    /// Whether a process is writing this run now; `None` where the file system cannot tell. A run whose status is
    /// running and that nobody writes was killed.
    pub fn is_being_written(&self) -> Option<bool> {
        let lock = File::open(self.folder.join(LOCK_FILE)).ok()?;
        match lock.try_lock_shared() {
            Ok(()) => Some(false),
            Err(TryLockError::WouldBlock) => Some(true),
            Err(TryLockError::Error(_)) => None,
        }
    }

    /// The metrics from the beginning.
    pub fn metrics(&self) -> Result<MetricsReader, RunError> {
        let path = self.folder.join(METRICS_FILE);
        let input = BufReader::new(File::open(&path).map_err(RunError::read(&path))?);
        Ok(MetricsReader { path, input, line: Vec::new(), is_line_whole: true, line_number: 0 })
    }

    /// The trace, `None` where none was begun. Its [`TraceFile::ending`] says whether it was closed.
    pub fn trace(&self) -> Result<Option<TraceFile<BufReader<File>>>, RunError> {
        let path = self.folder.join(TRACE_FILE);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(RunError::read(path)(error)),
        };
        TraceFile::open(BufReader::new(file)).map(Some).map_err(|source| RunError::Trace { path, source })
    }

    /// The final table, `None` while there is none.
    pub fn table(&self) -> Result<Option<PolicyTable>, RunError> {
        let path = self.folder.join(TABLE_FILE);
        let Some(value) = read_json::<serde_json::Value>(&path)? else { return Ok(None) };
        check_schema(&path, &value, TABLE_SCHEMA)?;
        let refused = |e: serde_json::Error| RunError::Json { path: path.clone(), line: None, reason: e.to_string() };
        serde_json::from_value(value).map(Some).map_err(refused)
    }
}

fn check_schema(path: &Path, value: &serde_json::Value, expected: &'static str) -> Result<(), RunError> {
    match value.get("schema").and_then(serde_json::Value::as_str) {
        Some(got) if got == expected => Ok(()),
        got => {
            let got = got.unwrap_or("(none)").chars().take(80).collect();
            Err(RunError::Schema { path: path.into(), got, expected })
        }
    }
}

/// Reads metrics line by line, in constant memory. At the end it can be asked again: a run at work adds lines.
#[derive(Debug)]
pub struct MetricsReader {
    path: PathBuf,
    input: BufReader<File>,
    /// The line read last, without its end; or the beginning of one that is not whole yet.
    line: Vec<u8>,
    is_line_whole: bool,
    line_number: u64,
}

impl MetricsReader {
    /// The next whole line; `None` at the end, for now. A last line without its end is still being written, or torn by a
    /// crash: it is kept until it is whole ([`MetricsReader::torn_bytes`]).
    pub fn next_metric(&mut self) -> Result<Option<Metric>, RunError> {
        if self.is_line_whole {
            self.line.clear();
            self.is_line_whole = false;
        }
        let room = (LINE_BYTES_MAX + 1).saturating_sub(self.line.len() as u64);
        let mut input = self.input.by_ref().take(room);
        input.read_until(b'\n', &mut self.line).map_err(RunError::read(&self.path))?;
        if self.line.last() != Some(&b'\n') {
            return if self.line.len() as u64 > LINE_BYTES_MAX {
                Err(RunError::TooLarge { path: self.path.clone(), what: "a line", max_bytes: LINE_BYTES_MAX })
            } else {
                Ok(None)
            };
        }
        self.line.pop();
        self.is_line_whole = true;
        self.line_number += 1;
        serde_json::from_slice(&self.line).map(Some).map_err(|e| RunError::Json {
            path: self.path.clone(),
            line: Some(self.line_number),
            reason: e.to_string(),
        })
    }

    /// Bytes of a last line that is not whole: known at the end.
    pub fn torn_bytes(&self) -> usize {
        if self.is_line_whole { 0 } else { self.line.len() }
    }

    pub(crate) fn line(&self) -> &[u8] {
        &self.line
    }
}

impl Iterator for MetricsReader {
    type Item = Result<Metric, RunError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.line.len() as u64 > LINE_BYTES_MAX {
            return None; // told once: there is no way past it
        }
        self.next_metric().transpose()
    }
}
