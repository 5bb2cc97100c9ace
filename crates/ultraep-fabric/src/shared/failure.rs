//! The group's first failure in the segment: one word, set once, plus details in a record of the rank that reports it.

use super::segment::Segment;
use super::status::Gone;
use crate::failure::{FAILURE_WORDS, Failure};
use crate::operation::OperationKind;
use crate::sync::Ordering;
use crate::{FabricError, Loss};
use ultraep_plan::Rank;

/// Where the reporter is in the word: whose record has the details.
const REPORTER_SHIFT: u32 = 24;
const REPORTER: u64 = 0xffff << REPORTER_SHIFT;

impl Gone {
    /// As others are told.
    pub(super) fn loss(self) -> Loss {
        match self {
            Self::Left => Loss::Left,
            Self::Dropped => Loss::Dropped,
        }
    }
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
        let [code, details @ ..] = failure.to_words();
        // Losses have no details, and their reporter may not be the only one to use its record.
        if !matches!(failure, Failure::Lost { .. }) {
            for (word, detail) in self.record(reporter).iter().zip(details) {
                word.store(detail, Ordering::Relaxed);
            }
        }
        code & !REPORTER | (reporter.index() as u64) << REPORTER_SHIFT
    }

    /// Whether the group has failed.
    pub(crate) fn has_failed(&self) -> bool {
        self.header().failure.0.is_set()
    }

    /// The first failure.
    pub(crate) fn failure(&self) -> Option<Failure> {
        let code = self.header().failure.0.get()?;
        let reporter = Rank::new(usize::from((code >> REPORTER_SHIFT) as u16));
        let mut words = [0; FAILURE_WORDS];
        words[0] = code & !REPORTER;
        for (word, stored) in words[1..].iter_mut().zip(self.record(reporter)) {
            *word = stored.load(Ordering::Relaxed);
        }
        Failure::from_words(&words)
    }

    /// The first failure as the error of a rank that is in `operation`.
    pub(crate) fn failure_error(&self, operation: OperationKind) -> Option<FabricError> {
        self.failure().map(|failure| failure.error(operation))
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
        self.ranks().find_map(|rank| self.control(rank).status.gone().map(|gone| (rank, gone.loss())))
    }
}
