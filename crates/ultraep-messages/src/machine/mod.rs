//! A rank's state machine: operations and messages in, messages out. No IO, no clock (time is an argument), no thread.

mod blame;
mod collective;
mod coordinator;
mod failing;
mod lanes;
mod onesided;
mod point_to_point;
#[cfg(test)]
mod simulated;

use crate::frame::{Frame, Kind};
use blame::Investigation;
use collective::Flight;
use coordinator::Coordinator;
use core::time::Duration;
use failing::Reported;
use lanes::Lane;
use onesided::{Get, OneSided};
use point_to_point::PointToPoint;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;
use ultraep_fabric::backend::{Failure, Hold, Identity, Operands};
use ultraep_fabric::{
    Completion, FabricError, GroupSpec, JoinError, Loss, OperationKind, Region, SIGNALS, Ticket, WindowId,
};
use ultraep_plan::Rank;

pub use lanes::{CHUNK_BYTES, WINDOW_BYTES};

/// Where a window is in its cycle, as this rank sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Closed,
    Opening,
    Open,
    Closing,
}

struct Window {
    region: Region,
    phase: Phase,
    /// Keeps guards out from `Open` to `Close`; peers' puts and gets go through it.
    open: Option<Arc<Hold>>,
}

// Classes of ticket, in the lowest bits of its number.
const TICKET_CLASS_BITS: u32 = 2;
const TICKET_ONE_SIDED: u64 = 0;
const TICKET_SIGNAL: u64 = 1;
const TICKET_COLLECTIVE: u64 = 2;

/// What a wait is for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Awaited {
    Collective(OperationKind),
    Signal,
    OneSided(OperationKind),
}

impl Awaited {
    pub(crate) fn kind(self) -> OperationKind {
        match self {
            Self::Collective(kind) | Self::OneSided(kind) => kind,
            Self::Signal => OperationKind::AwaitSignal,
        }
    }
}

pub(crate) struct Machine {
    rank: Rank,
    ranks: usize,
    operands: Operands,
    identity: Identity,
    /// Set when rank 0 has let this rank in, or not.
    joined: Option<Result<(), JoinError>>,
    windows: Vec<Window>,
    signals: [u64; SIGNALS],
    /// Operations submitted so far.
    submitted: u64,
    /// One-sided operations in the order of submission that have not gone out.
    queue: VecDeque<OneSided>,
    /// Streams of a put or send that have not left its memory, by number of the operation.
    putting: HashMap<u64, usize>,
    gets: Vec<Get>,
    point_to_point: PointToPoint,
    lanes: Vec<Lane>,
    /// Collectives submitted so far.
    sequence: u64,
    /// Collectives that rank 0 has been told of.
    entered: u64,
    flight: Option<Flight>,
    coordinator: Coordinator,
    /// Who has said goodbye or is gone, and how.
    gone: Vec<Option<Loss>>,
    failure: Option<Failure>,
    /// One that was found where no time is known: the next tick reports it.
    found: Option<Failure>,
    reported: Option<Reported>,
    investigation: Option<Investigation>,
    /// What the rank's thread is blocked in.
    activity: OperationKind,
    /// Messages to send, in order.
    out: Vec<(Rank, Vec<u8>)>,
    /// Whether something has come that the rank's thread may wait for.
    changed: bool,
}

impl Machine {
    /// For one rank of a group.
    pub(crate) fn new(spec: &GroupSpec, rank: Rank) -> Result<Self, FabricError> {
        let operands = Operands::new(spec, rank)?;
        let window = |bytes| Window { region: Region::zeroed(bytes), phase: Phase::Closed, open: None };
        let mut machine = Self {
            rank,
            ranks: spec.ranks,
            operands,
            identity: Identity::new(spec, spec.windows_digest()),
            joined: None,
            windows: spec.windows.iter().map(|spec| window(spec.bytes)).collect(),
            signals: [0; SIGNALS],
            submitted: 0,
            queue: VecDeque::new(),
            putting: HashMap::new(),
            gets: Vec::new(),
            point_to_point: PointToPoint::default(),
            lanes: (0..spec.ranks).map(|_| Lane::default()).collect(),
            sequence: 0,
            entered: 0,
            flight: None,
            coordinator: Coordinator::new(spec.ranks),
            gone: vec![None; spec.ranks],
            failure: None,
            found: None,
            reported: None,
            investigation: None,
            activity: OperationKind::Compute,
            out: Vec::new(),
            changed: false,
        };
        machine.greet();
        Ok(machine)
    }

