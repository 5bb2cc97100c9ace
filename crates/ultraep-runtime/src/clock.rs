//! Parallel time on a machine with fewer cores than ranks.
//!
//! Each rank carries a virtual clock. Between synchronisation points it advances by the CPU time that the rank's thread
//! really spent; at a synchronisation point all clocks become their maximum plus the transfer time of the bytes moved
//! under a stated bandwidth. The fabric carries the clocks: every collective takes a stamp and returns the largest.
//! Time spent inside the fabric (copies, waiting) is not counted: the stated bandwidth stands for it.
//!
//! Work that runs beside the computation (weight sync: what its plan takes under the link; grad reduce: its bytes) is done by
//! worker threads, which stand for engines of their own and are not counted either, and gets a deadline; a rank that arrives
//! at its join before the deadline is charged the difference as *exposed* time.
//!
//! What a step took is then exact by parts: between two synchronisation points the slowest rank decides, so the step is
//! the sum over segments of the slowest rank's parts plus the transfer ([`StepTime::critical_path`]).

use rustix::time::{ClockId, clock_gettime};

/// What a rank's time was spent on; the parts of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Part {
    /// Embedding, attention, norms, head and loss, forward and backward.
    Dense,
    /// Router scores, choice of experts, auxiliary loss, counting.
    Router,
    /// All-gather of counts and planning, splits included (`T_plan`).
    Plan,
    /// Token assignment and packing of rows (`T_reroute`).
    Reroute,
    /// Weight sync beyond reroute: what of it was exposed.
    WeightSync,
    /// Dispatch and combine: transfer, grouping of received rows, weighted sum (`T_all_to_all`).
    AllToAll,
    /// Grouped expert GEMMs (`T_experts`).
    Experts,
    /// Grad reduce: adding and zeroing, and the transfer beyond what it was hidden behind.
    GradReduce,
    /// All-reduce of dense gradients.
    AllReduce,
    /// Optimizer.
    Optimizer,
}

/// Number of parts.
pub const PARTS: usize = 10;

impl Part {
    /// All parts, in order.
    pub const ALL: [Part; PARTS] = [
        Part::Dense,
        Part::Router,
        Part::Plan,
        Part::Reroute,
        Part::WeightSync,
        Part::AllToAll,
        Part::Experts,
        Part::GradReduce,
        Part::AllReduce,
        Part::Optimizer,
    ];
}

/// One rank's time between two synchronisation points: nanoseconds by part, then the transfer at its end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Segment {
    compute_ns: [u64; PARTS],
    transfer_part: u64,
    transfer_ns: u64,
}

/// Words of a segment when gathered from all ranks.
pub(crate) const SEGMENT_WORDS: usize = PARTS + 2;

impl Segment {
    pub(crate) fn words(&self) -> [u64; SEGMENT_WORDS] {
        let mut words = [0; SEGMENT_WORDS];
        words[..PARTS].copy_from_slice(&self.compute_ns);
        words[PARTS] = self.transfer_part;
        words[PARTS + 1] = self.transfer_ns;
        words
    }
}

/// What one step took, in parallel time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepTime {
    /// All of it; the sum of the parts.
    pub total_ns: u64,
    /// By [`Part`].
    pub parts_ns: [u64; PARTS],
}

impl StepTime {
    /// Time of one part.
    pub fn part_ns(&self, part: Part) -> u64 {
        self.parts_ns[part as usize]
    }

    /// From all ranks' segments, `[ranks, segments, SEGMENT_WORDS]`: per segment the slowest rank (the lowest of equals).
    pub(crate) fn critical_path(words: &[u64], segments: usize) -> Self {
        let mut time = Self::default();
        let stride = segments * SEGMENT_WORDS;
        for segment in 0..segments {
            let of_rank = |rank_words: &'_ [u64]| {
                let at = segment * SEGMENT_WORDS;
                let mut copy = [0; SEGMENT_WORDS];
                copy.copy_from_slice(&rank_words[at..at + SEGMENT_WORDS]);
                copy
            };
            let ranks = words.chunks_exact(stride).map(of_rank);
            let total = |w: &[u64; SEGMENT_WORDS]| w[..PARTS].iter().sum::<u64>();
            let slowest = ranks.reduce(|best, w| if total(&w) > total(&best) { w } else { best });
            let Some(slowest) = slowest else { continue };
            for (sum, ns) in time.parts_ns.iter_mut().zip(slowest) {
                *sum += ns;
            }
            time.parts_ns[slowest[PARTS] as usize] += slowest[PARTS + 1];
        }
        time.total_ns = time.parts_ns.iter().sum();
        time
    }
}

/// A point in virtual time at which work running beside the computation ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(pub(crate) u64);

/// Segments that are kept for whoever asks for them. One who never does, and uses the runtime without its times, must not see
/// memory grow; on all ranks the same segments go, since they pass the same synchronisation points.
const MOST_SEGMENTS: usize = 1 << 16;

/// One rank's clock.
#[derive(Debug)]
pub struct VirtualClock {
    now_ns: u64,
    part: Part,
    running_since: Option<u64>,
    segment: Segment,
    segments: Vec<Segment>,
    thread_cpu_ns: fn() -> u64,
}

impl VirtualClock {
    /// A stopped clock that reads the CPU time of the calling thread.
    pub fn new() -> Self {
        Self::with_source(thread_cpu_ns)
    }

    /// A stopped clock over another source of nanoseconds.
    pub fn with_source(thread_cpu_ns: fn() -> u64) -> Self {
        Self {
            now_ns: 0,
            part: Part::Dense,
            running_since: None,
            segment: Segment::default(),
            segments: Vec::new(),
            thread_cpu_ns,
        }
    }

