//! The group's first failure: one word, set once, plus details in a record of the rank that reports it.

use super::segment::{RECORD_WORDS, Segment};
use super::status::Gone;
use crate::operation::{Collective, OperationKind};
use crate::sync::{AtomicU64, Ordering};
use crate::{FabricError, Loss};
use core::time::Duration;
use ultraep_plan::Rank;

const DETAILS: usize = RECORD_WORDS - ultraep_plan::MAX_RANKS / 64;

/// Why the group has failed, as it crosses processes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    Lost { rank: Rank, loss: Loss },
    Timeout { missing: Vec<Rank>, operation: OperationKind, waited: Duration },
    Mismatch { rank: Rank, operation: Collective, other: Rank, other_operation: Collective },
    Sizes { from: Rank, to: Rank, sent_bytes: u64, expected_bytes: u64 },
}

// The word: bit 63 set, 7 bits of cause, 16 of rank, 16 of reporter, 24 of detail.
const SET: u64 = 1 << 63;
const CAUSE_TIMEOUT: u64 = 100;
const CAUSE_MISMATCH: u64 = 101;
const CAUSE_SIZES: u64 = 102;

fn loss_code(loss: Loss) -> (u64, i32) {
    match loss {
        Loss::Left => (1, 0),
        Loss::Dropped => (2, 0),
        Loss::Failed => (3, 0),
        Loss::Panicked => (4, 0),
        Loss::Killed { signal } => (5, signal),
        Loss::Exited { code } => (6, code),
        Loss::Refused => (7, 0),
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
        _ => Loss::Dropped,
    }
}

fn word(cause: u64, rank: Rank, reporter: Rank, detail: i32) -> u64 {
    // Signals and exit codes fit 24 bits by their definition (0..=255, and 0..=64).
    let detail = u64::from(detail.unsigned_abs()) & 0xff_ffff;
    SET | cause << 56 | (rank.index() as u64) << 40 | (reporter.index() as u64) << 24 | detail
}

fn rank_at(word: u64, shift: u32) -> Rank {
    Rank::new(usize::from((word >> shift) as u16))
}

fn store_collective(record: &[AtomicU64], collective: &Collective) {
    for (word, value) in record.iter().zip([collective.sequence, collective.kind as u64, collective.detail]) {
        word.store(value, Ordering::Relaxed);
    }
}

fn load_collective(record: &[AtomicU64]) -> Collective {
    let load = |index: usize| record[index].load(Ordering::Relaxed);
    Collective { sequence: load(0), kind: OperationKind::from_code(load(1)), detail: load(2) }
}

impl Segment {
    /// Ends the group, unless it has failed before, and wakes every sleeper. Each rank reports at most once with details
    /// (it makes no further step after its first); the supervisor, which has no record of its own, reports losses, or with the
    /// record of a rank whose process has ended.
    pub(crate) fn fail(&self, reporter: Rank, failure: &Failure) {
        let code = self.record_failure(reporter, failure);
        self.header().failure.0.set(code);
        self.wake_all_failed();
    }

    /// Marks every futex word, so that no one falls asleep any more, and wakes who sleeps.
    pub(crate) fn wake_all_failed(&self) {
        let header = self.header();
        header.turnstile.0.fail();
        header.permits.0.fail();
        self.ranks().for_each(|rank| self.control(rank).doorbell.fail());
    }

