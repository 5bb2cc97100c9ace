//! Put, get and signals. On this fabric loads and stores do them, so each is complete when it has been submitted.

use super::endpoint::{Endpoint, Phase, Window};
use super::segment::Segment;
use crate::backend::{Right, Use};
use crate::operation::OperationKind;
use crate::sync::Ordering;
use crate::{AccessError, Completion, FabricError, RemoteSpan, Span, Ticket, copy};
use core::ptr::NonNull;
use ultraep_plan::Rank;

/// A local span that may be used: by a hold, or because it lies in the own part of an open window.
struct Local {
    start: NonNull<u8>,
    _right: Option<Right>,
}

impl Endpoint {
    fn local(&self, kind: OperationKind, span: &Span, usage: Use) -> Result<Local, FabricError> {
        self.operands.span(kind, span)?;
        let refused = self.operands.access(kind, "local span");
        let open = |window: &&super::endpoint::Window| window.phase == Phase::Open && window.region.same(&span.region);
        let (right, start) = match self.windows.iter().find(open) {
            Some(Window { open: Some(hold), .. }) => (None, hold.start().map_err(refused)?),
            _ => {
                let right = span.right(usage).map_err(&refused)?;
                let start = right.start().map_err(refused)?;
                (Some(right), start)
            }
        };
        // SAFETY: the offset lies within the region, as checked above.
        Ok(Local { start: unsafe { start.add(span.offset) }, _right: right })
    }

    /// Where a remote span starts, if its window is open and it lies within.
    fn remote(&self, kind: OperationKind, span: &RemoteSpan, bytes: usize) -> Result<NonNull<u8>, FabricError> {
        self.operands.rank(kind, span.rank)?;
        self.operands.window(kind, span.window)?;
        if self.windows[span.window.index()].phase != Phase::Open {
            return Err(self.operands.access(kind, "remote span")(AccessError::Closed));
        }
        self.operands.remote(kind, span, bytes)?;
        let Some((start, _)) = self.segment.window(span.window, span.rank) else {
            let (asked, limit) = (span.window.index(), self.windows.len());
            return self.operands.out_of_range(kind, span.rank, "window index", asked, limit);
        };
        // SAFETY: the offset lies within the part, as checked above.
        Ok(unsafe { start.add(span.offset) })
    }

    pub(super) fn put(&mut self, from: &Span, to: &[RemoteSpan], stamp: u64) -> Result<Ticket, FabricError> {
        let kind = OperationKind::Put;
        let source = self.local(kind, from, Use::Read)?;
        for target in to {
            self.remote(kind, target, from.bytes)?;
        }
        let starts = to.iter().filter_map(|target| self.remote(kind, target, from.bytes).ok()).map(NonNull::as_ptr);
        // SAFETY: both sides were checked to lie within their memory. The source is held for reading, or lies in an open
        // window; the targets lie in open windows: no references to open windows exist.
        unsafe { copy::copy_to_many(source.start.as_ptr(), starts, from.bytes) };
        drop(source);
        let others = to.iter().filter(|target| target.rank != self.rank).count() as u64;
        Ok(self.done(Completion { stamp, bytes_sent: from.bytes as u64 * others, bytes_received: 0 }))
    }

    /// What a put would write, when it would not be refused.
    pub(crate) fn copy_out(&self, from: &Span, to: &[RemoteSpan]) -> Result<Vec<u8>, FabricError> {
        let kind = OperationKind::Put;
        let source = self.local(kind, from, Use::Read)?;
        for target in to {
            self.remote(kind, target, from.bytes)?;
        }
        let mut bytes = vec![0; from.bytes];
        // SAFETY: the source was checked to lie within its memory and is held for reading, or lies in an open window; the
        // target is as long.
        unsafe { copy::copy(source.start.as_ptr(), bytes.as_mut_ptr(), from.bytes) };
        Ok(bytes)
    }

    pub(super) fn get(&mut self, from: RemoteSpan, to: &Span, stamp: u64) -> Result<Ticket, FabricError> {
        let kind = OperationKind::Get;
        let source = self.remote(kind, &from, to.bytes)?;
        let target = self.local(kind, to, Use::Write)?;
        // SAFETY: both sides were checked to lie within their memory. The source lies in an open window; the target is held
        // for writing, or lies in an open window: no references to open windows exist.
        unsafe { copy::copy(source.as_ptr(), target.start.as_ptr(), to.bytes) };
        drop(target);
        let bytes_received = if from.rank == self.rank { 0 } else { to.bytes as u64 };
        Ok(self.done(Completion { stamp, bytes_sent: 0, bytes_received }))
    }

    pub(super) fn signal(&mut self, rank: Rank, signal: usize, add: u64, stamp: u64) -> Result<Ticket, FabricError> {
        let kind = OperationKind::Signal;
        self.operands.rank(kind, rank)?;
        self.operands.signal(kind, signal)?;
        self.segment.raise_signal(rank, signal, add);
        Ok(self.done(Completion { stamp, bytes_sent: 0, bytes_received: 0 }))
    }

    pub(super) fn await_signal(&mut self, signal: usize, at_least: u64, stamp: u64) -> Result<Ticket, FabricError> {
        self.operands.signal(OperationKind::AwaitSignal, signal)?;
        Ok(self.signal_ticket(signal, at_least, stamp))
    }

    /// A signal word of this rank, which exists.
    pub(super) fn signal_value(&self, signal: usize) -> u64 {
        // SYNC POINT signal: acquires the puts that the signaller released in `signal`.
        self.segment.signals(self.rank)[signal].load(Ordering::Acquire)
    }
}

impl Segment {
    /// Raises a signal word that exists, and wakes its rank.
    pub(crate) fn raise_signal(&self, rank: Rank, signal: usize, add: u64) {
        // SYNC POINT signal: releases the signaller's earlier puts to whoever acquires the word in `signal_value`.
        self.signals(rank)[signal].fetch_add(add, Ordering::Release);
        self.control(rank).doorbell.ring();
    }
}
