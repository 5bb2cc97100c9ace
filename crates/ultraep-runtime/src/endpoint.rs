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
        let done = self.fabric.run(op, stamp)?;
        self.clock.depart(done.stamp, part, self.link.transfer_ns(bytes));
        Ok(done)
    }

    /// An operation beside the computation: the clock stands still; `stamp` travels, and the completion has the largest.
    pub(crate) fn aside(&mut self, op: Operation<'_>, stamp: u64) -> Result<Completion, RuntimeError> {
        self.clock.pause();
        let done = self.fabric.run(op, stamp)?;
        self.clock.resume();
        Ok(done)
    }

    /// Sums `data` (`f32`) over all ranks, in place, charged as a ring: each link moves it nearly twice.
    pub fn all_reduce(&mut self, data: &Region, part: Part) -> Result<(), RuntimeError> {
        let bytes = data.bytes();
        let ranks = self.ranks() as u64;
        let moved = 2 * bytes as u64 * (ranks - 1) / ranks;
        let span = Span { region: data.clone(), offset: 0, bytes };
        self.collective(Operation::AllReduceSumF32 { data: span }, part, moved)?;
        Ok(())
    }

    /// Gathers `send` of every rank into `recv`, in rank order.
    pub fn all_gather(&mut self, send: &Region, recv: &Region, part: Part) -> Result<(), RuntimeError> {
        let bytes = send.bytes();
        let moved = (bytes * (self.ranks() - 1)) as u64;
        let op = Operation::AllGather {
            send: Span { region: send.clone(), offset: 0, bytes },
            recv: Span { region: recv.clone(), offset: 0, bytes: recv.bytes() },
        };
        self.collective(op, part, moved)?;
        Ok(())
    }

    /// Waits in virtual time for `deadline`.
    pub(crate) fn join(&mut self, deadline: Deadline, part: Part) {
        self.clock.join(deadline, part);
    }

    /// Ends a step: a last synchronisation point, then what the step took, the same on every rank.
    pub fn finish_step(&mut self) -> Result<StepTime, RuntimeError> {
        self.collective(Operation::Barrier, Part::Optimizer, 0)?;
        let segments = self.clock.take_segments(&mut self.words);
        let send = Region::from_vec(std::mem::take(&mut self.words));
        let recv = Region::zeroed(send.bytes() * self.ranks());
        let op = Operation::AllGather {
            send: Span { region: send.clone(), offset: 0, bytes: send.bytes() },
            recv: Span { region: recv.clone(), offset: 0, bytes: recv.bytes() },
        };
        self.aside(op, 0)?;
        let time = StepTime::critical_path(&recv.read::<u64>()?, segments);
        Ok(time)
    }
}
