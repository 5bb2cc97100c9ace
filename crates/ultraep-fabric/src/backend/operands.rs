//! Checks of operands, the same on every backend, with the errors that the conformance suite expects.

use crate::{AccessError, FabricError, GroupSpec, OperationKind, RemoteSpan, SIGNALS, Span, WindowId};
use core::mem::size_of;
use ultraep_plan::Rank;

/// What operands of one rank may refer to: the group's ranks, windows and signals. Checks allocate nothing.
#[derive(Clone, Debug)]
pub struct Operands {
    rank: Rank,
    ranks: usize,
    /// Bytes of a rank's part of each window.
    windows: Vec<usize>,
}

impl Operands {
    /// For one rank of a group.
    ///
    /// # Errors
    /// [`FabricError::Spec`] when no group can be started like this; [`FabricError::OutOfRange`] when it has no such rank.
    pub fn new(spec: &GroupSpec, rank: Rank) -> Result<Self, FabricError> {
        spec.check()?;
        let windows = spec.windows.iter().map(|window| window.bytes).collect();
        let operands = Self { rank, ranks: spec.ranks, windows };
        operands.rank(OperationKind::Compute, rank)?;
        Ok(operands)
    }

    /// The [`FabricError::OutOfRange`] of this rank, or of the one that an operand names.
    ///
    /// # Errors
    /// Always.
    pub fn out_of_range<T>(
        &self,
        operation: OperationKind,
        rank: Rank,
        what: &'static str,
        asked: usize,
        limit: usize,
    ) -> Result<T, FabricError> {
        Err(FabricError::OutOfRange { operation, rank, what, asked, limit })
    }

    /// For `map_err`: the [`FabricError::Access`] of this rank.
    pub fn access(
        &self,
        operation: OperationKind,
        subject: &'static str,
    ) -> impl Fn(AccessError) -> FabricError + use<> {
        let rank = self.rank;
        move |source| FabricError::Access { operation, rank, subject, source }
    }

    /// That the group has this rank.
    ///
    /// # Errors
    /// [`FabricError::OutOfRange`].
    pub fn rank(&self, kind: OperationKind, rank: Rank) -> Result<(), FabricError> {
        if rank.index() < self.ranks {
            return Ok(());
        }
        self.out_of_range(kind, rank, "rank", rank.index(), self.ranks - 1)
    }

    /// That each rank has this signal word.
    ///
    /// # Errors
    /// [`FabricError::OutOfRange`].
    pub fn signal(&self, kind: OperationKind, signal: usize) -> Result<(), FabricError> {
        if signal < SIGNALS {
            return Ok(());
        }
        self.out_of_range(kind, self.rank, "signal index", signal, SIGNALS - 1)
    }

    /// Bytes of a rank's part of a window, which must be there.
    ///
    /// # Errors
    /// [`FabricError::OutOfRange`].
    pub fn window(&self, kind: OperationKind, id: WindowId) -> Result<usize, FabricError> {
        let limit = self.windows.len().saturating_sub(1);
        let what = "window index (one less than their number)";
        self.windows
            .get(id.index())
            .copied()
            .map_or_else(|| self.out_of_range(kind, self.rank, what, id.index(), limit), Ok)
    }

    /// That a span lies within its region.
    ///
    /// # Errors
    /// [`FabricError::OutOfRange`].
    pub fn span(&self, kind: OperationKind, span: &Span) -> Result<(), FabricError> {
        let what = "end of the local span (bytes)";
        self.within(kind, self.rank, what, (span.offset, span.bytes), span.region.bytes())
    }

    /// That `bytes` bytes at a remote span lie within a rank's part of a window.
    ///
    /// # Errors
    /// [`FabricError::OutOfRange`].
    pub fn remote(&self, kind: OperationKind, span: &RemoteSpan, bytes: usize) -> Result<(), FabricError> {
        self.rank(kind, span.rank)?;
        let limit = self.window(kind, span.window)?;
        self.within(kind, span.rank, "end of the remote span (bytes)", (span.offset, bytes), limit)
    }

    fn within(
        &self,
        kind: OperationKind,
        rank: Rank,
        what: &'static str,
        (offset, bytes): (usize, usize),
        limit: usize,
    ) -> Result<(), FabricError> {
        match offset.checked_add(bytes) {
            Some(end) if end <= limit => Ok(()),
            end => self.out_of_range(kind, rank, what, end.unwrap_or(usize::MAX), limit),
        }
    }

    /// The operands of an all-gather; whether it is in place, `send` being a part of `recv`.
    ///
    /// # Errors
    /// [`FabricError::OutOfRange`], [`FabricError::Access`] when they overlap otherwise.
    pub fn all_gather(&self, send: &Span, recv: &Span) -> Result<bool, FabricError> {
        let kind = OperationKind::AllGather;
        self.span(kind, send)?;
        self.span(kind, recv)?;
        let expected = send.bytes.saturating_mul(self.ranks);
        if recv.bytes != expected {
            return self.out_of_range(kind, self.rank, "length of recv (bytes)", recv.bytes, expected);
        }
        let in_place = send.region.same(&recv.region);
        if in_place && send.offset != recv.offset + self.rank.index() * send.bytes {
            return Err(self.access(kind, "send and recv")(AccessError::Overlap));
        }
        Ok(in_place)
    }

    /// The operands of an all-to-all.
    ///
    /// # Errors
    /// [`FabricError::OutOfRange`].
    pub fn all_to_all(
        &self,
        send: &Span,
        send_bytes: &[usize],
        recv: WindowId,
        recv_bytes: &[usize],
    ) -> Result<(), FabricError> {
        let kind = OperationKind::AllToAll;
        self.span(kind, send)?;
        let window = self.window(kind, recv)?;
        for (what, sizes) in [("sizes in send_bytes", send_bytes), ("sizes in recv_bytes", recv_bytes)] {
            if sizes.len() != self.ranks {
                return self.out_of_range(kind, self.rank, what, sizes.len(), self.ranks);
            }
        }
        let sum = |sizes: &[usize]| sizes.iter().fold(0, |sum: usize, &bytes| sum.saturating_add(bytes));
        if sum(send_bytes) != send.bytes {
            return self.out_of_range(kind, self.rank, "sum of send_bytes", sum(send_bytes), send.bytes);
        }
        if sum(recv_bytes) > window {
            return self.out_of_range(kind, self.rank, "sum of recv_bytes", sum(recv_bytes), window);
        }
        Ok(())
    }

    /// The operand of an all-reduce of `f32`.
    ///
    /// # Errors
    /// [`FabricError::OutOfRange`], [`FabricError::Access`] when it is no whole number of values.
    pub fn all_reduce(&self, data: &Span) -> Result<(), FabricError> {
        let kind = OperationKind::AllReduceSumF32;
        self.span(kind, data)?;
        if !data.bytes.is_multiple_of(size_of::<f32>()) {
            let source = AccessError::Ragged { bytes: data.bytes, size: size_of::<f32>() };
            return Err(self.access(kind, "data")(source));
        }
        Ok(())
    }
}