    fn record_failure(&self, reporter: Rank, failure: &Failure) -> u64 {
        match failure {
            Failure::Lost { rank, loss } => {
                let (cause, detail) = loss_code(*loss);
                word(cause, *rank, reporter, detail)
            }
            Failure::Timeout { missing, operation, waited } => {
                let record = self.record(reporter);
                record[0].store(*operation as u64, Ordering::Relaxed);
                record[1].store(u64::try_from(waited.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
                for (index, bits) in record[DETAILS..].iter().enumerate() {
                    let of_word = missing.iter().filter(|rank| rank.index() / 64 == index);
                    bits.store(of_word.fold(0, |bits, rank| bits | 1 << (rank.index() % 64)), Ordering::Relaxed);
                }
                word(CAUSE_TIMEOUT, missing.first().copied().unwrap_or(reporter), reporter, 0)
            }
            Failure::Mismatch { rank, operation, other, other_operation } => {
                let record = self.record(reporter);
                store_collective(&record[..3], operation);
                store_collective(&record[3..6], other_operation);
                record[6].store(other.index() as u64, Ordering::Relaxed);
                word(CAUSE_MISMATCH, *rank, reporter, 0)
            }
            Failure::Sizes { from, to, sent_bytes, expected_bytes } => {
                let record = self.record(reporter);
                for (word, value) in record.iter().zip([to.index() as u64, *sent_bytes, *expected_bytes]) {
                    word.store(value, Ordering::Relaxed);
                }
                word(CAUSE_SIZES, *from, reporter, 0)
            }
        }
    }

    /// Whether the group has failed.
    pub(crate) fn has_failed(&self) -> bool {
        self.header().failure.0.is_set()
    }

    /// The first failure.
    pub(crate) fn failure(&self) -> Option<Failure> {
        let code = self.header().failure.0.get()?;
        let (rank, reporter) = (rank_at(code, 40), rank_at(code, 24));
        let record = self.record(reporter);
        let load = |index: usize| record[index].load(Ordering::Relaxed);
        Some(match (code & !SET) >> 56 {
            CAUSE_TIMEOUT => {
                let has = |rank: &Rank| load(DETAILS + rank.index() / 64) >> (rank.index() % 64) & 1 == 1;
                Failure::Timeout {
                    missing: self.ranks().filter(has).collect(),
                    operation: OperationKind::from_code(load(0)),
                    waited: Duration::from_nanos(load(1)),
                }
            }
            CAUSE_MISMATCH => Failure::Mismatch {
                rank,
                operation: load_collective(&record[..3]),
                other: Rank::new(usize::from(load(6) as u16)),
                other_operation: load_collective(&record[3..6]),
            },
            CAUSE_SIZES => Failure::Sizes {
                from: rank,
                to: Rank::new(usize::from(load(0) as u16)),
                sent_bytes: load(1),
                expected_bytes: load(2),
            },
            cause => Failure::Lost { rank, loss: loss_from_code(cause, (code & 0xff_ffff) as i32) },
        })
    }

    /// The first failure as the error of a rank that is in `operation`.
    pub(crate) fn failure_error(&self, operation: OperationKind) -> Option<FabricError> {
        Some(match self.failure()? {
            Failure::Lost { rank, loss } => FabricError::PeerLost { rank, operation, reason: loss },
            Failure::Timeout { missing, operation, waited } => FabricError::Timeout { missing, operation, waited },
            Failure::Mismatch { rank, operation, other, other_operation } => {
                FabricError::Mismatch { rank, operation, other, other_operation }
            }
            Failure::Sizes { from, to, sent_bytes, expected_bytes } => {
                FabricError::SizeMismatch { from, to, sent_bytes, expected_bytes }
            }
        })
    }

    /// Takes `rank` out of the group, at most once: it left, or its endpoint was dropped. Whoever waits for it now is
    /// told, and whoever will need it later.
    pub(crate) fn depart(&self, rank: Rank, loss: Loss, unfinished: bool) {
        let gone = if loss == Loss::Left { Gone::Left } else { Gone::Dropped };
        if !self.control(rank).status.go(gone) {
            return;
        }
        let awaited = self.header().turnstile.0.go();
        if awaited || unfinished {
            self.fail(rank, &Failure::Lost { rank, loss });
        }
    }

    /// The first rank that has departed, and how.
    pub(crate) fn departed(&self) -> Option<(Rank, Loss)> {
        self.ranks().find_map(|rank| {
            let loss = match self.control(rank).status.gone()? {
                Gone::Left => Loss::Left,
                Gone::Dropped => Loss::Dropped,
            };
            Some((rank, loss))
        })
    }
}
