//! Put, get and signals.

use super::collective::fits;
use super::lanes::{CHUNK_BYTES, Item, Owner, Stream};
use super::{Machine, Phase, TICKET_ONE_SIDED, TICKET_SIGNAL};
use crate::frame::{Frame, HEAD_BYTES, Kind};
use std::sync::Arc;
use std::time::Instant;
use ultraep_fabric::backend::{Failure, Hold, Use};
use ultraep_fabric::{AccessError, FabricError, OperationKind, RemoteSpan, Span, Ticket, WindowId};
use ultraep_plan::Rank;

/// Chunks of a get that are asked for ahead of what has come.
const CHUNKS_AHEAD: usize = 8;

/// A local span that may be used.
#[derive(Clone)]
pub(super) struct Local {
    pub(super) hold: Arc<Hold>,
    pub(super) offset: usize,
    pub(super) bytes: usize,
}

/// An operation that has not gone out. They go out in order.
pub(super) enum OneSided {
    Put {
        number: u64,
        from: Local,
        to: Vec<RemoteSpan>,
    },
    Get(Get),
    /// A signal waits until all earlier puts are with their targets.
    Signal {
        number: u64,
        to: Rank,
        signal: usize,
        add: u64,
    },
    /// A collective was submitted here.
    Mark,
}

/// A get that has gone out, or is about to.
pub(super) struct Get {
    number: u64,
    from: RemoteSpan,
    to: Local,
    asked: usize,
    arrived: usize,
}

impl Get {
    /// Whose memory is waited for.
    pub(super) fn target(&self) -> Rank {
        self.from.rank
    }
}

impl OneSided {
    fn number(&self) -> Option<u64> {
        match self {
            Self::Put { number, .. } | Self::Signal { number, .. } => Some(*number),
            Self::Get(get) => Some(get.number),
            Self::Mark => None,
        }
    }
}

impl Machine {
    pub(super) fn local(&self, kind: OperationKind, span: &Span, usage: Use) -> Result<Local, FabricError> {
        self.operands.span(kind, span)?;
        let refused = self.operands.access(kind, "local span");
        let open = self.windows.iter().find(|window| window.phase == Phase::Open && window.region.same(&span.region));
        let hold = match open.and_then(|window| window.open.as_ref()) {
            Some(hold) => Arc::clone(hold),
            None => span.right(usage).map_err(&refused)?.shared(),
        };
        hold.start().map_err(refused)?;
        Ok(Local { hold, offset: span.offset, bytes: span.bytes })
    }

    /// That a remote span lies within a window that this rank has open.
    fn remote(&self, kind: OperationKind, span: &RemoteSpan, bytes: usize) -> Result<(), FabricError> {
        self.operands.rank(kind, span.rank)?;
        self.operands.window(kind, span.window)?;
        if self.windows[span.window.index()].phase != Phase::Open {
            return Err(self.operands.access(kind, "remote span")(AccessError::Closed));
        }
        self.operands.remote(kind, span, bytes)
    }

    pub(crate) fn put(&mut self, from: &Span, to: &[RemoteSpan], stamp: u64) -> Result<Ticket, FabricError> {
        let kind = OperationKind::Put;
        let source = self.local(kind, from, Use::Read)?;
        for target in to {
            self.remote(kind, target, from.bytes)?;
        }
        self.submitted += 1;
        let others = to.iter().filter(|target| target.rank != self.rank).count() as u64;
        let ticket = self.ticket(TICKET_ONE_SIDED, [kind.code(), from.bytes as u64 * others, stamp]);
        if from.bytes > 0 && !to.is_empty() {
            self.queue.push_back(OneSided::Put { number: self.submitted, from: source, to: to.to_vec() });
        }
        self.advance();
        Ok(ticket)
    }

    pub(crate) fn get(&mut self, from: RemoteSpan, to: &Span, stamp: u64) -> Result<Ticket, FabricError> {
        let kind = OperationKind::Get;
        self.remote(kind, &from, to.bytes)?;
        let target = self.local(kind, to, Use::Write)?;
        self.expect(from.rank);
        self.submitted += 1;
        let bytes = if from.rank == self.rank { 0 } else { to.bytes as u64 };
        let ticket = self.ticket(TICKET_ONE_SIDED, [kind.code(), bytes, stamp]);
        if to.bytes > 0 {
            self.queue.push_back(OneSided::Get(Get { number: self.submitted, from, to: target, asked: 0, arrived: 0 }));
        }
        self.advance();
        Ok(ticket)
    }

