//! A rank's endpoint over the shared segment: the fabric of threads and of processes alike.

use super::collective::InFlight;
use super::patience::{NAP, Patience};
use super::permits::Asked;
use super::segment::Segment;
use super::word::FAILED;
use crate::attach::Watch;
use crate::backend::{Hold, Operands};
use crate::failure::Failure;
use crate::operation::OperationKind;
use crate::stream::Direct;
use crate::sync::{AtomicU32, Ordering};
use crate::{Capabilities, Completion, Fabric, FabricError, GroupSpec, Loss, Operation, Region, Ticket, WindowId};
use core::time::Duration;
use std::sync::Arc;
use ultraep_plan::Rank;

/// The same for a waiter for a signal that has a collective to move on meanwhile: it sleeps on one word, not on two.
const NAP_BETWEEN: Duration = Duration::from_millis(1);

/// Looks before a waiter goes to sleep, when every rank can have a core of its own.
const SPINS: u32 = 2_000;
/// After so many of them it yields its core.
const SPINS_PER_YIELD: u32 = 100;

// Classes of ticket, in the lowest bits of its number.
const TICKET_CLASS_BITS: u32 = 2;
const TICKET_DONE: u64 = 0;
const TICKET_SIGNAL: u64 = 1;
const TICKET_COLLECTIVE: u64 = 2;

/// Where a window is in its cycle, as this rank sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Closed,
    Opening,
    Open,
    Closing,
    /// Given to the tile engine for good: neither guards nor puts and gets are allowed any more.
    Claimed,
}

pub(super) struct Window {
    pub(super) region: Region,
    pub(super) phase: Phase,
    /// Keeps guards out from `Open` to `Close`, or for good once claimed.
    pub(super) open: Option<Hold>,
    /// Rights of this rank to touch it that live.
    pub(super) reaches: Arc<AtomicU32>,
}

/// One rank of a group over a shared segment.
pub(crate) struct Endpoint {
    pub(super) segment: Arc<Segment>,
    pub(super) rank: Rank,
    pub(super) operands: Operands,
    pub(super) windows: Vec<Window>,
    /// Phases of collectives that this rank has entered.
    pub(super) entered: u64,
    /// Phases that this rank has seen end, modulo 2^31 as in the generation word.
    pub(super) seen: u32,
    /// Collectives that this rank has submitted.
    pub(super) sequence: u64,
    pub(super) collective: Option<InFlight>,
    tickets: u64,
    pub(super) timeout: Duration,
    /// Whether there are core permits at all, and whether this rank holds one.
    pub(super) limited: bool,
    computing: bool,
    pub(super) spins: u32,
    /// The rank's process is gone: nothing it would have done on its way out happens.
    pub(super) vanished: bool,
    /// The watch over other ranks, where no supervisor has it. It ends after the rank's status says that it has gone.
    watch: Option<Watch>,
}

/// What a wait is for.
#[derive(Clone, Copy)]
pub(super) enum Awaited {
    Phase(OperationKind),
    Signal { signal: usize, at_least: u64 },
}

impl Awaited {
    pub(super) fn kind(self) -> OperationKind {
        match self {
            Self::Phase(kind) => kind,
            Self::Signal { .. } => OperationKind::AwaitSignal,
        }
    }
}

