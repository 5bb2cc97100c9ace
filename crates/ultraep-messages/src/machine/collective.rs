//! Collectives of one rank: entered through rank 0, then blocks from rank to rank.

use super::lanes::{CHUNK_BYTES, Item, Owner, Stream};
use super::onesided::{OneSided, copy};
use super::{Machine, Phase, TICKET_COLLECTIVE};
use crate::frame::{Frame, Kind};
use core::ops::Range;
use std::sync::Arc;
use ultraep_fabric::backend::{Hold, Use};
use ultraep_fabric::{
    AccessError, Collective, Completion, FabricError, Operation, OperationKind, Span, Ticket, WindowId,
};
use ultraep_plan::Rank;

const F32_BYTES: usize = size_of::<f32>();

// A chunk of a share is a whole number of values.
const _: () = assert!(CHUNK_BYTES.is_multiple_of(F32_BYTES));

/// The collective that a rank has in flight.
pub(super) struct Flight {
    collective: Collective,
    stamp: u64,
    body: Body,
    /// For each lane the items that must be settled before it is entered; set when everything before has gone out.
    marks: Option<Vec<u64>>,
    entered: bool,
    /// The largest stamp, once all have entered.
    gone_ahead: Option<u64>,
    /// Streams that have not left this rank's memory.
    pub(super) streams: usize,
    /// Bytes that are still to come.
    missing: usize,
    moved: (u64, u64),
    /// Set when it is complete and the caller has not been told yet.
    pub(super) done: Option<Completion>,
}

impl Flight {
    pub(super) fn sequence(&self) -> u64 {
        self.collective.sequence
    }

    pub(super) fn kind(&self) -> OperationKind {
        self.collective.kind
    }

    /// Whether it waits for ranks that have not entered.
    pub(super) fn awaits_entries(&self) -> bool {
        self.entered && self.gone_ahead.is_none()
    }
}

/// A held span.
struct Piece {
    hold: Arc<Hold>,
    offset: usize,
}

impl Piece {
    fn new(span: &Span, usage: Use) -> Result<Self, AccessError> {
        let hold = span.right(usage)?.shared();
        hold.start()?;
        Ok(Self { hold, offset: span.offset })
    }
}

enum Body {
    Barrier,
    Open(usize),
    Close(usize),
    AllGather { send: Option<Piece>, recv: Piece, bytes: usize },
    AllToAll { send: Piece, sizes: Vec<u64>, window: Hold, places: Vec<usize> },
    AllReduce { data: Piece, elements: usize, chunks: Vec<Chunk> },
    Finished,
}

/// A collective that was checked.
struct Prepared {
    body: Body,
    /// What ranks compare beside its kind.
    detail: u64,
    /// Bytes that are to come.
    missing: usize,
    /// Bytes to and from other ranks.
    moved: (u64, u64),
}

impl Prepared {
    fn without_data(body: Body, detail: usize) -> Self {
        Self { body, detail: detail as u64, missing: 0, moved: (0, 0) }
    }
}

/// A chunk of the share that this rank sums: what has come for it, by rank.
struct Chunk {
    parts: Vec<Option<Frame>>,
    count: usize,
}

/// Whether bytes of a message lie within what they are for.
pub(super) fn fits(at: usize, bytes: usize, limit: usize) -> bool {
    at.checked_add(bytes).is_some_and(|end| end <= limit)
}

/// The elements that a rank sums.
fn share(elements: usize, ranks: usize, rank: Rank) -> Range<usize> {
    let each = elements.div_ceil(ranks);
    (rank.index() * each).min(elements)..((rank.index() + 1) * each).min(elements)
}

impl Machine {
    pub(crate) fn collective(&mut self, operation: Operation<'_>, stamp: u64) -> Result<Ticket, FabricError> {
        let kind = operation.kind();
        if let Some(flight) = &self.flight {
            return Err(FabricError::InFlight { operation: kind, rank: self.rank, in_flight: flight.kind() });
        }
        let Prepared { body, detail, missing, moved } = self.prepare(kind, operation)?;
        let collective = Collective { sequence: self.sequence, kind, detail };
        self.sequence += 1;
        self.submitted += 1;
        self.flight = Some(Flight {
            collective,
            stamp,
            body,
            marks: None,
            entered: false,
            gone_ahead: None,
            streams: 0,
            missing,
            moved,
            done: None,
        });
        self.queue.push_back(OneSided::Mark);
        let ticket = self.ticket(TICKET_COLLECTIVE, [collective.sequence, kind.code(), 0]);
        self.advance();
        Ok(ticket)
    }

