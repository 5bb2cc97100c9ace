//! Operations, their operands, and what comes back: plain structs, so that a backend can queue them.

use crate::region::{Hold, Use};
use crate::{AccessError, Region, WindowId};
use core::fmt;
use core::ops::Deref;
use std::sync::Arc;
use ultraep_plan::Rank;

/// A range of a local region.
#[derive(Clone, Debug)]
pub struct Span {
    /// The region.
    pub region: Region,
    /// First byte, from the start of the region.
    pub offset: usize,
    /// Length in bytes; 0 is allowed.
    pub bytes: usize,
    /// The caller's right to use the region.
    held: Option<Arc<Hold>>,
}

impl Span {
    /// The whole of `region`.
    #[must_use]
    pub fn whole(region: &Region) -> Self {
        Self::part(region, 0, region.bytes())
    }

    /// The `bytes` bytes of `region` from `offset` on.
    #[must_use]
    pub fn part(region: &Region, offset: usize, bytes: usize) -> Self {
        Self { region: region.clone(), offset, bytes, held: None }
    }

    /// A part of a region that the caller holds: operations use that right instead of taking one of their own, so that several at a
    /// time can fill or send parts of one region. The caller sees to it that they do not overlap.
    #[must_use]
    pub fn held(hold: &Arc<Hold>, offset: usize, bytes: usize) -> Self {
        Self { region: hold.region().clone(), offset, bytes, held: Some(Arc::clone(hold)) }
    }

    /// For backends: the right to use the region for [`Use::Read`] or [`Use::Write`], until it is dropped.
    ///
    /// # Errors
    /// [`AccessError`]: what uses the region now, or that the caller's hold does not allow writing.
    pub fn right(&self, usage: Use) -> Result<Right, AccessError> {
        match &self.held {
            Some(hold) if usage == Use::Read || hold.usage() != Use::Read => Ok(Right::Held(Arc::clone(hold))),
            Some(_) => Err(AccessError::BeingRead),
            None => Hold::take(&self.region, usage).map(Right::Own),
        }
    }
}

/// The right of an operation to use a span's region.
#[derive(Debug)]
pub enum Right {
    /// Taken for the operation.
    Own(Hold),
    /// The caller's.
    Held(Arc<Hold>),
}

impl Right {
    /// For parts of an operation that go their own ways.
    #[must_use]
    pub fn shared(self) -> Arc<Hold> {
        match self {
            Self::Own(hold) => Arc::new(hold),
            Self::Held(hold) => hold,
        }
    }
}

impl Deref for Right {
    type Target = Hold;

    fn deref(&self) -> &Hold {
        match self {
            Self::Own(hold) => hold,
            Self::Held(hold) => hold,
        }
    }
}

/// A place in a rank's part of a window. Its length is that of the local side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemoteSpan {
    /// Whose part.
    pub rank: Rank,
    /// Which window.
    pub window: WindowId,
    /// First byte, from the start of the part.
    pub offset: usize,
}

/// What a rank asks of the fabric.
///
/// Collectives (`Barrier`, `Open`, `Close`, `AllGather`, `AllToAll`, `AllReduceSumF32`) are submitted by every rank in the
/// same order with the same sizes; the fabric compares them and a difference is [`FabricError::Mismatch`](crate::FabricError::Mismatch)
/// on every rank. `Send` and `Recv` are of two ranks; the others are one-sided.
#[derive(Debug)]
#[non_exhaustive]
pub enum Operation<'a> {
    /// Done when every rank has submitted it. What a rank wrote before is visible to all others after.
    Barrier,
    /// Lets peers put into and get from the ranks' parts of `window`. Needs a closed window and no guard on the own part.
    Open {
        /// The window.
        window: WindowId,
    },
    /// Ends the epoch that `Open` began: every rank's earlier puts and gets are complete and guards are allowed again.
    Close {
        /// The window.
        window: WindowId,
    },
    /// Writes a local range to places in open windows: read once, written to each.
    Put {
        /// The source.
        from: Span,
        /// The destinations; none is allowed.
        to: &'a [RemoteSpan],
    },
    /// Reads from an open window into a local range.
    Get {
        /// The source.
        from: RemoteSpan,
        /// The destination.
        to: Span,
    },
    /// Adds to a signal word of a rank, after every put that this rank submitted before has landed (release).
    Signal {
        /// Whose signal.
        rank: Rank,
        /// Which of its [`SIGNALS`](crate::SIGNALS) words. Words start at 0 and only grow.
        signal: usize,
        /// What to add.
        add: u64,
    },
    /// Done when the own signal word is `at_least` so large (acquire: what was put before the signal is visible).
    AwaitSignal {
        /// Which of the own words.
        signal: usize,
        /// The value to reach.
        at_least: u64,
    },
    /// Sends a local range to a rank that receives it with a [`Operation::Recv`] of this rank and key; the n-th send with a key meets
    /// the n-th receive. Complete when all of it has left the source. Nothing leaves before the receive is posted (that is the
    /// credit), so that no data ever waits at the receiver; it then moves while the owners compute. Not ordered with
    /// anything else. Where [`Capabilities::point_to_point`](crate::Capabilities::point_to_point) says so.
    Send {
        /// To whom.
        to: Rank,
        /// Which of the messages between the two, by agreement: a position in a plan both have.
        key: u64,
        /// The source; it may lie in the own part of an open window.
        from: Span,
    },
    /// Receives what a rank sends with this key. Complete when all of it is there.
    Recv {
        /// From whom.
        from: Rank,
        /// Which message.
        key: u64,
        /// The destination, as long as what is sent; it may lie in the own part of an open window.
        to: Span,
    },
    /// `recv` becomes the concatenation of every rank's `send`, in rank order.
    AllGather {
        /// `[send.bytes]`, the same length on each rank.
        send: Span,
        /// `[N * send.bytes]`. It may share its region with `send` only if `send` lies exactly at its place in `recv`.
        recv: Span,
    },
    /// Each rank's block for each rank (MPI's alltoallv). Ranks with nothing to send or receive take part.
    AllToAll {
        /// The blocks for rank 0, 1, ... one after another.
        send: Span,
        /// `[N]`: bytes of each block.
        send_bytes: &'a [usize],
        /// Received blocks land one after another in source order at the start of the own part of this closed window.
        recv: WindowId,
        /// `[N]`: bytes expected from each rank.
        recv_bytes: &'a [usize],
    },
    /// Sums elementwise over ranks, in place: `((x0 + x1) + x2) + ...` in rank order for each element, so that the result
    /// is bitwise the same on every rank and every backend.
    AllReduceSumF32 {
        /// `[bytes / 4]` native `f32`, the same length on each rank. No alignment is needed.
        data: Span,
    },
}