impl Endpoint {
    /// Takes the place of `rank`, which the caller has made sure is free and marked as running.
    ///
    /// # Errors
    /// As for [`Operands::new`]; not with the specification that the segment was laid out for.
    pub(crate) fn new(segment: Arc<Segment>, rank: Rank, spec: &GroupSpec) -> Result<Self, FabricError> {
        let operands = Operands::new(spec, rank)?;
        let windows = (0..spec.windows.len())
            .filter_map(|index| segment.window(WindowId::new(index), rank))
            .map(|(start, bytes)| {
                // SAFETY: the part is mapped as long as the segment lives. Peers touch it in epochs and collectives only,
                // through the fabric's copies; this endpoint is the only one of `rank`, so that there is one region and
                // one state word for the part.
                let region = unsafe { Region::adopt(start, bytes, Arc::clone(&segment) as _) };
                Window { region, phase: Phase::Closed, open: None, reaches: Arc::default() }
            })
            .collect();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self {
            rank,
            operands,
            windows,
            entered: 0,
            seen: 0,
            sequence: 0,
            collective: None,
            tickets: 0,
            timeout: spec.timeout,
            limited: spec.permits().is_some(),
            computing: false,
            spins: if spec.ranks <= cores && spec.permits().is_none() { SPINS } else { 0 },
            vanished: false,
            watch: None,
            segment,
        })
    }

    /// With a watch over other ranks for as long as the endpoint lives.
    pub(crate) fn watched_by(mut self, watch: Watch) -> Self {
        self.watch = Some(watch);
        self
    }

    /// Waits for a core permit: a rank's main starts after this.
    pub(crate) fn start(&mut self) -> Result<(), FabricError> {
        self.take_permit(OperationKind::CorePermit)
    }

    /// The group's failure, if any, as the result of a call.
    pub(super) fn check_group(&mut self, kind: OperationKind) -> Result<(), FabricError> {
        if !self.segment.has_failed() {
            return Ok(());
        }
        Err(self.group_error(kind))
    }

    /// The group has failed: what to return from `kind`. Gives back what the collective in flight holds, except windows
    /// that peers may still be writing.
    pub(super) fn group_error(&mut self, kind: OperationKind) -> FabricError {
        self.collective = None;
        let unknown = FabricError::PeerLost { rank: self.rank, operation: kind, reason: Loss::Dropped };
        self.segment.failure_error(kind).unwrap_or(unknown)
    }

    /// Ends the group for this reason (or the one that came first), and returns it.
    pub(super) fn fail(&mut self, kind: OperationKind, failure: &Failure) -> FabricError {
        self.segment.fail(self.rank, failure);
        self.group_error(kind)
    }

    /// A ticket for something that is complete already.
    pub(super) fn done(&mut self, completion: Completion) -> Ticket {
        let Completion { stamp, bytes_sent, bytes_received } = completion;
        self.ticket(TICKET_DONE, [stamp, bytes_sent, bytes_received])
    }

    /// A ticket for a signal to come.
    pub(super) fn signal_ticket(&mut self, signal: usize, at_least: u64, stamp: u64) -> Ticket {
        self.ticket(TICKET_SIGNAL, [signal as u64, at_least, stamp])
    }

    /// A ticket for the collective in flight.
    pub(super) fn collective_ticket(&mut self, sequence: u64) -> Ticket {
        self.ticket(TICKET_COLLECTIVE, [sequence, 0, 0])
    }

    fn ticket(&mut self, class: u64, words: [u64; 3]) -> Ticket {
        self.tickets += 1;
        Ticket::new(self.tickets << TICKET_CLASS_BITS | class, words)
    }

    /// Moves on what this ticket stands for.
    fn look(&mut self, ticket: &Ticket) -> Result<Option<Completion>, FabricError> {
        let [first, second, third] = ticket.words();
        match ticket.id() & ((1 << TICKET_CLASS_BITS) - 1) {
            TICKET_DONE => Ok(Some(Completion { stamp: first, bytes_sent: second, bytes_received: third })),
            TICKET_SIGNAL => {
                self.check_group(OperationKind::AwaitSignal)?;
                // Peers may wait for our part of a collective before they can signal.
                self.progress()?;
                let signal = usize::try_from(first).unwrap_or(usize::MAX);
                self.operands.signal(OperationKind::AwaitSignal, signal)?;
                let reached = self.signal_value(signal) >= second;
                Ok(reached.then_some(Completion { stamp: third, bytes_sent: 0, bytes_received: 0 }))
            }
            _ if self.collective.as_ref().is_some_and(|flight| flight.sequence() == first) => self.advance(),
            _ => {
                self.check_group(OperationKind::Compute)?;
                Err(FabricError::UnknownTicket { id: ticket.id(), rank: self.rank })
            }
        }
    }

    pub(super) fn awaited(&self, ticket: &Ticket) -> Awaited {
        match &self.collective {
            Some(flight) if ticket.id() & TICKET_COLLECTIVE != 0 => Awaited::Phase(flight.kind()),
            _ => Awaited::Signal { signal: ticket.words()[0] as usize, at_least: ticket.words()[1] },
        }
    }

    /// Gives the permit back, sleeps until there is something to do, and has the permit again.
    fn block(&mut self, awaited: Awaited, patience: &mut Patience) -> Result<(), FabricError> {
        self.give_permit_back();
        let activity = &self.segment.control(self.rank).activity;
        activity.store(awaited.kind() as u32, Ordering::Relaxed);
        let slept = self.sleep(awaited, patience);
        self.segment.control(self.rank).activity.store(OperationKind::Compute as u32, Ordering::Relaxed);
        slept?;
        self.take_permit(awaited.kind())
    }

    fn sleep(&mut self, awaited: Awaited, patience: &mut Patience) -> Result<(), FabricError> {
        loop {
            let left = patience.left();
            let nap = match awaited {
                Awaited::Signal { .. } if self.collective.is_some() => left.min(NAP_BETWEEN),
                _ => left.min(NAP),
            };
            let moved = match awaited {
                Awaited::Phase(_) => self.sleep_for_phase(nap),
                Awaited::Signal { signal, at_least } => self.sleep_for_signal(signal, at_least, nap)?,
            };
            if self.segment.has_failed() {
                return Err(self.group_error(awaited.kind()));
            }
            if moved || nap == NAP_BETWEEN {
                return Ok(());
            }
            if left.is_zero() {
                let failure = self.timed_out(awaited, patience.waited());
                return Err(self.fail(awaited.kind(), &failure));
            }
        }
    }

    /// One sleep for the end of the current phase; whether it has ended.
    fn sleep_for_phase(&self, nap: Duration) -> bool {
        let turnstile = &self.segment.header().turnstile.0;
        let ended = |word: u32| word & FAILED != 0 || word >> 1 != self.seen;
        let word = turnstile.look();
        if !ended(word) {
            turnstile.sleep(word, nap);
        }
        ended(turnstile.look())
    }

    /// One sleep for a signal to this rank; whether it has come.
    fn sleep_for_signal(&mut self, signal: usize, at_least: u64, nap: Duration) -> Result<bool, FabricError> {
        self.operands.signal(OperationKind::AwaitSignal, signal)?;
        let reached = || self.signal_value(signal) >= at_least;
        if self.segment.control(self.rank).doorbell.sleep_unless(reached, nap) {
            return Ok(true);
        }
        self.check_signallers(signal, at_least)?;
        Ok(self.signal_value(signal) >= at_least)
    }

    pub(super) fn give_permit_back(&mut self) {
        if core::mem::take(&mut self.computing) {
            self.segment.control(self.rank).computing.store(0, Ordering::Relaxed);
            self.segment.header().permits.0.give_back();
        }
    }

    pub(super) fn take_permit(&mut self, kind: OperationKind) -> Result<(), FabricError> {
        if !self.limited || self.computing {
            return Ok(());
        }
        let segment = Arc::clone(&self.segment);
        let permits = &segment.header().permits.0;
        let control = segment.control(self.rank);
        control.activity.store(OperationKind::CorePermit as u32, Ordering::Relaxed);
        let (mut patience, mut turn) = (None, permits.taken());
        let result = loop {
            match permits.ask() {
                Asked::Granted => {
                    self.computing = true;
                    control.computing.store(1, Ordering::Relaxed);
                    break Ok(());
                }
                Asked::GroupFailed => break Err(self.group_error(kind)),
                Asked::NoneFree(word) => {
                    let now = permits.taken();
                    if now != turn {
                        // Others take turns: the queue moves.
                        (turn, patience) = (now, None);
                    }
                    let patience = patience.get_or_insert_with(|| Patience::new(self.timeout));
                    let left = patience.left();
                    if left.is_zero() {
                        let holds = |rank: &Rank| segment.control(*rank).computing.load(Ordering::Relaxed) != 0;
                        let missing = segment.ranks().filter(holds).collect();
                        let failure = segment.late(missing, OperationKind::CorePermit, patience.waited());
                        break Err(self.fail(kind, &failure));
                    }
                    permits.sleep(word, NAP.min(left));
                }
            }
        };
        control.activity.store(OperationKind::Compute as u32, Ordering::Relaxed);
        result
    }
}

