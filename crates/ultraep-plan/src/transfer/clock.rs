//! What a plan of transfers takes, exactly, chunk by chunk, under a [`TransferModel`].
//!
//! ```text
//! each rank, whenever its link is free: of its streams with a chunk that is ready, the one whose next chunk has the lowest
//! number, ties to the first in its list; that chunk goes to all receivers of the stream, one after the other
//! sending starts at s:  the sender's link is busy until s + send
//!                       the receiver's link from f = max(s + hop, when it gets free) until f + receive
//!                       complete at max(f + receive, s + hop + send); from then on a relay may send it
//! ```
//!
//! Sends are taken in order of `(start, rank)`, so receivers serve chunks in the order in which they come. Nothing in the
//! fabric slows a sender down; what waits for a busy receiver waits in the fabric. Integers throughout.
//! Complexity: O(T C (log N + streams a rank)) for T copies of C chunks. No allocation for plans within the topology's slots.

use alloc::vec::Vec;

use super::{MAX_STRIPES, Stripe, TransferModel, TransferModelError, TransferPlan};
use crate::draft::total_slots;
use crate::{Rank, Topology};

/// A time that does not come.
const NEVER: u64 = u64::MAX;
/// No row, no stream.
const NONE: u32 = u32::MAX;

/// Copies of one stripe of one expert by one rank.
#[derive(Clone, Copy, Debug, Default)]
struct Stream {
    first: u32,
    end: u32,
    /// Row of ready times, or [`NONE`]: a master is ready from the start.
    row: u32,
    /// Chunks sent, and chunks in all.
    sent: u32,
    chunks: u32,
    stripe: Stripe,
}

impl Stream {
    /// Number of the next chunk, in the expert.
    fn next(&self) -> u32 {
        self.sent * self.stripe.count + self.stripe.index
    }
}

/// A rank's links.
#[derive(Clone, Copy, Debug, Default)]
struct Links {
    send_free: u64,
    receive_free: u64,
    /// When its last chunk was complete.
    complete: u64,
    /// Stream whose chunk is on its way to the receivers, or [`NONE`], and the task whose turn it is.
    current: u32,
    task: u32,
    streams: (u32, u32),
}

/// Runs plans under a model.
#[derive(Clone, Debug)]
pub struct TransferClock {
    model: TransferModel,
    streams: Vec<Stream>,
    links: Vec<Links>,
    /// For each task the row where its receiver keeps ready times, or [`NONE`] where nobody waits for them.
    rows: Vec<u32>,
    /// Rows' known ready times: how many, `[rows]`, and which, `[rows, row_len]`.
    known: Vec<u32>,
    ready: Vec<u64>,
    row_len: usize,
    turns: Turns,
}

impl TransferClock {
    /// For plans of `topology`.
    pub fn new(topology: &Topology, model: TransferModel) -> Result<Self, TransferModelError> {
        model.check()?;
        let (ranks, stripes) = (topology.ranks(), MAX_STRIPES as usize);
        let (transfers, row_len) = (total_slots(topology), model.chunks() as usize);
        let units = transfers * stripes;
        Ok(Self {
            model,
            streams: Vec::with_capacity(units),
            links: Vec::with_capacity(ranks),
            rows: Vec::with_capacity(units),
            known: Vec::with_capacity(units),
            ready: Vec::with_capacity(transfers * (row_len + stripes)),
            row_len,
            turns: Turns::new(ranks),
        })
    }

    /// When the last replica of `plan` is complete, in nanoseconds from the start; 0 for a plan without transfers.
    pub fn run(&mut self, plan: &TransferPlan) -> u64 {
        self.begin(plan);
        while let Some((rank, now)) = self.turns.first() {
            self.send(plan, rank, now);
        }
        self.links.iter().map(|l| l.complete).max().unwrap_or(0)
    }

    /// When each rank had all its replicas in the last run, `[N]`; 0 for a rank that receives nothing.
    pub fn complete_ns(&self) -> impl ExactSizeIterator<Item = u64> {
        self.links.iter().map(|l| l.complete)
    }

