//! Says when nothing is heard of the ranks any more, and when this process did not run at all.
//!
//! Rank 0 counts up each time that all ranks have come to a step, four times a timeout at least while there is nothing to do.
//! The watchdog looks at that count often, and adds up the time that it saw pass without a change. A look that comes much
//! too late means that the process was suspended (stopped by a signal, or its machine asleep): that time says nothing about
//! the ranks, and counts as one look.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::state::Shared;
use crate::ServeError;
use crate::record::Observer;

/// Longest time between two looks.
const LOOK: Duration = Duration::from_millis(100);

/// A look that comes later than this was not held up by other work on the machine.
const SUSPENDED: Duration = Duration::from_secs(2);

/// The thread that looks. It ends when this is dropped.
pub(super) struct Watchdog {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// Watches the ranks of `shared`, which have failed when nothing is heard of them for `timeout`.
    pub(super) fn start(
        shared: Arc<Shared>,
        timeout: Duration,
        observer: Option<Arc<dyn Observer>>,
    ) -> Result<Self, ServeError> {
        let (stop, stopped) = channel();
        let watch = move || {
            let mut silence = Silence::new(timeout);
            let mut seen = Instant::now();
            while stopped.recv_timeout(silence.every) == Err(RecvTimeoutError::Timeout) {
                let now = Instant::now();
                let passed = now - std::mem::replace(&mut seen, now);
                let beats = shared.beats.load(Ordering::Relaxed);
                let found = silence.look(beats, passed);
                if let (Some(time), Some(observer)) = (found.suspended, &observer) {
                    observer.suspended(time);
                }
                if let Some(time) = found.silent {
                    let seconds = time.as_secs_f64();
                    let reason = format!(
                        "no sign of the ranks for {seconds:.1} s: one of them hangs, or a batch takes that long"
                    );
                    shared.stalled(beats, reason);
                }
            }
        };
        let thread = std::thread::Builder::new().name("watchdog".into()).spawn(watch);
        let thread = thread.map_err(ServeError::io("start a thread"))?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic was reported by its thread.
            let _ = thread.join();
        }
    }
}

/// The time without a change.
struct Silence {
    /// Between two looks.
    every: Duration,
    /// After this long it is too long.
    limit: Duration,
    beats: u64,
    silent: Duration,
}

/// What a look has found.
#[derive(Debug, Default, PartialEq, Eq)]
struct Found {
    /// For how long nothing was heard, if too long.
    silent: Option<Duration>,
    /// For how long the process did not run, if it was suspended.
    suspended: Option<Duration>,
}

impl Silence {
    fn new(timeout: Duration) -> Self {
        let every = LOOK.min(timeout / 16);
        // Ahead of the timeout by more than a look: it is to be seen within it.
        Self { every, limit: timeout - timeout / 8, beats: 0, silent: Duration::ZERO }
    }

    /// Takes in the ranks' count, `passed` after the look before.
    fn look(&mut self, beats: u64, passed: Duration) -> Found {
        let suspended = passed.checked_sub(self.every).filter(|late| *late >= SUSPENDED);
        if beats == std::mem::replace(&mut self.beats, beats) {
            self.silent += if suspended.is_some() { self.every } else { passed };
        } else {
            self.silent = Duration::ZERO;
        }
        Found { silent: (self.silent >= self.limit).then_some(self.silent), suspended }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_counts_up_to_the_timeout_and_time_without_this_process_does_not() {
        let second = Duration::from_secs(1);
        let mut silence = Silence::new(Duration::from_secs(60));
        assert_eq!(silence.every, LOOK);
        assert_eq!(silence.look(1, LOOK), Found::default());
        for _ in 0..52 {
            assert_eq!(silence.look(1, second), Found::default());
        }
        // Suspended for an hour: it counts as one look.
        let hour = Duration::from_secs(3600);
        assert_eq!(silence.look(1, hour), Found { silent: None, suspended: Some(hour - LOOK) });
        let found = silence.look(1, second);
        assert_eq!(found, Found { silent: Some(53 * second + LOOK), suspended: None });
        assert!(found.silent.unwrap() < Duration::from_secs(60), "within the timeout");
        // Back again.
        assert_eq!(silence.look(2, second), Found::default());
        assert_eq!(silence.look(2, second), Found::default());
    }
}