impl Fabric for Endpoint {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.segment.layout.ranks
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { direct: true, point_to_point: false, core_permits: true, stamps: true }
    }

    fn window(&self, id: WindowId) -> Option<Region> {
        self.windows.get(id.index()).map(|window| window.region.clone())
    }

    fn submit_stamped(&mut self, operation: Operation<'_>, stamp: u64) -> Result<Ticket, FabricError> {
        let kind = operation.kind();
        self.check_group(kind)?;
        match operation {
            Operation::Put { from, to } => self.put(&from, to, stamp),
            Operation::Get { from, to } => self.get(from, &to, stamp),
            Operation::Signal { rank, signal, add } => self.signal(rank, signal, add, stamp),
            Operation::AwaitSignal { signal, at_least } => self.await_signal(signal, at_least, stamp),
            Operation::Send { .. } | Operation::Recv { .. } => {
                Err(FabricError::NotOffered { operation: kind, rank: self.rank })
            }
            collective => self.submit_collective(collective, stamp),
        }
    }

    fn poll(&mut self, ticket: &Ticket) -> Result<Option<Completion>, FabricError> {
        self.look(ticket)
    }

    fn wait(&mut self, ticket: Ticket) -> Result<Completion, FabricError> {
        let mut spins = self.spins;
        let mut patience = None;
        loop {
            if let Some(completion) = self.look(&ticket)? {
                return Ok(completion);
            }
            if spins > 0 {
                spins -= 1;
                if spins.is_multiple_of(SPINS_PER_YIELD) {
                    // If the scheduler has put two ranks on one core this lets the other on, and stays visible as two ranks that want
                    // to run, which an idle core then pulls apart; asleep and woken in turn they would stay together.
                    std::thread::yield_now();
                } else {
                    core::hint::spin_loop();
                }
                continue;
            }
            let patience = patience.get_or_insert_with(|| Patience::new(self.timeout));
            self.block(self.awaited(&ticket), patience)?;
        }
    }

    fn direct(&mut self) -> Option<&mut dyn Direct> {
        Some(self)
    }

    fn leave(mut self: Box<Self>) -> Result<(), FabricError> {
        self.check_group(OperationKind::Leave)?;
        if let Some(flight) = &self.collective {
            let (rank, in_flight) = (self.rank, flight.kind());
            return Err(FabricError::InFlight { operation: OperationKind::Leave, rank, in_flight });
        }
        self.segment.depart(self.rank, Loss::Left, false);
        Ok(())
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        if self.vanished {
            return;
        }
        // After `leave` the rank has departed already and this changes nothing.
        let panicking = std::thread::panicking();
        let loss = if panicking { Loss::Panicked } else { Loss::Dropped };
        self.segment.depart(self.rank, loss, panicking || self.collective.is_some());
        self.give_permit_back();
    }
}
