//! What can go wrong, with who and where.

use crate::backend::VectorFamily;
use crate::operation::{Collective, OperationKind};
use core::fmt;
use core::time::Duration;
use ultraep_plan::Rank;

/// Why an operation could not be done.
///
/// `PeerLost`, `Timeout`, `Suspended`, `Mismatch` and `SizeMismatch` end the group: the first of them is what every later call of every
/// rank returns. The others concern one call of one rank, which changed nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FabricError {
    /// A rank is gone.
    #[error("rank {rank} was lost ({reason}): {operation} cannot complete")]
    PeerLost {
        /// Who is gone.
        rank: Rank,
        /// What the caller was doing.
        operation: OperationKind,
        /// How it went.
        reason: Loss,
    },
    /// A wait lasted longer than the group's timeout.
    #[error("{operation} timed out after {:.3} s: no sign of {}", waited.as_secs_f64(), RankList(missing))]
    Timeout {
        /// Who did not come, ascending.
        missing: Vec<Rank>,
        /// What was waited for.
        operation: OperationKind,
        /// How long.
        waited: Duration,
    },
    /// A wait lasted longer than the group's timeout because processes were stopped by a signal (SIGSTOP, Ctrl-Z) and did not go
    /// on. When all of the group are suspended together, that time counts for no wait.
    #[error("{operation} timed out after {:.3} s: suspended (stopped by a signal): {}", waited.as_secs_f64(), RankList(ranks))]
    Suspended {
        /// Whose processes, ascending.
        ranks: Vec<Rank>,
        /// What was waited for.
        operation: OperationKind,
        /// How long.
        waited: Duration,
    },
    /// Two ranks are in different collectives.
    #[error("ranks disagree: rank {rank} is in {operation}, rank {other} in {other_operation}")]
    Mismatch {
        /// One rank.
        rank: Rank,
        /// Where it is.
        operation: Collective,
        /// The other rank.
        other: Rank,
        /// Where that one is.
        other_operation: Collective,
    },
    /// Two ranks disagree on a block of an all-to-all, or on a message.
    #[error("rank {from} sends {sent_bytes} bytes to rank {to}, which expects {expected_bytes}")]
    SizeMismatch {
        /// The sender.
        from: Rank,
        /// The receiver.
        to: Rank,
        /// What the sender says.
        sent_bytes: u64,
        /// What the receiver says.
        expected_bytes: u64,
    },
    /// A region or window is in a state that does not allow this.
    #[error("{operation} on rank {rank}: {subject}: {source}")]
    Access {
        /// The operation.
        operation: OperationKind,
        /// Whose region or window: the caller for local spans.
        rank: Rank,
        /// Which operand.
        subject: &'static str,
        /// What forbids it.
        source: AccessError,
    },
    /// An operand points outside of what there is.
    #[error("{operation} on rank {rank}: {what} is {asked}, allowed {limit}")]
    OutOfRange {
        /// The operation.
        operation: OperationKind,
        /// The rank that the operand names; the caller for local spans.
        rank: Rank,
        /// Which operand, with its unit.
        what: &'static str,
        /// What was asked for.
        asked: usize,
        /// The largest allowed value, or the only one.
        limit: usize,
    },
    /// A collective was submitted while another is in flight on this rank.
    #[error("{operation} on rank {rank}: {in_flight} is still in flight")]
    InFlight {
        /// The one refused.
        operation: OperationKind,
        /// The caller.
        rank: Rank,
        /// The one in flight.
        in_flight: OperationKind,
    },
    /// A ticket that this endpoint never gave out or whose completion was already taken.
    #[error("ticket {id} is not in flight on rank {rank}")]
    UnknownTicket {
        /// The ticket's number.
        id: u64,
        /// The caller.
        rank: Rank,
    },
    /// A rank could not join its group.
    #[error("rank {rank} cannot join: {reason}")]
    Join {
        /// Who.
        rank: Rank,
        /// Why.
        reason: JoinError,
    },
    /// This backend's windows cannot be touched by loads and stores.
    #[error("rank {rank}: this fabric gives no direct access to windows")]
    NoDirectAccess {
        /// The caller.
        rank: Rank,
    },
    /// An operation that this backend does not have.
    #[error("rank {rank}: this fabric does not offer {operation}")]
    NotOffered {
        /// The operation.
        operation: OperationKind,
        /// The caller.
        rank: Rank,
    },
    /// The group cannot be started as specified.
    #[error("group of ranks: {what}: {asked} asked, at most {limit} possible")]
    Spec {
        /// Which part of the specification.
        what: &'static str,
        /// What was asked for.
        asked: usize,
        /// What is possible.
        limit: usize,
    },
    /// The operating system refused.
    #[error("{call}: {message}")]
    Os {
        /// The call.
        call: &'static str,
        /// Its error.
        message: String,
    },
}

