//! Writing a run folder.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use ultraep_trace::{Resumed, TraceMeta};

use crate::files::{write_atomically, write_json};
use crate::reader::RunReader;
use crate::trace::RunTrace;
use crate::{Metric, PolicyTable, RunError, RunInfo, RunStatus, UtcTime};

pub(crate) const INFO_FILE: &str = "run.json";
pub(crate) const METRICS_FILE: &str = "metrics.jsonl";
pub(crate) const TRACE_FILE: &str = "loads.uet";
pub(crate) const TABLE_FILE: &str = "table.json";
pub(crate) const CHECKPOINTS_FOLDER: &str = "checkpoints";
/// Locked by the writer as long as it lives. A file of its own, because locks keep readers out on some systems.
pub(crate) const LOCK_FILE: &str = ".lock";
const MARKDOWN_FILE: &str = "table.md";

/// Writes one run. Holds a lock on the folder while it lives, so that nobody else takes the run up meanwhile and readers
/// can tell a run at work from one that was killed.
#[derive(Debug)]
pub struct RunWriter {
    folder: PathBuf,
    info: RunInfo,
    metrics: File,
    /// Bytes of whole lines in the metrics.
    metrics_bytes: u64,
    metrics_lines: u64,
    /// Released when the process ends, in whatever way.
    _lock: File,
}

impl RunWriter {
    /// Makes the folder (and those above it) and writes `run.json`. Refuses a folder that is there already.
    /// [`UtcTime::folder_name`] gives the customary name.
    pub fn create(folder: &Path, info: RunInfo) -> Result<Self, RunError> {
        let not_made = || RunError::write(folder, "no run was begun");
        if let Some(above) = folder.parent() {
            fs::create_dir_all(above).map_err(not_made())?;
        }
        fs::create_dir(folder).map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists => RunError::Exists { path: folder.into() },
            _ => not_made()(source),
        })?;
        fs::create_dir(folder.join(CHECKPOINTS_FOLDER)).map_err(not_made())?;
        let lock = lock(folder)?;
        let path = folder.join(METRICS_FILE);
        let metrics = OpenOptions::new().write(true).create_new(true).open(&path).map_err(not_made())?;
        write_json(&folder.join(INFO_FILE), &info)?;
        Ok(Self { folder: folder.into(), info, metrics, metrics_bytes: 0, metrics_lines: 0, _lock: lock })
    }

    /// Takes up an interrupted run at `from_step`: lines of that step and later ones, a torn last line and the table are
    /// removed, the status becomes running. Whether config and text are the same is for the caller to compare
    /// ([`RunWriter::info`]); the trace is taken up by [`RunWriter::resume_trace`].
    pub fn resume(folder: &Path, from_step: u64) -> Result<Self, RunError> {
        RunReader::open(folder)?; // what is no run is refused before anything in it is touched
        let lock = lock(folder)?;
        let reader = RunReader::open(folder)?;
        let (mut kept, mut metrics_lines) = (Vec::new(), 0);
        let mut lines = reader.metrics()?;
        while let Some(metric) = lines.next_metric()? {
            if metric.step().is_some_and(|step| step < from_step) {
                kept.extend_from_slice(lines.line());
                kept.push(b'\n');
                metrics_lines += 1;
            }
        }
        for table in [TABLE_FILE, MARKDOWN_FILE] {
            match fs::remove_file(folder.join(table)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(RunError::write(folder.join(table), "it is from before")(error));
                }
                _ => {}
            }
        }
        let mut info = reader.into_info();
        info.status = RunStatus::Running;
        info.ended = None;
        info.resumed_from_steps.push(from_step);
        let path = folder.join(METRICS_FILE);
        write_atomically(&path, &kept)?;
        let mut metrics = OpenOptions::new().write(true).open(&path).map_err(RunError::read(&path))?;
        let metrics_bytes = metrics.seek(SeekFrom::End(0)).map_err(RunError::read(&path))?;
        write_json(&folder.join(INFO_FILE), &info)?;
        Ok(Self { folder: folder.into(), info, metrics, metrics_bytes, metrics_lines, _lock: lock })
    }

    /// The run's folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What `run.json` holds now.
    pub fn info(&self) -> &RunInfo {
        &self.info
    }

    /// Where checkpoints go.
    pub fn checkpoints_folder(&self) -> PathBuf {
        self.folder.join(CHECKPOINTS_FOLDER)
    }

    /// Begins the trace, `loads.uet`.
    pub fn create_trace(&self, meta: TraceMeta) -> Result<RunTrace, RunError> {
        let path = self.folder.join(TRACE_FILE);
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path);
        RunTrace::new(file.map_err(RunError::write(&path, "no trace was begun"))?, path, meta)
    }

    /// Takes up the trace of a resumed run: records of `from_step` and later ones are removed.
    pub fn resume_trace(&self, from_step: u64) -> Result<(RunTrace, Resumed), RunError> {
        RunTrace::resume(self.folder.join(TRACE_FILE), from_step)
    }

    /// Appends a line to the metrics: it has left the process when this returns. After an error every earlier line is
    /// whole and the failed one is gone.
    pub fn append_metric(&mut self, metric: &Metric) -> Result<(), RunError> {
        let path = || self.folder.join(METRICS_FILE);
        let refused = |e: serde_json::Error| RunError::Json { path: path(), line: None, reason: e.to_string() };
        let mut line = serde_json::to_vec(metric).map_err(refused)?;
        line.push(b'\n');
        if let Err(source) = self.metrics.write_all(&line) {
            // Half a line may be there. If even this fails, the reader leaves it out.
            let _ = self.metrics.set_len(self.metrics_bytes);
            let _ = self.metrics.seek(SeekFrom::Start(self.metrics_bytes));
            let kept = format!("the {} lines before are kept", self.metrics_lines);
            return Err(RunError::write(path(), kept)(source));
        }
        self.metrics_bytes += line.len() as u64;
        self.metrics_lines += 1;
        Ok(())
    }

    /// Waits until the disk has every line: what a checkpoint needs.
    pub fn sync_metrics(&self) -> Result<(), RunError> {
        let kept = || format!("the last of {} lines may not survive a power cut", self.metrics_lines);
        self.metrics.sync_data().map_err(|source| RunError::write(self.folder.join(METRICS_FILE), kept())(source))
    }

    /// Writes the final table, as JSON and as Markdown.
    pub fn write_table(&self, table: &PolicyTable) -> Result<(), RunError> {
        write_json(&self.folder.join(TABLE_FILE), table)?;
        write_atomically(&self.folder.join(MARKDOWN_FILE), table.to_markdown().as_bytes())
    }

    /// Changes what `run.json` says besides the status, such as the corpus found after the folder was made.
    pub fn update_info(&mut self, change: impl FnOnce(&mut RunInfo)) -> Result<(), RunError> {
        change(&mut self.info);
        write_json(&self.folder.join(INFO_FILE), &self.info)
    }

    /// Ends the run: metrics synced to the disk, status and time written.
    pub fn end(mut self, status: RunStatus, ended: UtcTime) -> Result<(), RunError> {
        let synced = self.sync_metrics();
        self.update_info(|info| {
            info.status = status;
            info.ended = Some(ended);
        })?;
        synced
    }
}

