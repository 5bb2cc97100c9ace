//! All ranks' machines under a seeded scheduler: messages of each pair arrive in order, and otherwise when the seed says so; a rank may
//! be lost at any moment, with any part of what it has sent.
//!
//! A failing seed is repeated with `SEED=... cargo test -p ultraep-messages machine::simulated`.

use super::{Awaited, CHUNK_BYTES, Machine};
use std::collections::VecDeque;
use std::time::{Duration, Instant};
use ultraep_fabric::backend::Failure;
use ultraep_fabric::{FabricError, GroupSpec, Loss, Operation, Region, RemoteSpan, Span, Ticket, WindowId};
use ultraep_plan::Rank;

const SLOTS: WindowId = WindowId::new(0);
const INBOX: WindowId = WindowId::new(1);
/// A rank's place in each window of another.
const PLACE: usize = 3000;
const ARRIVED: usize = 5;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % limit as u64) as usize
    }
}

/// Bytes of a rank for a purpose.
fn content(purpose: usize, rank: usize, bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (purpose * 101 + rank * 37 + at * 7 + at / 256 + 1) as u8).collect()
}

fn values(purpose: usize, rank: usize, count: usize) -> Vec<f32> {
    let mut random = Random((purpose * 1000 + rank) as u64);
    (0..count).map(|_| (random.below(1 << 20) as f32 - 5e5) * [1e-9, 1.0, 1e9][random.below(3)]).collect()
}

/// What all ranks do next.
#[derive(Clone, Debug)]
enum Step {
    Barrier,
    Gather(usize),
    Reduce(usize),
    /// Every rank's block of so many bytes for each.
    Exchange(usize),
    /// Everyone puts so many bytes to everyone and signals; who has all of them reads them while the window is open.
    Epoch(usize),
    /// Everyone puts so many bytes to everyone; closing alone says that they are there.
    Quiet(usize),
    /// Everyone sends so many bytes to its right.
    Ring(usize),
}

fn steps(random: &mut Random) -> Vec<Step> {
    let bytes = |random: &mut Random| [0, 1, 999, PLACE][random.below(4)];
    let step = |random: &mut Random| match random.below(9) {
        0 => Step::Barrier,
        1 => Step::Gather([0, 77, CHUNK_BYTES + 1][random.below(3)]),
        2 => Step::Reduce([0, 1, 50, CHUNK_BYTES / 2][random.below(4)]),
        3 => Step::Exchange(bytes(random)),
        4 | 5 => Step::Epoch(bytes(random)),
        6 | 7 => Step::Quiet(bytes(random)),
        _ => Step::Ring([0, 5, 3 * CHUNK_BYTES - 1][random.below(3)]),
    };
    (0..4 + random.below(4)).map(|_| step(random)).collect()
}

/// A rank: where it is in its steps, and what it waits for.
struct Player {
    machine: Option<Machine>,
    step: usize,
    /// Within the step.
    stage: usize,
    epochs: usize,
    waits: Vec<(Ticket, Instant)>,
    regions: Vec<Region>,
    outcome: Option<Result<(), FabricError>>,
}

enum Wire {
    Message(Vec<u8>),
    Closed,
}

struct World {
    random: Random,
    ranks: usize,
    players: Vec<Player>,
    /// `[from][to]`
    links: Vec<Vec<VecDeque<Wire>>>,
    now: Instant,
    steps: Vec<Step>,
}

impl World {
    fn new(seed: u64, ranks: usize) -> Self {
        let mut random = Random(seed);
        let steps = steps(&mut random);
        let mut spec = GroupSpec::new(ranks);
        spec.add_window("slots", PLACE * ranks);
        spec.add_window("inbox", PLACE * ranks);
        let player = |rank| Player {
            machine: Some(Machine::new(&spec, Rank::new(rank)).expect("a small group")),
            step: 0,
            stage: 0,
            epochs: 0,
            waits: Vec::new(),
            regions: Vec::new(),
            outcome: None,
        };
        let players = (0..ranks).map(player).collect();
        let links = (0..ranks).map(|_| (0..ranks).map(|_| VecDeque::new()).collect()).collect();
        let mut world = Self { random, ranks, players, links, now: Instant::now(), steps };
        (0..ranks).for_each(|rank| world.collect(rank));
        world
    }