impl FabricError {
    /// Wraps an error of the operating system.
    #[must_use]
    pub fn os(call: &'static str, error: impl fmt::Display) -> Self {
        Self::Os { call, message: error.to_string() }
    }

    /// Whether this error has ended the group.
    #[must_use]
    pub fn ends_group(&self) -> bool {
        matches!(
            self,
            Self::PeerLost { .. }
                | Self::Timeout { .. }
                | Self::Suspended { .. }
                | Self::Mismatch { .. }
                | Self::SizeMismatch { .. }
        )
    }

    /// The rank that an error of the group names as its cause.
    #[must_use]
    pub fn culprit(&self) -> Option<Rank> {
        match self {
            Self::PeerLost { rank, .. } | Self::Mismatch { rank, .. } | Self::Join { rank, .. } => Some(*rank),
            Self::SizeMismatch { from, .. } => Some(*from),
            Self::Timeout { missing, .. } => missing.first().copied(),
            Self::Suspended { ranks, .. } => ranks.first().copied(),
            _ => None,
        }
    }
}

/// How a rank was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Loss {
    /// It left before an operation that needs it.
    Left,
    /// Its endpoint was dropped without leaving: it ended early, or returned an error.
    Dropped,
    /// Its main returned an error.
    Failed,
    /// It panicked.
    Panicked,
    /// Its process was killed by this signal.
    Killed {
        /// The signal's number.
        signal: i32,
    },
    /// Its process ended with this code and without leaving.
    Exited {
        /// The exit code.
        code: i32,
    },
    /// It was refused when it joined.
    Refused,
    /// Its connection closed: its process has ended, or its machine is gone.
    Vanished,
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Left => f.write_str("it left before"),
            Self::Dropped => f.write_str("it dropped its endpoint"),
            Self::Failed => f.write_str("it returned an error"),
            Self::Panicked => f.write_str("it panicked"),
            Self::Killed { signal } => write!(f, "killed by signal {signal}"),
            Self::Exited { code } => write!(f, "exited with code {code} without leaving"),
            Self::Refused => f.write_str("it was refused when joining"),
            Self::Vanished => f.write_str("its connection closed"),
        }
    }
}

/// Why a rank was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum JoinError {
    /// What the launcher has under this number is not a fabric's segment, or cannot be opened.
    #[error("descriptor {fd} of process {launcher} is not the segment of a group")]
    NotASegment {
        /// The launcher's process id.
        launcher: u32,
        /// The launcher's descriptor.
        fd: u32,
    },
    /// Another version of the protocol.
    #[error("protocol version {got}, the group has {expected}")]
    Version {
        /// The group's.
        expected: u32,
        /// The joining rank's.
        got: u32,
    },
    /// Another configuration.
    #[error("config digest {got:016x}, the group has {expected:016x}")]
    ConfigDigest {
        /// The group's.
        expected: u64,
        /// The joining rank's.
        got: u64,
    },
    /// Another number of ranks.
    #[error("a group of {got} ranks expected, it has {expected}")]
    Ranks {
        /// The group's.
        expected: u64,
        /// The joining rank's.
        got: u64,
    },
    /// Other windows.
    #[error("windows differ (layout digest {got:016x}, the group has {expected:016x})")]
    Layout {
        /// The group's.
        expected: u64,
        /// The joining rank's.
        got: u64,
    },
    /// A processor with other vector instructions: sums would round differently.
    #[error("the processor has {got} instructions, the group's have {expected}")]
    Vectors {
        /// The group's.
        expected: VectorFamily,
        /// The joining rank's.
        got: VectorFamily,
    },
    /// Someone has already joined as this rank.
    #[error("the rank has already joined")]
    Taken,
    /// The segment is smaller than its windows need.
    #[error("the segment has {got} bytes, {expected} needed")]
    Truncated {
        /// Needed.
        expected: usize,
        /// There.
        got: usize,
    },
    /// The group has no such rank.
    #[error("the group has {ranks} ranks")]
    NoSuchRank {
        /// Ranks of the group.
        ranks: u64,
    },
}

