//! The trait that carries every backend.

use crate::stream::Direct;
use crate::{Completion, FabricError, Operation, Region, Ticket, WindowId};
use ultraep_plan::Rank;

/// What a backend may do or not. Everything else each one does; the conformance suite skips, aloud, what needs one of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// [`Fabric::direct`] gives loads and stores to peers' windows.
    pub direct: bool,
    /// [`Operation::Send`] and [`Operation::Recv`]. A fabric that has no direct access should offer them: experts then move as
    /// messages.
    pub point_to_point: bool,
    /// `GroupSpec::cores` is obeyed.
    pub core_permits: bool,
    /// Collectives carry the stamps of [`Fabric::submit_stamped`]. Without this every stamp is ignored and every completion's is 0.
    pub stamps: bool,
}

/// One rank's endpoint of a group.
///
/// Nothing here says that a rank is a thread, or that memory is the host's: operations are plain structs that a backend
/// may queue, and a host view of memory is [`Region::read`]/[`Region::write`], which a device's memory refuses.
///
/// # What may be in flight
/// Any number of one-sided operations, sends and receives, and one collective beside them (a second is refused with
/// [`FabricError::InFlight`]; so is a `Close` of a window that a send or receive is using). Collectives complete in the order of submission, the same on each rank. One-sided
/// operations complete in any order, except that a `Signal` follows all puts that the rank submitted before it. `Open`
/// allows puts and gets once it is *complete*, `Close` forbids them once it is *submitted*. A region is taken as long as
/// an operation that uses it is in flight: shared if it only reads it, alone if it writes it.
///
/// # Errors
/// A refused call (access, range, in flight) changes nothing and the group goes on. The first failure of the group
/// ([`FabricError::ends_group`]) ends it: every later call of every rank returns that same cause at once.
pub trait Fabric: Send {
    /// This rank.
    fn rank(&self) -> Rank;

    /// Ranks of the group, `N`.
    fn ranks(&self) -> usize;

    /// What this backend can do.
    fn capabilities(&self) -> Capabilities;

    /// The own part of a window; `None` when there is no such window, or the backend's windows are not host memory.
    fn window(&self, id: WindowId) -> Option<Region>;

    /// Starts an operation; never blocks. `stamp` is a logical time: a collective completes with the largest of all ranks'. It is for
    /// who measures; a backend may ignore it ([`Capabilities::stamps`]).
    ///
    /// # Errors
    /// As for the trait.
    fn submit_stamped(&mut self, operation: Operation<'_>, stamp: u64) -> Result<Ticket, FabricError>;

    /// Starts an operation; never blocks.
    ///
    /// # Errors
    /// As for the trait.
    fn submit(&mut self, operation: Operation<'_>) -> Result<Ticket, FabricError> {
        self.submit_stamped(operation, 0)
    }

    /// Moves operations on and looks whether this one is complete; never blocks and keeps the core permit: poll beside
    /// other work, then [`Fabric::wait`]. The completion of a collective is given out once.
    ///
    /// # Errors
    /// As for the trait; [`FabricError::UnknownTicket`].
    fn poll(&mut self, ticket: &Ticket) -> Result<Option<Completion>, FabricError>;

    /// Blocks until the operation is complete; the core permit is with others meanwhile.
    ///
    /// # Errors
    /// As for the trait; [`FabricError::Timeout`] after the group's timeout.
    fn wait(&mut self, ticket: Ticket) -> Result<Completion, FabricError>;

    /// Submits and waits.
    ///
    /// # Errors
    /// As for [`Fabric::submit`] and [`Fabric::wait`].
    fn run(&mut self, operation: Operation<'_>) -> Result<Completion, FabricError> {
        self.run_stamped(operation, 0)
    }

    /// Submits with a stamp and waits.
    ///
    /// # Errors
    /// As for [`Fabric::submit_stamped`] and [`Fabric::wait`].
    fn run_stamped(&mut self, operation: Operation<'_>, stamp: u64) -> Result<Completion, FabricError> {
        let ticket = self.submit_stamped(operation, stamp)?;
        self.wait(ticket)
    }

    /// Loads and stores to peers' parts of open windows, where windows are memory of this machine; `None` where they are not, and
    /// put and get must do.
    fn direct(&mut self) -> Option<&mut dyn Direct> {
        None
    }

    /// Ends this rank's part properly. Dropping an endpoint instead means that the rank was lost: ranks that wait for it,
    /// or come to need it, get [`FabricError::PeerLost`] (as they do when it leaves before a collective that they run).
    ///
    /// # Errors
    /// The group's failure; [`FabricError::InFlight`] with a collective in flight, which loses the rank.
    fn leave(self: Box<Self>) -> Result<(), FabricError>;
}