    /// The others.
    fn peers(&self) -> impl Iterator<Item = Rank> + use<> {
        let me = self.rank;
        (0..self.ranks).map(Rank::new).filter(move |&rank| rank != me)
    }

    pub(crate) fn window(&self, id: WindowId) -> Option<Region> {
        self.windows.get(id.index()).map(|window| window.region.clone())
    }

    fn post(&mut self, to: Rank, message: Vec<u8>) {
        self.out.push((to, message));
    }

    fn post_to_all(&mut self, message: &[u8]) {
        for peer in self.peers() {
            self.post(peer, message.to_vec());
        }
    }

    /// Whether there is something for the progress thread to do.
    pub(crate) fn has_out(&self) -> bool {
        !self.out.is_empty() || self.found.is_some()
    }

    /// What there is to send now.
    pub(crate) fn take_out(&mut self) -> Vec<(Rank, Vec<u8>)> {
        core::mem::take(&mut self.out)
    }

    /// Whether the rank's thread has something to look at since the last call.
    pub(crate) fn take_changed(&mut self) -> bool {
        core::mem::take(&mut self.changed)
    }

    /// Moves on everything that can move.
    pub(crate) fn advance(&mut self) {
        if self.failure.is_some() {
            return;
        }
        self.dispatch();
        self.meet();
        self.flow();
        self.enter_when_ready();
        self.complete();
    }