/// Why a region cannot be used like this now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AccessError {
    /// A write guard is alive, or an operation in flight writes it.
    #[error("being written")]
    BeingWritten,
    /// Read guards are alive, or operations in flight read it.
    #[error("being read")]
    BeingRead,
    /// The window is open to peers (or being opened or closed).
    #[error("the window is open to peers")]
    Open,
    /// The window is not open.
    #[error("the window is not open")]
    Closed,
    /// A collective in flight receives into the window, or one has failed while it did.
    #[error("a collective in flight receives into it")]
    Receiving,
    /// The region's start is not aligned for the type.
    #[error("not aligned to {align} bytes")]
    Misaligned {
        /// Alignment of the type.
        align: usize,
    },
    /// The region's size is no multiple of the type's.
    #[error("{bytes} bytes are no multiple of {size}")]
    Ragged {
        /// Bytes of the region.
        bytes: usize,
        /// Bytes of the type.
        size: usize,
    },
    /// The memory is not the host's.
    #[error("no host view of this memory")]
    NoHostView,
    /// A range that ends behind the region.
    #[error("a range that ends at byte {end} of {bytes}")]
    Beyond {
        /// Where it ends.
        end: usize,
        /// Bytes of the region.
        bytes: usize,
    },
    /// Two operands of one operation overlap in a way that it does not define.
    #[error("the operands overlap")]
    Overlap,
}

/// Shows ranks as "rank 3", "ranks 1, 2".
struct RankList<'a>(&'a [Rank]);

impl fmt::Display for RankList<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some((first, rest)) = self.0.split_first() else { return f.write_str("any rank") };
        write!(f, "rank{} {first}", if rest.is_empty() { "" } else { "s" })?;
        rest.iter().try_for_each(|rank| write!(f, ", {rank}"))
    }
}

/// Why a group ended badly: the rank that failed first, with its own error.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GroupError<E = ProcessEnd> {
    /// The rank's main returned an error (threads), or its process ended badly (processes).
    #[error("rank {rank}: {error}")]
    Failed {
        /// The rank that failed first.
        rank: Rank,
        /// Its own error.
        error: E,
    },
    /// The rank panicked.
    #[error("rank {rank} panicked: {message}")]
    Panicked {
        /// The rank that failed first.
        rank: Rank,
        /// What it said.
        message: String,
    },
    /// The fabric found the cause: a rank that hung, or ranks that disagree.
    #[error("rank {rank}: {error}")]
    Fabric {
        /// The rank that the cause names first.
        rank: Rank,
        /// The cause.
        error: FabricError,
    },
    /// The group did not start.
    #[error(transparent)]
    Start(#[from] FabricError),
}

impl<E> GroupError<E> {
    /// The rank that failed first, once the group had started.
    #[must_use]
    pub fn rank(&self) -> Option<Rank> {
        match self {
            Self::Failed { rank, .. } | Self::Panicked { rank, .. } | Self::Fabric { rank, .. } => Some(*rank),
            Self::Start(_) => None,
        }
    }
}

/// How a rank's process ended, when not well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProcessEnd {
    /// With an exit code.
    #[error("process exited with code {0}")]
    Exited(i32),
    /// By a signal.
    #[error("process killed by signal {0}")]
    Killed(i32),
}
