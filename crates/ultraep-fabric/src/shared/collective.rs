//! Collectives as state machines over the turnstile: each step moves bytes, then enters the next phase.
//!
//! | collective     | before its first phase        | after phase 1                        | after phase 2                  |
//! |----------------|-------------------------------|--------------------------------------|--------------------------------|
//! | barrier        |                               | done                                 |                                |
//! | open           | own part refuses guards       | peers may put and get                |                                |
//! | close          | own puts and gets are over    | own part allows guards, done         |                                |
//! | all-gather     | chunk -> own staging          | all staging -> `recv`; next chunk    | ...                            |
//! | all-to-all     | publish sizes                 | check sizes, blocks -> peers' windows| done                           |
//! | all-reduce     | chunk -> own staging          | own share of all staging, summed in rank order -> own reduced | all reduced -> `data`; next chunk |
//!
//! Staging and reduced areas exist twice, for even and odd phases: an area is written before its phase is entered and read
//! after that phase has ended and before the next is entered; it is written again two phases on, when every rank has
//! entered the phase between and so has finished reading.

use super::endpoint::{Endpoint, Phase};
use super::layout::{STAGING_BYTES, share_elements};
use super::segment::Segment;
use super::turnstile::Entered;
use super::word::FAILED;
use crate::backend::{Hold, Right, Use};
use crate::failure::Failure;
use crate::operation::{Collective, OperationKind};
use crate::sync::{self, Ordering};
use crate::{AccessError, Completion, FabricError, Loss, Operation, Span, Ticket, WindowId, copy};
use core::mem::size_of;
use core::ptr::NonNull;
use ultraep_plan::Rank;

const F32_BYTES: usize = size_of::<f32>();

/// The collective that a rank has in flight.
pub(crate) struct InFlight {
    collective: Collective,
    stamp: u64,
    sent: u64,
    received: u64,
    body: Body,
    /// Set when it is complete and the caller has not been told yet.
    done: Option<Completion>,
}

impl InFlight {
    pub(super) fn sequence(&self) -> u64 {
        self.collective.sequence
    }

    pub(super) fn kind(&self) -> OperationKind {
        self.collective.kind
    }
}

/// A held span.
struct Piece {
    _right: Right,
    start: NonNull<u8>,
}

// SAFETY: the pointer is into the memory of the region that the hold keeps alive; regions are `Send`.
unsafe impl Send for Piece {}

impl Piece {
    /// For a span that lies within its region.
    fn new(span: &Span, usage: Use) -> Result<Self, AccessError> {
        let right = span.right(usage)?;
        let start = right.start()?;
        // SAFETY: the span lies within the region.
        Ok(Self { _right: right, start: unsafe { start.add(span.offset) } })
    }

    /// `at` bytes into the piece; within the span that was checked when it was made.
    fn at(&self, at: usize) -> NonNull<u8> {
        // SAFETY: the span was checked to lie within the region, and the steps stay within the span.
        unsafe { self.start.add(at) }
    }
}

enum Body {
    Barrier,
    Open(usize),
    Close(usize),
    AllGather {
        send: Option<Piece>,
        recv: Piece,
        bytes: usize,
        gathered: usize,
    },
    AllToAll {
        send: Piece,
        /// Length of the send span.
        bytes: usize,
        window: Hold,
        sent: bool,
    },
    AllReduce {
        data: Piece,
        bytes: usize,
        reduced: usize,
        summed: bool,
    },
    /// Complete: everything has been given back.
    Finished,
}

impl Endpoint {
    pub(super) fn submit_collective(&mut self, operation: Operation<'_>, stamp: u64) -> Result<Ticket, FabricError> {
        let kind = operation.kind();
        if let Some(flight) = &self.collective {
            let (rank, in_flight) = (self.rank, flight.kind());
            return Err(FabricError::InFlight { operation: kind, rank, in_flight });
        }
        let (body, detail) = self.prepare(kind, operation)?;
        let collective = Collective { sequence: self.sequence, kind, detail };
        self.sequence += 1;
        self.collective = Some(InFlight { collective, stamp, sent: 0, received: 0, body, done: None });
        self.publish_chunk();
        self.enter_phase()?;
        Ok(self.collective_ticket(collective.sequence))
    }