    /// When [`Machine::tick`] must be called at the latest, if nothing else happens.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let reported = self.reported.as_ref().map(|reported| reported.until);
        let asked = self.investigation.as_ref().map(|investigation| investigation.until);
        reported.into_iter().chain(asked).min()
    }

    /// What the passing of time changes.
    pub(crate) fn tick(&mut self, now: Instant) {
        if let Some(failure) = self.found.take() {
            self.fail(failure, now);
        }
        self.conclude(now);
        self.report_unanswered(now);
    }

    /// A message has come.
    pub(crate) fn receive(&mut self, from: Rank, bytes: Vec<u8>, now: Instant) {
        let Some(frame) = Frame::parse(bytes).filter(|_| from.index() < self.ranks && from != self.rank) else {
            return;
        };
        match frame.kind {
            Kind::Hello => self.admit(from, frame.identity()),
            Kind::Welcome => self.welcomed(frame.words[0], frame.identity()),
            Kind::Enter => self.entered_by(from, &frame),
            Kind::Go => self.go(frame.words[0], frame.words[1]),
            Kind::Data => self.data(from, &frame),
            Kind::Part => self.part(from, frame),
            Kind::Sums => self.sums(from, &frame),
            Kind::Put => self.put_by(from, &frame),
            Kind::Get => self.get_by(from, &frame),
            Kind::Got => self.got(&frame),
            Kind::Signal => self.signal_by(from, &frame),
            Kind::Ack => self.lanes[from.index()].acknowledge(frame.words[0], frame.words[1]),
            Kind::Report => self.report_by(frame.failure(), now),
            Kind::Failed => self.failed(frame.failure()),
            Kind::Query => self.query(from, frame.words[0]),
            Kind::Status => self.status(from, &frame, now),
            Kind::Credit => self.credit(from, &frame),
            Kind::Tile => self.tile(from, &frame),
            Kind::Goodbye => self.goodbye_by(from, &frame, now),
        }
        self.advance();
    }

    /// A peer's connection has closed.
    pub(crate) fn closed(&mut self, peer: Rank, now: Instant) {
        if peer.index() < self.ranks && self.gone[peer.index()].is_none() {
            self.departs(peer, Loss::Vanished, true, now);
            self.advance();
        }
    }

    fn greet(&mut self) {
        if self.rank.index() == 0 {
            self.admit(self.rank, Some(self.identity));
        } else {
            let hello = Frame::of_words(Kind::Hello, [0; 4], self.identity.to_words());
            self.post(Rank::new(0), hello);
        }
    }

    /// Whether this rank has been let in. What happens to the group afterwards is for its first operation to say.
    pub(crate) fn joined(&self) -> Result<bool, FabricError> {
        match &self.joined {
            Some(Ok(())) => Ok(true),
            Some(Err(reason)) => Err(FabricError::Join { rank: self.rank, reason: reason.clone() }),
            None => self.check(OperationKind::Join).map(|()| false),
        }
    }

    fn welcomed(&mut self, refused: u64, group: Option<Identity>) {
        let admitted = group.map(|group| group.admit(&self.identity));
        let admitted = admitted.unwrap_or(Err(JoinError::Taken));
        self.joined = Some(if refused == 0 { Ok(()) } else { admitted.and(Err(JoinError::Taken)) });
        self.changed = true;
    }

    /// The group's failure, if any, as the result of a call.
    pub(crate) fn check(&self, kind: OperationKind) -> Result<(), FabricError> {
        self.failure.as_ref().map_or(Ok(()), |failure| Err(failure.error(kind)))
    }

    /// A ticket for the operation submitted last.
    fn ticket(&self, class: u64, words: [u64; 3]) -> Ticket {
        Ticket::new(self.submitted << TICKET_CLASS_BITS | class, words)
    }

    /// What a ticket stands for, if it is complete.
    pub(crate) fn look(&mut self, ticket: &Ticket, now: Instant) -> Result<Option<Completion>, FabricError> {
        let [first, second, third] = ticket.words();
        self.check(self.awaited(ticket).kind())?;
        match ticket.id() & ((1 << TICKET_CLASS_BITS) - 1) {
            TICKET_ONE_SIDED => {
                let receives = [OperationKind::Get, OperationKind::Recv].map(OperationKind::code).contains(&first);
                let (sent, received) = if receives { (0, second) } else { (second, 0) };
                let done = Completion { stamp: third, bytes_sent: sent, bytes_received: received };
                Ok((!self.is_pending(ticket.id() >> TICKET_CLASS_BITS)).then_some(done))
            }
            TICKET_SIGNAL => {
                let signal = usize::try_from(first).unwrap_or(usize::MAX);
                self.operands.signal(OperationKind::AwaitSignal, signal)?;
                if self.signals[signal] >= second {
                    return Ok(Some(Completion { stamp: third, bytes_sent: 0, bytes_received: 0 }));
                }
                self.check_signallers(now);
                self.check(OperationKind::AwaitSignal).map(|()| None)
            }
            _ => match &mut self.flight {
                Some(flight) if flight.sequence() == first => {
                    let done = flight.done.take();
                    if done.is_some() {
                        self.flight = None;
                    }
                    Ok(done)
                }
                _ => Err(FabricError::UnknownTicket { id: ticket.id(), rank: self.rank }),
            },
        }
    }

    pub(crate) fn awaited(&self, ticket: &Ticket) -> Awaited {
        let [first, second, _] = ticket.words();
        match ticket.id() & ((1 << TICKET_CLASS_BITS) - 1) {
            TICKET_COLLECTIVE => Awaited::Collective(OperationKind::from_code(second)),
            TICKET_SIGNAL => Awaited::Signal,
            _ => Awaited::OneSided(OperationKind::from_code(first)),
        }
    }

    /// The rank's thread is blocked in this, or computes.
    pub(crate) fn set_activity(&mut self, activity: OperationKind) {
        self.activity = activity;
    }

    /// What keeps this rank from leaving, if anything does: a collective, a send or a receive.
    pub(crate) fn in_flight(&self) -> Option<OperationKind> {
        self.flight.as_ref().map(Flight::kind).or_else(|| self.point_to_point.in_flight())
    }

    /// Whether everything that was submitted has left: this rank may go.
    pub(crate) fn is_drained(&self) -> bool {
        self.queue.is_empty() && self.gets.is_empty() && self.lanes.iter().all(Lane::is_empty)
    }

    /// Says goodbye to all: nothing else is sent after this.
    pub(crate) fn depart(&mut self, loss: Loss, unfinished: bool) {
        let failure = Failure::Lost { rank: self.rank, loss };
        let goodbye = Frame::of_words(Kind::Goodbye, [unfinished.into(), 0, 0, 0], failure.to_words());
        self.post_to_all(&goodbye);
    }

    /// The progress thread has ended: nothing comes any more.
    pub(crate) fn stopped(&mut self) {
        if self.failure.is_none() {
            self.failure = Some(Failure::Lost { rank: self.rank, loss: Loss::Vanished });
        }
        self.changed = true;
    }

    /// How long an answer to a question may take.
    pub(crate) const ANSWER_WITHIN: Duration = Duration::from_secs(1);
}
