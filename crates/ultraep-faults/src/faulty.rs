//! A fabric whose rank is struck at one operation, and which counts operations.

use std::panic::resume_unwind;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rustix::process::{Signal, getpid, kill_process};
use ultraep_fabric::simulated::{Fault, FaultKind, Moment};
use ultraep_fabric::stream::{Direct, Reach};
use ultraep_fabric::{
    Capabilities, Completion, Fabric, FabricError, Loss, Operation, OperationKind, Region, Ticket, WindowId,
};
use ultraep_plan::Rank;

/// The ranks of a group that share a process: what they have done, and how many have ended.
#[derive(Debug, Default)]
pub struct Bystanders {
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct State {
    ended: usize,
    operations: Vec<Vec<OperationKind>>,
}

impl Bystanders {
    /// Of a group of `ranks`.
    pub fn new(ranks: usize) -> Self {
        Self { state: Mutex::new(State { ended: 0, operations: vec![Vec::new(); ranks] }), ended: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Counters: whole even if a rank panicked with the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A rank's main is over.
    pub fn end(&self) {
        self.lock().ended += 1;
        self.ended.notify_all();
    }

    /// Sleeps until so many mains are over.
    fn wait_for(&self, ended: usize) {
        let state = self.lock();
        let done = self.ended.wait_while(state, |state| state.ended < ended);
        drop(done.unwrap_or_else(PoisonError::into_inner));
    }

    /// Operations of each rank, `[ranks][operations]`.
    pub fn operations(&self) -> Vec<Vec<OperationKind>> {
        self.lock().operations.clone()
    }
}

/// Wraps a rank's endpoint and strikes the rank at the operation that its fault names (never at [`Moment::Turn`]).
///
/// On threads a rank that hangs sleeps until all others have ended, and none can be killed. In a process of its own it
/// hangs by stopping itself (`SIGSTOP`) and is killed by itself (`SIGKILL`), at that very operation.
pub struct FaultyEndpoint {
    inner: Box<dyn Fabric>,
    fault: Option<Fault>,
    own_process: bool,
    bystanders: Arc<Bystanders>,
    submitted: u64,
    failed: Option<FabricError>,
}

impl FaultyEndpoint {
    /// Strikes `inner`'s rank if `fault` is for it.
    pub fn new(inner: Box<dyn Fabric>, fault: Option<Fault>, own_process: bool, bystanders: Arc<Bystanders>) -> Self {
        let fault = fault.filter(|fault| fault.rank == inner.rank());
        Self { inner, fault, own_process, bystanders, submitted: 0, failed: None }
    }

    fn strike(&mut self, now: Moment, operation: OperationKind) -> Result<(), FabricError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let Some(fault) = self.fault.take_if(|fault| fault.moment == now) else { return Ok(()) };
        let signal = |signal| {
            // It cannot fail for the own process.
            let _ = kill_process(getpid(), signal);
        };
        match fault.kind {
            FaultKind::Panics => resume_unwind(Box::new("a panic on purpose")),
            FaultKind::Killed if self.own_process => signal(Signal::KILL),
            FaultKind::Hangs if self.own_process => signal(Signal::STOP),
            FaultKind::Hangs => self.bystanders.wait_for(self.inner.ranks() - 1),
            FaultKind::Stalls(time) => {
                std::thread::sleep(time);
                return Ok(());
            }
            _ => {}
        }
        let error = FabricError::PeerLost { rank: self.inner.rank(), operation, reason: Loss::Failed };
        self.failed = Some(error.clone());
        Err(error)
    }

    fn note(&mut self, kind: OperationKind) {
        let rank = self.inner.rank().index();
        self.bystanders.lock().operations[rank].push(kind);
    }
}

impl Direct for FaultyEndpoint {
    fn claim(&mut self, window: WindowId) -> Result<Reach, FabricError> {
        let rank = self.inner.rank();
        self.inner.direct().ok_or(FabricError::NoDirectAccess { rank })?.claim(window)
    }

    fn check(&mut self) -> Result<(), FabricError> {
        let (kind, number, rank) = (OperationKind::Stream, self.submitted, self.inner.rank());
        self.strike(Moment::Before(number), kind)?;
        self.note(kind);
        self.submitted += 1;
        self.inner.direct().ok_or(FabricError::NoDirectAccess { rank })?.check()?;
        self.strike(Moment::InFlight(number), kind)
    }

    fn wait_until(&mut self, peer: Rank, ready: &dyn Fn() -> bool) -> Result<(), FabricError> {
        let rank = self.inner.rank();
        self.inner.direct().ok_or(FabricError::NoDirectAccess { rank })?.wait_until(peer, ready)
    }
}

impl Fabric for FaultyEndpoint {
    fn rank(&self) -> Rank {
        self.inner.rank()
    }

    fn ranks(&self) -> usize {
        self.inner.ranks()
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    fn window(&self, id: WindowId) -> Option<Region> {
        self.inner.window(id)
    }

    fn submit_stamped(&mut self, operation: Operation<'_>, stamp: u64) -> Result<Ticket, FabricError> {
        let (kind, number) = (operation.kind(), self.submitted);
        self.strike(Moment::Before(number), kind)?;
        self.note(kind);
        self.submitted += 1;
        let ticket = self.inner.submit_stamped(operation, stamp)?;
        self.strike(Moment::InFlight(number), kind)?;
        Ok(ticket)
    }

    fn poll(&mut self, ticket: &Ticket) -> Result<Option<Completion>, FabricError> {
        self.inner.poll(ticket)
    }

    fn wait(&mut self, ticket: Ticket) -> Result<Completion, FabricError> {
        self.inner.wait(ticket)
    }

    fn direct(&mut self) -> Option<&mut dyn Direct> {
        self.inner.direct().is_some().then_some(self as &mut dyn Direct)
    }

    fn leave(mut self: Box<Self>) -> Result<(), FabricError> {
        self.strike(Moment::Before(self.submitted), OperationKind::Leave)?;
        self.note(OperationKind::Leave);
        self.inner.leave()
    }
}