    /// Checks everything and takes what the operation uses. The second value is what ranks compare.
    fn prepare(&mut self, kind: OperationKind, operation: Operation<'_>) -> Result<(Body, u64), FabricError> {
        match operation {
            Operation::Open { window } => {
                self.operands.window(kind, window)?;
                let index = window.index();
                let hold = Hold::take(&self.windows[index].region, Use::Open);
                self.windows[index].open = Some(hold.map_err(self.operands.access(kind, "window"))?);
                self.windows[index].phase = Phase::Opening;
                Ok((Body::Open(index), index as u64))
            }
            Operation::Close { window } => {
                self.operands.window(kind, window)?;
                let index = window.index();
                if self.windows[index].phase != Phase::Open {
                    return Err(self.operands.access(kind, "window")(AccessError::Closed));
                }
                self.windows[index].phase = Phase::Closing;
                Ok((Body::Close(index), index as u64))
            }
            Operation::AllGather { send, recv } => Ok((self.prepare_gather(&send, &recv)?, send.bytes as u64)),
            Operation::AllToAll { send, send_bytes, recv, recv_bytes } => {
                let body = self.prepare_all_to_all(&send, send_bytes, recv, recv_bytes)?;
                Ok((body, recv.index() as u64))
            }
            Operation::AllReduceSumF32 { data } => {
                self.operands.all_reduce(&data)?;
                let piece = Piece::new(&data, Use::Write).map_err(self.operands.access(kind, "data"))?;
                Ok((Body::AllReduce { data: piece, bytes: data.bytes, reduced: 0, summed: false }, data.bytes as u64))
            }
            // The one-sided operations do not come here.
            _ => Ok((Body::Barrier, 0)),
        }
    }

    fn prepare_gather(&self, send: &Span, recv: &Span) -> Result<Body, FabricError> {
        let kind = OperationKind::AllGather;
        let in_place = self.operands.all_gather(send, recv)?;
        let to = Piece::new(recv, Use::Write).map_err(self.operands.access(kind, "recv"))?;
        let from = match in_place {
            true => None,
            false => Some(Piece::new(send, Use::Read).map_err(self.operands.access(kind, "send"))?),
        };
        Ok(Body::AllGather { send: from, recv: to, bytes: send.bytes, gathered: 0 })
    }

    fn prepare_all_to_all(
        &self,
        send: &Span,
        send_bytes: &[usize],
        recv: WindowId,
        recv_bytes: &[usize],
    ) -> Result<Body, FabricError> {
        let kind = OperationKind::AllToAll;
        self.operands.all_to_all(send, send_bytes, recv, recv_bytes)?;
        // The window last: a receiving hold does not come back by itself.
        let from = Piece::new(send, Use::Read).map_err(self.operands.access(kind, "send"))?;
        let window = Hold::take(&self.windows[recv.index()].region, Use::Receive);
        let window = window.map_err(self.operands.access(kind, "recv window"))?;
        let places = recv_bytes.iter().scan(0, |end, &bytes| {
            *end += bytes;
            Some(*end - bytes)
        });
        let published = send_bytes.iter().copied().chain(recv_bytes.iter().copied()).chain(places);
        for (word, bytes) in self.segment.sizes(self.rank).iter().zip(published) {
            // Relaxed: ordered by the turnstile.
            word.store(bytes as u64, Ordering::Relaxed);
        }
        Ok(Body::AllToAll { send: from, bytes: send.bytes, window, sent: false })
    }

