//! Send and receive: a receive that is posted is a credit at the sender, and what it allows goes out like any other data.

use super::collective::fits;
use super::lanes::{Item, Owner, Stream};
use super::onesided::{Local, copy};
use super::{Machine, TICKET_ONE_SIDED};
use crate::frame::{Frame, Kind};
use std::sync::Arc;
use ultraep_fabric::backend::{Failure, Hold, Use};
use ultraep_fabric::{FabricError, OperationKind, Span, Ticket};
use ultraep_plan::Rank;

/// A send without a credit.
struct Send {
    number: u64,
    to: Rank,
    key: u64,
    from: Local,
}

/// A receive that is not complete.
struct Recv {
    number: u64,
    from: Rank,
    to: Local,
    arrived: usize,
}

/// A receive that another rank has posted for one of this rank's sends.
struct Credit {
    from: Rank,
    key: u64,
    number: u64,
    bytes: u64,
}

#[derive(Default)]
pub(super) struct PointToPoint {
    sends: Vec<Send>,
    recvs: Vec<Recv>,
    /// In the order in which they came; none of them meets one of the `sends`.
    credits: Vec<Credit>,
}

impl PointToPoint {
    pub(super) fn is_pending(&self, number: u64) -> bool {
        self.sends.iter().any(|send| send.number == number) || self.recvs.iter().any(|recv| recv.number == number)
    }

    pub(super) fn in_flight(&self) -> Option<OperationKind> {
        let send = self.sends.first().map(|_| OperationKind::Send);
        send.or_else(|| self.recvs.first().map(|_| OperationKind::Recv))
    }

    /// Whether a rank owes this one something.
    pub(super) fn needs(&self, rank: Rank) -> bool {
        self.sends.iter().any(|send| send.to == rank) || self.recvs.iter().any(|recv| recv.from == rank)
    }

    /// What uses the memory of an open window.
    pub(super) fn using(&self, window: &Arc<Hold>) -> Option<OperationKind> {
        let send = self.sends.iter().find(|send| Arc::ptr_eq(&send.from.hold, window)).map(|_| OperationKind::Send);
        let recv = || self.recvs.iter().find(|recv| Arc::ptr_eq(&recv.to.hold, window)).map(|_| OperationKind::Recv);
        send.or_else(recv)
    }
}

impl Machine {
    pub(crate) fn send(&mut self, to: Rank, key: u64, from: &Span, stamp: u64) -> Result<Ticket, FabricError> {
        let kind = OperationKind::Send;
        self.operands.rank(kind, to)?;
        let from = self.local(kind, from, Use::Read)?;
        self.expect(to);
        self.submitted += 1;
        let bytes = if to == self.rank { 0 } else { from.bytes as u64 };
        let ticket = self.ticket(TICKET_ONE_SIDED, [kind.code(), bytes, stamp]);
        self.point_to_point.sends.push(Send { number: self.submitted, to, key, from });
        self.advance();
        Ok(ticket)
    }

    pub(crate) fn recv(&mut self, from: Rank, key: u64, to: &Span, stamp: u64) -> Result<Ticket, FabricError> {
        let kind = OperationKind::Recv;
        self.operands.rank(kind, from)?;
        let to = self.local(kind, to, Use::Write)?;
        self.expect(from);
        self.submitted += 1;
        let (number, bytes) = (self.submitted, to.bytes as u64);
        self.point_to_point.recvs.push(Recv { number, from, to, arrived: 0 });
        if from == self.rank {
            self.point_to_point.credits.push(Credit { from, key, number, bytes });
        } else {
            self.post(from, Frame::bytes(Kind::Credit, [key, number, bytes, 0]));
        }
        let bytes = if from == self.rank { 0 } else { bytes };
        let ticket = self.ticket(TICKET_ONE_SIDED, [kind.code(), bytes, stamp]);
        self.advance();
        Ok(ticket)
    }

    /// The rank is needed: that it has gone ends the group.
    pub(super) fn expect(&mut self, rank: Rank) {
        if let Some(loss) = self.gone[rank.index()] {
            self.found = Some(Failure::Lost { rank, loss });
        }
    }

    pub(super) fn credit(&mut self, from: Rank, frame: &Frame) {
        let [key, number, bytes, _] = frame.words;
        self.point_to_point.credits.push(Credit { from, key, number, bytes });
    }

    /// Starts every send that has a credit, the first of each with the first.
    pub(super) fn meet(&mut self) {
        let mut index = 0;
        while let Some(credit) = self.point_to_point.credits.get(index) {
            let meets = |send: &Send| send.to == credit.from && send.key == credit.key;
            let Some(at) = self.point_to_point.sends.iter().position(meets) else {
                index += 1;
                continue;
            };
            let (credit, send) = (self.point_to_point.credits.remove(index), self.point_to_point.sends.remove(at));
            let sent_bytes = send.from.bytes as u64;
            if credit.bytes != sent_bytes {
                let (from, to, expected_bytes) = (self.rank, credit.from, credit.bytes);
                self.found = Some(Failure::Sizes { from, to, sent_bytes, expected_bytes });
                // It ends with the failure, never well.
                self.putting.insert(send.number, 1);
                return;
            }
            self.start_send(send, &credit);
        }
    }

    fn start_send(&mut self, send: Send, credit: &Credit) {
        let Local { hold, offset, bytes } = send.from;
        if send.to == self.rank {
            let recvs = &mut self.point_to_point.recvs;
            if let Some(index) = recvs.iter().position(|recv| recv.number == credit.number) {
                let to = recvs.swap_remove(index).to;
                copy(&hold, offset, &to.hold, to.offset, bytes);
            }
            self.changed = true;
            return;
        }
        self.putting.insert(send.number, 1);
        self.lanes[send.to.index()].push(Item::Stream(Stream {
            kind: Kind::Tile,
            word: credit.number,
            at: 0,
            source: hold,
            from: offset,
            bytes,
            left: 0,
            owner: Owner::Operation(send.number),
        }));
    }

    /// A chunk of a message that this rank has posted a receive for.
    pub(super) fn tile(&mut self, from: Rank, frame: &Frame) {
        let bytes = frame.payload().len();
        let recvs = &mut self.point_to_point.recvs;
        let recv = recvs.iter().position(|recv| recv.number == frame.words[0] && recv.from == from);
        if let (Some(index), Some(at)) = (recv, frame.size(1)) {
            let recv = &mut recvs[index];
            if fits(at, bytes, recv.to.bytes) && recv.to.hold.write_bytes(recv.to.offset + at, frame.payload()).is_ok()
            {
                recv.arrived += bytes;
            }
            if recv.arrived >= recv.to.bytes {
                recvs.swap_remove(index);
                self.changed = true;
            }
        }
        self.acknowledge(from, bytes);
    }
}
