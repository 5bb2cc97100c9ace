//! The event level: every rank on its own, chunks over links that ranks share, instances one after another.
//!
//! ```text
//! forward:  each rank: rest; all ranks: counts, plan; each rank: reroute beside weight sync (chunk by chunk, with relays,
//!           by the transfer clock), then its link sends chunks round its peers
//! sending starts at s: the sender's link is busy for the chunk; the receiver takes chunks in the order they were sent, each
//!           from max(s + hop, end of the one before), longer by the incast for rows above the pair's even share
//! experts:  when all rows are there, instance by instance; results go back the same way
//! ```
//!
//! Dispatch and combine each begin when all ranks are there: their kernels open with a barrier, since receive buffers are used
//! again (DeepEP: `notify_dispatch`, `cached_notify_dispatch`, `cached_notify_combine`; so does this project's fabric). Between
//! barriers every rank is on its own. Near and far peers have links of their own. `O(chunks log N)` a pass.

use ultraep_plan::time::at_speed_ps;

use crate::balancer::LayerLoad;
use crate::layer::{Direction, LayerModel, LayerTimes, LayerWork, PassWork};
use crate::queue::EventQueue;
use crate::span::{Span, Stream};
/// What happens. The order of variants does not matter: the queue orders by time and age.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// A rank's link may send the next chunk.
    Send { rank: u16, far: bool },
    /// All rows of a rank are there, or the instance before is done.
    Instance { rank: u16, index: u16 },
}

impl From<Event> for u64 {
    fn from(event: Event) -> u64 {
        match event {
            Event::Send { rank, far } => 1 << 32 | u64::from(rank) << 1 | u64::from(far),
            Event::Instance { rank, index } => 2 << 32 | u64::from(rank) << 16 | u64::from(index),
        }
    }
}

/// One way of an all-to-all: what is left to send, and to whom.
#[derive(Clone, Debug, Default)]
struct Flow {
    /// `[N, N]`: rows left from rank to rank.
    left: Vec<u32>,
    /// Peers of a rank with rows left, near and far, in the order of turns.
    peers: Vec<[Vec<u16>; 2]>,
    turn: Vec<[usize; 2]>,
    /// Rows that a rank still awaits, `[N]`.
    awaited: Vec<u64>,
    /// When a rank had its last row so far, `[N]`.
    complete: Vec<u64>,
}

/// A rank's link of one kind.
#[derive(Clone, Copy, Debug, Default)]
struct Link {
    send_free: u64,
    receive_free: u64,
    scheduled: bool,
}

/// The model.
#[derive(Default)]
pub struct EventLevel {
    queue: EventQueue<Event>,
    dispatch: Flow,
    combine: Flow,
    links: Vec<[Link; 2]>,
    /// Ranks whose experts are not done.
    computing: usize,
    experts_from: Vec<u64>,
    /// When combine began, everywhere.
    combine_from: u64,
    spans: Option<Vec<Span>>,
}

impl EventLevel {
    /// One that keeps what each rank did when.
    pub fn with_spans() -> Self {
        Self { spans: Some(Vec::new()), ..Self::default() }
    }

