//! The right to touch all ranks' parts of an open window by loads and stores.

use crate::shared::Segment;
use crate::sync::{AtomicU32, Ordering};
use crate::{FabricError, OperationKind, WindowId};
use core::ptr::NonNull;
use std::sync::Arc;
use ultraep_plan::Rank;

/// What the tile engine needs of a fabric whose windows are memory of this machine. [`Fabric::direct`](crate::Fabric::direct)
/// gives it; only backends of this crate have it.
pub trait Direct {
    /// The right to touch `window`, which this rank has open. The window cannot be closed while it lives.
    ///
    /// # Errors
    /// [`FabricError::Access`] when the window is not open; the group's failure.
    fn reach(&mut self, window: WindowId) -> Result<Reach, FabricError>;

    /// Blocks until `ready` holds; the core permit is with others meanwhile. For what stores of `peer` (or threads of this rank,
    /// when it is this rank) bring about: whoever does rings this rank's bell.
    ///
    /// # Errors
    /// The group's failure; [`FabricError::Timeout`], which names `peer`, after the group's timeout.
    fn wait_until(&mut self, peer: Rank, ready: &dyn Fn() -> bool) -> Result<(), FabricError>;
}

/// Loads from and stores to every rank's part of one open window are allowed as long as this lives.
///
/// Why that cannot race with safe code: the window is open on this rank, so every rank has submitted `Open` and has no
/// guard on its part. A part is given back to its owner when `Close` is complete, which needs this rank's submission, and
/// this rank's endpoint refuses to close the window while there is a reach.
pub struct Reach {
    segment: Arc<Segment>,
    window: WindowId,
    rank: Rank,
    /// Reaches of this rank to this window that live.
    alive: Arc<AtomicU32>,
}

impl Reach {
    /// For a window that the caller has found open; `alive` is what its endpoint looks at before it closes it.
    pub(crate) fn new(segment: &Arc<Segment>, window: WindowId, rank: Rank, alive: &Arc<AtomicU32>) -> Self {
        // Relaxed: counted up and looked at by the rank's own thread.
        alive.fetch_add(1, Ordering::Relaxed);
        Self { segment: Arc::clone(segment), window, rank, alive: Arc::clone(alive) }
    }

    /// Whose it is.
    pub(crate) fn rank(&self) -> Rank {
        self.rank
    }

    /// The first of `bytes` bytes at `offset` in a rank's part, if they lie within.
    pub(crate) fn place(&self, rank: Rank, offset: usize, bytes: usize) -> Result<NonNull<u8>, FabricError> {
        let ranks = self.segment.layout.ranks;
        let refuse = |what, asked, limit| {
            Err(FabricError::OutOfRange { operation: OperationKind::Stream, rank, what, asked, limit })
        };
        if rank.index() >= ranks {
            return refuse("rank", rank.index(), ranks - 1);
        }
        let part = self.segment.window(self.window, rank);
        let limit = part.map_or(0, |(_, bytes)| bytes);
        match (part, offset.checked_add(bytes)) {
            // SAFETY: the offset lies within the part.
            (Some((start, limit)), Some(end)) if end <= limit => Ok(unsafe { start.add(offset) }),
            (_, end) => refuse("end of the slot (bytes)", end.unwrap_or(usize::MAX), limit),
        }
    }

    /// Whether the group has failed.
    pub(crate) fn has_failed(&self) -> bool {
        self.segment.has_failed()
    }

    /// Rings a rank's bell: something it may wait for has come.
    pub(crate) fn ring(&self, rank: Rank) {
        self.segment.control(rank).doorbell.ring();
    }
}

impl Drop for Reach {
    fn drop(&mut self) {
        // SYNC POINT reach: releases what this rank's workers loaded and stored to the endpoint, which acquires in `close`.
        self.alive.fetch_sub(1, Ordering::Release);
    }
}
