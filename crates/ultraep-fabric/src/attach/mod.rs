//! EP ranks as processes of one host that nobody forked from one parent: started by `torchrun`, `mpirun`, `srun` or by hand.
//!
//! ```text
//! rank 0 (leader)   makes the segment, a sealed memory file; listens on a Unix socket; writes its name into the store
//! other ranks       read the name from the store, connect, say who they are
//!   leader          compares identities (protocol, ranks, digests, vector instructions); hands the file's descriptor over the socket
//!   rank            maps it, and is a rank like any other
//! from then on      each rank watches the leader's socket, the leader all ranks': one that closes is a rank that is gone
//! ```
//!
//! The socket's name is abstract (no file), its peers must have the same user id. Several groups live in one process, each with its
//! own name; the ranks of a group may be any part of the processes that share the store.
//!
//! # How death is seen
//! The kernel closes a process's sockets, however it ends. Whoever sees one close looks at the rank's status in the segment: a rank
//! that has neither left nor dropped its endpoint has vanished; either that or a dropped endpoint ends the group with an error that names
//! it. The leader sees that of everyone until it leaves; who hangs is named after the timeout, as in every group.

mod handshake;
mod rendezvous;
mod store;
mod watch;

pub use rendezvous::{DEFAULT_PORT, Rendezvous, RendezvousError};
pub use store::{Store, StoreError, StoreServer, TcpStore};

use crate::backend::{Failure, Identity};
use crate::processes::memory_file;
use crate::shared::{Endpoint, Layout, Segment};
use crate::{Fabric, FabricError, GroupSpec, JoinError, Loss, OperationKind};
use handshake::{Answer, Hello};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};
use ultraep_plan::Rank;

pub(crate) use watch::Watch;

/// Takes the place of `rank` in the group `name` of `spec.ranks` processes of this host, which find each other through `store`.
/// All of them call this with equal names and specifications; rank 0 returns when all have come, which may take as long as `within`:
/// starting a job takes longer than any later wait should.
///
/// # Errors
/// [`FabricError::Join`] when this rank is refused; [`FabricError::Timeout`] of [`OperationKind::Join`], which names who has not come, on
/// those who have; [`FabricError::PeerLost`] when another was refused; [`FabricError::Spec`], [`FabricError::Os`] (the store's errors,
/// too).
pub fn attach(
    name: &str,
    rank: Rank,
    spec: &GroupSpec,
    store: &mut dyn Store,
    within: Duration,
) -> Result<Box<dyn Fabric>, FabricError> {
    let layout = Layout::new(spec)?;
    if rank.index() >= spec.ranks {
        return Err(FabricError::Join { rank, reason: JoinError::NoSuchRank { ranks: spec.ranks as u64 } });
    }
    let joining = Joining { key: format!("group/{name}"), rank, spec, since: Instant::now(), within };
    if rank.index() == 0 { joining.lead(layout, store) } else { joining.follow(layout, store) }
}

/// How long rank 0 may take to write why it no longer listens.
const WORD_WITHIN: Duration = Duration::from_secs(1);

/// A rank on its way in.
struct Joining<'a> {
    /// Of the leader's socket, in the store.
    key: String,
    rank: Rank,
    spec: &'a GroupSpec,
    since: Instant,
    within: Duration,
}