    /// Takes what a rank sends to the links.
    fn collect(&mut self, rank: usize) {
        let now = self.now;
        let Some(machine) = &mut self.players[rank].machine else { return };
        machine.tick(now);
        for (to, message) in machine.take_out() {
            self.links[rank][to.index()].push_back(Wire::Message(message));
        }
    }

    /// Delivers the first message of some link; whether there was one.
    fn deliver(&mut self) -> bool {
        let pairs: Vec<(usize, usize)> = (0..self.ranks * self.ranks)
            .map(|pair| (pair / self.ranks, pair % self.ranks))
            .filter(|&(from, to)| !self.links[from][to].is_empty())
            .collect();
        if pairs.is_empty() {
            return false;
        }
        let (from, to) = pairs[self.random.below(pairs.len())];
        let wire = self.links[from][to].pop_front();
        if let (Some(wire), Some(machine)) = (wire, &mut self.players[to].machine) {
            match wire {
                Wire::Message(message) => machine.receive(Rank::new(from), message, self.now),
                Wire::Closed => machine.closed(Rank::new(from), self.now),
            }
        }
        self.collect(to);
        true
    }

    /// The rank's process is gone, with a part of what it has sent but not delivered.
    fn kill(&mut self, rank: usize) {
        self.players[rank].machine = None;
        for to in 0..self.ranks {
            let kept = self.random.below(self.links[rank][to].len() + 1);
            self.links[rank][to].truncate(kept);
            self.links[rank][to].push_back(Wire::Closed);
        }
    }

    /// Lets a rank do one thing; whether it did.
    fn play(&mut self, rank: usize) -> bool {
        let player = &mut self.players[rank];
        let Some(machine) = player.machine.as_mut().filter(|_| player.outcome.is_none()) else { return false };
        match machine.joined() {
            Ok(true) => {}
            Ok(false) => return false,
            Err(error) => return self.end(rank, Err(error)),
        }
        while let Some((ticket, _)) = player.waits.first() {
            match machine.look(ticket, self.now) {
                Ok(Some(_)) => drop(player.waits.remove(0)),
                Ok(None) => return false,
                Err(error) => return self.end(rank, Err(error)),
            }
        }
        let acted = self.act(rank);
        self.collect(rank);
        match acted {
            Ok(()) => true,
            Err(error) => self.end(rank, Err(error)),
        }
    }

    fn end(&mut self, rank: usize, outcome: Result<(), FabricError>) -> bool {
        let loss = if outcome.is_ok() { Loss::Left } else { Loss::Dropped };
        self.players[rank].outcome = Some(outcome);
        if let Some(machine) = &mut self.players[rank].machine {
            machine.depart(loss, false);
        }
        self.collect(rank);
        self.players[rank].machine = None;
        self.links[rank].iter_mut().for_each(|link| link.push_back(Wire::Closed));
        true
    }