    /// Publishes what the collective is and enters its next phase; the last rank to do so checks that all agree.
    fn enter_phase(&mut self) -> Result<(), FabricError> {
        let Some(flight) = &self.collective else { return Ok(()) };
        let (collective, stamp) = (flight.collective, flight.stamp);
        self.entered += 1;
        let control = self.segment.control(self.rank);
        // Relaxed: ordered by the turnstile.
        control.stamp.store(stamp, Ordering::Relaxed);
        control.sequence.store(collective.sequence, Ordering::Relaxed);
        control.kind.store(collective.kind as u64, Ordering::Relaxed);
        control.detail.store(collective.detail, Ordering::Relaxed);
        control.entered.store(self.entered, Ordering::Relaxed);
        let ranks = self.segment.layout.ranks as u64;
        match self.segment.header().turnstile.0.enter(ranks) {
            Entered::Waiting => Ok(()),
            Entered::SomeoneGone => {
                let (rank, loss) = self.segment.departed().unwrap_or((self.rank, Loss::Dropped));
                Err(self.fail(collective.kind, &Failure::Lost { rank, loss }))
            }
            Entered::Last => match self.compare() {
                Ok(stamp) => {
                    self.turn(ranks, stamp);
                    Ok(())
                }
                Err(failure) => Err(self.fail(collective.kind, &failure)),
            },
        }
    }

    /// What all ranks have published, as the last one to enter: the largest stamp, if they agree.
    fn compare(&self) -> Result<u64, Failure> {
        let published = |rank: Rank| {
            let control = self.segment.control(rank);
            Collective {
                sequence: control.sequence.load(Ordering::Relaxed),
                kind: OperationKind::from_code(control.kind.load(Ordering::Relaxed)),
                detail: control.detail.load(Ordering::Relaxed),
            }
        };
        let first = Rank::new(0);
        let operation = published(first);
        let mut stamp = 0;
        for other in self.segment.ranks() {
            let other_operation = published(other);
            if other_operation != operation {
                return Err(Failure::Mismatch { rank: first, operation, other, other_operation });
            }
            stamp = stamp.max(self.segment.control(other).stamp.load(Ordering::Relaxed));
        }
        Ok(stamp)
    }

    /// Ends the phase. With core permits, as many ranks wake as permits are free; the rest queue for permits.
    fn turn(&self, ranks: u64, stamp: u64) {
        let header = self.segment.header();
        let permits = &header.permits.0;
        if !self.limited {
            return header.turnstile.0.turn(ranks, stamp, None);
        }
        let free = permits.free();
        header.turnstile.0.turn(ranks, stamp, Some((&permits.word, free)));
        // A permit that came free before the others had moved to the queue woke nobody.
        let free_now = permits.free();
        if free_now > free {
            sync::wake(&permits.word, free_now - free);
        }
    }

    /// Moves the collective in flight on as far as it goes, and hands out its completion once.
    pub(super) fn advance(&mut self) -> Result<Option<Completion>, FabricError> {
        self.progress()?;
        let done = self.collective.as_mut().and_then(|flight| flight.done.take());
        if done.is_some() {
            self.collective = None;
        }
        Ok(done)
    }

    /// Moves the collective in flight, if any, on as far as it goes.
    pub(super) fn progress(&mut self) -> Result<(), FabricError> {
        while self.progress_phase()? {}
        Ok(())
    }

    /// Moves the collective in flight, if any, past one phase that has ended; whether there was one.
    pub(super) fn progress_phase(&mut self) -> Result<bool, FabricError> {
        let Some(flight) = &self.collective else { return Ok(false) };
        let (kind, done) = (flight.kind(), flight.done.is_some());
        self.check_group(kind)?;
        if done {
            return Ok(false);
        }
        let turnstile = &self.segment.header().turnstile.0;
        let word = turnstile.look();
        if word & FAILED != 0 {
            return Err(self.group_error(kind));
        }
        if word >> 1 == self.seen {
            return Ok(false);
        }
        let stamp = turnstile.stamp();
        self.seen = word >> 1;
        if self.step()? {
            if let Some(flight) = &mut self.collective {
                flight.body = Body::Finished;
                let (bytes_sent, bytes_received) = (flight.sent, flight.received);
                flight.done = Some(Completion { stamp, bytes_sent, bytes_received });
            }
        } else {
            self.publish_chunk();
            self.enter_phase()?;
        }
        Ok(true)
    }

