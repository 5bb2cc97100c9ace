//! A rank's endpoint of the simulated fabric: the shared segment's endpoint, with a turn of the scheduler around each step.

use super::scheduler::{Content, Place, Scheduler};
use super::{FaultKind, Stopped};
use crate::shared::Endpoint;
use crate::stream::{Direct, Reach};
use crate::{
    Capabilities, Completion, Fabric, FabricError, Loss, Operation, OperationKind, Region, RemoteSpan, Span, Ticket,
    WindowId,
};
use core::time::Duration;
use std::panic::resume_unwind;
use std::sync::Arc;
use ultraep_plan::Rank;

/// A poll that finds nothing new sleeps this long in virtual time, so that a rank that polls does not stop time.
const POLL_NAP: Duration = Duration::from_millis(1);

pub(super) struct SimulatedEndpoint {
    /// Gone once the rank has left or its process was killed.
    inner: Option<Box<Endpoint>>,
    scheduler: Arc<Scheduler>,
    rank: Rank,
    ranks: usize,
    timeout: Duration,
    /// Operations submitted so far.
    submitted: u64,
    /// Whether peers' windows can be touched directly.
    direct: bool,
    /// What a fault made this rank's calls return.
    failed: Option<FabricError>,
}

impl SimulatedEndpoint {
    pub(super) fn new(inner: Endpoint, scheduler: Arc<Scheduler>, timeout: Duration, direct: bool) -> Self {
        let (rank, ranks) = (inner.rank(), inner.ranks());
        Self { inner: Some(Box::new(inner)), scheduler, rank, ranks, timeout, direct, submitted: 0, failed: None }
    }

    /// A turn of the scheduler, and what strikes the rank there.
    fn turn(&mut self, place: Place, kind: OperationKind) -> Result<(), FabricError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        match self.scheduler.turn(self.rank, place) {
            None => Ok(()),
            Some(FaultKind::Fails) => {
                let error = FabricError::PeerLost { rank: self.rank, operation: kind, reason: Loss::Failed };
                self.failed = Some(error.clone());
                Err(error)
            }
            // Like a panic, without the message on the screen.
            Some(FaultKind::Panics) => resume_unwind(Box::new("a simulated panic")),
            Some(FaultKind::Killed) => {
                self.scheduler.killed(self.rank);
                self.stop()
            }
            Some(FaultKind::Hangs) => {
                self.scheduler.hang(self.rank);
                self.stop()
            }
            Some(FaultKind::Stalls(time)) => {
                self.scheduler.sleep(self.rank, time);
                Ok(())
            }
        }
    }

    /// Ends the rank's thread as if it had ended between two instructions.
    fn stop(&mut self) -> ! {
        if let Some(inner) = self.inner.take() {
            inner.vanish();
        }
        resume_unwind(Box::new(Stopped))
    }

    /// The endpoint, while the rank has one.
    fn inner(&mut self) -> Result<&mut Endpoint, FabricError> {
        let gone = FabricError::PeerLost { rank: self.rank, operation: OperationKind::Compute, reason: Loss::Left };
        self.inner.as_deref_mut().ok_or(gone)
    }

    fn submit_to_inner(&mut self, operation: Operation<'_>, stamp: u64) -> Result<Ticket, FabricError> {
        let kind = operation.kind();
        self.inner()?.check(kind)?;
        match operation {
            Operation::Put { from, to } => self.put(&from, to, stamp),
            Operation::Signal { rank, signal, add } => {
                self.inner()?.check_signal_to(rank, signal)?;
                self.scheduler.send(self.rank, Content::Signal { rank, signal, add });
                Ok(self.inner()?.completed(stamp, 0))
            }
            Operation::Get { from, .. } => {
                // A rank sees its own puts.
                self.scheduler.land_puts_to(self.rank, from.rank, from.window);
                self.inner()?.submit_stamped(operation, stamp)
            }
            Operation::AwaitSignal { .. } | Operation::Send { .. } | Operation::Recv { .. } => {
                self.inner()?.submit_stamped(operation, stamp)
            }
            collective => {
                // Entering orders all that this rank did before.
                self.scheduler.land_all_of(self.rank);
                let result = self.inner()?.submit_stamped(collective, stamp);
                self.scheduler.changed();
                result
            }
        }
    }

    /// Captures the bytes now; they land piece by piece when the scheduler says so.
    fn put(&mut self, from: &Span, to: &[RemoteSpan], stamp: u64) -> Result<Ticket, FabricError> {
        let bytes = self.inner()?.copy_out(from, to)?;
        for &target in to {
            self.scheduler.send(self.rank, Content::Put { to: target, bytes: bytes.clone() });
        }
        let others = to.iter().filter(|target| target.rank != self.rank).count() as u64;
        Ok(self.inner()?.completed(stamp, bytes.len() as u64 * others))
    }

    /// One look at a ticket, as far as one phase goes.
    fn look(&mut self, ticket: &Ticket) -> Result<Looked, FabricError> {
        let moved = self.inner()?.advance_phase()?;
        if moved {
            return Ok(Looked::Moved);
        }
        Ok(self.inner()?.poll(ticket)?.map_or(Looked::Nothing, Looked::Complete))
    }
}