    /// Checks everything and takes what the operation uses.
    fn prepare(&mut self, kind: OperationKind, operation: Operation<'_>) -> Result<Prepared, FabricError> {
        let others = self.ranks - 1;
        match operation {
            Operation::Open { window } => {
                self.operands.window(kind, window)?;
                let own = &mut self.windows[window.index()];
                let hold = Hold::take(&own.region, Use::Open).map_err(self.operands.access(kind, "window"))?;
                own.open = Some(Arc::new(hold));
                own.phase = Phase::Opening;
                Ok(Prepared::without_data(Body::Open(window.index()), window.index()))
            }
            Operation::Close { window } => {
                self.operands.window(kind, window)?;
                let own = &mut self.windows[window.index()];
                if own.phase != Phase::Open {
                    return Err(self.operands.access(kind, "window")(AccessError::Closed));
                }
                let used = own.open.as_ref().and_then(|hold| self.point_to_point.using(hold));
                if let Some(in_flight) = used {
                    return Err(FabricError::InFlight { operation: kind, rank: self.rank, in_flight });
                }
                own.phase = Phase::Closing;
                Ok(Prepared::without_data(Body::Close(window.index()), window.index()))
            }
            Operation::AllGather { send, recv } => {
                let in_place = self.operands.all_gather(&send, &recv)?;
                let to = Piece::new(&recv, Use::Write).map_err(self.operands.access(kind, "recv"))?;
                let from = match in_place {
                    true => None,
                    false => Some(Piece::new(&send, Use::Read).map_err(self.operands.access(kind, "send"))?),
                };
                let (bytes, missing) = (send.bytes, send.bytes * others);
                let body = Body::AllGather { send: from, recv: to, bytes };
                Ok(Prepared { body, detail: bytes as u64, missing, moved: (missing as u64, missing as u64) })
            }
            Operation::AllToAll { send, send_bytes, recv, recv_bytes } => {
                self.prepare_all_to_all(&send, send_bytes, recv, recv_bytes)
            }
            Operation::AllReduceSumF32 { data } => {
                self.operands.all_reduce(&data)?;
                let piece = Piece::new(&data, Use::Write).map_err(self.operands.access(kind, "data"))?;
                let elements = data.bytes / F32_BYTES;
                let own = share(elements, self.ranks, self.rank).len() * F32_BYTES;
                let chunk = || Chunk { parts: (0..self.ranks).map(|_| None).collect(), count: 0 };
                let chunks = (0..own.div_ceil(CHUNK_BYTES)).map(|_| chunk()).collect();
                let moved = if others == 0 { 0 } else { (data.bytes - own + own * others) as u64 };
                // All sums, the own share's as well, which are there when every part of it is.
                let missing = if others == 0 { 0 } else { data.bytes };
                let body = Body::AllReduce { data: piece, elements, chunks };
                Ok(Prepared { body, detail: data.bytes as u64, missing, moved: (moved, moved) })
            }
            // The one-sided operations do not come here.
            _ => Ok(Prepared::without_data(Body::Barrier, 0)),
        }
    }

    fn prepare_all_to_all(
        &self,
        send: &Span,
        send_bytes: &[usize],
        recv: WindowId,
        recv_bytes: &[usize],
    ) -> Result<Prepared, FabricError> {
        let kind = OperationKind::AllToAll;
        self.operands.all_to_all(send, send_bytes, recv, recv_bytes)?;
        let send = Piece::new(send, Use::Read).map_err(self.operands.access(kind, "send"))?;
        // The window last: a receiving hold does not come back by itself.
        let window = Hold::take(&self.windows[recv.index()].region, Use::Receive);
        let window = window.map_err(self.operands.access(kind, "recv window"))?;
        let me = self.rank.index();
        let of_others = |sizes: &[usize]| sizes.iter().sum::<usize>() - sizes[me];
        let (sent, missing) = (of_others(send_bytes), of_others(recv_bytes));
        let places = recv_bytes.iter().scan(0, |end, &bytes| {
            *end += bytes;
            Some(*end - bytes)
        });
        let sizes = send_bytes.iter().chain(recv_bytes).map(|&bytes| bytes as u64).collect();
        let body = Body::AllToAll { send, sizes, window, places: places.collect() };
        Ok(Prepared { body, detail: recv.index() as u64, missing, moved: (sent as u64, missing as u64) })
    }