    /// What is to be done after a phase has ended; whether the collective is complete.
    fn step(&mut self) -> Result<bool, FabricError> {
        let parity = self.parity();
        let Some(flight) = &mut self.collective else { return Ok(true) };
        match &mut flight.body {
            Body::Barrier | Body::Finished => Ok(true),
            Body::Open(index) => {
                self.windows[*index].phase = Phase::Open;
                Ok(true)
            }
            Body::Close(index) => {
                let window = &mut self.windows[*index];
                window.phase = Phase::Closed;
                window.open.take().into_iter().for_each(Hold::release);
                Ok(true)
            }
            Body::AllGather { recv, bytes, gathered, .. } => {
                let chunk = STAGING_BYTES.min(*bytes - *gathered);
                for rank in self.segment.ranks() {
                    let from = self.segment.staging(rank, parity);
                    let to = recv.at(rank.index() * *bytes + *gathered);
                    // SAFETY: a chunk fits the staging area, whose owner does not write it in this phase; `recv` is held for
                    // writing and holds N pieces of `bytes` bytes.
                    unsafe { copy::copy(from.as_ptr(), to.as_ptr(), chunk) };
                }
                *gathered += chunk;
                let others = (self.segment.layout.ranks - 1) as u64 * chunk as u64;
                flight.sent += others;
                flight.received += others;
                Ok(*gathered == *bytes)
            }
            Body::AllReduce { data, bytes, reduced, summed } => {
                let elements = STAGING_BYTES.min(*bytes - *reduced) / F32_BYTES;
                let mine = share(elements, self.segment.layout.ranks, self.rank).len() * F32_BYTES;
                *summed = !*summed;
                if *summed {
                    // The sums go to the area of the phase that comes next.
                    sum_share(&self.segment, self.rank, parity, 1 - parity, elements);
                    return Ok(false);
                }
                gather_shares(&self.segment, parity, elements, &|at| data.at(*reduced + at));
                *reduced += elements * F32_BYTES;
                let others = self.segment.layout.ranks - 1;
                let moved = (elements * F32_BYTES - mine + mine * others) as u64;
                flight.sent += moved;
                flight.received += moved;
                Ok(*reduced == *bytes)
            }
            Body::AllToAll { sent: true, .. } => {
                if let Body::AllToAll { window, .. } = core::mem::replace(&mut flight.body, Body::Finished) {
                    window.release();
                }
                Ok(true)
            }
            Body::AllToAll { .. } => self.exchange().map(|()| false),
        }
    }

    /// All-to-all, after every rank has published its sizes: writes this rank's blocks. Other processes can write the words, so
    /// each is read once, and what was read is what is checked and used.
    fn exchange(&mut self) -> Result<(), FabricError> {
        let (me, ranks) = (self.rank, self.segment.layout.ranks);
        let Some(flight) = &mut self.collective else { return Ok(()) };
        let Body::AllToAll { send, bytes: all, sent, .. } = &mut flight.body else { return Ok(()) };
        let size = |rank: Rank, index: usize| self.segment.sizes(rank)[index].load(Ordering::Relaxed);
        let window = WindowId::new(flight.collective.detail as usize);
        let (mut at, mut failure) = (0_usize, None);
        for to in self.segment.ranks() {
            let (bytes, expected, before) =
                (size(me, to.index()), size(to, ranks + me.index()), size(to, 2 * ranks + me.index()));
            let (incoming, awaited) = (size(to, me.index()), size(me, ranks + to.index()));
            let differ = |from, to, sent_bytes, expected_bytes| Failure::Sizes { from, to, sent_bytes, expected_bytes };
            if incoming != awaited && bytes == expected {
                failure = Some(differ(to, me, incoming, awaited));
                break;
            }
            // Within the send span, and within the receiver's part.
            let place = || {
                let count = usize::try_from(bytes).ok().filter(|_| bytes == expected)?;
                let end = at.checked_add(count).filter(|&end| end <= *all)?;
                let (start, limit) = self.segment.window(window, to)?;
                before.checked_add(bytes).filter(|&end| end <= limit as u64)?;
                Some((start, count, end))
            };
            let Some((start, count, end)) = place() else {
                failure = Some(differ(me, to, bytes, expected));
                break;
            };
            // SAFETY: the block lies within this rank's send span and, as just checked, within the receiver's part, which the
            // receiver holds for receiving until all ranks have entered the next phase. Blocks do not overlap.
            unsafe { copy::copy(send.at(at).as_ptr(), start.add(before as usize).as_ptr(), count) };
            at = end;
            if to != me {
                flight.sent += bytes;
                flight.received += incoming;
            }
        }
        *sent = true;
        failure.map_or(Ok(()), |failure| Err(self.fail(OperationKind::AllToAll, &failure)))
    }

