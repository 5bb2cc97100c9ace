//! Records loads while a run is at work, off its critical path.
//!
//! The rank that records copies counts and plan into a recycled record and hands it to a writer thread through a ring of fixed
//! size; the thread encodes, compresses and writes. Where the ring is full the record is dropped and counted: a slow disk
//! costs records, never time.
//!
//! ```text
//! rank 0   record(step, ..)  --full records-->  writer thread: loads.uet
//!                            <--empty records--
//! ```
//!
//! Memory: one record for each place in the ring and two more, taken as they are first needed; nothing is allocated after
//! that. Records of a step that is not sampled cost a division.

use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use ultraep_trace::Record;

use crate::{RunError, RunTrace};

/// After so long without a new record, what is written so far leaves the process: live viewers see it.
const QUIET: Duration = Duration::from_millis(250);

/// What is recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProfilerOptions {
    /// Every how many steps (batches, in serving) all layers are recorded: 1 for all of them, 0 for none.
    pub every: u64,
    /// Records that may wait for the writer; at least 1.
    pub ring: usize,
}

impl Default for ProfilerOptions {
    /// Every step; 1024 records may wait.
    fn default() -> Self {
        Self { every: 1, ring: 1024 }
    }
}

/// What came of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProfileSummary {
    /// Every how many steps was recorded.
    pub every: u64,
    /// Records handed to the writer.
    pub recorded: u64,
    /// Records dropped because the writer was behind.
    pub dropped: u64,
}

enum Message {
    Record(Box<Record>),
    Sync(SyncSender<Result<(), RunError>>),
}

/// Hands records to a thread that writes them.
#[derive(Debug)]
pub struct Profiler {
    /// `None` once the writer is gone.
    full: Option<SyncSender<Message>>,
    empty: Receiver<Box<Record>>,
    /// The record that found no room.
    spare: Option<Box<Record>>,
    thread: Option<JoinHandle<Result<RunTrace, RunError>>>,
    summary: ProfileSummary,
}

impl Profiler {
    /// Starts the writer thread over a trace.
    pub fn start(trace: RunTrace, options: ProfilerOptions) -> Result<Self, RunError> {
        let ring = options.ring.max(1);
        let (full, records) = sync_channel(ring);
        let (recycled, empty) = sync_channel(ring + 1);
        let path = trace.path().to_path_buf();
        let thread = std::thread::Builder::new().name("profiler".into());
        let thread = thread.spawn(move || write(trace, &records, &recycled));
        let thread = thread.map_err(RunError::write(path, "no thread for the profiler"))?;
        let summary = ProfileSummary { every: options.every, ..ProfileSummary::default() };
        Ok(Self { full: Some(full), empty, spare: None, thread: Some(thread), summary })
    }

    /// Whether a step is sampled.
    pub fn wants(&self, step: u64) -> bool {
        self.summary.every > 0 && step.is_multiple_of(self.summary.every)
    }

    /// Records what `fill` writes into a record whose vectors keep their memory from an earlier use (so `fill` sets every
    /// field), unless the ring is full. Never waits. An error is one that the writer met before: from then on nothing is
    /// recorded, and the trace holds its whole blocks.
    pub fn record(&mut self, fill: impl FnOnce(&mut Record)) -> Result<(), RunError> {
        let Some(full) = &self.full else { return Ok(()) };
        let mut record = self.spare.take().or_else(|| self.empty.try_recv().ok()).unwrap_or_default();
        fill(&mut record);
        match full.try_send(Message::Record(record)) {
            Ok(()) => self.summary.recorded += 1,
            Err(TrySendError::Full(Message::Record(record))) => {
                self.summary.dropped += 1;
                self.spare = Some(record);
            }
            Err(TrySendError::Full(Message::Sync(_)) | TrySendError::Disconnected(_)) => {
                self.join()?;
            }
        }
        Ok(())
    }

    /// What was recorded so far.
    pub fn summary(&self) -> ProfileSummary {
        self.summary
    }

    /// Waits until the disk has every record so far: what a checkpoint needs.
    pub fn sync(&mut self) -> Result<(), RunError> {
        let Some(full) = &self.full else { return Ok(()) };
        let (done, wait) = sync_channel(1);
        let answer = full.send(Message::Sync(done)).ok().and_then(|()| wait.recv().ok());
        match answer {
            Some(result) => result,
            None => self.join().map(drop),
        }
    }

    /// Ends the writer and closes the trace with its index.
    pub fn finish(mut self) -> Result<ProfileSummary, RunError> {
        if let Some(trace) = self.join()? {
            trace.finish()?;
        }
        Ok(self.summary)
    }

    /// The writer's end: its trace, or its error, once.
    fn join(&mut self) -> Result<Option<RunTrace>, RunError> {
        self.full = None;
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result.map(Some),
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => Ok(None),
        }
    }
}

impl Drop for Profiler {
    /// A profiler that is dropped ends its thread; whole blocks are kept, as after a crash.
    fn drop(&mut self) {
        self.full = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn write(
    mut trace: RunTrace,
    records: &Receiver<Message>,
    recycled: &SyncSender<Box<Record>>,
) -> Result<RunTrace, RunError> {
    let mut unflushed = false;
    loop {
        match records.recv_timeout(QUIET) {
            Ok(Message::Record(record)) => {
                trace.append(&record)?;
                unflushed = true;
                // No room: the record is freed here. The producer may be gone.
                let _ = recycled.try_send(record);
            }
            Ok(Message::Sync(done)) => {
                let result = trace.sync();
                unflushed = false;
                let failed = result.is_err();
                // Whoever asked may be gone.
                let _ = done.send(result);
                if failed {
                    return Ok(trace);
                }
            }
            Err(RecvTimeoutError::Timeout) if unflushed => {
                trace.flush()?;
                unflushed = false;
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(trace),
        }
    }
}
