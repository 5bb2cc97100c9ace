//! Sees ranks die: a thread that sleeps on their sockets, which the kernel closes whatever happens to a process.

use crate::backend::Failure;
use crate::shared::{Gone, Segment};
use crate::{FabricError, Loss};
use rustix::event::{PollFd, PollFlags, poll};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use ultraep_plan::Rank;

/// The watch over some ranks. Dropping it ends the thread and closes the sockets, which others take for this rank's end: its status
/// must say by then that it has gone.
pub(crate) struct Watch {
    /// Closing it ends the thread.
    stop: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Watches `peers` for `rank`.
    pub(super) fn start(
        segment: &Arc<Segment>,
        rank: Rank,
        peers: Vec<(Rank, UnixStream)>,
    ) -> Result<Self, FabricError> {
        let failed = |error| FabricError::os("watch the group's ranks", error);
        let (stop, stopped) = UnixStream::pair().map_err(failed)?;
        let segment = Arc::clone(segment);
        let thread = thread::Builder::new().name(format!("watch of rank {rank}"));
        let thread = thread.spawn(move || watch(&segment, rank, peers, &stopped)).map_err(failed)?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It does not panic; if it did, it has said so.
            let _ = thread.join();
        }
    }
}

fn watch(segment: &Segment, rank: Rank, mut peers: Vec<(Rank, UnixStream)>, stopped: &UnixStream) {
    loop {
        // Ranks say nothing once they have joined: what there is to see is the end.
        let mut handles: Vec<PollFd<'_>> = vec![PollFd::new(stopped, PollFlags::IN)];
        handles.extend(peers.iter().map(|(_, stream)| PollFd::new(stream, PollFlags::IN)));
        match poll(&mut handles, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            // No memory for it: the timeout still names who is gone.
            Err(_) => return,
        }
        if !handles[0].revents().is_empty() {
            return;
        }
        let closed: Vec<bool> = handles[1..].iter().map(|handle| !handle.revents().is_empty()).collect();
        drop(handles);
        let gone = peers.iter().zip(&closed).filter(|(_, closed)| **closed).map(|((peer, _), _)| *peer);
        for peer in gone {
            // Who waits for tiles or a signal of a rank that dropped its endpoint waits where that rank could not see it.
            let loss = match segment.control(peer).status.gone() {
                None => Some(Loss::Vanished),
                Some(Gone::Dropped) => Some(Loss::Dropped),
                Some(Gone::Left) => None,
            };
            if let Some(loss) = loss {
                segment.fail(rank, &Failure::Lost { rank: peer, loss });
            } else if segment.has_failed() {
                // It may have died before it woke the others.
                segment.wake_all_failed();
            }
        }
        let mut closed = closed.into_iter();
        peers.retain(|_| !closed.next().unwrap_or(false));
    }
}
