//! Grad reduce: replicas' gradients into masters, beside the computation.

use ultraep_fabric::stream::GradReduce;
use ultraep_plan::PlannedTransfers;

use crate::clock::Deadline;
use crate::sync::Carrier;
use crate::{Endpoint, Part, RuntimeError};

/// A grad reduce under way.
#[derive(Debug)]
pub(crate) struct Reducing {
    /// What the bytes take through the stated link, once the last rank at this one's transfers has started.
    transfer_ns: u64,
}

impl Carrier {
    /// Starts the grad reduce of a plan: every home rank adds its replicas' gradients to its masters', master first, then the
    /// replicas in the plan's order, so that the sum is the same on every run, and zeroes the slots. Worker threads do it beside
    /// what follows; the masters' gradients of the layer and the slots' are in use until [`Carrier::join_reduce`].
    pub(crate) fn start_reduce(
        &mut self,
        endpoint: &mut Endpoint,
        layer: usize,
        planned: &PlannedTransfers,
    ) -> Result<(), RuntimeError> {
        endpoint.clock.pause();
        let transfers = planned.direct();
        if transfers.all().is_empty() {
            return Ok(());
        }
        self.join_reduce(endpoint)?;
        endpoint.clock.pause();
        let Some(slots) = &mut self.grad_slots else { return Ok(()) };
        let work = GradReduce { topology: &self.config.topology, transfers, masters: &self.grads[layer] };
        let now = endpoint.clock.now_ns();
        // On a fabric without direct access it is done here, by this thread.
        endpoint.clock.enter(Part::GradReduce);
        let started = slots.reduce(endpoint.fabric(), &work, self.config.transfer.reduce_workers, now);
        endpoint.clock.pause();
        started?;
        let moved = u64::from(transfers.busiest_copies()) * self.config.shape.weight_bytes() as u64;
        self.reducing = Some(Reducing { transfer_ns: endpoint.link().transfer_ns(moved) });
        Ok(())
    }

    /// Waits for the grad reduce that is under way, if any: before the slots' gradients are written again. What this thread still
    /// has to add itself is work of the rank's core; in virtual time it also waits for the bytes.
    pub(crate) fn join_reduce(&mut self, endpoint: &mut Endpoint) -> Result<(), RuntimeError> {
        let (Some(Reducing { transfer_ns }), Some(slots)) = (self.reducing.take(), &mut self.grad_slots) else {
            return Ok(());
        };
        endpoint.clock.enter(Part::GradReduce);
        let added = slots.join(endpoint.fabric());
        endpoint.clock.pause();
        let deadline = Deadline(added? + transfer_ns);
        endpoint.join(deadline, Part::GradReduce);
        Ok(())
    }
}
