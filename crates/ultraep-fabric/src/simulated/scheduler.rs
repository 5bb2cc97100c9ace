//! Who runs, what lands, what strikes: every choice of a simulated run, under one lock.
//!
//! Each rank is a thread, and exactly one of them runs: the one that `State::running` names. The others wait for their
//! turn. Whoever runs makes the next choice itself and hands the turn over.

use super::habits::{Habits, Random};
use super::{Fault, FaultKind, Moment, Schedule, Simulation, never_left};
use crate::failure::Failure;
use crate::shared::Segment;
use crate::{Loss, RemoteSpan, WindowId};
use core::time::Duration;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use ultraep_plan::Rank;

/// Virtual nanoseconds of a turn.
const TURN_NS: u64 = 1_000;

/// Where a rank takes a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Submit(u64),
    InFlight(u64),
    Elsewhere,
}

/// What travels.
pub(super) enum Content {
    Put { to: RemoteSpan, bytes: Vec<u8> },
    Signal { rank: Rank, signal: usize, add: u64 },
}

struct Message {
    from: Rank,
    /// Of all messages sent, in order.
    number: u64,
    /// Lands by itself from then on.
    due_ns: u64,
    content: Content,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doing {
    /// Wants to run.
    Ready,
    /// Does nothing before this time.
    Asleep {
        until_ns: u64,
    },
    /// Looks again when there is more news than this, or at this time.
    Blocked {
        news: u64,
        until_ns: u64,
    },
    /// Never runs again, until all others have ended.
    Hung,
    Ended,
}

struct Member {
    doing: Doing,
    turns: u64,
    /// How often something has changed that this rank may be waiting for.
    news: u64,
}

struct State {
    random: Random,
    habits: Habits,
    faults: Vec<Fault>,
    members: Vec<Member>,
    running: Option<usize>,
    /// Of each rank, for habits that go by it; the next rank to fall behind all others gets `lowest`.
    priorities: Vec<i64>,
    lowest: i64,
    now_ns: u64,
    messages: Vec<Message>,
    sent: u64,
    /// Ranks whose processes were killed, and when the supervisor notices.
    notices: Vec<(u64, Rank)>,
    turns: u64,
    landed_late: u64,
    digest: u64,
}

pub(super) struct Scheduler {
    segment: Arc<Segment>,
    state: Mutex<State>,
    /// One a rank: its turn has come.
    turns: Vec<Condvar>,
    timeout: Duration,
}

impl Scheduler {
    pub(super) fn new(segment: Arc<Segment>, simulation: &Simulation, timeout: Duration) -> Self {
        let ranks = segment.ranks().count();
        let mut random = Random::new(simulation.seed);
        let habits = Habits::draw(&mut random, ranks, timeout);
        let priorities = (0..ranks).map(|_| random.below(1 << 32) as i64).collect();
        let state = State {
            random,
            habits,
            faults: simulation.faults.clone(),
            members: (0..ranks).map(|_| Member { doing: Doing::Ready, turns: 0, news: 0 }).collect(),
            running: None,
            priorities,
            lowest: -1,
            now_ns: 0,
            messages: Vec::new(),
            sent: 0,
            notices: Vec::new(),
            turns: 0,
            landed_late: 0,
            digest: 0xcbf2_9ce4_8422_2325,
        };
        Self { segment, state: Mutex::new(state), turns: (0..ranks).map(|_| Condvar::new()).collect(), timeout }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics with the lock held; if something did, the state would still be whole.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Gives the first turn.
    pub(super) fn start(&self) {
        let mut state = self.lock();
        self.hand_over(&mut state, None);
    }

    /// A rank's thread did not start.
    pub(super) fn never_starts(&self, rank: Rank) {
        self.lock().members[rank.index()].doing = Doing::Ended;
    }

    /// Waits for the first turn.
    pub(super) fn await_turn(&self, rank: Rank) {
        let state = self.lock();
        self.until_my_turn(state, rank);
    }

    /// The rank offers to stop here: others may run before this returns. What strikes it, if something is due.
    pub(super) fn turn(&self, rank: Rank, place: Place) -> Option<FaultKind> {
        let mut state = self.lock();
        state.turns += 1;
        state.now_ns += TURN_NS;
        let member = &mut state.members[rank.index()];
        let number = member.turns;
        member.turns += 1;
        let due = |fault: &Fault| {
            let now = match fault.moment {
                Moment::Before(operation) => place == Place::Submit(operation),
                Moment::InFlight(operation) => place == Place::InFlight(operation),
                Moment::Turn(turn) => number == turn,
            };
            fault.rank == rank && now
        };
        if let Some(index) = state.faults.iter().position(due) {
            let kind = state.faults.swap_remove(index).kind;
            state.fold(1 << 32 | rank.index() as u64);
            return Some(kind);
        }
        let odds = state.habits.sleeps;
        if state.random.chance(odds) {
            let nap_ns = state.nap_ns();
            state.members[rank.index()].doing = Doing::Asleep { until_ns: state.now_ns + nap_ns };
        }
        self.hand_over(&mut state, Some(rank));
        self.until_my_turn(state, rank);
        None
    }

    /// The rank waits until something changes, at most this long.
    pub(super) fn block(&self, rank: Rank, at_most: Duration) {
        self.pause(rank, |state| Doing::Blocked {
            news: state.members[rank.index()].news,
            until_ns: state.after(at_most),
        });
    }

    /// The rank does nothing for this long.
    pub(super) fn sleep(&self, rank: Rank, time: Duration) {
        self.pause(rank, |state| Doing::Asleep { until_ns: state.after(time) });
    }

    /// The rank does nothing any more; returns when all others have ended.
    pub(super) fn hang(&self, rank: Rank) {
        self.pause(rank, |_| Doing::Hung);
    }

    fn pause(&self, rank: Rank, doing: impl FnOnce(&State) -> Doing) {
        let mut state = self.lock();
        state.members[rank.index()].doing = doing(&state);
        self.hand_over(&mut state, Some(rank));
        self.until_my_turn(state, rank);
    }

    /// The rank's thread has nothing more to do.
    pub(super) fn end(&self, rank: Rank) {
        let mut state = self.lock();
        state.members[rank.index()].doing = Doing::Ended;
        state.news_for_all();
        self.hand_over(&mut state, Some(rank));
    }

    /// After all ranks have ended.
    pub(super) fn finish(&self) -> Schedule {
        let state = self.lock();
        let time = Duration::from_nanos(state.now_ns);
        Schedule { digest: state.digest, turns: state.turns, landed_late: state.landed_late, time }
    }

    /// Something has changed that a blocked rank may be waiting for.
    pub(super) fn changed(&self) {
        self.lock().news_for_all();
    }

    pub(super) fn now(&self) -> Duration {
        Duration::from_nanos(self.lock().now_ns)
    }

    /// Whether anything has not landed yet.
    pub(super) fn under_way(&self) -> bool {
        !self.lock().messages.is_empty()
    }

    /// Takes a message on its way.
    pub(super) fn send(&self, from: Rank, content: Content) {
        let mut state = self.lock();
        let content = match content {
            Content::Put { to, bytes } => return state.send_pieces(from, to, &bytes),
            signal => signal,
        };
        state.send(from, content);
    }

    /// Lands all that a rank has sent, in any order that its signals allow.
    pub(super) fn land_all_of(&self, rank: Rank) {
        let mut state = self.lock();
        while let Some(index) = state.any_of(|message| message.from == rank) {
            self.land(&mut state, index);
        }
    }

    /// Lands the puts of a rank to one place.
    pub(super) fn land_puts_to(&self, from: Rank, target: Rank, window: WindowId) {
        let mut state = self.lock();
        let there = |message: &Message| {
            let to = match &message.content {
                Content::Put { to, .. } => to,
                Content::Signal { .. } => return false,
            };
            message.from == from && (to.rank, to.window) == (target, window)
        };
        while let Some(index) = state.any_of(there) {
            self.land(&mut state, index);
        }
    }

    /// The rank is lost: half of what it has sent and what has not landed never will.
    pub(super) fn lose_some_of(&self, rank: Rank) {
        let mut guard = self.lock();
        let state = &mut *guard;
        // Signals are all lost: one that landed later would vouch for puts that are lost.
        let random = &mut state.random;
        state.messages.retain(|message| {
            message.from != rank || (matches!(message.content, Content::Put { .. }) && random.chance(512))
        });
        state.news_for_all();
    }

    /// The rank's process was killed: the supervisor notices after a while.
    pub(super) fn killed(&self, rank: Rank) {
        self.lose_some_of(rank);
        let mut state = self.lock();
        let notice_ns = state.now_ns + state.nap_ns();
        state.notices.push((notice_ns, rank));
    }

    fn until_my_turn(&self, mut state: MutexGuard<'_, State>, rank: Rank) {
        while state.running != Some(rank.index()) {
            let wait = self.turns[rank.index()].wait(state);
            state = wait.unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }

    /// Chooses who runs next and gives that rank the turn.
    fn hand_over(&self, state: &mut State, from: Option<Rank>) {
        let next = self.choose(state, from);
        state.running = next;
        if let Some(next) = next {
            state.fold(next as u64);
            state.members[next].doing = Doing::Ready;
            if from.map(Rank::index) != Some(next) {
                self.turns[next].notify_one();
            }
        }
    }

    fn choose(&self, state: &mut State, from: Option<Rank>) -> Option<usize> {
        loop {
            self.notice(state);
            let now_ns = state.now_ns;
            let rings = state.habits.rings;
            if state.random.chance(rings)
                && let Some(index) = state.any_of(|message| matches!(message.content, Content::Signal { .. }))
            {
                state.landed_late += 1;
                self.land(state, index);
            }
            let landing = state.any_of(|message| message.due_ns <= now_ns);
            let ready: Vec<usize> = (0..state.members.len()).filter(|&index| state.is_ready(index)).collect();
            let odds = state.habits.lands;
            if let Some(index) = landing
                && (ready.is_empty() || state.random.chance(odds))
            {
                state.landed_late += 1;
                self.land(state, index);
                continue;
            }
            if !ready.is_empty() {
                return Some(state.pick(&ready, from.map(Rank::index)));
            }
            match state.next_event_ns() {
                Some(time_ns) => state.now_ns = time_ns,
                None => return self.release_hung(state),
            }
        }
    }

    /// Everyone has ended but the ranks that hang: one after another they may.
    fn release_hung(&self, state: &mut State) -> Option<usize> {
        let hung = state.members.iter().position(|member| member.doing == Doing::Hung)?;
        // Nobody waited for it; whoever started the group does in the end.
        let rank = Rank::new(hung);
        self.segment.fail(rank, &never_left(rank, self.timeout));
        Some(hung)
    }

    /// The supervisor looks after those whose process is gone.
    fn notice(&self, state: &mut State) {
        let now_ns = state.now_ns;
        while let Some(index) = state.notices.iter().position(|&(time_ns, _)| time_ns <= now_ns) {
            let (_, rank) = state.notices.swap_remove(index);
            self.segment.fail(rank, &Failure::Lost { rank, loss: Loss::Killed { signal: 9 } });
            state.news_for_all();
        }
    }

    /// Lands the message at `index`; a signal after all earlier puts of its rank.
    fn land(&self, state: &mut State, index: usize) {
        let Message { from, number, content, .. } = state.messages.swap_remove(index);
        if let Content::Signal { .. } = content {
            let earlier = |message: &Message| {
                message.from == from && message.number < number && matches!(message.content, Content::Put { .. })
            };
            while let Some(index) = state.any_of(earlier) {
                self.land(state, index);
            }
        }
        state.fold(2 << 32 | number);
        match content {
            // SAFETY: checked by `copy_out` when it was put. A rank's messages land before it submits a `Close`
            // (`land_all_of`), and a rank that is lost submits none.
            Content::Put { to, bytes } => unsafe { self.segment.land_put(to, &bytes) },
            Content::Signal { rank, signal, add } => {
                self.segment.raise_signal(rank, signal, add);
                state.members[rank.index()].news += 1;
            }
        }
    }
}

impl State {
    /// Takes a choice into the digest.
    fn fold(&mut self, choice: u64) {
        self.digest = (self.digest ^ choice).wrapping_mul(0x0000_0100_0000_01b3);
    }

    fn news_for_all(&mut self) {
        self.members.iter_mut().for_each(|member| member.news += 1);
    }

    fn after(&self, time: Duration) -> u64 {
        self.now_ns.saturating_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX))
    }

