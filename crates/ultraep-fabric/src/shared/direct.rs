//! Direct access to claimed windows, for the tile engine.

use super::endpoint::{Endpoint, Phase};
use super::patience::{NAP, Patience};
use super::segment::Segment;
use crate::backend::{Hold, Use};
use crate::operation::OperationKind;
use crate::stream::{Direct, Reach};
use crate::sync::Ordering;
use crate::{AccessError, FabricError, WindowId};
use ultraep_plan::Rank;

impl Direct for Endpoint {
    fn claim(&mut self, window: WindowId) -> Result<Reach, FabricError> {
        let kind = OperationKind::Stream;
        self.check_group(kind)?;
        self.operands.window(kind, window)?;
        let index = window.index();
        // SYNC POINT reach: acquires what this rank's workers did under an earlier claim; pairs with `Reach::drop`.
        let reaches = self.windows[index].reaches.load(Ordering::Acquire);
        match self.windows[index].phase {
            Phase::Claimed if reaches == 0 => {}
            Phase::Closed => {
                let hold = Hold::take(&self.windows[index].region, Use::Open);
                self.windows[index].open = Some(hold.map_err(self.operands.access(kind, "window"))?);
            }
            _ => return Err(self.operands.access(kind, "window")(AccessError::Open)),
        }
        self.windows[index].phase = Phase::Claimed;
        Ok(Reach::new(&self.segment, window, self.rank, &self.windows[index].reaches))
    }

    fn check(&mut self) -> Result<(), FabricError> {
        self.check_group(OperationKind::Stream)
    }

    fn wait_until(&mut self, peer: Rank, ready: &dyn Fn() -> bool) -> Result<(), FabricError> {
        let kind = OperationKind::Stream;
        for spin in 0..self.spins {
            if ready() {
                return Ok(());
            }
            core::hint::spin_loop();
            if spin % 64 == 63 {
                std::thread::yield_now();
            }
        }
        self.give_permit_back();
        let control = &std::sync::Arc::clone(&self.segment);
        let control = control.control(self.rank);
        self.segment.note_awaited(self.rank, Some(peer));
        let mut patience = Patience::new(self.timeout);
        let result = loop {
            let left = patience.left();
            // Tiles arrive without a bell when their chunk is not yet complete.
            if control.doorbell.sleep_unless(ready, left.min(NAP)) {
                break Ok(());
            }
            if self.segment.has_failed() {
                break Err(self.group_error(kind));
            }
            if let Err(lost) = self.check_sender(peer, ready) {
                break Err(lost);
            }
            if left.is_zero() {
                let failure = self.tiles_timed_out(peer, patience.waited());
                break Err(self.fail(kind, &failure));
            }
        };
        self.segment.note_awaited(self.rank, None);
        result?;
        self.take_permit(kind)
    }
}

impl Segment {
    /// The rank is blocked for tiles of a peer, or is so no more.
    pub(super) fn note_awaited(&self, rank: Rank, peer: Option<Rank>) {
        let (activity, awaits) = match peer {
            Some(peer) => (OperationKind::Stream, peer.index() as u32 + 1),
            None => (OperationKind::Compute, 0),
        };
        let control = self.control(rank);
        control.awaits.store(awaits, Ordering::Relaxed);
        control.activity.store(activity as u32, Ordering::Relaxed);
    }

    /// The rank whose tiles a rank is blocked for.
    pub(super) fn awaited(&self, rank: Rank) -> Option<Rank> {
        let peer = self.control(rank).awaits.load(Ordering::Relaxed).checked_sub(1)? as usize;
        (peer < self.layout.ranks).then(|| Rank::new(peer))
    }
}