    /// The next thing of a rank's program.
    fn act(&mut self, rank: usize) -> Result<(), FabricError> {
        let (ranks, step) = (self.ranks, self.players[rank].step);
        let Some(of_all) = self.steps.get(step).cloned() else {
            let machine = self.players[rank].machine.as_ref().expect("it plays");
            if machine.is_drained() {
                self.end(rank, Ok(()));
            }
            return Ok(());
        };
        let stage = self.players[rank].stage;
        self.players[rank].stage += 1;
        let right = Rank::new((rank + 1) % ranks);
        let left = (rank + ranks - 1) % ranks;
        match (of_all, stage) {
            (Step::Barrier, 0) => self.submit(rank, Operation::Barrier)?,
            (Step::Gather(bytes), 0) => {
                let send = Region::from_vec(content(step, rank, bytes));
                let recv = Region::zeroed(bytes * ranks);
                let operation = Operation::AllGather { send: Span::whole(&send), recv: Span::whole(&recv) };
                self.submit(rank, operation)?;
                self.players[rank].regions.push(recv);
            }
            (Step::Gather(bytes), 1) => {
                let expected: Vec<u8> = (0..ranks).flat_map(|from| content(step, from, bytes)).collect();
                self.expect(rank, &expected);
            }
            (Step::Reduce(count), 0) => {
                let data = Region::from_vec(values(step, rank, count));
                self.submit(rank, Operation::AllReduceSumF32 { data: Span::whole(&data) })?;
                self.players[rank].regions.push(data);
            }
            (Step::Reduce(count), 1) => {
                let mut sum = values(step, 0, count);
                for other in 1..ranks {
                    sum.iter_mut().zip(values(step, other, count)).for_each(|(sum, value)| *sum += value);
                }
                let expected: Vec<u8> = sum.iter().flat_map(|value| value.to_ne_bytes()).collect();
                self.expect(rank, &expected);
            }
            (Step::Exchange(bytes), 0) => {
                let send = Region::from_vec(content(step, rank, bytes * ranks));
                let sizes = vec![bytes; ranks];
                let (send, recv) = (Span::whole(&send), INBOX);
                self.submit(rank, Operation::AllToAll { send, send_bytes: &sizes, recv, recv_bytes: &sizes })?;
            }
            (Step::Exchange(bytes), 1) => {
                let block = |from| content(step, from, bytes * ranks)[rank * bytes..(rank + 1) * bytes].to_vec();
                let expected: Vec<u8> = (0..ranks).flat_map(block).collect();
                self.expect_in(rank, INBOX, &expected);
            }
            (Step::Epoch(_) | Step::Quiet(_), 0) => self.submit(rank, Operation::Open { window: SLOTS })?,
            (Step::Quiet(bytes), 1) => self.put_to_all(rank, bytes)?,
            (Step::Quiet(_), 2) => self.submit(rank, Operation::Close { window: SLOTS })?,
            (Step::Quiet(bytes), 3) => self.expect_slots(rank, bytes),
            (Step::Epoch(bytes), 1) => {
                self.put_to_all(rank, bytes)?;
                for to in (0..ranks).map(Rank::new) {
                    self.submit(rank, Operation::Signal { rank: to, signal: ARRIVED, add: 1 })?;
                }
                self.players[rank].epochs += 1;
                let at_least = (self.players[rank].epochs * ranks) as u64;
                self.submit(rank, Operation::AwaitSignal { signal: ARRIVED, at_least })?;
            }
            (Step::Epoch(bytes), 2) => {
                // Everyone has signalled, so everything that anyone has put is there, wherever it is.
                let to = Region::zeroed(bytes);
                let from = RemoteSpan { rank: right, window: SLOTS, offset: left * PLACE };
                self.submit(rank, Operation::Get { from, to: Span::whole(&to) })?;
                self.players[rank].regions.push(to);
            }
            (Step::Epoch(bytes), 3) => {
                self.expect(rank, &content(step, left, bytes));
                self.submit(rank, Operation::Close { window: SLOTS })?;
            }
            (Step::Epoch(bytes), 4) => self.expect_slots(rank, bytes),
            (Step::Ring(bytes), 0) => {
                let from = Region::from_vec(content(step, rank, bytes));
                let to = Region::zeroed(bytes);
                let key = step as u64;
                self.submit(rank, Operation::Send { to: right, key, from: Span::whole(&from) })?;
                self.submit(rank, Operation::Recv { from: Rank::new(left), key, to: Span::whole(&to) })?;
                self.players[rank].regions.push(to);
            }
            (Step::Ring(bytes), 1) => self.expect(rank, &content(step, left, bytes)),
            _ => {
                let player = &mut self.players[rank];
                (player.step, player.stage) = (player.step + 1, 0);
            }
        }
        Ok(())
    }