/// Locks the folder for this process. File systems without locks are taken as they are.
fn lock(folder: &Path) -> Result<File, RunError> {
    let path = folder.join(LOCK_FILE);
    let file = File::create(&path).map_err(RunError::write(&path, "the run is as it was"))?;
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => Err(RunError::Busy { path: folder.into() }),
        Ok(()) | Err(TryLockError::Error(_)) => Ok(file),
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use crate::ValidationMetrics;

    #[test]
    fn a_full_disk_keeps_the_lines_before_and_says_so() {
        let folder = tempfile::TempDir::new().expect("folder");
        let info = RunInfo::starting(UtcTime::from_unix_s(0));
        let mut writer = RunWriter::create(&folder.path().join("run"), info).expect("run");
        let metric = Metric::Validation(ValidationMetrics { step: 1, loss: 2.5, tokens: 3 });
        writer.append_metric(&metric).expect("room");
        let disk = std::mem::replace(
            &mut writer.metrics,
            OpenOptions::new().write(true).open("/dev/full").expect("a device that is always full"),
        );
        let error = writer.append_metric(&metric).expect_err("full");
        let words = error.to_string();
        assert!(matches!(error, RunError::Write { .. }), "{error:?}");
        assert!(words.contains("metrics.jsonl") && words.ends_with("the 1 lines before are kept"), "{words}");
        writer.metrics = disk;
        writer.append_metric(&metric).expect("room again");
        let reader = RunReader::open(writer.folder()).expect("run");
        assert_eq!(reader.metrics().expect("metrics").count(), 2);
    }
}