    /// Everything that was submitted before the collective has gone to its lane.
    pub(super) fn mark(&mut self) {
        let marks = self.lanes.iter().map(super::Lane::mark).collect();
        if let Some(flight) = &mut self.flight {
            flight.marks = Some(marks);
        }
    }

    /// Enters the collective in flight once everything that was submitted before it is with its target.
    pub(super) fn enter_when_ready(&mut self) {
        let Some(flight) = &self.flight else { return };
        let Some(marks) = flight.marks.as_ref().filter(|_| !flight.entered) else { return };
        let settled = |(lane, mark): (&super::Lane, &u64)| lane.is_settled(*mark);
        if self.is_getting() || !self.lanes.iter().zip(marks).all(settled) {
            return;
        }
        let Collective { sequence, kind, detail } = flight.collective;
        let sizes: &[u64] = if let Body::AllToAll { sizes, .. } = &flight.body { sizes } else { &[] };
        let enter = Frame::of_words(Kind::Enter, [sequence, kind.code(), detail, flight.stamp], sizes.iter().copied());
        self.entered += 1;
        if let Some(flight) = &mut self.flight {
            flight.entered = true;
        }
        if self.rank.index() == 0 {
            if let Some(frame) = Frame::parse(enter) {
                self.entered_by(self.rank, &frame);
            }
        } else if let Some(loss) = self.gone[0] {
            self.coordinator_is_gone(loss);
        } else {
            self.post(Rank::new(0), enter);
        }
    }

    /// All have entered, and agree.
    pub(super) fn go(&mut self, sequence: u64, stamp: u64) {
        let Some(flight) = self.flight.as_mut().filter(|flight| flight.collective.sequence == sequence) else { return };
        flight.gone_ahead = Some(stamp);
        let (me, ranks) = (self.rank, self.ranks);
        let mut streams = Vec::new();
        let mut stream = |to: Rank, kind: Kind, piece: &Piece, at: usize, bytes: usize| {
            if bytes > 0 {
                let (source, from) = (Arc::clone(&piece.hold), piece.offset + at);
                let owner = Owner::Collective;
                streams.push((to, Stream { kind, word: sequence, at: 0, source, from, bytes, left: 0, owner }));
            }
        };
        match &flight.body {
            Body::AllGather { send, recv, bytes } => {
                let own = me.index() * *bytes;
                if let Some(send) = send {
                    copy(&send.hold, send.offset, &recv.hold, recv.offset + own, *bytes);
                }
                for to in (0..ranks).map(Rank::new).filter(|&rank| rank != me) {
                    match send {
                        Some(send) => stream(to, Kind::Data, send, 0, *bytes),
                        None => stream(to, Kind::Data, recv, own, *bytes),
                    }
                }
            }
            Body::AllToAll { send, sizes, window, places } => {
                let mut at = 0;
                for (to, &bytes) in sizes[..ranks].iter().enumerate() {
                    let bytes = bytes as usize;
                    if to == me.index() {
                        copy(&send.hold, send.offset + at, window, places[to], bytes);
                    } else {
                        stream(Rank::new(to), Kind::Data, send, at, bytes);
                    }
                    at += bytes;
                }
            }
            Body::AllReduce { data, elements, .. } => {
                for to in (0..ranks).map(Rank::new).filter(|&rank| rank != me) {
                    let share = share(*elements, ranks, to);
                    stream(to, Kind::Part, data, share.start * F32_BYTES, share.len() * F32_BYTES);
                }
            }
            Body::Barrier | Body::Open(_) | Body::Close(_) | Body::Finished => {}
        }
        flight.streams += streams.len();
        for (to, stream) in streams {
            self.lanes[to.index()].push(Item::Stream(stream));
        }
    }

    /// A chunk of another rank's piece or block.
    pub(super) fn data(&mut self, from: Rank, frame: &Frame) {
        let bytes = frame.payload().len();
        if let Some(flight) = self.flight.as_mut().filter(|flight| flight.collective.sequence == frame.words[0])
            && let Some(at) = frame.size(1)
        {
            let written = match &flight.body {
                Body::AllGather { recv, bytes: piece, .. } if fits(at, bytes, *piece) => {
                    recv.hold.write_bytes(recv.offset + from.index() * *piece + at, frame.payload())
                }
                Body::AllToAll { sizes, window, places, .. }
                    if fits(at, bytes, sizes[self.ranks + from.index()] as usize) =>
                {
                    window.write_bytes(places[from.index()] + at, frame.payload())
                }
                _ => Err(AccessError::Closed),
            };
            if written.is_ok() {
                flight.missing = flight.missing.saturating_sub(bytes);
            }
        }
        self.acknowledge(from, bytes);
    }

