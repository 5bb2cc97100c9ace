//! Direct access to open windows, for the tile engine.

use super::endpoint::{Endpoint, Phase};
use super::failure::Failure;
use crate::operation::OperationKind;
use crate::stream::{Direct, Reach};
use crate::sync::Ordering;
use crate::{AccessError, FabricError, WindowId};
use std::time::{Duration, Instant};
use ultraep_plan::Rank;

/// Longest sleep before a waiter looks again: tiles arrive without a bell when their chunk is not yet complete.
const NAP: Duration = Duration::from_millis(100);

impl Direct for Endpoint {
    fn reach(&mut self, window: WindowId) -> Result<Reach, FabricError> {
        let kind = OperationKind::Stream;
        self.check_group(kind)?;
        let index = self.checked_window(kind, window)?;
        if self.windows[index].phase != Phase::Open {
            return Err(self.access(kind, "window")(AccessError::Closed));
        }
        Ok(Reach::new(&self.segment, window, self.rank, &self.reaches))
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
        control.activity.store(kind as u32, Ordering::Relaxed);
        let since = Instant::now();
        let result = loop {
            let left = self.timeout.saturating_sub(since.elapsed());
            if control.doorbell.sleep_unless(ready, left.min(NAP)) {
                break Ok(());
            }
            if self.segment.has_failed() {
                break Err(self.group_error(kind));
            }
            if left.is_zero() {
                let failure = Failure::Timeout { missing: vec![peer], operation: kind, waited: since.elapsed() };
                break Err(self.fail(kind, &failure));
            }
        };
        control.activity.store(OperationKind::Compute as u32, Ordering::Relaxed);
        result?;
        self.take_permit(kind)
    }
}
