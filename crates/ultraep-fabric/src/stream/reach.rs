//! The right to touch all ranks' parts of a claimed window by loads and stores.

use crate::shared::Segment;
use crate::sync::{AtomicU32, AtomicU64, Ordering};
use crate::{FabricError, OperationKind, WindowId};
use core::ptr::NonNull;
use std::sync::Arc;
use ultraep_plan::Rank;

/// What the tile engine needs of a fabric whose windows are memory of this machine. [`Fabric::direct`](crate::Fabric::direct)
/// gives it; only backends of this crate have it.
pub trait Direct {
    /// Takes the own part of `window` for the tile engine, for good: guards, puts and gets are refused from now on. A window may
    /// be claimed again once everything that the last claim gave is dropped.
    ///
    /// # Errors
    /// [`FabricError::Access`] when the part is in use; the group's failure.
    fn claim(&mut self, window: WindowId) -> Result<Reach, FabricError>;

    /// Called where a piece of work starts, and where it is waited for.
    ///
    /// # Errors
    /// The group's failure.
    fn check(&mut self) -> Result<(), FabricError>;

    /// Blocks until `ready` holds; the core permit is with others meanwhile. For what stores of `peer` (or threads of this rank,
    /// when it is this rank) bring about: whoever does rings this rank's bell.
    ///
    /// # Errors
    /// The group's failure; [`FabricError::Timeout`], which names `peer`, after the group's timeout.
    fn wait_until(&mut self, peer: Rank, ready: &dyn Fn() -> bool) -> Result<(), FabricError>;
}

/// Stamps of so many epochs are kept: a rank is never further ahead of one that still asks, unless nothing else binds the two.
const STAMPS: usize = 4;

/// What a rank says of its part of a claimed window. All zero at the start.
#[repr(C, align(128))]
pub(crate) struct Credit {
    /// Pieces of work for which the rank has let its peers in. Their workers touch its slots for the n-th piece of work only
    /// when this is at least n.
    epoch: AtomicU64,
    /// The logical time at which it did, by epoch modulo [`STAMPS`].
    stamps: [AtomicU64; STAMPS],
}

impl Credit {
    /// Lets peers in, by the owner: its earlier reads and writes of its slots are over, their flags are lowered.
    pub(crate) fn give(&self, epoch: u64, stamp: u64) {
        // Relaxed: released with the epoch.
        self.stamps[epoch as usize % STAMPS].store(stamp, Ordering::Relaxed);
        // SYNC POINT credit: releases the owner's use of its slots to the peers' workers, which acquire in `covers`.
        self.epoch.store(epoch, Ordering::Release);
    }

    /// Whether the owner has let peers in for this piece of work.
    pub(crate) fn covers(&self, epoch: u64) -> bool {
        // SYNC POINT credit: acquires what the owner released in `give`.
        self.epoch.load(Ordering::Acquire) >= epoch
    }

    /// The last epoch that was given.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// When the owner let peers in; it has, for this epoch.
    pub(crate) fn stamp(&self, epoch: u64) -> u64 {
        self.stamps[epoch as usize % STAMPS].load(Ordering::Relaxed)
    }
}

/// Loads from and stores to every rank's part of one claimed window are possible as long as this lives; when they are allowed,
/// the credits say.
///
/// Why that cannot race with safe code: a rank's workers touch a peer's part only when the peer's [`Credit`] covers their piece
/// of work, and only until they have raised all flags of the slot. A peer gives credit only after it has claimed its part, so
/// that the fabric refuses guards on it for good, and while [`SlotSet`](super::SlotSet), the only one to read and write it, has
/// no view of it and hands none out before all flags are up.
pub struct Reach {
    segment: Arc<Segment>,
    window: WindowId,
    rank: Rank,
    /// Reaches of this rank to this window that live.
    alive: Arc<AtomicU32>,
}

impl Reach {
    /// For a window that the caller has claimed; `alive` is what its endpoint looks at before it is claimed again.
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

    /// The credit of a rank of the group; `None` for others.
    pub(crate) fn credit(&self, rank: Rank) -> Option<&Credit> {
        if rank.index() >= self.segment.layout.ranks {
            return None;
        }
        self.segment.credit(self.window, rank)
    }

    /// Whether the group has failed.
    pub(crate) fn has_failed(&self) -> bool {
        self.segment.has_failed()
    }

    /// Rings the bell of a rank of the group: something it may wait for has come.
    pub(crate) fn ring(&self, rank: Rank) {
        self.segment.control(rank).doorbell.ring();
    }
}

impl Drop for Reach {
    fn drop(&mut self) {
        // SYNC POINT reach: releases what this rank's workers loaded and stored to the endpoint, which acquires in `claim`.
        self.alive.fetch_sub(1, Ordering::Release);
    }
}