    fn nap_ns(&mut self) -> u64 {
        1 + self.random.below(self.habits.nap_ns_max)
    }

    /// One of the messages that qualify, if any.
    fn any_of(&mut self, qualifies: impl Fn(&Message) -> bool) -> Option<usize> {
        let count = self.messages.iter().filter(|message| qualifies(message)).count() as u64;
        if count == 0 {
            return None;
        }
        let chosen = self.random.below(count) as usize;
        let mut those = self.messages.iter().enumerate().filter(|(_, message)| qualifies(message));
        those.nth(chosen).map(|(index, _)| index)
    }

    fn send(&mut self, from: Rank, content: Content) {
        let due_ns = self.now_ns + self.nap_ns();
        self.sent += 1;
        self.messages.push(Message { from, number: self.sent, due_ns, content });
    }

    fn send_pieces(&mut self, from: Rank, to: RemoteSpan, bytes: &[u8]) {
        let pieces = 1 + self.random.below(self.habits.pieces_max) as usize;
        let piece = bytes.len().div_ceil(pieces).max(1);
        for (index, bytes) in bytes.chunks(piece).enumerate() {
            let to = RemoteSpan { offset: to.offset + index * piece, ..to };
            self.send(from, Content::Put { to, bytes: bytes.to_vec() });
        }
    }