    /// Takes what was kept since the last time.
    pub fn take_spans(&mut self) -> Vec<Span> {
        self.spans.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Events handled so far.
    pub fn events(&self) -> u64 {
        self.queue.scheduled()
    }

    fn span(&mut self, name: &'static str, rank: usize, stream: Stream, start_ps: u64, end_ps: u64) {
        if let Some(spans) = self.spans.as_mut().filter(|_| end_ps > start_ps) {
            spans.push(Span { name, rank: rank as u32, stream, start_ps, end_ps });
        }
    }

    /// From `start`, the same everywhere, to when each rank has its results.
    fn exchange(&mut self, work: &LayerWork, load: &LayerLoad, direction: Direction, start: u64) {
        let ranks = load.ranks();
        self.queue.restart();
        self.dispatch.begin(load, work.domain_ranks, |from, to| from * ranks + to);
        self.combine.begin(load, work.domain_ranks, |from, to| to * ranks + from);
        self.links.clear();
        self.links.resize(ranks, [Link::default(); 2]);
        (self.computing, self.combine_from) = (ranks, 0);
        self.experts_from.clear();
        self.experts_from.resize(ranks, 0);
        for rank in 0..ranks {
            self.links[rank].iter_mut().for_each(|link| link.send_free = start);
            self.dispatch.complete[rank] = start;
            for far in [false, true] {
                self.wake(rank, far);
            }
            if self.dispatch.awaited[rank] == 0 {
                self.queue.push(start, Event::Instance { rank: rank as u16, index: 0 });
            }
        }
        while let Some((now, event)) = self.queue.pop() {
            match event {
                Event::Send { rank, far } => self.send(work, load.even_share, direction, (usize::from(rank), far), now),
                Event::Instance { rank, index } => {
                    self.compute(work, load, direction, (usize::from(rank), usize::from(index)), now);
                }
            }
        }
    }

    /// Schedules a link that has something to send and is not scheduled.
    fn wake(&mut self, rank: usize, far: bool) {
        let index = usize::from(far);
        let link = &mut self.links[rank][index];
        let at = if !self.dispatch.peers[rank][index].is_empty() {
            link.send_free
        } else if self.computing == 0 && !self.combine.peers[rank][index].is_empty() {
            link.send_free.max(self.combine_from)
        } else {
            return;
        };
        if !link.scheduled {
            link.scheduled = true;
            self.queue.push(at, Event::Send { rank: rank as u16, far });
        }
    }

    fn send(&mut self, work: &LayerWork, even_share: u32, direction: Direction, link: (usize, bool), now: u64) {
        let (rank, far) = link;
        let pass = work.pass(direction);
        let back = self.dispatch.peers[rank][usize::from(far)].is_empty();
        let flow = if back { &mut self.combine } else { &mut self.dispatch };
        let (to, rows, excess) = flow.take(rank, far, work.chunk_rows, even_share);
        let (busy, taking) = costs(pass, far, rows, excess);
        let receiver = &mut self.links[to][usize::from(far)];
        let there = now.saturating_add(work.hop_ps);
        let from = receiver.receive_free.max(there);
        receiver.receive_free = from.saturating_add(taking);
        let complete = receiver.receive_free.max(there.saturating_add(busy));
        flow.complete[to] = flow.complete[to].max(complete);
        flow.awaited[to] -= u64::from(rows);
        if !back && flow.awaited[to] == 0 {
            let at = flow.complete[to];
            self.queue.push(at, Event::Instance { rank: to as u16, index: 0 });
        }
        let own = &mut self.links[rank][usize::from(far)];
        (own.send_free, own.scheduled) = (now.saturating_add(busy), false);
        self.wake(rank, far);
    }

    fn compute(&mut self, work: &LayerWork, load: &LayerLoad, direction: Direction, at: (usize, usize), now: u64) {
        let (rank, index) = at;
        let speed = work.speeds[rank];
        if index == 0 {
            self.experts_from[rank] = now;
        }
        let fixed = if index == 0 { work.pass(direction).fixed_ps } else { 0 };
        match load.rows_of(rank).get(index) {
            Some(&rows) => {
                let work_ps = fixed.saturating_add(work.instance_ps(rows, direction));
                let end = now.saturating_add(at_speed_ps(work_ps, speed));
                self.queue.push(end, Event::Instance { rank: rank as u16, index: index as u16 + 1 });
            }
            None => {
                let end = now.saturating_add(at_speed_ps(fixed, speed));
                self.combine_from = self.combine_from.max(end);
                self.computing -= 1;
                self.span("experts", rank, Stream::Compute, self.experts_from[rank], end);
                if self.computing == 0 {
                    self.combine.complete.fill(self.combine_from);
                    for rank in 0..self.links.len() {
                        self.wake(rank, false);
                        self.wake(rank, true);
                    }
                }
            }
        }
    }
}

/// Time of a chunk on its sender's link and on its receiver's.
fn costs(pass: &PassWork, far: bool, rows: u32, excess: u32) -> (u64, u64) {
    if far {
        let busy = u64::from(rows).saturating_mul(pass.far_row_ps);
        return (busy, busy);
    }
    let busy = u64::from(rows).saturating_mul(pass.link_row_ps);
    (busy, busy.saturating_add(u64::from(excess).saturating_mul(pass.incast_row_ps)))
}

impl Flow {
    fn begin(&mut self, load: &LayerLoad, domain_ranks: usize, index: impl Fn(usize, usize) -> usize) {
        let ranks = load.ranks();
        self.left.clear();
        self.left.resize(ranks * ranks, 0);
        self.peers.resize_with(ranks, Default::default);
        self.turn.clear();
        self.turn.resize(ranks, [0; 2]);
        for list in [&mut self.awaited, &mut self.complete] {
            list.clear();
            list.resize(ranks, 0);
        }
        for from in 0..ranks {
            self.peers[from].iter_mut().for_each(Vec::clear);
            // Step by step every rank sends to another one, in its own domain and in others: not all to one.
            let (domain, own) = (from / domain_ranks, from % domain_ranks);
            let domains = ranks / domain_ranks;
            let near = (1..domain_ranks).map(|step| (0, step));
            let far = (0..domain_ranks).flat_map(|step| (1..domains).map(move |away| (away, step)));
            for (away, step) in near.chain(far) {
                let to = (domain + away) % domains * domain_ranks + (own + step) % domain_ranks;
                let rows = load.flows[index(from, to)];
                if rows > 0 {
                    self.left[from * ranks + to] = rows;
                    self.awaited[to] += u64::from(rows);
                    self.peers[from][usize::from(away > 0)].push(to as u16);
                }
            }
        }
    }

