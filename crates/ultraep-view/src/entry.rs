//! One source with what is known of it so far, kept up to date by a thread.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use ultraep_trace::Record;

use crate::metrics::{RunFollower, RunJson};
use crate::scan::{Progress, Scanner};
use crate::source::{Source, Trace, open_trace};
use crate::summary::Summary;
use crate::{Settings, ViewError};

/// How often a run at work is looked at.
const POLL: Duration = Duration::from_millis(300);
/// Counts read under one lock of the state.
const BATCH_COUNTS: usize = 1 << 20;
/// Most records read on either side of a microbatch to find its neighbours.
const REACH_MAX: u64 = 4096;

/// A source and its state.
pub(crate) struct Entry {
    pub(crate) source: Source,
    state: Mutex<State>,
    /// For requests; the scanner has its own.
    trace: Mutex<Trace>,
    /// Grows with every change of the state.
    revision: watch::Sender<u64>,
}

/// What is known so far.
pub(crate) struct State {
    pub(crate) summary: Summary,
    pub(crate) progress: Progress,
    pub(crate) run: Option<RunJson>,
    /// Whether more may come.
    pub(crate) is_live: bool,
    /// Why reading ended early.
    pub(crate) error: Option<String>,
    /// What is missing at the end of a trace that nobody writes.
    pub(crate) ending: Option<String>,
}

/// A microbatch and what is around it.
pub(crate) struct Found {
    pub(crate) record: Record,
    /// Counts of the same layer before, oldest first.
    pub(crate) history: Vec<Vec<u32>>,
    /// Step and microbatch of the same layer before and after.
    pub(crate) previous: Option<(u64, u32)>,
    pub(crate) next: Option<(u64, u32)>,
    /// Other layers of the same microbatch, nearest below and above.
    pub(crate) layer_below: Option<u32>,
    pub(crate) layer_above: Option<u32>,
}

