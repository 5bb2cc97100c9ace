//! Where a balancer's ranks meet.

use ultraep_fabric::{Fabric, Operation, Region, Span};

use crate::BalancerError;

/// How a balancer reaches the other ranks, and who watches it do so. Every boxed fabric is one. A stack that measures wraps its
/// fabric and hears of each step; the defaults watch nothing.
pub trait Plane {
    /// The fabric.
    fn fabric(&mut self) -> &mut dyn Fabric;

    /// Gathers every rank's counts into `recv`, in rank order: the one point at which all ranks of a layer meet.
    ///
    /// # Errors
    /// The fabric's.
    fn gather_counts(&mut self, send: &Region, recv: &Region) -> Result<(), BalancerError> {
        gather(self.fabric(), send, recv)
    }

    /// Gathers every rank's digest, in checked mode and for adopted plans.
    ///
    /// # Errors
    /// The fabric's.
    fn gather_digests(&mut self, send: &Region, recv: &Region) -> Result<(), BalancerError> {
        gather(self.fabric(), send, recv)
    }

    /// The plan is made; what follows are checks and books.
    fn planned(&mut self) {}

    /// A logical time that travels with credits: see [`Balancer::wait`](crate::Balancer::wait).
    fn stamp(&mut self) -> u64 {
        0
    }
}

impl Plane for Box<dyn Fabric> {
    fn fabric(&mut self) -> &mut dyn Fabric {
        &mut **self
    }
}

fn gather(fabric: &mut dyn Fabric, send: &Region, recv: &Region) -> Result<(), BalancerError> {
    fabric.run(Operation::AllGather { send: Span::whole(send), recv: Span::whole(recv) })?;
    Ok(())
}
