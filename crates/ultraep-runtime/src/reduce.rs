//! Grad reduce: replicas' gradients into masters, beside the computation.

use ultraep_fabric::Operation;
use ultraep_fabric::stream::GradReduce;

use crate::clock::Deadline;
use crate::config::window;
use crate::sync::{Carrier, PlannedTransfers};
use crate::{Endpoint, Part, RuntimeError};

/// A grad reduce under way.
#[derive(Debug)]
pub(crate) struct Reducing {
    /// When the bytes are through the stated link.
    deadline: Deadline,
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
        let transfers = &planned.direct;
        if transfers.all().is_empty() {
            return Ok(());
        }
        self.join_reduce(endpoint)?;
        endpoint.clock.pause();
        let now = endpoint.clock.now_ns();
        let start_ns = endpoint.aside(Operation::Open { window: window::SLOT_GRADS }, now)?.stamp;
        let (slots, topology, masters) = (&self.grad_slots, &self.config.topology, &self.grads[layer]);
        let work = GradReduce { slots, topology, transfers, masters };
        // On a fabric without direct access it is done here, by this thread.
        endpoint.clock.enter(Part::GradReduce);
        let started = self.reduce_engine.start_reduce(endpoint.fabric(), &work, self.config.transfer.reduce_workers);
        endpoint.clock.pause();
        started?;
        let moved = planned.busiest_copies * self.config.shape.weight_bytes() as u64;
        self.reducing = Some(Reducing { deadline: Deadline(start_ns + endpoint.link().transfer_ns(moved)) });
        Ok(())
    }

    /// Waits for the grad reduce that is under way, if any: before the slots' gradients are written again. What this thread still
    /// has to add itself is work of the rank's core; in virtual time it also waits for the bytes.
    pub(crate) fn join_reduce(&mut self, endpoint: &mut Endpoint) -> Result<(), RuntimeError> {
        let Some(Reducing { deadline }) = self.reducing.take() else { return Ok(()) };
        endpoint.clock.enter(Part::GradReduce);
        let added = self.reduce_engine.wait(endpoint.fabric());
        endpoint.clock.pause();
        added?;
        endpoint.aside(Operation::Close { window: window::SLOT_GRADS }, 0)?;
        endpoint.join(deadline, Part::GradReduce);
        Ok(())
    }
}