    /// The next chunk of a link: receiver, rows, and how many of them are above the pair's even share.
    fn take(&mut self, rank: usize, far: bool, chunk_rows: u32, even_share: u32) -> (usize, u32, u32) {
        let ranks = self.turn.len();
        let (peers, turn) = (&mut self.peers[rank][usize::from(far)], &mut self.turn[rank][usize::from(far)]);
        *turn %= peers.len();
        let to = usize::from(peers[*turn]);
        let left = &mut self.left[rank * ranks + to];
        let rows = chunk_rows.min(*left);
        // What is above the even share goes first: all of a pair's rows count, in whatever order.
        let excess = rows.min(left.saturating_sub(even_share));
        *left -= rows;
        if *left == 0 {
            peers.remove(*turn);
        } else {
            *turn += 1;
        }
        (to, rows, excess)
    }
}

impl LayerModel for EventLevel {
    fn pass(&mut self, work: &LayerWork, load: &LayerLoad, direction: Direction, ready: &mut [u64]) -> LayerTimes {
        let begun = last(ready);
        let mut before_plan = 0;
        if direction == Direction::Forward {
            for (rank, time) in ready.iter_mut().enumerate() {
                let start = *time;
                *time = time.saturating_add(work.rest_ps(rank, direction));
                self.span("rest", rank, Stream::Compute, start, *time);
            }
            // The counts are all-gathered: the plan waits for the last rank.
            before_plan = last(ready);
            for (rank, time) in ready.iter_mut().enumerate() {
                let from = if work.plan_ps > 0 { before_plan } else { *time };
                let planned = from.saturating_add(work.plan_ps);
                *time = planned.saturating_add(work.sync_ps(load, rank));
                self.span("plan", rank, Stream::Compute, from, planned);
                self.span("weight sync", rank, Stream::Communication, planned, *time);
            }
        }
        let sent = last(ready);
        self.exchange(work, load, direction, sent);
        for (rank, time) in ready.iter_mut().enumerate() {
            *time = self.combine.complete[rank].max(self.links[rank][0].send_free).max(self.links[rank][1].send_free);
            self.span("dispatch", rank, Stream::Communication, sent, self.dispatch.complete[rank]);
            self.span("combine", rank, Stream::Communication, self.combine_from, *time);
        }
        let exchanged = last(ready);
        if direction == Direction::Backward {
            let exposed = work.exposed_backward_ps(load);
            for (rank, time) in ready.iter_mut().enumerate() {
                let rest = work.rest_ps(rank, direction);
                self.span("rest", rank, Stream::Compute, *time, time.saturating_add(rest));
                *time = time.saturating_add(rest).saturating_add(exposed);
            }
        }
        self.parts(work, load, direction, Moments { begun, before_plan, sent, exchanged })
    }

    fn digest(&self) -> u64 {
        self.queue.digest()
    }
}

fn last(times: &[u64]) -> u64 {
    times.iter().copied().max().unwrap_or(0)
}

/// When the last rank did what.
#[derive(Clone, Copy)]
struct Moments {
    /// Began the pass.
    begun: u64,
    /// Had its counts.
    before_plan: u64,
    /// Began dispatch: all do at once.
    sent: u64,
    /// Had its results.
    exchanged: u64,
}

impl EventLevel {
    /// From the last rank to begin to the last to end: its experts are the busiest rank's, the all-to-all is what is left.
    fn parts(&self, work: &LayerWork, load: &LayerLoad, direction: Direction, at: Moments) -> LayerTimes {
        let exchange = at.exchanged - at.sent;
        let experts = (0..load.ranks()).map(|r| work.experts_ps(load, r, direction)).max().unwrap_or(0).min(exchange);
        let (rest_ps, plan_ps, sync_ps) = match direction {
            Direction::Forward => {
                let plan = work.plan_ps.min(at.sent - at.before_plan);
                (at.before_plan - at.begun, plan, at.sent - at.before_plan - plan)
            }
            Direction::Backward => {
                let rest = (0..load.ranks()).map(|r| work.rest_ps(r, direction)).max().unwrap_or(0);
                (rest, 0, work.exposed_backward_ps(load))
            }
        };
        LayerTimes { rest_ps, plan_ps, sync_ps, all_to_all_ps: exchange - experts, experts_ps: experts }
    }
}
