//! EP ranks as processes of this machine, over one shared memory segment.
//!
//! [`launch`] makes the segment (an anonymous memory file of sealed size, never a name in the file system), starts one
//! process a rank, and returns the [`Group`] that supervises them. Each process calls [`join`] with the [`JoinInfo`] from its
//! command line, which names the launcher's descriptor: the process opens the file behind it anew, so that no descriptor of its
//! own is touched, whatever the text says. A child that dies marks its rank lost in the segment, so that the
//! others end with an error that names it; children die with the parent; the segment goes with the last mapping.

use crate::backend::Identity;
use crate::failure::Failure;
use crate::shared::{Endpoint, Layout, Patience, SEALS, Segment};
use crate::sync::Ordering;
use crate::{Fabric, FabricError, GroupError, GroupSpec, JoinError, Loss, OperationKind, ProcessEnd};
use core::fmt;
use core::marker::PhantomData;
use core::str::FromStr;
use core::time::Duration;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use rustix::fs::{MemfdFlags, Mode, OFlags, fcntl_add_seals, ftruncate, memfd_create, open};
use rustix::process::{
    Pid, PidfdFlags, Signal, getpid, getppid, pidfd_open, pidfd_send_signal, set_parent_process_death_signal,
};
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStderr, ChildStdout, Command, ExitStatus};
use std::sync::Arc;
use ultraep_plan::Rank;

/// After a failure the other ranks have this long (or the group's timeout, if that is shorter) to end by themselves.
pub const GRACE: Duration = Duration::from_secs(10);

/// Longest sleep of the supervisor before it looks for failures that no child's end announces.
const NAP: Duration = Duration::from_millis(50);

/// What a rank's process needs to join. Travels as text on its command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JoinInfo {
    launcher: u32,
    fd: u32,
    rank: Rank,
}

impl JoinInfo {
    /// The rank to join as.
    #[must_use]
    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// Opens the launcher's segment. What is behind the descriptor is looked at afterwards; opening has no effect on it.
    fn open(&self) -> io::Result<OwnedFd> {
        // Without blocking, should it be a pipe, and without becoming anyone's terminal.
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        Ok(open(format!("/proc/{}/fd/{}", self.launcher, self.fd), flags, Mode::empty())?)
    }
}

impl fmt::Display for JoinInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.launcher, self.fd, self.rank)
    }
}

/// Text that is no [`JoinInfo`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not LAUNCHER:DESCRIPTOR:RANK")]
pub struct BadJoinInfo(pub String);

impl FromStr for JoinInfo {
    type Err = BadJoinInfo;

    fn from_str(text: &str) -> Result<Self, BadJoinInfo> {
        let parse = || {
            let (launcher, rest) = text.split_once(':')?;
            let (fd, rank) = rest.split_once(':')?;
            let (launcher, fd) = (launcher.parse().ok()?, fd.parse().ok()?);
            Some(Self { launcher, fd, rank: Rank::new(usize::from(rank.parse::<u16>().ok()?)) })
        };
        parse().ok_or_else(|| BadJoinInfo(text.to_owned()))
    }
}

/// Starts a group: one process a rank, each from the command that `command` makes. It must pass the [`JoinInfo`] on (as
/// text in an argument) to a program that calls [`join`] with an equal `spec`.
///
/// The children die with the *thread* that calls this (a property of the parent-death signal), which is why a [`Group`]
/// stays on its thread.
///
/// # Errors
/// [`FabricError::Spec`], or [`FabricError::Os`] when the segment cannot be made or a process not started; processes started
/// before are then killed and reaped.
pub fn launch(spec: &GroupSpec, mut command: impl FnMut(Rank, JoinInfo) -> Command) -> Result<Group, FabricError> {
    let layout = Layout::new(spec)?;
    let file = memory_file(layout.total_bytes)?;
    let segment = Segment::map(file.as_fd(), layout)?;
    segment.initialise(spec);
    let mut group = Group {
        segment,
        file,
        members: Vec::new(),
        timeout: spec.timeout,
        failed: None,
        ended: None,
        _thread: PhantomData,
    };
    for rank in group.segment.ranks() {
        let info = JoinInfo { launcher: std::process::id(), fd: group.file.as_raw_fd().unsigned_abs(), rank };
        // On an error the group is dropped, which kills and reaps the members so far.
        group.members.push(Member::start(command(rank, info))?);
    }
    Ok(group)
}

pub(crate) fn memory_file(bytes: usize) -> Result<OwnedFd, FabricError> {
    let failed = |call| move |error: rustix::io::Errno| FabricError::os(call, error);
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = memfd_create(c"ultraep-fabric", flags).map_err(failed("memfd_create"))?;
    ftruncate(&file, bytes as u64).map_err(failed("ftruncate"))?;
    fcntl_add_seals(&file, SEALS).map_err(failed("seal the segment"))?;
    Ok(file)
}

