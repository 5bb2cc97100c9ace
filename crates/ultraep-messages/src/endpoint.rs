//! One rank's endpoint: hands operations to the machine, and waits.

use crate::machine::{Awaited, Machine};
use crate::progress::{self, Shared, State};
use crate::transport::{Transport, Waker};
use core::time::Duration;
use std::sync::{Arc, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::Instant;
use ultraep_fabric::{
    Capabilities, Completion, Fabric, FabricError, GroupSpec, Loss, Operation, OperationKind, Region, Ticket, WindowId,
};
use ultraep_plan::Rank;

/// Longest sleep before a waiter looks around again, whatever happens.
const NAP: Duration = Duration::from_millis(100);

/// One rank of a group that exchanges messages.
pub struct MessageFabric {
    shared: Arc<Shared>,
    waker: Waker,
    progress: Option<JoinHandle<()>>,
    rank: Rank,
    ranks: usize,
    timeout: Duration,
    departed: bool,
}

impl MessageFabric {
    /// Joins the group whose ranks `transport` connects. Returns when all have come, which may take as long as `within`: starting a
    /// job takes longer than any later wait should.
    ///
    /// # Errors
    /// [`FabricError::Spec`]; [`FabricError::Join`] when this rank's specification or processor differs from rank 0's;
    /// [`FabricError::PeerLost`] when another's does; [`FabricError::Timeout`] of [`OperationKind::Join`], which names who has not come.
    pub fn start(
        spec: &GroupSpec,
        transport: impl Transport,
        within: Duration,
    ) -> Result<Box<dyn Fabric>, FabricError> {
        let (rank, ranks) = (transport.rank(), transport.ranks());
        if ranks != spec.ranks {
            return Err(FabricError::Spec { what: "ranks, with this transport", asked: spec.ranks, limit: ranks });
        }
        let shared = Arc::new(Shared::new(Machine::new(spec, rank)?));
        let waker = transport.waker();
        let thread = thread::Builder::new().name(format!("messages of rank {rank}"));
        let of_thread = Arc::clone(&shared);
        let progress = thread.spawn(move || progress::run(&of_thread, transport));
        let progress = Some(progress.map_err(|error| FabricError::os("spawn a thread", error))?);
        let timeout = spec.timeout;
        let fabric = Self { shared, waker, progress, rank, ranks, timeout, departed: false };
        fabric.join(within)?;
        Ok(Box::new(fabric))
    }

    fn join(&self, within: Duration) -> Result<(), FabricError> {
        let since = Instant::now();
        // Rank 0 knows who is missing: the others give it the time to say so.
        let patience = within + if self.rank.index() == 0 { Duration::ZERO } else { 2 * Machine::ANSWER_WITHIN };
        let mut state = self.shared.state();
        while !state.machine.joined()? {
            if since.elapsed() >= patience {
                state.machine.nobody_came(since.elapsed(), Instant::now());
                (self.waker)();
            }
            state = self.shared.sleep(state, NAP);
        }
        Ok(())
    }

    /// Does something with the machine, and has its messages sent.
    fn with<T>(&self, act: impl FnOnce(&mut Machine) -> T) -> T {
        let mut state = self.shared.state();
        let result = act(&mut state.machine);
        let wake = state.machine.has_out();
        drop(state);
        if wake {
            (self.waker)();
        }
        result
    }

    /// Sleeps until `ready` gives something; after the timeout it asks who is missing, which ends the group.
    fn sleep_until<T>(
        &self,
        awaited: Awaited,
        mut ready: impl FnMut(&mut Machine, Instant) -> Result<Option<T>, FabricError>,
    ) -> Result<T, FabricError> {
        let since = Instant::now();
        let mut state = self.shared.state();
        loop {
            let looked = ready(&mut state.machine, Instant::now());
            if let Some(done) = looked.transpose() {
                return self.awake(state, done);
            }
            state.machine.set_activity(awaited.kind());
            let waited = since.elapsed();
            if waited >= self.timeout {
                state.machine.expire(awaited, waited, Instant::now());
                (self.waker)();
            }
            let left = self.timeout.saturating_sub(waited).max(Duration::from_millis(10));
            state = self.shared.sleep(state, left.min(NAP));
        }
    }

    fn awake<T>(&self, mut state: MutexGuard<'_, State>, result: Result<T, FabricError>) -> Result<T, FabricError> {
        state.machine.set_activity(OperationKind::Compute);
        state.machine.forget_expiry();
        let wake = state.machine.has_out();
        drop(state);
        // A look may have found a failure to spread.
        if wake {
            (self.waker)();
        }
        result
    }

    /// Says goodbye, and ends the progress thread.
    fn depart(&mut self, loss: Loss, unfinished: bool) {
        if core::mem::replace(&mut self.departed, true) {
            return;
        }
        let mut state = self.shared.state();
        state.machine.depart(loss, unfinished);
        state.departing = true;
        drop(state);
        (self.waker)();
        if let Some(thread) = self.progress.take() {
            // It does not panic; if it did, it has said so.
            let _ = thread.join();
        }
    }
}

impl Fabric for MessageFabric {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.ranks
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { direct: false, point_to_point: true, core_permits: false, stamps: true }
    }

    fn window(&self, id: WindowId) -> Option<Region> {
        self.shared.state().machine.window(id)
    }

    fn submit_stamped(&mut self, operation: Operation<'_>, stamp: u64) -> Result<Ticket, FabricError> {
        let kind = operation.kind();
        self.with(|machine| {
            machine.check(kind)?;
            match operation {
                Operation::Put { from, to } => machine.put(&from, to, stamp),
                Operation::Get { from, to } => machine.get(from, &to, stamp),
                Operation::Signal { rank, signal, add } => machine.signal(rank, signal, add, stamp),
                Operation::AwaitSignal { signal, at_least } => machine.await_signal(signal, at_least, stamp),
                Operation::Send { to, key, from } => machine.send(to, key, &from, stamp),
                Operation::Recv { from, key, to } => machine.recv(from, key, &to, stamp),
                collective => machine.collective(collective, stamp),
            }
        })
    }

    fn poll(&mut self, ticket: &Ticket) -> Result<Option<Completion>, FabricError> {
        // A look may find a failure to spread.
        self.with(|machine| machine.look(ticket, Instant::now()))
    }

    fn wait(&mut self, ticket: Ticket) -> Result<Completion, FabricError> {
        let awaited = self.shared.state().machine.awaited(&ticket);
        self.sleep_until(awaited, |machine, now| machine.look(&ticket, now))
    }

    fn leave(mut self: Box<Self>) -> Result<(), FabricError> {
        let (operation, rank) = (OperationKind::Leave, self.rank);
        {
            let state = self.shared.state();
            state.machine.check(operation)?;
            if let Some(in_flight) = state.machine.in_flight() {
                return Err(FabricError::InFlight { operation, rank, in_flight });
            }
        }
        // What was put and signalled must be on its way: nothing is sent after the goodbye.
        self.sleep_until(Awaited::OneSided(operation), |machine, _| {
            machine.check(operation)?;
            Ok(machine.is_drained().then_some(()))
        })?;
        self.depart(Loss::Left, false);
        Ok(())
    }
}

impl Drop for MessageFabric {
    fn drop(&mut self) {
        let panicking = thread::panicking();
        let unfinished = panicking || self.shared.state().machine.in_flight().is_some();
        self.depart(if panicking { Loss::Panicked } else { Loss::Dropped }, unfinished);
    }
}
