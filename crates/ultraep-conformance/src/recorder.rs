//! A fabric that remembers the first error that ended its group: for groups that nobody supervises.

use std::sync::{Arc, Mutex, PoisonError};
use ultraep_fabric::stream::Direct;
use ultraep_fabric::{Capabilities, Completion, Fabric, FabricError, Operation, Region, Ticket, WindowId};
use ultraep_plan::Rank;

/// What a rank saw of the group's failure: the culprit and the text.
pub(crate) type Seen = Arc<Mutex<Option<(Option<Rank>, String)>>>;

pub(crate) struct Recorder {
    /// Gone once the rank has left.
    inner: Option<Box<dyn Fabric>>,
    rank: Rank,
    seen: Seen,
}

impl Recorder {
    pub(crate) fn boxed(inner: Box<dyn Fabric>, seen: &Seen) -> Box<dyn Fabric> {
        let rank = inner.rank();
        Box::new(Self { inner: Some(inner), rank, seen: Arc::clone(seen) })
    }

    fn inner(&mut self) -> &mut dyn Fabric {
        &mut **self.inner.as_mut().expect("used after leaving only by its own drop")
    }

    fn note<T>(seen: &Seen, result: Result<T, FabricError>) -> Result<T, FabricError> {
        if let Err(error) = &result
            && error.ends_group()
        {
            let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            seen.get_or_insert_with(|| (error.culprit(), error.to_string()));
        }
        result
    }
}

impl Fabric for Recorder {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.inner.as_ref().map_or(0, |inner| inner.ranks())
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.as_ref().expect("as above").capabilities()
    }

    fn window(&self, id: WindowId) -> Option<Region> {
        self.inner.as_ref()?.window(id)
    }

    fn submit_stamped(&mut self, operation: Operation<'_>, stamp: u64) -> Result<Ticket, FabricError> {
        let result = self.inner().submit_stamped(operation, stamp);
        Self::note(&self.seen, result)
    }

    fn poll(&mut self, ticket: &Ticket) -> Result<Option<Completion>, FabricError> {
        let result = self.inner().poll(ticket);
        Self::note(&self.seen, result)
    }

    fn wait(&mut self, ticket: Ticket) -> Result<Completion, FabricError> {
        let result = self.inner().wait(ticket);
        Self::note(&self.seen, result)
    }

    fn direct(&mut self) -> Option<&mut dyn Direct> {
        self.inner().direct()
    }

    fn leave(mut self: Box<Self>) -> Result<(), FabricError> {
        let left = self.inner.take().map_or(Ok(()), |inner| inner.leave());
        Self::note(&self.seen, left)
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        if let Some(mut inner) = self.inner.take() {
            // A wait of the tile engine sees failures beside the recorder. This operation has no effect but to return them.
            let probe = inner.submit(Operation::AwaitSignal { signal: 0, at_least: 0 });
            let _ = Self::note(&self.seen, probe);
        }
    }
}