/// Takes a rank's place in a group that [`launch`] has started.
///
/// # Errors
/// [`FabricError::Join`] when `spec` differs from the group's (protocol version, config digest, ranks, windows), when the
/// rank has joined already, or when the descriptor is not a group's segment. The group's failure, if it has failed already.
pub fn join(spec: &GroupSpec, info: JoinInfo) -> Result<Box<dyn Fabric>, FabricError> {
    let rank = info.rank;
    let refuse = |reason| FabricError::Join { rank, reason };
    let not_a_segment = JoinError::NotASegment { launcher: info.launcher, fd: info.fd };
    let file = info.open().map_err(|_| refuse(not_a_segment.clone()))?;
    let (group, bytes) = Segment::identity(file.as_fd()).ok_or_else(|| refuse(not_a_segment))?;
    let layout = check_identity(spec, &group, bytes).map_err(refuse)?;
    if rank.index() >= layout.ranks {
        return Err(refuse(JoinError::NoSuchRank { ranks: group.ranks }));
    }
    take_place(spec, rank, Segment::map(file.as_fd(), layout)?)
}

/// Becomes `rank` of the group with this segment, unless someone is already.
fn take_place(spec: &GroupSpec, rank: Rank, segment: Segment) -> Result<Box<dyn Fabric>, FabricError> {
    if !segment.control(rank).status.start() {
        return Err(FabricError::Join { rank, reason: JoinError::Taken });
    }
    segment.control(rank).process.store(std::process::id(), Ordering::Relaxed);
    let mut endpoint = Endpoint::new(Arc::new(segment), rank, spec)?;
    endpoint.start()?;
    Ok(Box::new(endpoint))
}

/// Whether a segment of this identity and size is that of a group with this specification.
fn check_identity(spec: &GroupSpec, group: &Identity, bytes: usize) -> Result<Layout, JoinError> {
    let layout = Layout::new(spec);
    // A specification that cannot be laid out is not the group's.
    group.admit(&Identity::new(spec, layout.as_ref().map_or(0, |layout| layout.digest)))?;
    match layout {
        Ok(layout) if bytes >= layout.total_bytes => Ok(layout),
        Ok(layout) => Err(JoinError::Truncated { expected: layout.total_bytes, got: bytes }),
        Err(_) => Err(JoinError::Layout { expected: group.layout_digest, got: 0 }),
    }
}

/// The processes of a group, supervised from the thread that launched them. Dropping it kills and reaps those that live.
pub struct Group {
    segment: Segment,
    /// What the processes open when they join.
    file: OwnedFd,
    members: Vec<Member>,
    timeout: Duration,
    /// Since the supervisor first saw that the group has failed.
    failed: Option<Patience>,
    /// Since a process ended last.
    ended: Option<Patience>,
    _thread: PhantomData<*const ()>,
}

struct Member {
    child: Child,
    /// Names the process even if its number is taken again.
    handle: OwnedFd,
    status: Option<ExitStatus>,
}

impl Member {
    fn start(mut command: Command) -> Result<Self, FabricError> {
        let parent = getpid();
        let prepare = move || -> io::Result<()> {
            set_parent_process_death_signal(Some(Signal::KILL))?;
            if getppid() != Some(parent) {
                // The parent died before the signal was set up.
                return Err(io::ErrorKind::NotConnected.into());
            }
            Ok(())
        };
        // SAFETY: between fork and exec the closure makes two system calls and nothing else: no allocation, no lock.
        unsafe { command.pre_exec(prepare) };
        let mut child = command.spawn().map_err(|error| FabricError::os("start a rank's process", error))?;
        match pidfd_open(Pid::from_child(&child), PidfdFlags::empty()) {
            Ok(handle) => Ok(Self { child, handle, status: None }),
            Err(error) => {
                // Nothing better can be done about errors here: the child is being given up.
                let _ = child.kill();
                let _ = child.wait();
                Err(FabricError::os("pidfd_open", error))
            }
        }
    }

    fn kill(&self) {
        if self.status.is_none() {
            // It fails if the process has just ended, which is what is wanted.
            let _ = pidfd_send_signal(&self.handle, Signal::KILL);
        }
    }
}

impl Group {
    /// Kills the process of a rank; the others end with an error that names it.
    pub fn kill(&self, rank: Rank) {
        if let Some(member) = self.members.get(rank.index()) {
            member.kill();
        }
    }

    /// Sends `SIGUSR1` to the process of a rank, for whatever it takes that to mean; one that has ended gets nothing.
    pub fn notify(&self, rank: Rank) {
        if let Some(member) = self.members.get(rank.index()).filter(|member| member.status.is_none()) {
            // It fails if the process has just ended: nobody is left to be told.
            let _ = pidfd_send_signal(&member.handle, Signal::USR1);
        }
    }

    /// The process id of a rank.
    #[must_use]
    pub fn process_id(&self, rank: Rank) -> Option<u32> {
        self.members.get(rank.index()).map(|member| member.child.id())
    }

    /// The standard output of a rank, if its command piped it.
    pub fn take_stdout(&mut self, rank: Rank) -> Option<ChildStdout> {
        self.members.get_mut(rank.index())?.child.stdout.take()
    }