    fn is_ready(&self, index: usize) -> bool {
        match self.members[index].doing {
            Doing::Ready => true,
            Doing::Asleep { until_ns } => until_ns <= self.now_ns,
            Doing::Blocked { news, until_ns } => news != self.members[index].news || until_ns <= self.now_ns,
            Doing::Hung | Doing::Ended => false,
        }
    }

    /// Who of `ready`, which is not empty, runs next.
    fn pick(&mut self, ready: &[usize], from: Option<usize>) -> usize {
        if self.habits.ranked {
            if let Some(from) = from
                && self.random.chance(16)
            {
                self.priorities[from] = self.lowest;
                self.lowest -= 1;
            }
            let highest = ready.iter().copied().max_by_key(|&rank| self.priorities[rank]);
            return highest.unwrap_or(ready[0]);
        }
        if let Some(from) = from.filter(|from| ready.contains(from))
            && self.random.chance(self.habits.stays)
        {
            return from;
        }
        let chosen = ready[self.random.below(ready.len() as u64) as usize];
        let slow = Some(chosen) == self.habits.slow && self.random.chance(960);
        match ready.iter().find(|&&other| slow && other != chosen) {
            Some(&other) => other,
            None => chosen,
        }
    }

    /// When something happens next if nobody can run.
    fn next_event_ns(&self) -> Option<u64> {
        let members = self.members.iter().filter_map(|member| match member.doing {
            Doing::Asleep { until_ns } | Doing::Blocked { until_ns, .. } => Some(until_ns),
            Doing::Ready | Doing::Hung | Doing::Ended => None,
        });
        let messages = self.messages.iter().map(|message| message.due_ns);
        let notices = self.notices.iter().map(|&(time_ns, _)| time_ns);
        members.chain(messages).chain(notices).min()
    }
}
