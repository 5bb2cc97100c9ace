//! Who is to blame when a wait has lasted too long: this rank asks all others what they are doing.

use super::{Awaited, Machine};
use crate::frame::{Frame, Kind};
use core::time::Duration;
use std::time::Instant;
use ultraep_fabric::OperationKind;
use ultraep_fabric::backend::Failure;
use ultraep_plan::Rank;

/// What a rank says about itself.
#[derive(Clone, Copy)]
struct Answer {
    activity: OperationKind,
    entered: u64,
}

/// A question to all others.
pub(super) struct Investigation {
    number: u64,
    awaited: Awaited,
    waited: Duration,
    answers: Vec<Option<Answer>>,
    /// When those who have not answered are taken for silent.
    pub(super) until: Instant,
}

impl Machine {
    /// A wait of this rank has lasted too long.
    pub(crate) fn expire(&mut self, awaited: Awaited, waited: Duration, now: Instant) {
        if self.failure.is_some() || self.reported.is_some() || self.investigation.is_some() {
            return;
        }
        let number = self.submitted;
        let answers = vec![None; self.ranks];
        self.investigation = Some(Investigation { number, awaited, waited, answers, until: now + Self::ANSWER_WITHIN });
        let query = Frame::bytes(Kind::Query, [number, 0, 0, 0]);
        self.post_to_all(&query);
        self.conclude(now);
    }

    /// The wait has ended after all.
    pub(crate) fn forget_expiry(&mut self) {
        self.investigation = None;
    }

    pub(super) fn query(&mut self, from: Rank, number: u64) {
        let status = Frame::bytes(Kind::Status, [number, self.activity.code(), self.entered, 0]);
        self.post(from, status);
    }

    pub(super) fn status(&mut self, from: Rank, frame: &Frame, now: Instant) {
        if let Some(investigation) = &mut self.investigation
            && investigation.number == frame.words[0]
        {
            let answer = Answer { activity: frame.operation(1), entered: frame.words[2] };
            investigation.answers[from.index()] = Some(answer);
            self.conclude(now);
        }
    }

    /// Names who is missing, once all have answered or have had the time to.
    pub(super) fn conclude(&mut self, now: Instant) {
        let Some(investigation) = &self.investigation else { return };
        let here = |rank: &Rank| self.gone[rank.index()].is_none();
        let answered = |rank: &Rank| investigation.answers[rank.index()].is_some();
        if !self.peers().filter(here).all(|rank| answered(&rank)) && now < investigation.until {
            return;
        }
        let missing = self.missing(investigation);
        let (operation, waited) = (investigation.awaited.kind(), investigation.waited);
        self.investigation = None;
        self.fail(Failure::Timeout { missing, operation, waited }, now);
    }

    fn missing(&self, investigation: &Investigation) -> Vec<Rank> {
        let others: Vec<Rank> = self.peers().filter(|rank| self.gone[rank.index()].is_none()).collect();
        let answer = |rank: &Rank| investigation.answers[rank.index()];
        let silent: Vec<Rank> = others.iter().copied().filter(|rank| answer(rank).is_none()).collect();
        if !silent.is_empty() {
            return silent;
        }
        let entered = |rank: &Rank| answer(rank).map_or(0, |answer| answer.entered);
        let blocked = |rank: &Rank| answer(rank).is_some_and(|answer| answer.activity != OperationKind::Compute);
        let mut missing = others.clone();
        if let Awaited::Collective(_) = investigation.awaited {
            missing.retain(|rank| entered(rank) < self.entered);
        }
        if missing.is_empty() || !matches!(investigation.awaited, Awaited::Collective(_)) {
            // Anyone could send the signal: whoever is not blocked itself, if there is such a rank.
            missing = others;
            // Who waits in a collective that this rank has yet to enter does nothing before that.
            let waits_for_me = |rank: &Rank| blocked(rank) && entered(rank) > self.entered;
            for excused in [&waits_for_me as &dyn Fn(&Rank) -> bool, &blocked] {
                if !missing.iter().all(excused) {
                    missing.retain(|rank| !excused(rank));
                }
            }
        }
        if missing.is_empty() {
            missing.push(self.rank);
        }
        missing
    }
}
