//! The group's first failure: reported to rank 0, which spreads the first one that it hears of.

use super::Machine;
use crate::frame::{Frame, Kind};
use std::time::Instant;
use ultraep_fabric::Loss;
use ultraep_fabric::backend::Failure;
use ultraep_plan::Rank;

/// A failure that rank 0 has been told of and has not spread.
pub(super) struct Reported {
    failure: Failure,
    /// After this it is spread from here.
    pub(super) until: Instant,
}

impl Machine {
    /// This rank has found a failure.
    pub(super) fn fail(&mut self, failure: Failure, now: Instant) {
        if self.failure.is_some() || self.reported.is_some() {
            return;
        }
        if self.rank.index() == 0 || self.gone[0].is_some() {
            return self.spread(failure);
        }
        let report = Frame::of_words(Kind::Report, [0; 4], failure.to_words());
        self.post(Rank::new(0), report);
        self.reported = Some(Reported { failure, until: now + Self::ANSWER_WITHIN });
    }

    /// Makes this the group's failure, if there is none, and tells all others.
    pub(super) fn spread(&mut self, failure: Failure) {
        if self.failure.is_some() {
            return;
        }
        let failed = Frame::of_words(Kind::Failed, [0; 4], failure.to_words());
        self.post_to_all(&failed);
        self.failed(Some(failure));
    }

    /// The group has failed.
    pub(super) fn failed(&mut self, failure: Option<Failure>) {
        if self.failure.is_some() || failure.is_none() {
            return;
        }
        self.failure = failure;
        self.found = None;
        self.reported = None;
        self.investigation = None;
        // Gives back what operations hold, except windows that were received into.
        self.flight = None;
        self.queue.clear();
        self.putting.clear();
        self.gets.clear();
        self.point_to_point = super::PointToPoint::default();
        self.lanes.iter_mut().for_each(|lane| *lane = super::Lane::default());
        self.changed = true;
    }

    /// A rank reports a failure to this one, which is rank 0.
    pub(super) fn report_by(&mut self, failure: Option<Failure>, now: Instant) {
        if let Some(failure) = failure {
            self.fail(failure, now);
        }
    }

    /// Rank 0 has not spread what it was told.
    pub(super) fn report_unanswered(&mut self, now: Instant) {
        if let Some(reported) = self.reported.take_if(|reported| reported.until <= now) {
            self.spread(reported.failure);
        }
    }

    /// Rank 0 is gone, and this rank needs it.
    pub(super) fn coordinator_is_gone(&mut self, loss: Loss) {
        self.spread(Failure::Lost { rank: Rank::new(0), loss });
    }

    /// A rank says goodbye.
    pub(super) fn goodbye_by(&mut self, from: Rank, frame: &Frame, now: Instant) {
        if let Some(Failure::Lost { rank, loss }) = frame.failure()
            && rank == from
        {
            self.departs(from, loss, frame.words[0] != 0, now);
        }
    }

    /// A rank is gone. That ends the group if it was in the middle of something, or if anyone waits for it.
    pub(super) fn departs(&mut self, rank: Rank, loss: Loss, unfinished: bool, now: Instant) {
        if self.gone[rank.index()].is_some() {
            return;
        }
        self.gone[rank.index()] = Some(loss);
        self.changed = true;
        if rank.index() == 0
            && let Some(reported) = self.reported.take()
        {
            return self.spread(reported.failure);
        }
        let entered = self.flight.as_ref().is_some_and(super::Flight::awaits_entries);
        let awaited = match rank.index() {
            0 => entered,
            _ => self.rank.index() == 0 && self.coordinator.is_awaited(),
        };
        let needed = self.gets.iter().any(|get| get.target() == rank) || self.point_to_point.needs(rank);
        if unfinished || awaited || needed {
            self.fail(Failure::Lost { rank, loss }, now);
        }
    }
}