    /// The standard error of a rank, if its command piped it.
    pub fn take_stderr(&mut self, rank: Rank) -> Option<ChildStderr> {
        self.members.get_mut(rank.index())?.child.stderr.take()
    }

    /// Supervises until all ranks have ended, and reaps them.
    ///
    /// A child that ended by a signal, with a code other than 0, or without leaving, marks its rank lost. When some have left
    /// and ended, those that have neither left nor ended are named after the group's timeout. After the first
    /// failure the rest have [`GRACE`] to end by themselves, then they are killed.
    ///
    /// # Errors
    /// [`GroupError`] names the rank that failed first and how its process ended.
    pub fn wait(mut self) -> Result<(), GroupError> {
        while !self.supervise(NAP)? {}
        self.result()
    }

    /// Supervises for at most `limit` (less when something happens); whether all ranks have ended, so that
    /// [`Group::wait`] returns at once. For callers with something to do meanwhile.
    ///
    /// # Errors
    /// [`FabricError::Os`] when the processes cannot be watched.
    pub fn supervise(&mut self, limit: Duration) -> Result<bool, FabricError> {
        self.watch(limit.min(NAP))?;
        for index in 0..self.members.len() {
            let member = &mut self.members[index];
            if member.status.is_some() {
                continue;
            }
            let ended = member.child.try_wait().map_err(|error| FabricError::os("wait for a rank's process", error))?;
            if let Some(status) = ended {
                member.status = Some(status);
                self.ended = Some(Patience::new(self.timeout));
                self.ended(Rank::new(index), status);
            }
        }
        if !self.segment.has_failed() {
            self.expect_to_leave();
        }
        if self.segment.has_failed() {
            let grace = GRACE.min(self.timeout);
            let left = self.failed.get_or_insert_with(|| Patience::new(grace)).left();
            // The rank that found the failure may have died before it woke the others.
            self.segment.wake_all_failed();
            if left.is_zero() {
                self.members.iter().for_each(Member::kill);
            }
        }
        Ok(self.members.iter().all(|member| member.status.is_some()))
    }

    /// A rank that has left needs no other, so nobody but the supervisor waits for those that have not: they have as long as
    /// any wait.
    fn expect_to_leave(&mut self) {
        let Some(ended) = self.ended.as_mut() else { return };
        if !ended.left().is_zero() {
            return;
        }
        let waited = ended.waited();
        let ranks = || self.segment.ranks().zip(&self.members);
        let in_group = |rank: &Rank| self.segment.control(*rank).status.is_in_group();
        let alive = ranks().filter(|(_, member)| member.status.is_none()).map(|(rank, _)| rank);
        let missing: Vec<Rank> = alive.filter(in_group).collect();
        // The record of a rank whose process has ended: nobody else writes it any more, and the first failure, which there was
        // not when the process ended, is not in it.
        let ended = ranks().find(|(_, member)| member.status.is_some());
        if let Some((reporter, _)) = ended.filter(|_| !missing.is_empty()) {
            self.segment.fail(reporter, &self.segment.late(missing, OperationKind::Leave, waited));
        }
    }

    /// Sleeps until a living member ends, at most `limit`.
    fn watch(&self, limit: Duration) -> Result<(), FabricError> {
        let alive = self.members.iter().filter(|member| member.status.is_none());
        let mut handles: Vec<PollFd<'_>> = alive.map(|member| PollFd::new(&member.handle, PollFlags::IN)).collect();
        let limit = Timespec { tv_sec: 0, tv_nsec: limit.subsec_nanos().into() };
        match poll(&mut handles, Some(&limit)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(FabricError::os("poll", error)),
        }
    }

    /// A rank's process has ended: unless it ended well, the rank is lost.
    fn ended(&self, rank: Rank, status: ExitStatus) {
        let in_group = self.segment.control(rank).status.is_in_group();
        let loss = match (status.signal(), status.code()) {
            (Some(signal), _) => Loss::Killed { signal },
            (None, code) => Loss::Exited { code: code.unwrap_or(0) },
        };
        if !status.success() || in_group {
            self.segment.fail(rank, &Failure::Lost { rank, loss });
        }
    }

    fn result(&self) -> Result<(), GroupError> {
        let Some(error) = self.segment.failure_error(OperationKind::Compute) else { return Ok(()) };
        let rank = error.culprit().unwrap_or(Rank::new(0));
        let status = self.members.get(rank.index()).and_then(|member| member.status);
        let end = status.filter(|status| !status.success()).map(|status| match (status.signal(), status.code()) {
            (Some(signal), _) => ProcessEnd::Killed(signal),
            (None, code) => ProcessEnd::Exited(code.unwrap_or(0)),
        });
        Err(match (&error, end) {
            (FabricError::PeerLost { .. }, Some(error)) => GroupError::Failed { rank, error },
            _ => GroupError::Fabric { rank, error },
        })
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.members.iter().for_each(Member::kill);
        for member in self.members.iter_mut().filter(|member| member.status.is_none()) {
            // Killed above; a wait that fails has nothing to reap.
            let _ = member.child.wait();
        }
    }
}
