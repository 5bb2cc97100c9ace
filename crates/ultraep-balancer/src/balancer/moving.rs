//! Expert state in motion, and the slots between two movements.

use ultraep_fabric::Pod;
use ultraep_fabric::stream::{GradReduce, SlotSet, WeightSync};
use ultraep_plan::PhysicalIndex;

use super::Balancer;
use crate::{BalancerError, Plane, VirtualLayer};

/// Movement of expert state under way. It goes on whether or not anybody waits; dropping this changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "slots may be used once this has been waited for"]
pub struct Pending {
    what: What,
    /// Number of the movement among those of its kind; 0 for one with nothing to move.
    number: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Weights,
    Grads,
}

impl Pending {
    /// Whether there is nothing to move: the plan has no replicas.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.number == 0
    }
}

impl Balancer {
    /// Starts to fill this rank's slots with the weights of the replicas that a virtual layer's plan gives it, and to send its own
    /// masters' weights to theirs. What the slots held is gone. In forward, and again in backward when another layer has synced since.
    ///
    /// # Errors
    /// As for [`Balancer::place`]; [`BalancerError::Fabric`] when masters are in use, and the fabric's.
    pub fn sync_weights(&mut self, plane: &mut dyn Plane, at: VirtualLayer) -> Result<Pending, BalancerError> {
        let kept = self.ring.get(self.place(at)?);
        let nothing = Pending { what: What::Weights, number: 0 };
        if kept.transfers.direct().all().is_empty() {
            return Ok(nothing);
        }
        let masters = &self.masters[at.layer].weights;
        let work = WeightSync { topology: &self.config.topology, plan: kept.transfers.plan(), masters };
        let stamp = plane.stamp();
        self.weights.sync(plane.fabric(), &work, self.config.transfer.sync_workers, stamp)?;
        self.synced += 1;
        Ok(Pending { number: self.synced, ..nothing })
    }

    /// Starts to add replicas' gradients to their masters', master first, then the replicas in the plan's order, so that the sum is
    /// the same on every run, and to zero the slots' gradients.
    ///
    /// # Errors
    /// As for [`Balancer::sync_weights`]; [`BalancerError::InferenceOnly`].
    pub fn reduce_grads(&mut self, plane: &mut dyn Plane, at: VirtualLayer) -> Result<Pending, BalancerError> {
        let kept = self.ring.get(self.place(at)?);
        let nothing = Pending { what: What::Grads, number: 0 };
        let (Some(slots), Some(masters)) = (&mut self.grads, &self.masters[at.layer].grads) else {
            return Err(BalancerError::InferenceOnly { at });
        };
        let transfers = kept.transfers.direct();
        if transfers.all().is_empty() {
            return Ok(nothing);
        }
        let work = GradReduce { topology: &self.config.topology, transfers, masters };
        let stamp = plane.stamp();
        slots.reduce(plane.fabric(), &work, self.config.transfer.reduce_workers, stamp)?;
        self.reduced += 1;
        Ok(Pending { number: self.reduced, ..nothing })
    }

    /// Waits until what `pending` brings this rank is there: after a weight sync its slots may be read; after a grad reduce its
    /// masters' gradients are complete and its slots' are 0. Gives the largest [`Plane::stamp`] of this rank and those at the other
    /// end of its transfers. One that a later movement of its kind has overtaken is over, and gives 0.
    ///
    /// # Errors
    /// The fabric's; a timeout names the rank that was waited for.
    pub fn wait(&mut self, plane: &mut dyn Plane, pending: Pending) -> Result<u64, BalancerError> {
        Ok(match (pending.what, &mut self.grads) {
            _ if pending.is_empty() => 0,
            (What::Weights, _) if pending.number == self.synced => self.weights.join(plane.fabric())?,
            (What::Grads, Some(grads)) if pending.number == self.reduced => grads.join(plane.fabric())?,
            _ => 0,
        })
    }

    /// Waits until this rank has moved all that it has started: its masters are its own again.
    ///
    /// # Errors
    /// As for [`Balancer::wait`].
    pub fn drain(&mut self, plane: &mut dyn Plane) -> Result<(), BalancerError> {
        self.weights.drain(plane.fabric())?;
        self.grads.as_mut().map_or(Ok(()), |grads| grads.drain(plane.fabric()))?;
        Ok(())
    }

    /// Where a physical expert of this rank lies among its slots, in bytes; `None` for a master.
    #[must_use]
    pub fn slot_range(&self, physical: PhysicalIndex) -> Option<std::ops::Range<usize>> {
        self.weights.slot(&self.config.topology, physical).map(|slot| self.weights.slots().range(slot))
    }

    /// Where a physical expert's gradients lie among the slots' gradients, in bytes; `None` for a master.
    #[must_use]
    pub fn grad_slot_range(&self, physical: PhysicalIndex) -> Option<std::ops::Range<usize>> {
        let grads = self.grads.as_ref()?;
        grads.slot(&self.config.topology, physical).map(|slot| grads.slots().range(slot))
    }

    /// Weights in this rank's slots, once the last weight sync has been waited for.
    ///
    /// # Errors
    /// [`BalancerError::Access`] before, and when `T` does not fit.
    pub fn slot_weights<T: Pod>(&self) -> Result<&[T], BalancerError> {
        Ok(self.weights.read()?)
    }

    /// Weights and gradients in this rank's slots: backward adds to the latter. Once the last movement of each kind has been waited for.
    ///
    /// # Errors
    /// As for [`Balancer::slot_weights`].
    pub fn slot_weights_and_grads<T: Pod, G: Pod>(&mut self) -> Result<(&[T], &mut [G]), BalancerError> {
        let grads = self.grads.as_mut().map_or(Ok(&mut [][..]), SlotSet::write)?;
        Ok((self.weights.read()?, grads))
    }
}