    pub(crate) fn signal(&mut self, to: Rank, signal: usize, add: u64, stamp: u64) -> Result<Ticket, FabricError> {
        let kind = OperationKind::Signal;
        self.operands.rank(kind, to)?;
        self.operands.signal(kind, signal)?;
        self.submitted += 1;
        let ticket = self.ticket(TICKET_ONE_SIDED, [kind.code(), 0, stamp]);
        self.queue.push_back(OneSided::Signal { number: self.submitted, to, signal, add });
        self.advance();
        Ok(ticket)
    }

    pub(crate) fn await_signal(&mut self, signal: usize, at_least: u64, stamp: u64) -> Result<Ticket, FabricError> {
        self.operands.signal(OperationKind::AwaitSignal, signal)?;
        self.submitted += 1;
        Ok(self.ticket(TICKET_SIGNAL, [signal as u64, at_least, stamp]))
    }

    /// Whether a one-sided operation is not complete on this rank.
    pub(super) fn is_pending(&self, number: u64) -> bool {
        self.putting.contains_key(&number)
            || self.point_to_point.is_pending(number)
            || self.gets.iter().any(|get| get.number == number)
            || self.queue.iter().any(|operation| operation.number() == Some(number))
    }

    /// Whether a get of this rank is under way.
    pub(super) fn is_getting(&self) -> bool {
        !self.gets.is_empty()
    }

    /// Hands operations to the lanes, in order, as far as they may go.
    pub(super) fn dispatch(&mut self) {
        while let Some(operation) = self.queue.front() {
            if let OneSided::Signal { to, .. } = operation
                && !self.puts_are_with(*to)
            {
                return;
            }
            match self.queue.pop_front() {
                Some(OneSided::Put { number, from, to }) => self.send_put(number, &from, &to),
                Some(OneSided::Get(get)) => self.start_get(get),
                Some(OneSided::Signal { to, signal, add, .. }) => self.send_signal(to, signal, add),
                Some(OneSided::Mark) => self.mark(),
                None => {}
            }
            self.changed = true;
        }
    }

    /// Whether a signal to a rank may go out: what goes to others is there, what goes to that rank goes before.
    fn puts_are_with(&self, to: Rank) -> bool {
        self.peers().filter(|&peer| peer != to).all(|peer| {
            let lane = &self.lanes[peer.index()];
            lane.is_settled(lane.mark()) || self.gone[peer.index()].is_some()
        })
    }

    fn send_put(&mut self, number: u64, from: &Local, to: &[RemoteSpan]) {
        for target in to {
            if target.rank == self.rank {
                self.copy_within(from, target.window, target.offset);
                continue;
            }
            *self.putting.entry(number).or_default() += 1;
            let stream = Stream {
                kind: Kind::Put,
                word: target.window.index() as u64,
                at: target.offset as u64,
                source: Arc::clone(&from.hold),
                from: from.offset,
                bytes: from.bytes,
                left: 0,
                owner: Owner::Operation(number),
            };
            self.lanes[target.rank.index()].push(Item::Stream(stream));
        }
    }

    /// A put into the own window.
    fn copy_within(&self, from: &Local, window: WindowId, offset: usize) {
        let Some(target) = self.windows[window.index()].open.as_ref() else { return };
        copy(&from.hold, from.offset, target, offset, from.bytes);
    }

    fn start_get(&mut self, mut get: Get) {
        if get.from.rank == self.rank {
            if let Some(source) = self.windows[get.from.window.index()].open.as_ref() {
                copy(source, get.from.offset, &get.to.hold, get.to.offset, get.to.bytes);
            }
            return;
        }
        for _ in 0..CHUNKS_AHEAD {
            self.ask(&mut get);
        }
        self.gets.push(get);
    }