/// What a look found.
enum Looked {
    Complete(Completion),
    /// A phase has ended; there may be more.
    Moved,
    Nothing,
}

impl Direct for SimulatedEndpoint {
    fn claim(&mut self, window: WindowId) -> Result<Reach, FabricError> {
        self.inner()?.claim(window)
    }

    fn check(&mut self) -> Result<(), FabricError> {
        let (kind, number) = (OperationKind::Stream, self.submitted);
        self.turn(Place::Submit(number), kind)?;
        self.submitted += 1;
        Direct::check(self.inner()?)?;
        self.turn(Place::InFlight(number), kind)
    }

    fn wait_until(&mut self, peer: Rank, ready: &dyn Fn() -> bool) -> Result<(), FabricError> {
        let kind = OperationKind::Stream;
        let since = self.scheduler.now();
        loop {
            // A rank that hangs here does so asleep, as far as others can see.
            self.turn(Place::Elsewhere, kind)?;
            self.inner()?.wakes();
            if ready() {
                return Ok(());
            }
            let (waited, timeout) = (self.scheduler.now() - since, self.timeout);
            let inner = self.inner()?;
            inner.check(kind)?;
            if let Err(lost) = inner.check_sender(peer, ready) {
                self.scheduler.changed();
                return Err(lost);
            }
            if waited >= timeout {
                let error = inner.expire_tiles(peer, waited);
                self.scheduler.changed();
                return Err(error);
            }
            inner.sleeps_for_tiles(peer);
            // Stores ring no bell here. Longer and longer naps, so that a wait in vain is over soon.
            self.scheduler.sleep(self.rank, POLL_NAP + waited / 8);
        }
    }
}

impl Fabric for SimulatedEndpoint {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.ranks
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { direct: self.direct, point_to_point: false, core_permits: true, stamps: true }
    }

    fn window(&self, id: WindowId) -> Option<Region> {
        self.inner.as_ref()?.window(id)
    }

    fn submit_stamped(&mut self, operation: Operation<'_>, stamp: u64) -> Result<Ticket, FabricError> {
        let (kind, number) = (operation.kind(), self.submitted);
        self.turn(Place::Submit(number), kind)?;
        self.submitted += 1;
        let ticket = self.submit_to_inner(operation, stamp)?;
        self.turn(Place::InFlight(number), kind)?;
        Ok(ticket)
    }

    fn poll(&mut self, ticket: &Ticket) -> Result<Option<Completion>, FabricError> {
        for last in [false, true] {
            self.turn(Place::Elsewhere, OperationKind::Compute)?;
            let looked = self.look(ticket);
            if matches!(looked, Ok(Looked::Moved) | Err(_)) {
                self.scheduler.changed();
            }
            match looked? {
                Looked::Complete(completion) => return Ok(Some(completion)),
                Looked::Nothing if !last => self.scheduler.sleep(self.rank, POLL_NAP),
                Looked::Moved | Looked::Nothing => {}
            }
        }
        Ok(None)
    }

    fn wait(&mut self, ticket: Ticket) -> Result<Completion, FabricError> {
        let mut since = None;
        loop {
            // A rank that hangs here does so asleep, as far as others can see.
            self.turn(Place::Elsewhere, OperationKind::Compute)?;
            self.inner()?.wakes();
            let looked = self.look(&ticket);
            if matches!(looked, Ok(Looked::Moved) | Err(_)) {
                self.scheduler.changed();
            }
            match looked? {
                Looked::Complete(completion) => return Ok(completion),
                Looked::Moved => continue,
                Looked::Nothing => {}
            }
            let now = self.scheduler.now();
            let waited = now - *since.get_or_insert(now);
            let (timeout, under_way) = (self.timeout, self.scheduler.under_way());
            let inner = self.inner()?;
            let error = if waited >= timeout {
                Some(inner.expire(&ticket, waited))
            } else if under_way {
                None
            } else {
                inner.check_awaited(&ticket).err()
            };
            if let Some(error) = error {
                self.scheduler.changed();
                return Err(error);
            }
            inner.sleeps(&ticket);
            self.scheduler.block(self.rank, timeout - waited);
        }
    }

    fn direct(&mut self) -> Option<&mut dyn Direct> {
        self.direct.then_some(self as &mut dyn Direct)
    }

    fn leave(mut self: Box<Self>) -> Result<(), FabricError> {
        let number = self.submitted;
        self.turn(Place::Submit(number), OperationKind::Leave)?;
        self.scheduler.land_all_of(self.rank);
        let result = self.inner.take().map_or(Ok(()), |inner| inner.leave());
        self.scheduler.changed();
        result
    }
}

impl Drop for SimulatedEndpoint {
    fn drop(&mut self) {
        if let Some(inner) = self.inner.take() {
            self.scheduler.lose_some_of(self.rank);
            drop(inner);
            self.scheduler.changed();
        }
    }
}