impl Joining<'_> {
    fn left(&self) -> Duration {
        self.within.saturating_sub(self.since.elapsed())
    }

    fn timeout(&self, missing: Vec<Rank>) -> Failure {
        Failure::Timeout { missing, operation: OperationKind::Join, waited: self.since.elapsed() }
    }

    fn refused(&self, reason: JoinError) -> FabricError {
        FabricError::Join { rank: self.rank, reason }
    }

    /// The key under which rank 0 leaves the failure of a group that did not come together.
    fn failed(&self) -> String {
        format!("{}/failed", self.key)
    }

    /// Why rank 0 no longer listens, if it has said so.
    fn why_closed(&self, store: &mut dyn Store, otherwise: FabricError) -> FabricError {
        let said = store.get(&self.failed(), self.left().min(WORD_WITHIN)).ok();
        let failure = said.and_then(|bytes| {
            let (words, _) = bytes.as_chunks::<8>();
            let words: Vec<u64> = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
            Failure::from_words(&words.try_into().ok()?)
        });
        failure.map_or(otherwise, |failure| failure.error(OperationKind::Join))
    }

    /// The part of rank 0.
    fn lead(&self, layout: Layout, store: &mut dyn Store) -> Result<Box<dyn Fabric>, FabricError> {
        let identity = Identity::new(self.spec, layout.digest);
        let file = memory_file(layout.total_bytes)?;
        let segment = Arc::new(Segment::map(file.as_fd(), layout)?);
        segment.initialise(self.spec);
        segment.control(self.rank).status.start();
        let (name, listener) = listen()?;
        store.set(&self.key, name.as_bytes()).map_err(store_failed)?;
        // Their sockets close after the failure is there for them to see.
        let mut members = Vec::new();
        match self.gather(&mut members, &listener, &segment, &identity, &file) {
            Ok(()) => {
                let watch = Watch::start(&segment, self.rank, members)?;
                self.start(segment, watch)
            }
            Err(failure) => {
                segment.fail(self.rank, &failure);
                // For those who come after this; that they cannot be told changes nothing here.
                let words = failure.to_words();
                let _ = store.set(&self.failed(), &words.map(u64::to_le_bytes).concat());
                Err(failure.error(OperationKind::Join))
            }
        }
    }

    /// Waits for all other ranks, and keeps their sockets.
    fn gather(
        &self,
        members: &mut Vec<(Rank, UnixStream)>,
        listener: &UnixListener,
        segment: &Segment,
        identity: &Identity,
        file: &OwnedFd,
    ) -> Result<(), Failure> {
        let came = |members: &[(Rank, UnixStream)], rank: Rank| members.iter().any(|(member, _)| *member == rank);
        while members.len() + 1 < segment.layout.ranks {
            let Some(stream) = accept(listener, self.left()) else {
                let missing = segment.ranks().filter(|&rank| rank != self.rank && !came(members, rank));
                return Err(self.timeout(missing.collect()));
            };
            // Who says nothing sensible is not a rank of ours: others may still come.
            let Ok(hello) = Hello::receive(&stream, self.left()) else { continue };
            let rank = hello.rank;
            let answer = if rank == self.rank || rank.index() >= segment.layout.ranks {
                Answer::NoSuchRank
            } else if came(members, rank) {
                Answer::Taken
            } else if identity.admit(&hello.identity).is_err() {
                Answer::Differs
            } else {
                Answer::Welcome
            };
            match (answer, answer.send(&stream, identity, file.as_fd())) {
                (Answer::Welcome, Ok(())) => members.push((rank, stream)),
                (Answer::Welcome, Err(_)) => return Err(Failure::Lost { rank, loss: Loss::Vanished }),
                (Answer::Differs, _) => return Err(Failure::Lost { rank, loss: Loss::Refused }),
                (Answer::Taken | Answer::NoSuchRank, _) => {}
            }
        }
        Ok(())
    }

    /// The part of every other rank.
    fn follow(&self, layout: Layout, store: &mut dyn Store) -> Result<Box<dyn Fabric>, FabricError> {
        let leader = Rank::new(0);
        let name = match store.get(&self.key, self.left()) {
            Err(StoreError::Timeout { .. }) => return Err(self.timeout(vec![leader]).error(OperationKind::Join)),
            name => name.map_err(store_failed)?,
        };
        let connected = SocketAddr::from_abstract_name(&name).and_then(|address| UnixStream::connect_addr(&address));
        let refused = |error| FabricError::os("connect to rank 0, on this host", error);
        let stream = connected.map_err(|error| self.why_closed(store, refused(error)))?;
        let identity = Identity::new(self.spec, layout.digest);
        let greeted = Hello { rank: self.rank, identity }.send(&stream);
        let answered = greeted.and_then(|()| Answer::receive(&stream, self.left()));
        let lost = Failure::Lost { rank: leader, loss: Loss::Vanished }.error(OperationKind::Join);
        let (answer, group, file) = answered.map_err(|_| self.why_closed(store, lost))?;
        match answer {
            Answer::Taken => return Err(self.refused(JoinError::Taken)),
            Answer::NoSuchRank => return Err(self.refused(JoinError::NoSuchRank { ranks: group.ranks })),
            Answer::Welcome | Answer::Differs => group.admit(&identity).map_err(|reason| self.refused(reason))?,
        }
        let file = file.ok_or_else(|| FabricError::os("rank 0's answer", "it has no memory file"))?;
        // What came over the socket is looked at as closely as what a launcher names.
        let expected = layout.total_bytes;
        let found = Segment::identity(file.as_fd()).filter(|(found, _)| *found == group);
        let got = found.map_or(0, |(_, bytes)| bytes);
        if got < expected {
            return Err(self.refused(JoinError::Truncated { expected, got }));
        }
        let segment = Arc::new(Segment::map(file.as_fd(), layout)?);
        if !segment.control(self.rank).status.start() {
            return Err(self.refused(JoinError::Taken));
        }
        let watch = Watch::start(&segment, self.rank, vec![(leader, stream)])?;
        self.start(segment, watch)
    }

    /// The endpoint of a rank whose place is taken.
    fn start(&self, segment: Arc<Segment>, watch: Watch) -> Result<Box<dyn Fabric>, FabricError> {
        let mut endpoint = Endpoint::new(segment, self.rank, self.spec)?.watched_by(watch);
        endpoint.start()?;
        Ok(Box::new(endpoint))
    }
}

fn store_failed(error: StoreError) -> FabricError {
    FabricError::os("the group's store", error)
}

/// A socket with a name that nobody has.
fn listen() -> Result<(String, UnixListener), FabricError> {
    let process = std::process::id();
    let mut attempt = 0u32;
    loop {
        let name = format!("ultraep-fabric/{process}/{attempt}");
        let bound = SocketAddr::from_abstract_name(&name).and_then(|address| UnixListener::bind_addr(&address));
        match bound {
            Ok(listener) => return Ok((name, listener)),
            // Another group of this process, or of a process with this number in another namespace.
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse && attempt < 10_000 => attempt += 1,
            Err(error) => return Err(FabricError::os("listen for the group's ranks", error)),
        }
    }
}

/// The next process of this user that connects, within `limit`.
fn accept(listener: &UnixListener, limit: Duration) -> Option<UnixStream> {
    let since = Instant::now();
    loop {
        let left = limit.saturating_sub(since.elapsed());
        let wait = Timespec { tv_sec: i64::try_from(left.as_secs()).ok()?, tv_nsec: left.subsec_nanos().into() };
        let mut handles = [PollFd::new(listener, PollFlags::IN)];
        match poll(&mut handles, Some(&wait)) {
            Ok(0) => return None,
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => return None,
        }
        let Ok((stream, _)) = listener.accept() else { continue };
        let peer = rustix::net::sockopt::socket_peercred(&stream);
        if peer.is_ok_and(|peer| peer.uid == rustix::process::geteuid()) {
            return Some(stream);
        }
    }
}