    /// Asks for the next chunk of a get, if there is one.
    fn ask(&mut self, get: &mut Get) {
        let bytes = CHUNK_BYTES.min(get.to.bytes - get.asked);
        if bytes == 0 {
            return;
        }
        let at = get.from.offset + get.asked;
        // The chunk's place in the window says which chunk it is.
        let words = [get.from.window.index() as u64, at as u64, bytes as u64, get.number];
        get.asked += bytes;
        self.lanes[get.from.rank.index()].push(Item::Message(Frame::bytes(Kind::Get, words), false));
    }

    fn send_signal(&mut self, to: Rank, signal: usize, add: u64) {
        if to == self.rank {
            self.signals[signal] = self.signals[signal].wrapping_add(add);
            return;
        }
        let message = Frame::bytes(Kind::Signal, [signal as u64, add, 0, 0]);
        self.lanes[to.index()].push(Item::Message(message, true));
    }

    /// The hold of a window of this rank that is open to peers.
    fn open_window(&self, frame: &Frame) -> Option<Arc<Hold>> {
        self.windows.get(frame.size(0)?)?.open.clone()
    }

    pub(super) fn put_by(&mut self, from: Rank, frame: &Frame) {
        if let (Some(window), Some(offset)) = (self.open_window(frame), frame.size(1)) {
            // The sender has checked the range; what does not fit is not written.
            let _ = window.write_bytes(offset, frame.payload());
        }
        self.acknowledge(from, frame.payload().len());
    }

    pub(super) fn get_by(&mut self, from: Rank, frame: &Frame) {
        let (Some(offset), Some(bytes)) = (frame.size(1), frame.size(2)) else { return };
        let bytes = bytes.min(CHUNK_BYTES);
        let mut answer = Frame::with_payload(Kind::Got, [frame.words[3], frame.words[1], 0, 0], bytes);
        let read = self.open_window(frame).map(|window| window.read_bytes(offset, &mut answer[HEAD_BYTES..]));
        if let Some(Ok(())) = read {
            self.post(from, answer);
        }
    }

    pub(super) fn got(&mut self, frame: &Frame) {
        let Some(index) = self.gets.iter().position(|get| get.number == frame.words[0]) else { return };
        let mut get = self.gets.swap_remove(index);
        let at = frame.size(1).and_then(|at| at.checked_sub(get.from.offset));
        let Some(at) = at.filter(|&at| fits(at, frame.payload().len(), get.to.bytes)) else {
            return self.gets.push(get);
        };
        // Within what was asked for, as the chunk was cut here.
        let _ = get.to.hold.write_bytes(get.to.offset + at, frame.payload());
        get.arrived += frame.payload().len();
        if get.arrived < get.to.bytes {
            self.ask(&mut get);
            self.gets.push(get);
        } else {
            self.changed = true;
        }
    }

    pub(super) fn signal_by(&mut self, from: Rank, frame: &Frame) {
        if let Some(word) = frame.size(0).and_then(|index| self.signals.get_mut(index)) {
            *word = word.wrapping_add(frame.words[1]);
            self.changed = true;
        }
        self.acknowledge(from, 0);
    }

    /// Ends the group when a signal is awaited that nobody is left to send.
    pub(super) fn check_signallers(&mut self, now: Instant) {
        let departed = self.peers().find_map(|peer| Some((peer, self.gone[peer.index()]?)));
        if let Some((rank, loss)) = departed
            && self.peers().all(|peer| self.gone[peer.index()].is_some())
        {
            self.fail(Failure::Lost { rank, loss }, now);
        }
    }
}

/// Copies between two holds, chunk by chunk.
pub(super) fn copy(from: &Hold, from_offset: usize, to: &Hold, to_offset: usize, bytes: usize) {
    let mut chunk = vec![0; CHUNK_BYTES.min(bytes)];
    let mut done = 0;
    while done < bytes {
        let part = &mut chunk[..CHUNK_BYTES.min(bytes - done)];
        // Both ranges were checked when the operation was submitted, and are the host's.
        let copied = from.read_bytes(from_offset + done, part).and_then(|()| to.write_bytes(to_offset + done, part));
        debug_assert!(copied.is_ok(), "{copied:?}");
        done += part.len();
    }
}