impl Operation<'_> {
    /// Its kind.
    #[must_use]
    pub fn kind(&self) -> OperationKind {
        match self {
            Self::Barrier => OperationKind::Barrier,
            Self::Open { .. } => OperationKind::Open,
            Self::Close { .. } => OperationKind::Close,
            Self::Put { .. } => OperationKind::Put,
            Self::Get { .. } => OperationKind::Get,
            Self::Signal { .. } => OperationKind::Signal,
            Self::AwaitSignal { .. } => OperationKind::AwaitSignal,
            Self::Send { .. } => OperationKind::Send,
            Self::Recv { .. } => OperationKind::Recv,
            Self::AllGather { .. } => OperationKind::AllGather,
            Self::AllToAll { .. } => OperationKind::AllToAll,
            Self::AllReduceSumF32 { .. } => OperationKind::AllReduceSumF32,
        }
    }
}

macro_rules! operation_kinds {
    ($($name:ident = $code:literal, $text:literal;)*) => {
        /// The kinds of operation, and the other things that a rank may wait for. For errors.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        #[repr(u8)]
        pub enum OperationKind {
            $(#[doc = $text] $name = $code,)*
        }

        impl OperationKind {
            /// The code under which it crosses processes.
            #[must_use]
            pub fn code(self) -> u64 {
                self as u64
            }

            /// From its code; [`OperationKind::Compute`] for one that no kind has.
            #[must_use]
            pub fn from_code(code: u64) -> Self {
                match code {
                    $($code => Self::$name,)*
                    _ => Self::Compute,
                }
            }
        }

        impl fmt::Display for OperationKind {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self {
                    $(Self::$name => $text,)*
                })
            }
        }
    };
}

operation_kinds! {
    Compute = 0, "computing";
    Barrier = 1, "barrier";
    Open = 2, "open";
    Close = 3, "close";
    Put = 4, "put";
    Get = 5, "get";
    Signal = 6, "signal";
    AwaitSignal = 7, "await signal";
    AllGather = 8, "all-gather";
    AllToAll = 9, "all-to-all";
    AllReduceSumF32 = 10, "all-reduce";
    CorePermit = 11, "core permit";
    Leave = 12, "leave";
    Join = 13, "joining";
    Send = 14, "send";
    Recv = 15, "receive";
    Stream = 20, "tile stream";
}

/// A collective as its ranks compare it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Collective {
    /// How many collectives the rank had submitted before.
    pub sequence: u64,
    /// The kind.
    pub kind: OperationKind,
    /// Bytes (all-gather: of `send`; all-reduce: of `data`) or the window's index (open, close, all-to-all).
    pub detail: u64,
}

impl fmt::Display for Collective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { sequence, kind, detail } = self;
        match kind {
            OperationKind::Barrier => write!(f, "{kind} #{sequence}"),
            OperationKind::AllGather | OperationKind::AllReduceSumF32 => {
                write!(f, "{kind} #{sequence} of {detail} bytes")
            }
            _ => write!(f, "{kind} #{sequence} on window {detail}"),
        }
    }
}

/// What a finished operation reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Collectives: the largest of the stamps that the ranks passed. Others: the own stamp.
    pub stamp: u64,
    /// Bytes that went from this rank to other ranks.
    pub bytes_sent: u64,
    /// Bytes that came from other ranks to this one.
    pub bytes_received: u64,
}

/// An operation in flight. Opaque to callers; the backend that issued it finds the operation by its content.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "an operation is complete only once its ticket has been polled or waited for"]
pub struct Ticket {
    id: u64,
    words: [u64; 3],
}

impl Ticket {
    /// For backends: a ticket with this number and content.
    pub fn new(id: u64, words: [u64; 3]) -> Self {
        Self { id, words }
    }

    /// For backends: the number.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// For backends: the content.
    #[must_use]
    pub fn words(&self) -> [u64; 3] {
        self.words
    }
}
