//! The group's first failure, as a value and as the words in which it crosses processes.

use crate::operation::{Collective, OperationKind};
use crate::{FabricError, Loss};
use core::time::Duration;
use ultraep_plan::{MAX_RANKS, Rank};

/// Why a group has failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// A rank is gone.
    Lost {
        /// Who.
        rank: Rank,
        /// How.
        loss: Loss,
    },
    /// A wait lasted longer than the group's timeout.
    Timeout {
        /// Who did not come, ascending.
        missing: Vec<Rank>,
        /// What was waited for.
        operation: OperationKind,
        /// How long.
        waited: Duration,
    },
    /// A wait lasted longer than the group's timeout because processes were stopped by a signal.
    Suspended {
        /// Whose, ascending.
        ranks: Vec<Rank>,
        /// What was waited for.
        operation: OperationKind,
        /// How long.
        waited: Duration,
    },
    /// Two ranks are in different collectives.
    Mismatch {
        /// One rank: the lowest.
        rank: Rank,
        /// Where it is.
        operation: Collective,
        /// The other: the lowest that differs from it.
        other: Rank,
        /// Where that one is.
        other_operation: Collective,
    },
    /// Two ranks disagree on a block of an all-to-all, or on a message.
    Sizes {
        /// The sender.
        from: Rank,
        /// The receiver.
        to: Rank,
        /// Bytes that the sender sends.
        sent_bytes: u64,
        /// Bytes that the receiver expects.
        expected_bytes: u64,
    },
}

/// Words of a failure: its code, eight of details, a bitmap of missing ranks.
pub const FAILURE_WORDS: usize = 1 + DETAILS + MAX_RANKS / 64;

const DETAILS: usize = 8;

// The code: bit 63 set, 7 bits of cause, 16 of rank, 16 that are for whoever stores it, 24 of detail.
const SET: u64 = 1 << 63;
const CAUSE_TIMEOUT: u64 = 100;
const CAUSE_MISMATCH: u64 = 101;
const CAUSE_SIZES: u64 = 102;
const CAUSE_SUSPENDED: u64 = 103;

fn loss_code(loss: Loss) -> (u64, i32) {
    match loss {
        Loss::Left => (1, 0),
        Loss::Dropped => (2, 0),
        Loss::Failed => (3, 0),
        Loss::Panicked => (4, 0),
        Loss::Killed { signal } => (5, signal),
        Loss::Exited { code } => (6, code),
        Loss::Refused => (7, 0),
        Loss::Vanished => (8, 0),
    }
}

fn loss_from_code(cause: u64, detail: i32) -> Loss {
    match cause {
        1 => Loss::Left,
        3 => Loss::Failed,
        4 => Loss::Panicked,
        5 => Loss::Killed { signal: detail },
        6 => Loss::Exited { code: detail },
        7 => Loss::Refused,
        8 => Loss::Vanished,
        _ => Loss::Dropped,
    }
}

fn code(cause: u64, rank: Rank, detail: i32) -> u64 {
    // Signals and exit codes fit 24 bits by their definition (0..=255, and 0..=64).
    SET | cause << 56 | (rank.index() as u64) << 40 | u64::from(detail.unsigned_abs()) & 0xff_ffff
}

fn rank_of(word: u64) -> Rank {
    Rank::new(usize::from(word as u16))
}

fn put_collective(words: &mut [u64], collective: &Collective) {
    words[..3].copy_from_slice(&[collective.sequence, collective.kind.code(), collective.detail]);
}

fn collective(words: &[u64]) -> Collective {
    Collective { sequence: words[0], kind: OperationKind::from_code(words[1]), detail: words[2] }
}

impl Failure {
    /// As words. The first is never 0; its bits 24 to 39 are 0 and for whoever stores it.
    #[must_use]
    pub fn to_words(&self) -> [u64; FAILURE_WORDS] {
        let mut words = [0; FAILURE_WORDS];
        let (first, details) = words.split_at_mut(1);
        first[0] = match self {
            Self::Lost { rank, loss } => {
                let (cause, detail) = loss_code(*loss);
                code(cause, *rank, detail)
            }
            Self::Timeout { missing: ranks, operation, waited } | Self::Suspended { ranks, operation, waited } => {
                details[0] = operation.code();
                details[1] = u64::try_from(waited.as_nanos()).unwrap_or(u64::MAX);
                for rank in ranks {
                    details[DETAILS + rank.index() / 64] |= 1 << (rank.index() % 64);
                }
                let is_timeout = matches!(self, Self::Timeout { .. });
                let cause = if is_timeout { CAUSE_TIMEOUT } else { CAUSE_SUSPENDED };
                code(cause, ranks.first().copied().unwrap_or(Rank::new(0)), 0)
            }
            Self::Mismatch { rank, operation, other, other_operation } => {
                put_collective(details, operation);
                put_collective(&mut details[3..], other_operation);
                details[6] = other.index() as u64;
                code(CAUSE_MISMATCH, *rank, 0)
            }
            Self::Sizes { from, to, sent_bytes, expected_bytes } => {
                details[..3].copy_from_slice(&[to.index() as u64, *sent_bytes, *expected_bytes]);
                code(CAUSE_SIZES, *from, 0)
            }
        };
        words
    }

    /// From its words: `None` when there is no failure in them.
    #[must_use]
    pub fn from_words(words: &[u64; FAILURE_WORDS]) -> Option<Self> {
        let (&[code], details) = words.split_first_chunk::<1>()?;
        if code & SET == 0 {
            return None;
        }
        let rank = rank_of(code >> 40);
        Some(match (code & !SET) >> 56 {
            cause @ (CAUSE_TIMEOUT | CAUSE_SUSPENDED) => {
                let has = |rank: &usize| details[DETAILS + rank / 64] >> (rank % 64) & 1 == 1;
                let ranks = (0..MAX_RANKS).filter(has).map(Rank::new).collect();
                let (operation, waited) = (OperationKind::from_code(details[0]), Duration::from_nanos(details[1]));
                match cause {
                    CAUSE_TIMEOUT => Self::Timeout { missing: ranks, operation, waited },
                    _ => Self::Suspended { ranks, operation, waited },
                }
            }
            CAUSE_MISMATCH => Self::Mismatch {
                rank,
                operation: collective(details),
                other: rank_of(details[6]),
                other_operation: collective(&details[3..]),
            },
            CAUSE_SIZES => {
                Self::Sizes { from: rank, to: rank_of(details[0]), sent_bytes: details[1], expected_bytes: details[2] }
            }
            cause => Self::Lost { rank, loss: loss_from_code(cause, (code & 0xff_ffff) as i32) },
        })
    }

    /// As the error of a rank that is in `operation`.
    #[must_use]
    pub fn error(&self, operation: OperationKind) -> FabricError {
        match self.clone() {
            Self::Lost { rank, loss } => FabricError::PeerLost { rank, operation, reason: loss },
            Self::Timeout { missing, operation, waited } => FabricError::Timeout { missing, operation, waited },
            Self::Suspended { ranks, operation, waited } => FabricError::Suspended { ranks, operation, waited },
            Self::Mismatch { rank, operation, other, other_operation } => {
                FabricError::Mismatch { rank, operation, other, other_operation }
            }
            Self::Sizes { from, to, sent_bytes, expected_bytes } => {
                FabricError::SizeMismatch { from, to, sent_bytes, expected_bytes }
            }
        }
    }
}
