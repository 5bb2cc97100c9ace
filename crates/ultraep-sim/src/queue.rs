//! The event queue: a binary heap on (time, sequence number).
//!
//! Events of one time come out in the order in which they went in, so a simulation does not depend on the heap's inner order.
//! The queue digests every event it hands out: two runs are the same run exactly when their digests are.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use xxhash_rust::xxh64::Xxh64;

/// Events of type `E`, ordered by time and then by age.
#[derive(Clone)]
pub struct EventQueue<E> {
    heap: BinaryHeap<Reverse<(u64, u64, E)>>,
    sequence: u64,
    now_ps: u64,
    digest: Xxh64,
}

impl<E: Ord> Default for EventQueue<E> {
    fn default() -> Self {
        Self { heap: BinaryHeap::new(), sequence: 0, now_ps: 0, digest: Xxh64::new(0) }
    }
}

impl<E: Ord + Copy + Into<u64>> EventQueue<E> {
    /// Schedules `event`. A time in the past counts as now: nothing happens before its cause.
    pub fn push(&mut self, time_ps: u64, event: E) {
        self.heap.push(Reverse((time_ps.max(self.now_ps), self.sequence, event)));
        self.sequence += 1;
    }

    /// The next event and its time.
    pub fn pop(&mut self) -> Option<(u64, E)> {
        let Reverse((time_ps, _, event)) = self.heap.pop()?;
        self.now_ps = time_ps;
        self.digest.update(&time_ps.to_le_bytes());
        self.digest.update(&event.into().to_le_bytes());
        Some((time_ps, event))
    }

    /// Back to time zero with nothing scheduled; the digest goes on.
    pub fn restart(&mut self) {
        self.heap.clear();
        self.now_ps = 0;
    }

    /// Digest of everything handed out so far.
    pub fn digest(&self) -> u64 {
        self.digest.digest()
    }

    /// Events scheduled so far.
    pub fn scheduled(&self) -> u64 {
        self.sequence
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_come_by_time_then_age_and_never_before_their_cause() {
        let mut queue = EventQueue::<u64>::default();
        for (time, event) in [(5, 1), (3, 2), (5, 0), (3, 9)] {
            queue.push(time, event);
        }
        assert_eq!((queue.pop(), queue.pop(), queue.pop()), (Some((3, 2)), Some((3, 9)), Some((5, 1))));
        queue.push(1, 7);
        assert_eq!((queue.pop(), queue.pop(), queue.pop()), (Some((5, 0)), Some((5, 7)), None));
    }

    #[test]
    fn the_digest_tells_orders_apart() {
        let digest = |order: [u64; 3]| {
            let mut queue = EventQueue::<u64>::default();
            order.into_iter().for_each(|event| queue.push(1, event));
            while queue.pop().is_some() {}
            queue.digest()
        };
        assert_eq!(digest([1, 2, 3]), digest([1, 2, 3]));
        assert_ne!(digest([1, 2, 3]), digest([1, 3, 2]));
    }
}