    /// Parity of the phase that was entered last.
    fn parity(&self) -> usize {
        (self.entered % 2) as usize
    }

    /// Copies the next chunk to the staging area of the phase that is about to be entered.
    fn publish_chunk(&mut self) {
        let parity = 1 - self.parity();
        let Some(flight) = &self.collective else { return };
        let (from, chunk) = match &flight.body {
            Body::AllGather { send, recv, bytes, gathered } => {
                let from = match send {
                    Some(send) => send.at(*gathered),
                    None => recv.at(self.rank.index() * *bytes + *gathered),
                };
                (from, STAGING_BYTES.min(*bytes - *gathered))
            }
            Body::AllReduce { data, bytes, reduced, summed: false } => {
                (data.at(*reduced), STAGING_BYTES.min(*bytes - *reduced))
            }
            _ => return,
        };
        let to = self.segment.staging(self.rank, parity);
        // SAFETY: the chunk lies within the held span and fits the staging area, which nobody reads before this rank has
        // entered the phase (see the top of the file).
        unsafe { copy::copy(from.as_ptr(), to.as_ptr(), chunk) };
    }
}

/// The elements of a chunk that `rank` sums.
fn share(elements: usize, ranks: usize, rank: Rank) -> core::ops::Range<usize> {
    let each = share_elements(elements, ranks);
    (rank.index() * each).min(elements)..((rank.index() + 1) * each).min(elements)
}

/// Sums the share of `me` of a chunk over all ranks' staging areas, in rank order, into its reduced area.
fn sum_share(segment: &Segment, me: Rank, from: usize, to: usize, elements: usize) {
    let share = share(elements, segment.layout.ranks, me);
    let staged = |rank: Rank| {
        let start = segment.staging(rank, from).cast::<f32>();
        // SAFETY: page-aligned staging area of at least `elements` values, written before the phase that has ended and not
        // again before this rank has entered the next; any bytes are an `f32`.
        unsafe { core::slice::from_raw_parts(start.add(share.start).as_ptr(), share.len()) }
    };
    let start = segment.reduced(me, to).cast::<f32>();
    // SAFETY: aligned, holds the largest share of a full chunk, and no other rank reads it before this rank has entered the
    // next phase.
    let sums = unsafe { core::slice::from_raw_parts_mut(start.as_ptr(), share.len()) };
    for rank in segment.ranks() {
        if rank.index() == 0 {
            sums.copy_from_slice(staged(rank));
        } else {
            sums.iter_mut().zip(staged(rank)).for_each(|(sum, value)| *sum += value);
        }
    }
}

/// Copies every rank's reduced share of a chunk to its place.
fn gather_shares(segment: &Segment, parity: usize, elements: usize, to: &dyn Fn(usize) -> NonNull<u8>) {
    for rank in segment.ranks() {
        let share = share(elements, segment.layout.ranks, rank);
        let from = segment.reduced(rank, parity);
        let target = to(share.start * F32_BYTES);
        // SAFETY: the share fits the reduced area, which its owner does not write in this phase; the target lies within the
        // span held for writing.
        unsafe { copy::copy(from.as_ptr(), target.as_ptr(), share.len() * F32_BYTES) };
    }
}