/// A lock whose holder panicked guards figures that are still whole enough to show.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Entry {
    pub(crate) fn open(path: &Path, settings: &Settings) -> Result<Self, ViewError> {
        let source = Source::open(path, settings)?;
        let state = State {
            summary: Summary::new(source.meta.layers, source.meta.experts),
            progress: Progress::default(),
            run: None,
            is_live: true,
            error: None,
            ending: None,
        };
        let trace = Mutex::new(open_trace(&source.trace)?);
        Ok(Self { source, state: Mutex::new(state), trace, revision: watch::Sender::new(0) })
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    pub(crate) fn revision(&self) -> u64 {
        *self.revision.borrow()
    }

    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }

    fn changed(&self) {
        self.revision.send_modify(|revision| *revision += 1);
    }

    /// Reads to the end, and on as long as somebody writes, until `stop`. Failures become part of the state.
    pub(crate) fn follow(&self, stop: &AtomicBool) {
        if let Err(error) = self.read_all(true, &|_| !stop.load(Ordering::Relaxed)) {
            self.fail(&error);
        }
    }

    /// Reads what there is now.
    pub(crate) fn read_once(&self, progress: &dyn Fn(&Progress)) -> Result<(), ViewError> {
        let on = |now: &Progress| {
            progress(now);
            true
        };
        self.read_all(false, &on)
    }

    /// How run and trace stand; told only where it differs from before.
    fn set_standing(&self, run: Option<&RunJson>, is_live: bool, ending: Option<String>) {
        let mut state = self.state();
        if (state.run.as_ref(), state.is_live, &state.ending) == (run, is_live, &ending) {
            return;
        }
        (state.run, state.is_live, state.ending) = (run.cloned(), is_live, ending);
        drop(state);
        self.changed();
    }

    fn fail(&self, error: &ViewError) {
        let mut state = self.state();
        (state.error, state.is_live) = (Some(error.to_string()), false);
        drop(state);
        self.changed();
    }

    fn read_all(&self, is_following: bool, go_on: &dyn Fn(&Progress) -> bool) -> Result<(), ViewError> {
        while let Pass::Again = self.read_pass(is_following, go_on)? {
            let Source { meta, .. } = &self.source;
            self.state().summary = Summary::new(meta.layers, meta.experts);
        }
        Ok(())
    }

    /// One pass from the beginning; again when the run was taken up again at an earlier step meanwhile.
    fn read_pass(&self, is_following: bool, go_on: &dyn Fn(&Progress) -> bool) -> Result<Pass, ViewError> {
        let source = &self.source;
        let mut scanner = Scanner::new(source)?;
        let mut run = source.run.as_deref().map(RunFollower::open).transpose()?;
        let batch = (BATCH_COUNTS / source.meta.counts().max(1)).clamp(1, 256);
        loop {
            let mut has_more = true;
            let before = scanner.progress().read;
            while has_more {
                let mut state = self.state();
                has_more = scanner.advance(source, batch, &mut state.summary)?;
                state.progress = scanner.progress();
                drop(state);
                if scanner.progress().read > before {
                    self.changed();
                }
                if !go_on(&scanner.progress()) {
                    return Ok(Pass::Done);
                }
            }
            let was_taken_up = match (&mut run, &source.run) {
                (Some(run), Some(folder)) => run.advance(folder)?,
                _ => false,
            };
            if was_taken_up {
                return Ok(Pass::Again);
            }
            let is_running = run.as_ref().map_or(!scanner.progress().is_closed, RunFollower::is_running);
            // Of a run at work it is no news that its trace is open.
            let ending = scanner.ending().filter(|_| run.is_none() || !is_running || !is_following);
            self.set_standing(run.as_ref().map(RunFollower::json), is_following && is_running, ending);
            if !(is_following && is_running) {
                return Ok(Pass::Done);
            }
            std::thread::park_timeout(POLL);
            if !go_on(&scanner.progress()) {
                return Ok(Pass::Done);
            }
            if scanner.refresh(source).is_err() {
                return Ok(Pass::Again); // shorter than before: taken up again
            }
        }
    }

    /// Finds a microbatch, with up to `window` earlier ones of its layer.
    pub(crate) fn find(&self, step: u64, microbatch: u32, layer: u32, window: usize) -> Result<Found, ViewError> {
        let source = &self.source;
        let refuse = |error| ViewError::Trace { path: source.trace.clone(), source: error };
        let mut trace = lock(&self.trace);
        if !trace.ending().is_closed && trace.refresh().is_err() {
            *trace = open_trace(&source.trace)?;
        }
        let number = trace.find(step, microbatch, layer).map_err(refuse)?;
        let number = number.ok_or_else(|| self.not_found(step, microbatch, layer))?;
        let layers = self.state().summary.layers.len().max(1) as u64;
        let reach = (layers * (window as u64 + 1)).saturating_add(layers).min(REACH_MAX);
        let first = number.saturating_sub(reach);
        let end = (number + 1).saturating_add(reach.min(2 * layers)).min(trace.records());
        let mut found = Found {
            record: Record::default(),
            history: Vec::new(),
            previous: None,
            next: None,
            layer_below: None,
            layer_above: None,
        };
        let mut record = Record::default();
        for at in first..end {
            trace.read(at, &mut record).map_err(refuse)?;
            found.take(&record, at.cmp(&number), (step, microbatch, layer));
        }
        let extra = found.history.len().saturating_sub(window);
        found.history.drain(..extra);
        Ok(found)
    }

    fn not_found(&self, step: u64, microbatch: u32, layer: u32) -> ViewError {
        let state = self.state();
        let steps = state.summary.steps;
        let layers: Vec<String> = state.summary.layers.keys().take(64).map(u32::to_string).collect();
        let (first, last) = steps.unwrap_or_default();
        ViewError::NotFound {
            what: format!("microbatch {microbatch} of layer {layer} in step {step}"),
            known: format!("there are steps {first} to {last}, layers {}", layers.join(", ")),
        }
    }
}

enum Pass {
    Done,
    Again,
}

impl Found {
    fn take(&mut self, record: &Record, order: std::cmp::Ordering, (step, microbatch, layer): (u64, u32, u32)) {
        let place = (record.step, record.microbatch);
        if place == (step, microbatch) {
            if record.layer < layer {
                self.layer_below = Some(self.layer_below.map_or(record.layer, |other| other.max(record.layer)));
            }
            if record.layer > layer {
                self.layer_above = Some(self.layer_above.map_or(record.layer, |other| other.min(record.layer)));
            }
        }
        if record.layer != layer {
            return;
        }
        match order {
            std::cmp::Ordering::Less => {
                self.previous = Some(place);
                self.history.push(record.before.clone());
            }
            std::cmp::Ordering::Equal => self.record.clone_from(record),
            std::cmp::Ordering::Greater => {
                self.next.get_or_insert(place);
            }
        }
    }
}
