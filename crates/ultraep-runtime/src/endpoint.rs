//! A rank's way to the others: its fabric endpoint and its clock, kept in step.

use ultraep_fabric::{Completion, Fabric, Operation, Region, Span};
use ultraep_plan::Rank;

use crate::clock::{Deadline, StepTime, VirtualClock};
use crate::{Link, Part, RuntimeError};

/// Fabric and clock of one rank.
pub struct Endpoint {
    fabric: Box<dyn Fabric>,
    /// The rank's clock.
    pub clock: VirtualClock,
    link: Link,
    words: Vec<u64>,
}

impl Endpoint {
    /// Over `fabric`; the clock charges transfers at `link`.
    pub fn new(fabric: Box<dyn Fabric>, link: Link) -> Self {
        Self { fabric, clock: VirtualClock::new(), link, words: Vec::new() }
    }

    /// This rank.
    pub fn rank(&self) -> Rank {
        self.fabric.rank()
    }

    /// `N`.
    pub fn ranks(&self) -> usize {
        self.fabric.ranks()
    }

    /// The fabric, for operations that the clock must not see.
    pub fn fabric(&mut self) -> &mut dyn Fabric {
        &mut *self.fabric
    }

    /// Ends this rank's part in the group in good order.
    pub fn leave(self) -> Result<(), RuntimeError> {
        Ok(self.fabric.leave()?)
    }

    /// The stated bandwidth.
    pub fn link(&self) -> Link {
        self.link
    }

    /// A collective that is a synchronisation point: clocks become their maximum plus the time of `bytes` on the busiest
    /// link, charged to `part`.
    pub fn collective(&mut self, op: Operation<'_>, part: Part, bytes: u64) -> Result<Completion, RuntimeError> {
        let stamp = self.clock.arrive();
        let done = self.fabric.run_stamped(op, stamp)?;
        self.clock.depart(done.stamp, part, self.link.transfer_ns(bytes));
        Ok(done)
    }

    /// An operation beside the computation: the clock stands still, and stays so; `stamp` travels, and the completion has
    /// the largest.
    pub(crate) fn aside(&mut self, op: Operation<'_>, stamp: u64) -> Result<Completion, RuntimeError> {
        self.clock.pause();
        Ok(self.fabric.run_stamped(op, stamp)?)
    }

    /// Sums `data` (`f32`) over all ranks, in place, charged as a ring: each link moves it nearly twice.
    pub fn all_reduce(&mut self, data: &Region, part: Part) -> Result<(), RuntimeError> {
        let bytes = data.bytes();
        let ranks = self.ranks() as u64;
        let moved = 2 * bytes as u64 * (ranks - 1) / ranks;
        let span = Span::part(data, 0, bytes);
        self.collective(Operation::AllReduceSumF32 { data: span }, part, moved)?;
        Ok(())
    }

    /// Gathers `send` of every rank into `recv`, in rank order.
    pub fn all_gather(&mut self, send: &Region, recv: &Region, part: Part) -> Result<(), RuntimeError> {
        let bytes = send.bytes();
        let moved = (bytes * (self.ranks() - 1)) as u64;
        let op = Operation::AllGather { send: Span::part(send, 0, bytes), recv: Span::whole(recv) };
        self.collective(op, part, moved)?;
        Ok(())
    }

    /// As [`Endpoint::all_gather`], beside the computation.
    pub(crate) fn gather_aside(&mut self, send: &Region, recv: &Region) -> Result<(), RuntimeError> {
        self.aside(Operation::AllGather { send: Span::whole(send), recv: Span::whole(recv) }, 0)?;
        Ok(())
    }

    /// Waits in virtual time for `deadline`.
    pub(crate) fn join(&mut self, deadline: Deadline, part: Part) {
        self.clock.join(deadline, part);
    }

    /// Ends a step: a last synchronisation point, then what the step took, the same on every rank. The clock stands still
    /// until [`VirtualClock::enter`]: what lies between two steps (reports, checkpoints) is in neither.
    pub fn finish_step(&mut self) -> Result<StepTime, RuntimeError> {
        self.collective(Operation::Barrier, Part::Optimizer, 0)?;
        self.clock.pause();
        let segments = self.clock.take_segments(&mut self.words);
        let send = Region::from_vec(std::mem::take(&mut self.words));
        let recv = Region::zeroed(send.bytes() * self.ranks());
        let op = Operation::AllGather { send: Span::whole(&send), recv: Span::whole(&recv) };
        self.aside(op, 0)?;
        let time = StepTime::critical_path(&recv.read::<u64>()?, segments);
        Ok(time)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use ultraep_fabric::{GroupSpec, run_threads};

    use super::*;

    thread_local!(static FAKE: Cell<u64> = const { Cell::new(0) });

    fn advance(ns: u64) {
        FAKE.set(FAKE.get() + ns);
    }

    /// Runs `check` on the endpoint of a group of one, whose clock only [`advance`] moves.
    fn alone(check: impl Fn(&mut Endpoint) -> Result<(), RuntimeError> + Sync) {
        let result = run_threads(&GroupSpec::new(1), |fabric| {
            let mut endpoint = Endpoint::new(fabric, Link::default());
            endpoint.clock = VirtualClock::with_source(|| FAKE.get());
            check(&mut endpoint)?;
            endpoint.leave()
        });
        result.unwrap_or_else(|error| panic!("{error}"));
    }

    #[test]
    fn operations_beside_the_computation_do_not_start_the_clock() {
        alone(|endpoint| {
            endpoint.clock.enter(Part::Plan);
            advance(3);
            endpoint.clock.pause();
            endpoint.aside(Operation::Barrier, 0)?;
            advance(5);
            endpoint.clock.pause();
            assert_eq!(endpoint.clock.now_ns(), 3);
            Ok(())
        });
    }

    #[test]
    fn what_lies_between_two_steps_is_in_neither() {
        alone(|endpoint| {
            endpoint.clock.enter(Part::Optimizer);
            advance(3);
            assert_eq!(endpoint.finish_step()?.part_ns(Part::Optimizer), 3);
            advance(100);
            endpoint.clock.enter(Part::Dense);
            advance(4);
            let time = endpoint.finish_step()?;
            assert_eq!((time.total_ns, time.part_ns(Part::Dense)), (4, 4));
            Ok(())
        });
    }
}
