//! The profiling hook: a run folder with the loads and plans of every batch, written off the hot path.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;

use ultraep_plan::Topology;
use ultraep_run::{RunInfo, RunStatus, RunTrace, RunWriter, UtcTime};
use ultraep_runtime::LayerRecord;
use ultraep_trace::{PlanRecord, Record, TraceMeta};

use crate::ServeError;

/// Hears what the engine does.
pub trait Observer: Send + Sync {
    /// The layers of one batch, in order. Called between batches: it must not wait.
    fn batch(&self, records: &[LayerRecord]);
    /// The ranks ended although they were not told to; they are being started again.
    fn ranks_lost(&self, reason: &str);
}

/// Batches that may wait to be written; more are left out and counted.
const BACKLOG_MAX: usize = 256;

/// The hot end of a [`Recorder`]. Clones are the same.
#[derive(Clone)]
pub struct Feed {
    to: SyncSender<Vec<LayerRecord>>,
    dropped: Arc<AtomicU64>,
}

impl Feed {
    /// Hands a batch to the recorder; left out and counted when it is too far behind.
    pub fn batch(&self, records: &[LayerRecord]) {
        if let Err(TrySendError::Full(_)) = self.to.try_send(records.to_vec()) {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Writes a run folder (`docs/run-folder.md`) while the server runs: a step is a batch.
pub struct Recorder {
    feed: Feed,
    thread: JoinHandle<Result<RunWriter, ServeError>>,
    folder: PathBuf,
}

impl Recorder {
    /// Makes `folder` and begins the trace.
    pub fn create(folder: &Path, info: RunInfo, topology: &Topology, layers: usize) -> Result<Self, ServeError> {
        let writer = RunWriter::create(folder, info)?;
        let trace = writer.create_trace(TraceMeta::of_topology(topology, layers))?;
        let (to, batches) = sync_channel(BACKLOG_MAX);
        let write = move || write(writer, trace, batches);
        let thread = std::thread::Builder::new().name("recorder".into()).spawn(write);
        let thread = thread.map_err(ServeError::io("start a thread"))?;
        Ok(Self { feed: Feed { to, dropped: Arc::default() }, thread, folder: folder.to_path_buf() })
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What an [`Observer`] feeds. All clones must be gone before [`Recorder::finish`], which waits for that.
    pub fn feed(&self) -> Feed {
        self.feed.clone()
    }

    /// Ends the run folder when the engine has ended; gives the batches left out because the disk was too slow.
    pub fn finish(self, status: RunStatus, ended: UtcTime) -> Result<u64, ServeError> {
        let dropped = self.feed.dropped.load(Ordering::Relaxed);
        drop(self.feed);
        let writer = self.thread.join().map_err(|_| ServeError::Ranks("the recorder ended early".into()))??;
        writer.end(status, ended)?;
        Ok(dropped)
    }
}

fn write(writer: RunWriter, mut trace: RunTrace, batches: Receiver<Vec<LayerRecord>>) -> Result<RunWriter, ServeError> {
    for (step, records) in batches.into_iter().enumerate() {
        for record in records {
            trace.append(&to_record(step as u64, record))?;
        }
    }
    trace.finish()?;
    Ok(writer)
}

fn to_record(step: u64, record: LayerRecord) -> Record {
    Record {
        step,
        microbatch: 0,
        layer: record.at.layer as u32,
        before: record.counts,
        after: Some(PlanRecord {
            policy: record.policy.name().to_string(),
            digest: record.digest,
            offsets: record.offsets,
            instances: record.instances,
            split: Some(record.split),
        }),
        top_k: None,
    }
}