    fn begin(&mut self, plan: &TransferPlan) {
        let tasks = plan.tasks();
        self.streams.clear();
        self.links.clear();
        self.known.clear();
        self.rows.clear();
        self.rows.resize(tasks.len(), NONE);
        for rank in (0..plan.ranks()).map(Rank::new) {
            let first_stream = self.streams.len() as u32;
            let mut first = plan.range(rank).start;
            for stream in plan.streams(rank) {
                let row = plan.feeder(first).map_or(NONE, |feeder| {
                    self.rows[feeder] = self.known.len() as u32;
                    self.known.push(0);
                    self.rows[feeder]
                });
                let end = first + stream.len();
                let stripe = stream[0].stripe;
                let chunks = stripe.chunks(self.model.chunks()).len() as u32;
                self.streams.push(Stream { first: first as u32, end: end as u32, row, sent: 0, chunks, stripe });
                first = end;
            }
            let streams = (first_stream, self.streams.len() as u32);
            self.links.push(Links { current: NONE, streams, ..Links::default() });
        }
        self.row_len = self.model.chunks().div_ceil(u64::from(plan.stripes().max(1))) as usize;
        let room = self.known.len() * self.row_len;
        if self.ready.len() < room {
            self.ready.resize(room, 0);
        }
        self.turns.clear(plan.ranks());
        for rank in 0..plan.ranks() {
            self.turns.set(rank, self.next_ns(rank));
        }
    }

    /// When the next chunk of a stream is ready, as far as known.
    fn ready_ns(&self, stream: &Stream) -> u64 {
        if stream.sent == stream.chunks {
            NEVER
        } else if stream.row == NONE {
            0
        } else if stream.sent < self.known[stream.row as usize] {
            self.ready[stream.row as usize * self.row_len + stream.sent as usize]
        } else {
            NEVER
        }
    }

    fn streams_of(&self, rank: usize) -> core::ops::Range<usize> {
        let (first, end) = self.links[rank].streams;
        first as usize..end as usize
    }

    /// When a rank starts its next send, as far as known.
    fn next_ns(&self, rank: usize) -> u64 {
        let links = &self.links[rank];
        if links.current != NONE {
            return links.send_free;
        }
        let ready = self.streams[self.streams_of(rank)].iter().map(|s| self.ready_ns(s)).min();
        ready.map_or(NEVER, |ready| ready.max(links.send_free))
    }

    fn send(&mut self, plan: &TransferPlan, rank: usize, now: u64) {
        if self.links[rank].current == NONE {
            let ready = self.streams_of(rank).filter(|&s| self.ready_ns(&self.streams[s]) <= now);
            let Some(chosen) = ready.min_by_key(|&s| (self.streams[s].next(), s)) else {
                debug_assert!(false, "a rank's turn without a chunk that is ready");
                return self.turns.set(rank, NEVER);
            };
            (self.links[rank].current, self.links[rank].task) = (chosen as u32, self.streams[chosen].first);
        }
        let (stream, task) = (self.links[rank].current as usize, self.links[rank].task as usize);
        let to = plan.tasks()[task].transfer.to.index();
        let complete = self.receive(to, now);
        let row = self.rows[task];
        if row != NONE {
            self.ready[row as usize * self.row_len + self.streams[stream].sent as usize] = complete;
            self.known[row as usize] += 1;
            if to != rank {
                self.turns.set(to, self.next_ns(to));
            }
        }
        let links = &mut self.links[rank];
        links.send_free = now + self.model.send_ns;
        links.task += 1;
        if links.task == self.streams[stream].end {
            links.current = NONE;
            self.streams[stream].sent += 1;
        }
        self.turns.set(rank, self.next_ns(rank));
    }

    /// Takes in a chunk whose sending starts now; when it is complete.
    fn receive(&mut self, to: usize, now: u64) -> u64 {
        let TransferModel { send_ns, receive_ns, hop_ns, .. } = self.model;
        let links = &mut self.links[to];
        let from = links.receive_free.max(now + hop_ns);
        links.receive_free = from + receive_ns;
        let complete = links.receive_free.max(now + hop_ns + send_ns);
        links.complete = links.complete.max(complete);
        complete
    }
}

/// Whose turn it is: a tournament over ranks by time, ties to the lower rank.
#[derive(Clone, Debug, Default)]
struct Turns {
    /// `[2 * leaves]`: winners above, ranks' times in the second half.
    times: Vec<u64>,
    leaves: usize,
}

impl Turns {
    fn new(ranks: usize) -> Self {
        Self { times: Vec::with_capacity(2 * ranks.next_power_of_two()), leaves: 0 }
    }

    fn clear(&mut self, ranks: usize) {
        self.leaves = ranks.next_power_of_two();
        self.times.clear();
        self.times.resize(2 * self.leaves, NEVER);
    }

    fn set(&mut self, rank: usize, time: u64) {
        let mut at = self.leaves + rank;
        self.times[at] = time;
        while at > 1 {
            let least = self.times[at].min(self.times[at ^ 1]);
            at /= 2;
            if self.times[at] == least {
                break;
            }
            self.times[at] = least;
        }
    }

    fn first(&self) -> Option<(usize, u64)> {
        let time = *self.times.get(1)?;
        if time == NEVER {
            return None;
        }
        let mut at = 1;
        while at < self.leaves {
            at = 2 * at + usize::from(self.times[2 * at] != time);
        }
        Some((at - self.leaves, time))
    }
}