    /// A chunk of another rank's values, to be summed here. It is acknowledged when it has been: who is ahead waits.
    pub(super) fn part(&mut self, from: Rank, frame: Frame) {
        let (me, ranks) = (self.rank, self.ranks);
        let Some(flight) = self.flight.as_mut().filter(|flight| flight.collective.sequence == frame.words[0]) else {
            return;
        };
        let Body::AllReduce { data, elements, chunks } = &mut flight.body else { return };
        let Some(at) = frame.size(1) else { return };
        let Some(chunk) = chunks.get_mut(at / CHUNK_BYTES) else { return };
        if chunk.parts[from.index()].replace(frame).is_none() {
            chunk.count += 1;
        }
        if chunk.count + 1 < ranks {
            return;
        }
        let own = share(*elements, ranks, me);
        let bytes = CHUNK_BYTES.min((own.len() * F32_BYTES).saturating_sub(at));
        let start = own.start * F32_BYTES + at;
        let mut mine = vec![0; bytes];
        // Within the span that was checked when the operation was submitted.
        let read = data.hold.read_bytes(data.offset + start, &mut mine);
        let mut sums = vec![0f32; bytes / F32_BYTES];
        for rank in 0..ranks {
            let values = chunk.parts[rank].as_ref().map_or(&mine[..], Frame::payload);
            let (values, _) = values.as_chunks::<F32_BYTES>();
            let values = values.iter().map(|value| f32::from_ne_bytes(*value));
            if rank == 0 {
                sums.iter_mut().zip(values).for_each(|(sum, value)| *sum = value);
            } else {
                sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
            }
        }
        mine.chunks_exact_mut(F32_BYTES).zip(&sums).for_each(|(bytes, sum)| bytes.copy_from_slice(&sum.to_ne_bytes()));
        let written = data.hold.write_bytes(data.offset + start, &mine);
        debug_assert!(read.is_ok() && written.is_ok(), "{read:?} {written:?}");
        flight.missing = flight.missing.saturating_sub(bytes);
        chunk.parts.iter_mut().for_each(|part| *part = None);
        let (source, sequence) = (Arc::clone(&data.hold), flight.collective.sequence);
        let from = data.offset + start;
        flight.streams += ranks - 1;
        for peer in self.peers() {
            self.acknowledge(peer, bytes);
            let stream = Stream {
                kind: Kind::Sums,
                word: sequence,
                at: start as u64,
                source: Arc::clone(&source),
                from,
                bytes,
                left: 0,
                owner: Owner::Collective,
            };
            self.lanes[peer.index()].push(Item::Stream(stream));
        }
    }

    /// A chunk of sums.
    pub(super) fn sums(&mut self, from: Rank, frame: &Frame) {
        let bytes = frame.payload().len();
        if let Some(flight) = self.flight.as_mut().filter(|flight| flight.collective.sequence == frame.words[0])
            && let Body::AllReduce { data, elements, .. } = &flight.body
            && let Some(at) = frame.size(1)
            && fits(at, bytes, *elements * F32_BYTES)
            && data.hold.write_bytes(data.offset + at, frame.payload()).is_ok()
        {
            flight.missing = flight.missing.saturating_sub(bytes);
        }
        self.acknowledge(from, bytes);
    }

    /// Completes the collective in flight, if nothing is missing.
    pub(super) fn complete(&mut self) {
        let Some(flight) = &mut self.flight else { return };
        let Some(stamp) = flight.gone_ahead.filter(|_| flight.done.is_none()) else { return };
        if flight.missing > 0 || flight.streams > 0 {
            return;
        }
        match core::mem::replace(&mut flight.body, Body::Finished) {
            Body::Open(index) => self.windows[index].phase = Phase::Open,
            Body::Close(index) => {
                let window = &mut self.windows[index];
                window.phase = Phase::Closed;
                // Puts from it and gets into it are over: they were before the collective was entered.
                window.open.take().and_then(Arc::into_inner).into_iter().for_each(Hold::release);
            }
            Body::AllToAll { window, .. } => window.release(),
            _ => {}
        }
        let (bytes_sent, bytes_received) = flight.moved;
        flight.done = Some(Completion { stamp, bytes_sent, bytes_received });
        self.changed = true;
    }
}
