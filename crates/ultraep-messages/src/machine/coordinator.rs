//! Rank 0's part: it lets ranks in, and compares what they have entered.

use super::Machine;
use crate::frame::{Frame, Kind};
use std::time::Instant;
use ultraep_fabric::backend::{Failure, Identity};
use ultraep_fabric::{Collective, JoinError, Loss, OperationKind};
use ultraep_plan::Rank;

/// What a rank has entered.
struct Entry {
    collective: Collective,
    stamp: u64,
    /// `[2N]` for an all-to-all: bytes to each rank, bytes from each.
    sizes: Vec<u64>,
}

pub(super) struct Coordinator {
    joined: Vec<bool>,
    entries: Vec<Option<Entry>>,
}

impl Coordinator {
    pub(super) fn new(ranks: usize) -> Self {
        Self { joined: vec![false; ranks], entries: (0..ranks).map(|_| None).collect() }
    }

    /// Whether anyone waits for the others.
    pub(super) fn is_awaited(&self) -> bool {
        self.entries.iter().any(Option::is_some)
    }

    /// Who has not joined.
    pub(super) fn absent(&self) -> Vec<Rank> {
        (0..self.joined.len()).filter(|&rank| !self.joined[rank]).map(Rank::new).collect()
    }

    /// What all have entered, as soon as all have: the largest stamp if they agree.
    fn compare(&mut self) -> Option<Result<(u64, u64), Failure>> {
        if !self.entries.iter().all(Option::is_some) {
            return None;
        }
        let entries: Vec<Entry> = self.entries.iter_mut().filter_map(Option::take).collect();
        let rank = Rank::new(0);
        let operation = entries[0].collective;
        if let Some(other) = entries.iter().position(|entry| entry.collective != operation) {
            let (other_operation, other) = (entries[other].collective, Rank::new(other));
            return Some(Err(Failure::Mismatch { rank, operation, other, other_operation }));
        }
        let stamp = entries.iter().map(|entry| entry.stamp).max().unwrap_or(0);
        let differing = if operation.kind == OperationKind::AllToAll { differing_sizes(&entries) } else { None };
        Some(differing.map_or(Ok((operation.sequence, stamp)), Err))
    }
}

/// The first block on which its two ends disagree.
fn differing_sizes(entries: &[Entry]) -> Option<Failure> {
    let ranks = entries.len();
    let size = |rank: usize, index: usize| entries[rank].sizes.get(index).copied().unwrap_or(0);
    (0..ranks * ranks).find_map(|block| {
        let (from, to) = (block / ranks, block % ranks);
        let (sent_bytes, expected_bytes) = (size(from, to), size(to, ranks + from));
        let (from, to) = (Rank::new(from), Rank::new(to));
        (sent_bytes != expected_bytes).then_some(Failure::Sizes { from, to, sent_bytes, expected_bytes })
    })
}

impl Machine {
    /// A rank says who it is.
    pub(super) fn admit(&mut self, rank: Rank, identity: Option<Identity>) {
        if self.rank.index() != 0 {
            return;
        }
        let welcome = |refused| Frame::of_words(Kind::Welcome, [refused, 0, 0, 0], self.identity.to_words());
        let admitted = identity.ok_or(JoinError::Taken).and_then(|identity| self.identity.admit(&identity));
        if admitted.is_err() {
            let refusal = welcome(1);
            self.post(rank, refusal);
            self.spread(Failure::Lost { rank, loss: Loss::Refused });
            return;
        }
        self.coordinator.joined[rank.index()] = true;
        if self.coordinator.absent().is_empty() {
            let welcome = welcome(0);
            self.post_to_all(&welcome);
            self.joined = Some(Ok(()));
            self.changed = true;
        }
    }

    /// A rank has entered a collective.
    pub(super) fn entered_by(&mut self, rank: Rank, frame: &Frame) {
        if self.rank.index() != 0 || self.failure.is_some() {
            return;
        }
        let departed = self.peers().find_map(|peer| Some((peer, self.gone[peer.index()]?)));
        if let Some((rank, loss)) = departed {
            return self.spread(Failure::Lost { rank, loss });
        }
        let [sequence, _, detail, stamp] = frame.words;
        let collective = Collective { sequence, kind: frame.operation(1), detail };
        let sizes = frame.payload_words().collect();
        self.coordinator.entries[rank.index()] = Some(Entry { collective, stamp, sizes });
        match self.coordinator.compare() {
            None => {}
            Some(Ok((sequence, stamp))) => {
                let go = Frame::bytes(Kind::Go, [sequence, stamp, 0, 0]);
                self.post_to_all(&go);
                self.go(sequence, stamp);
                self.flow();
                self.complete();
            }
            Some(Err(failure)) => self.spread(failure),
        }
    }

    /// That not all have come within the timeout.
    pub(crate) fn nobody_came(&mut self, waited: core::time::Duration, now: Instant) {
        let missing = if self.rank.index() == 0 { self.coordinator.absent() } else { vec![Rank::new(0)] };
        let failure = Failure::Timeout { missing, operation: OperationKind::Join, waited };
        if self.rank.index() == 0 { self.spread(failure) } else { self.fail(failure, now) }
    }
}
