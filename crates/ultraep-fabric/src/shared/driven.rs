//! An endpoint that is driven from outside instead of sleeping: the simulated fabric's way in. The state machines, the
//! failure record and the rules are those of every other rank; only who decides when to look again is different.

use super::endpoint::{Awaited, Endpoint};
use super::segment::Segment;
use crate::operation::OperationKind;
use crate::sync::Ordering;
use crate::{FabricError, RemoteSpan, Ticket, copy};
use core::time::Duration;
use ultraep_plan::Rank;

impl Endpoint {
    /// For a driver that lets one rank run at a time, which obeys any number of core permits.
    pub(crate) fn without_permits(mut self) -> Self {
        self.limited = false;
        self
    }

    /// Moves the collective in flight, if any, past one phase; whether it moved.
    pub(crate) fn advance_phase(&mut self) -> Result<bool, FabricError> {
        self.progress_phase()
    }

    /// The rank sleeps for this ticket from now on, until [`Endpoint::wakes`].
    pub(crate) fn sleeps(&self, ticket: &Ticket) {
        let kind = self.awaited(ticket).kind();
        self.segment.control(self.rank).activity.store(kind as u32, Ordering::Relaxed);
    }

    /// The rank is awake again.
    pub(crate) fn wakes(&self) {
        self.segment.note_awaited(self.rank, None);
    }

    /// Whether a signal that is awaited can still come; for other tickets, yes.
    pub(crate) fn check_awaited(&mut self, ticket: &Ticket) -> Result<(), FabricError> {
        match self.awaited(ticket) {
            Awaited::Signal { signal, at_least } => self.check_signallers(signal, at_least),
            Awaited::Phase(_) => Ok(()),
        }
    }

    /// The rank has waited too long: ends the group.
    pub(crate) fn expire(&mut self, ticket: &Ticket, waited: Duration) -> FabricError {
        let awaited = self.awaited(ticket);
        let failure = self.timed_out(awaited, waited);
        self.fail(awaited.kind(), &failure)
    }

    /// The rank sleeps until tiles of `peer` are there, until [`Endpoint::wakes`].
    pub(crate) fn sleeps_for_tiles(&self, peer: Rank) {
        self.segment.note_awaited(self.rank, Some(peer));
    }

    /// The rank has waited too long for tiles of `peer`: ends the group.
    pub(crate) fn expire_tiles(&mut self, peer: Rank, waited: Duration) -> FabricError {
        let failure = self.tiles_timed_out(peer, waited);
        self.fail(OperationKind::Stream, &failure)
    }

    /// Refuses a signal that cannot be sent.
    pub(crate) fn check_signal_to(&self, rank: Rank, signal: usize) -> Result<(), FabricError> {
        let kind = OperationKind::Signal;
        self.operands.rank(kind, rank)?;
        self.operands.signal(kind, signal)
    }

    /// The group's failure, if any, as the result of `kind`.
    pub(crate) fn check(&mut self, kind: OperationKind) -> Result<(), FabricError> {
        self.check_group(kind)
    }

    /// A ticket for a one-sided operation that needs no more waiting.
    pub(crate) fn completed(&mut self, stamp: u64, bytes_sent: u64) -> Ticket {
        self.done(crate::Completion { stamp, bytes_sent, bytes_received: 0 })
    }

    /// The rank's process is gone without a word.
    pub(crate) fn vanish(mut self: Box<Self>) {
        self.vanished = true;
    }
}

impl Segment {
    /// Writes what a rank has put, or a part of it.
    ///
    /// # Safety
    /// The place was checked by [`Endpoint::copy_out`], and the rank that put it has not submitted the window's `Close` since.
    pub(crate) unsafe fn land_put(&self, to: RemoteSpan, bytes: &[u8]) {
        let Some((start, limit)) = self.window(to.window, to.rank) else { return };
        debug_assert!(to.offset + bytes.len() <= limit);
        // SAFETY: within the part, as checked; the window is open until every rank has submitted `Close`, so no references to
        // it exist.
        unsafe { copy::copy(bytes.as_ptr(), start.add(to.offset).as_ptr(), bytes.len()) };
    }
}