    /// Counts from here on towards `part`.
    pub fn enter(&mut self, part: Part) {
        self.pause();
        self.part = part;
        self.running_since = Some((self.thread_cpu_ns)());
    }

    /// Books the time since [`VirtualClock::enter`] and stops.
    pub fn pause(&mut self) {
        if let Some(since) = self.running_since.take() {
            let spent = (self.thread_cpu_ns)().saturating_sub(since);
            self.spend(self.part, spent);
        }
    }

    /// Goes on towards the same part.
    pub(crate) fn resume(&mut self) {
        self.running_since = Some((self.thread_cpu_ns)());
    }

    fn spend(&mut self, part: Part, ns: u64) {
        self.now_ns += ns;
        self.segment.compute_ns[part as usize] += ns;
    }

    /// Now, in virtual nanoseconds since the clock was made. The clock must be paused to be exact.
    pub fn now_ns(&self) -> u64 {
        self.now_ns
    }

    /// The end of work of `ns` that starts now beside the computation.
    pub(crate) fn beside(&self, ns: u64) -> Deadline {
        Deadline(self.now_ns + ns)
    }

    /// Waits in virtual time for work beside the computation; what had to be waited for is `part`.
    pub(crate) fn join(&mut self, deadline: Deadline, part: Part) {
        let running = self.running_since.is_some();
        self.pause();
        self.spend(part, deadline.0.saturating_sub(self.now_ns));
        if running {
            self.resume();
        }
    }

    /// A synchronisation point: pauses, and gives the stamp to pass to the fabric.
    pub(crate) fn arrive(&mut self) -> u64 {
        self.pause();
        self.now_ns
    }

    /// Past the synchronisation point: the largest stamp of all ranks, and the transfer that follows.
    pub(crate) fn depart(&mut self, largest_stamp: u64, part: Part, transfer_ns: u64) {
        self.now_ns = largest_stamp + transfer_ns;
        self.segment.transfer_part = part as u64;
        self.segment.transfer_ns = transfer_ns;
        if self.segments.len() == MOST_SEGMENTS {
            self.segments.clear();
        }
        self.segments.push(std::mem::take(&mut self.segment));
        self.resume();
    }

    /// Segments since the last [`VirtualClock::take_segments`], into `out`; memory of both is kept.
    pub(crate) fn take_segments(&mut self, out: &mut Vec<u64>) -> usize {
        out.clear();
        let count = self.segments.len();
        self.segments.drain(..).for_each(|segment| out.extend(segment.words()));
        count
    }
}

impl Default for VirtualClock {
    fn default() -> Self {
        Self::new()
    }
}

/// CPU time of the calling thread, in nanoseconds.
fn thread_cpu_ns() -> u64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    thread_local!(static FAKE: Cell<u64> = const { Cell::new(0) });

    fn advance(ns: u64) {
        FAKE.set(FAKE.get() + ns);
    }

    fn clock() -> VirtualClock {
        VirtualClock::with_source(|| FAKE.get())
    }

    #[test]
    fn time_is_booked_by_part_and_not_while_paused() {
        let mut clock = clock();
        clock.enter(Part::Dense);
        advance(5);
        clock.enter(Part::Router);
        advance(7);
        clock.pause();
        advance(100);
        clock.enter(Part::Router);
        advance(1);
        assert_eq!(clock.arrive(), 13);
        clock.depart(20, Part::AllToAll, 4);
        assert_eq!(clock.now_ns(), 24);
        let mut words = Vec::new();
        assert_eq!(clock.take_segments(&mut words), 1);
        assert_eq!(words[Part::Dense as usize], 5);
        assert_eq!(words[Part::Router as usize], 8);
        assert_eq!(words[PARTS..], [Part::AllToAll as u64, 4]);
    }

    #[test]
    fn segments_that_nobody_takes_do_not_pile_up() {
        let mut clock = clock();
        for now in 0..3 * MOST_SEGMENTS as u64 + 5 {
            clock.depart(now, Part::Plan, 0);
        }
        assert_eq!(clock.take_segments(&mut Vec::new()), 5);
    }

    #[test]
    fn only_what_a_join_waits_for_is_exposed() {
        let mut clock = clock();
        clock.enter(Part::Reroute);
        let deadline = clock.beside(10);
        advance(4);
        clock.join(deadline, Part::WeightSync);
        assert_eq!(clock.arrive(), 10);
        let hidden = clock.beside(3);
        clock.enter(Part::Dense);
        advance(8);
        clock.join(hidden, Part::GradReduce);
        assert_eq!(clock.arrive(), 18);
        clock.depart(18, Part::Plan, 0);
        let mut words = Vec::new();
        clock.take_segments(&mut words);
        assert_eq!(words[Part::WeightSync as usize], 6);
        assert_eq!(words[Part::GradReduce as usize], 0);
    }

    #[test]
    fn the_critical_path_takes_the_slowest_rank_of_each_segment() {
        let segment = |dense: u64, experts: u64| {
            let mut s = Segment { transfer_part: Part::AllToAll as u64, transfer_ns: 2, ..Segment::default() };
            s.compute_ns[Part::Dense as usize] = dense;
            s.compute_ns[Part::Experts as usize] = experts;
            s.words()
        };
        // Rank 0: (3, 1) then (0, 9); rank 1: (1, 5) then (2, 2).
        let words = [segment(3, 1), segment(0, 9), segment(1, 5), segment(2, 2)].concat();
        let time = StepTime::critical_path(&words, 2);
        assert_eq!(time.part_ns(Part::Dense), 1);
        assert_eq!(time.part_ns(Part::Experts), 14);
        assert_eq!(time.part_ns(Part::AllToAll), 4);
        assert_eq!(time.total_ns, 19);
    }
}
