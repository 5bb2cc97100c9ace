//! The profiling hook: a run folder with the loads and plans of batches, written off the hot path.

use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use ultraep_plan::Topology;
use ultraep_run::{ProfileSummary, Profiler, ProfilerOptions, RunInfo, RunStatus, RunWriter, UtcTime};
use ultraep_runtime::LayerRecord;
use ultraep_trace::TraceMeta;
use ultraep_train::fill_record;

use crate::ServeError;

/// Hears what the engine does.
pub trait Observer: Send + Sync {
    /// The layers of one batch, in order. Called between batches: it must not wait.
    fn batch(&self, records: &[LayerRecord]);
    /// The ranks ended although they were not told to; they are being started again.
    fn ranks_lost(&self, reason: &str);
    /// This process did not run for `time`: it was stopped by a signal, or its machine slept. Nothing is lost by that.
    fn suspended(&self, time: Duration);
}

/// Writes a run folder (`docs/run-folder.md`) while the server runs: a step is a batch. A slow disk costs records, never time.
pub struct Recorder {
    writer: RunWriter,
    profiler: Mutex<(Profiler, u64)>,
}

impl Recorder {
    /// Makes `folder` and begins the trace; every `every`-th batch is recorded.
    pub fn create(
        folder: &Path,
        info: RunInfo,
        topology: &Topology,
        layers: usize,
        every: u64,
    ) -> Result<Self, ServeError> {
        let writer = RunWriter::create(folder, info)?;
        let trace = writer.create_trace(TraceMeta::of_topology(topology, layers))?;
        // A whole batch must fit, or models of many layers would always lose their last ones.
        let ring = ProfilerOptions::default().ring.max(2 * layers);
        let profiler = Profiler::start(trace, ProfilerOptions { every, ring })?;
        Ok(Self { writer, profiler: Mutex::new((profiler, 0)) })
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        self.writer.folder()
    }

    /// Records the next batch. An error is one that the writer met; nothing is recorded from then on.
    pub fn batch(&self, records: &[LayerRecord]) -> Result<(), ServeError> {
        let mut state = self.profiler.lock().unwrap_or_else(PoisonError::into_inner);
        let (profiler, step) = &mut *state;
        if profiler.wants(*step) {
            for record in records {
                profiler.record(|to| fill_record(to, *step, 0, record))?;
            }
        }
        *step += 1;
        Ok(())
    }

    /// Ends the run folder; gives what was recorded of it.
    pub fn finish(self, status: RunStatus, ended: UtcTime) -> Result<ProfileSummary, ServeError> {
        let Self { mut writer, profiler } = self;
        let (profiler, _) = profiler.into_inner().unwrap_or_else(PoisonError::into_inner);
        let summary = profiler.finish()?;
        writer.update_info(|info| info.profile = Some(summary))?;
        writer.end(status, ended)?;
        Ok(summary)
    }
}