    /// A put of this step's bytes to the own place in every rank's slots.
    fn put_to_all(&mut self, rank: usize, bytes: usize) -> Result<(), FabricError> {
        let from = Region::from_vec(content(self.players[rank].step, rank, bytes));
        let place = |to| RemoteSpan { rank: Rank::new(to), window: SLOTS, offset: rank * PLACE };
        let to: Vec<RemoteSpan> = (0..self.ranks).map(place).collect();
        self.submit(rank, Operation::Put { from: Span::whole(&from), to: &to })
    }

    /// That everyone's bytes of this step are in the own slots.
    fn expect_slots(&self, rank: usize, bytes: usize) {
        let player = &self.players[rank];
        let window = player.machine.as_ref().expect("it plays").window(SLOTS).expect("two windows");
        let all = window.read::<u8>().expect("closed");
        for from in 0..self.ranks {
            assert!(all[from * PLACE..][..bytes] == content(player.step, from, bytes), "rank {rank}: from {from}");
        }
    }

    fn submit(&mut self, rank: usize, operation: Operation<'_>) -> Result<(), FabricError> {
        let now = self.now;
        let machine = self.players[rank].machine.as_mut().expect("it plays");
        machine.check(operation.kind())?;
        let ticket = match operation {
            Operation::Put { from, to } => machine.put(&from, to, 0)?,
            Operation::Get { from, to } => machine.get(from, &to, 0)?,
            Operation::Signal { rank, signal, add } => machine.signal(rank, signal, add, 0)?,
            Operation::AwaitSignal { signal, at_least } => machine.await_signal(signal, at_least, 0)?,
            Operation::Send { to, key, from } => machine.send(to, key, &from, 0)?,
            Operation::Recv { from, key, to } => machine.recv(from, key, &to, 0)?,
            collective => machine.collective(collective, 0)?,
        };
        self.players[rank].waits.push((ticket, now));
        Ok(())
    }

    /// What a region that an operation has filled must hold.
    fn expect(&mut self, rank: usize, expected: &[u8]) {
        let region = self.players[rank].regions.remove(0);
        assert!(region.read::<u8>().expect("nothing uses it any more")[..] == *expected, "rank {rank}: wrong content");
    }

    fn expect_in(&self, rank: usize, window: WindowId, expected: &[u8]) {
        let machine = self.players[rank].machine.as_ref().expect("it plays");
        let window = machine.window(window).expect("two windows");
        let all = window.read::<u8>().expect("nothing is received any more");
        assert!(all[..expected.len()] == *expected, "rank {rank}: wrong content in a window");
    }

    /// Until all ranks have ended. `kill` is a rank, and after how many turns.
    fn run(&mut self, kill: Option<(usize, usize)>) {
        let mut idle = 0;
        for turn in 0.. {
            if let Some((rank, after)) = kill
                && turn == after
                && self.players[rank].outcome.is_none()
            {
                self.kill(rank);
            }
            if self.players.iter().all(|player| player.outcome.is_some() || player.machine.is_none()) {
                return;
            }
            let player = self.random.below(self.ranks);
            let moved = if self.random.below(3) == 0 { self.play(player) } else { self.deliver() };
            if moved {
                idle = 0;
                continue;
            }
            let others: Vec<usize> = (0..self.ranks).collect();
            let any = others.into_iter().any(|rank| self.play(rank)) || self.deliver();
            idle = if any { 0 } else { idle + 1 };
            if any {
                continue;
            }
            // Nothing moves but time.
            assert!(
                idle < 10,
                "a stall: {:?} {:?}",
                self.steps,
                self.players.iter().map(|p| (p.step, p.stage)).collect::<Vec<_>>()
            );
            self.now += Duration::from_secs(2);
            for rank in 0..self.ranks {
                self.collect(rank);
            }
        }
    }
}

