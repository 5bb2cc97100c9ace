//! The progress thread: the only one that touches the transport.

use crate::machine::Machine;
use crate::transport::{Event, Transport, TransportError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Longest wait for an event, whatever happens.
const NAP: Duration = Duration::from_secs(1);

/// How long the last messages of a rank may take to get out: peers' progress threads take them at once, if they live.
const CLOSE_WITHIN: Duration = Duration::from_secs(2);

/// What the rank's thread and the progress thread share.
pub(crate) struct Shared {
    state: Mutex<State>,
    /// Something has come that the rank's thread may wait for.
    changed: Condvar,
}

pub(crate) struct State {
    pub(crate) machine: Machine,
    /// The rank has said goodbye: the thread ends when that is sent.
    pub(crate) departing: bool,
}

impl Shared {
    pub(crate) fn new(machine: Machine) -> Self {
        Self { state: Mutex::new(State { machine, departing: false }), changed: Condvar::new() }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sleeps until something has changed, at most `limit`.
    pub(crate) fn sleep<'a>(&self, state: MutexGuard<'a, State>, limit: Duration) -> MutexGuard<'a, State> {
        self.changed.wait_timeout(state, limit).unwrap_or_else(PoisonError::into_inner).0
    }
}

/// Tells the rank's thread that nothing comes any more, however the progress thread ends.
struct Ended<'a>(&'a Shared);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.state().machine.stopped();
        self.0.changed.notify_all();
    }
}

/// The progress thread's life.
pub(crate) fn run(shared: &Arc<Shared>, mut transport: impl Transport) {
    let _ended = Ended(shared);
    // An error of the transport ends the thread, which says so to the rank; the peers see it close.
    let _ = serve(shared, &mut transport);
    transport.close(CLOSE_WITHIN);
}

fn serve(shared: &Shared, transport: &mut impl Transport) -> Result<(), TransportError> {
    let mut event = None;
    loop {
        let mut state = shared.state();
        let now = Instant::now();
        match event.take() {
            Some(Event::Message { from, bytes }) => state.machine.receive(from, bytes, now),
            Some(Event::Closed { peer }) => state.machine.closed(peer, now),
            None => {}
        }
        state.machine.tick(now);
        let (out, changed, departing) = (state.machine.take_out(), state.machine.take_changed(), state.departing);
        let wait = state.machine.deadline().map_or(NAP, |deadline| deadline.saturating_duration_since(now).min(NAP));
        drop(state);
        if changed {
            shared.changed.notify_all();
        }
        for (to, message) in out {
            transport.send(to, message)?;
        }
        if departing {
            return Ok(());
        }
        event = transport.poll(wait)?;
    }
}
