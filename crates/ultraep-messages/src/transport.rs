//! What carries messages.

use core::time::Duration;
use std::sync::Arc;
use ultraep_plan::Rank;

/// Ends a [`Transport::poll`] early, from any thread.
pub type Waker = Arc<dyn Fn() + Send + Sync>;

/// Carries messages between the ranks of a group: in order between each two of them, each once, of any length.
///
/// All calls but the waker's come from one thread, after the transport was made (MPI's `MPI_THREAD_SERIALIZED` is enough where the
/// waker does nothing).
pub trait Transport: Send + 'static {
    /// This rank.
    fn rank(&self) -> Rank;

    /// Ranks of the group.
    fn ranks(&self) -> usize;

    /// Takes a message to another rank; never blocks. What a peer that is gone can no longer take is dropped.
    ///
    /// # Errors
    /// When the transport itself no longer works.
    fn send(&mut self, to: Rank, message: Vec<u8>) -> Result<(), TransportError>;

    /// Moves messages on, and returns the next thing that has come. Waits at most `wait` for one.
    ///
    /// # Errors
    /// When the transport itself no longer works.
    fn poll(&mut self, wait: Duration) -> Result<Option<Event>, TransportError>;

    /// What ends a poll that waits. It may do nothing when polls never wait longer than some microseconds.
    fn waker(&self) -> Waker;

    /// Sends what was taken, for at most `limit`, then closes: peers get [`Event::Closed`] after the last message.
    fn close(&mut self, limit: Duration);
}

/// What has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A message.
    Message {
        /// Who sent it.
        from: Rank,
        /// What is in it.
        bytes: Vec<u8>,
    },
    /// A peer has closed, or is gone; no message of it will come any more.
    Closed {
        /// Who.
        peer: Rank,
    },
}

/// Why a transport no longer works.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{call}: {message}")]
pub struct TransportError {
    /// The call that failed.
    pub call: &'static str,
    /// Its error.
    pub message: String,
}