/// Runs every seed, or the one that `SEED` names.
fn for_seeds(count: u64, check: impl Fn(u64)) {
    let only = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok());
    for seed in only.map_or(0..count, |seed| seed..seed + 1) {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| check(seed)));
        assert!(result.is_ok(), "again: SEED={seed} cargo test -p ultraep-messages machine::simulated");
    }
}

#[test]
fn every_schedule_ends_well_with_the_right_bits() {
    for_seeds(1000, |seed| {
        let mut world = World::new(seed, 1 + seed as usize % 5);
        world.run(None);
        for (rank, player) in world.players.iter().enumerate() {
            assert_eq!(player.outcome, Some(Ok(())), "rank {rank}: {:?}", world.steps);
        }
    });
}

#[test]
fn a_rank_that_vanishes_at_any_moment_is_named_by_all_others() {
    for_seeds(1000, |seed| {
        let ranks = 2 + seed as usize % 4;
        let mut world = World::new(seed, ranks);
        let (culprit, after) = (world.random.below(ranks), world.random.below(1500));
        world.run(Some((culprit, after)));
        for (rank, player) in world.players.iter().enumerate() {
            // Who had done everything needs no other.
            let Some(Err(error)) = &player.outcome else { continue };
            let lost =
                matches!(error, FabricError::PeerLost { rank, reason: Loss::Vanished, .. } if rank.index() == culprit);
            assert!(lost, "rank {rank} says {error}; {culprit} was lost after {after} turns");
        }
    });
}

#[test]
fn a_wait_in_vain_names_the_rank_that_computes() {
    for ranks in 2..6 {
        for culprit in 0..ranks {
            let mut world = World::new(7, ranks);
            world.steps = vec![Step::Barrier];
            // Everyone but the culprit enters.
            while world.deliver() {}
            for rank in (0..ranks).filter(|&rank| rank != culprit) {
                assert!(world.play(rank));
            }
            while world.deliver() {}
            let waiter = (culprit + 1) % ranks;
            let kind = ultraep_fabric::OperationKind::Barrier;
            for player in world.players.iter_mut().enumerate().filter(|(rank, _)| *rank != culprit) {
                player.1.machine.as_mut().expect("it lives").set_activity(kind);
            }
            let now = world.now;
            let machine = world.players[waiter].machine.as_mut().expect("it lives");
            machine.expire(Awaited::Collective(kind), Duration::from_secs(9), now);
            world.collect(waiter);
            while world.deliver() {}
            for player in &world.players {
                let error = player.machine.as_ref().expect("it lives").check(kind).expect_err("it has failed");
                let missing = vec![Rank::new(culprit)];
                let waited = Duration::from_secs(9);
                assert_eq!(error, Failure::Timeout { missing, operation: kind, waited }.error(kind));
            }
        }
    }
}

/// Whatever a peer sends, a machine neither panics nor writes outside of what an operation named.
#[test]
fn strange_messages_do_no_harm() {
    for_seeds(200, |seed| {
        let mut world = World::new(seed, 3);
        while world.deliver() {}
        let mut random = Random(seed ^ 0xabcd);
        for turn in 0..300 {
            let numbers = [0, 1, 2, 3, 40, PLACE, CHUNK_BYTES, usize::MAX];
            let mut words = vec![1 + random.below(20) as u64];
            words.extend((0..4).map(|_| numbers[random.below(numbers.len())] as u64));
            let mut message: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            message.extend(content(turn, 0, [0, 8, 40, 272, 3000][random.below(5)]));
            message.truncate(if random.below(10) == 0 { random.below(50) } else { usize::MAX });
            // Not those that end the group at once: the rest is to be reached.
            if ![13, 14, 17].contains(&words[0]) {
                let now = world.now;
                let to = random.below(3);
                if let Some(machine) = &mut world.players[to].machine {
                    machine.receive(Rank::new(random.below(4)), message, now);
                    machine.take_out();
                }
            }
            world.play(random.below(3));
        }
    });
}
