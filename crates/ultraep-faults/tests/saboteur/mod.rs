//! A fabric that does one operation of its rank wrong.

use ultraep_fabric::{
    Capabilities, Completion, Fabric, FabricError, Operation, Region, RemoteSpan, Span, Ticket, WindowId,
};
use ultraep_plan::Rank;

/// What is done wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bug {
    /// The first put is not done.
    LosesAPut,
    /// The first put goes to the place beside the right one.
    MisplacesAPut,
    /// The first put is done once the window is being closed.
    PutsAfterClose,
    /// The first get is not done.
    LosesAGet,
    /// A barrier instead of the first all-to-all.
    OtherCollective,
}

pub(crate) struct Saboteur {
    inner: Box<dyn Fabric>,
    bug: Option<Bug>,
    late: Option<(Span, Vec<RemoteSpan>)>,
}

impl Saboteur {
    pub(crate) fn new(inner: Box<dyn Fabric>, bug: Option<Bug>) -> Self {
        Self { inner, bug, late: None }
    }

    fn nothing(&mut self, stamp: u64) -> Result<Ticket, FabricError> {
        let from = Span::part(&Region::zeroed(0), 0, 0);
        self.inner.submit_stamped(Operation::Put { from, to: &[] }, stamp)
    }
}

impl Fabric for Saboteur {
    fn rank(&self) -> Rank {
        self.inner.rank()
    }

    fn ranks(&self) -> usize {
        self.inner.ranks()
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    fn window(&self, id: WindowId) -> Option<Region> {
        self.inner.window(id)
    }

    fn submit_stamped(&mut self, operation: Operation<'_>, stamp: u64) -> Result<Ticket, FabricError> {
        match (self.bug, operation) {
            (Some(Bug::LosesAPut), Operation::Put { .. }) | (Some(Bug::LosesAGet), Operation::Get { .. }) => {
                self.bug = None;
                self.nothing(stamp)
            }
            (Some(Bug::MisplacesAPut), Operation::Put { from, to }) => {
                self.bug = None;
                let beside =
                    |to: &RemoteSpan| RemoteSpan { offset: if to.offset == 0 { from.bytes } else { 0 }, ..*to };
                let to: Vec<_> = to.iter().map(beside).collect();
                self.inner.submit_stamped(Operation::Put { from, to: &to }, stamp)
            }
            (Some(Bug::PutsAfterClose), Operation::Put { from, to }) if self.late.is_none() => {
                self.late = Some((from, to.to_vec()));
                self.nothing(stamp)
            }
            (Some(Bug::PutsAfterClose), Operation::Close { window }) => {
                let ticket = self.inner.submit_stamped(Operation::Close { window }, stamp)?;
                if let Some((from, to)) = self.late.take() {
                    self.inner.run_stamped(Operation::Put { from, to: &to }, stamp)?;
                }
                Ok(ticket)
            }
            (Some(Bug::OtherCollective), Operation::AllToAll { .. }) => {
                self.bug = None;
                self.inner.submit_stamped(Operation::Barrier, stamp)
            }
            (_, operation) => self.inner.submit_stamped(operation, stamp),
        }
    }

    fn poll(&mut self, ticket: &Ticket) -> Result<Option<Completion>, FabricError> {
        self.inner.poll(ticket)
    }

    fn wait(&mut self, ticket: Ticket) -> Result<Completion, FabricError> {
        self.inner.wait(ticket)
    }

    fn leave(self: Box<Self>) -> Result<(), FabricError> {
        self.inner.leave()
    }
}
