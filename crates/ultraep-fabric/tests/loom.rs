//! Explores the interleavings of the fabric's turnstile, permits, doorbell, borrow word, failure word and status, and of the
//! tile engine's counter and flags, compiled here against loom's atomics. The futex is a model that loses a wake-up wherever
//! the real one would: who sleeps with no one left to wake it
//! is a deadlock, which loom reports.
//!
//! Loom runs each model once an interleaving, so a model that passes holds for all of them (within the stated number of
//! preemptions).

// The models do not use everything that the files have.
#![allow(dead_code)]

#[path = "../src/borrow.rs"]
mod borrow;
#[path = "../src/shared/cause.rs"]
mod cause;
#[path = "../src/shared/doorbell.rs"]
mod doorbell;
#[path = "../src/shared/permits.rs"]
mod permits;
#[path = "../src/stream/schedule.rs"]
mod schedule;
#[path = "../src/shared/status.rs"]
mod status;
#[path = "../src/shared/turnstile.rs"]
mod turnstile;
#[path = "../src/shared/word.rs"]
mod word;
#[path = "../src/stream/worker.rs"]
mod worker;

/// Stands in for the crate's `sync` module.
mod sync {
    pub(crate) use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

    use core::time::Duration;
    use loom::sync::{Condvar, Mutex};

    loom::lazy_static! {
        /// The kernel's side of all futexes: compares and falls asleep in one step, under its lock.
        static ref KERNEL: (Mutex<()>, Condvar) = (Mutex::new(()), Condvar::new());
    }

    /// There is no time in a model: a sleep ends by being woken.
    pub(crate) fn sleep_while(word: &AtomicU32, value: u32, _limit: Duration) {
        let (lock, sleepers) = &*KERNEL;
        let guard = lock.lock().expect("no model panics with the lock");
        if word.load(Ordering::SeqCst) == value {
            drop(sleepers.wait(guard));
        }
    }

    /// Wakes everyone: the real one may wake fewer, which `permits` covers by waking one for each permit.
    pub(crate) fn wake(_word: &AtomicU32, _count: u32) {
        let (lock, sleepers) = &*KERNEL;
        let _guard = lock.lock().expect("no model panics with the lock");
        sleepers.notify_all();
    }

    pub(crate) fn wake_and_requeue(word: &AtomicU32, _value: u32, _count: u32, _other: &AtomicU32) {
        wake(word, u32::MAX);
    }
}

use borrow::{Borrow, OPEN, WRITER};
use cause::Cause;
use core::time::Duration;
use doorbell::Doorbell;
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;
use permits::{Asked, Permits};
use status::{Gone, Status};
use turnstile::{Entered, Turnstile};
use word::FAILED;

const LIMIT: Duration = Duration::from_secs(1);

fn explore(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

/// Passes one phase as the endpoint does: whether it ended, or the group failed.
fn pass(turnstile: &Turnstile, ranks: u64, seen: &mut u32, stamp: u64) -> bool {
    match turnstile.enter(ranks) {
        Entered::Last => turnstile.turn(ranks, stamp, None),
        Entered::Waiting => {}
        Entered::SomeoneGone => return false,
    }
    loop {
        let word = turnstile.look();
        if word & FAILED != 0 {
            return false;
        }
        if word >> 1 != *seen {
            *seen = word >> 1;
            return true;
        }
        turnstile.sleep(word, LIMIT);
    }
}

/// Two ranks write, pass, read each other's cell, pass, and write again: no access races, no one sleeps for ever.
#[test]
fn turnstile_orders_what_ranks_write() {
    explore(3, || {
        let shared = Arc::new((Turnstile::default(), [UnsafeCell::new(0u64), UnsafeCell::new(0)]));
        let rank = |me: usize| {
            let shared = Arc::clone(&shared);
            move || {
                let (turnstile, cells) = &*shared;
                let mut seen = 0;
                for round in 1..=2 {
                    // SAFETY: checked by loom: an access that is not ordered after the other rank's reads fails the model.
                    cells[me].with_mut(|cell| unsafe { *cell = round });
                    assert!(pass(turnstile, 2, &mut seen, round));
                    assert_eq!(turnstile.stamp(), round);
                    // SAFETY: as above, for the other rank's writes.
                    assert_eq!(cells[1 - me].with(|cell| unsafe { *cell }), round);
                    assert!(pass(turnstile, 2, &mut seen, round));
                }
            }
        };
        let other = thread::spawn(rank(1));
        rank(0)();
        other.join().expect("rank 1 ends well");
    });
}

/// Three ranks and one phase: the two that wait both wake.
#[test]
fn turnstile_wakes_everyone() {
    explore(2, || {
        let turnstile = Arc::new(Turnstile::default());
        let rank = || {
            let turnstile = Arc::clone(&turnstile);
            move || assert!(pass(&turnstile, 3, &mut 0, 1))
        };
        let others = [thread::spawn(rank()), thread::spawn(rank())];
        rank()();
        others.into_iter().for_each(|other| other.join().expect("all end well"));
    });
}

/// A rank goes while the other enters: the one is told, or the other is, and a failure wakes whoever sleeps.
#[test]
fn turnstile_never_waits_for_who_has_gone() {
    explore(3, || {
        let turnstile = Arc::new(Turnstile::default());
        let leaver = Arc::clone(&turnstile);
        let leaver = thread::spawn(move || {
            if leaver.go() {
                leaver.fail();
            }
        });
        assert!(!pass(&turnstile, 2, &mut 0, 1), "a phase of two ended with one");
        leaver.join().expect("the leaver ends well");
    });
}

/// Three ranks and one permit: never two at a time, and everyone has a turn.
#[test]
fn permits_exclude_and_starve_no_one() {
    explore(2, || {
        let shared = Arc::new((Permits::default(), UnsafeCell::new(0u64)));
        shared.0.initialise(1);
        let rank = || {
            let shared = Arc::clone(&shared);
            move || {
                let (permits, computing) = &*shared;
                loop {
                    match permits.ask() {
                        Asked::Granted => break,
                        Asked::NoneFree(word) => permits.sleep(word, LIMIT),
                        Asked::GroupFailed => panic!("nobody failed"),
                    }
                }
                // SAFETY: checked by loom: two ranks with the one permit at a time would race here.
                computing.with_mut(|turns| unsafe { *turns += 1 });
                permits.give_back();
            }
        };
        let others = [thread::spawn(rank()), thread::spawn(rank())];
        rank()();
        others.into_iter().for_each(|other| other.join().expect("all end well"));
        assert_eq!(shared.0.free(), 1);
    });
}

/// A holder that fails the group instead of giving back: who sleeps for the permit hears of it.
#[test]
fn permits_end_with_the_group() {
    explore(3, || {
        let permits = Arc::new(Permits::default());
        permits.initialise(1);
        assert_eq!(permits.ask(), Asked::Granted);
        let waiter = Arc::clone(&permits);
        let waiter = thread::spawn(move || {
            while let Asked::NoneFree(word) = waiter.ask() {
                waiter.sleep(word, LIMIT);
            }
            assert_eq!(waiter.ask(), Asked::GroupFailed);
        });
        permits.fail();
        waiter.join().expect("the waiter ends well");
    });
}

/// Put, signal, wait, read: what was put is there, and no ring is lost.
#[test]
fn doorbell_loses_no_signal() {
    explore(3, || {
        let shared = Arc::new((Doorbell::default(), AtomicU64::new(0), UnsafeCell::new(0u64)));
        let signaller = |last: bool| {
            let shared = Arc::clone(&shared);
            move || {
                let (doorbell, signal, window) = &*shared;
                if last {
                    // SAFETY: checked by loom against the reader below.
                    window.with_mut(|place| unsafe { *place = 7 });
                }
                signal.fetch_add(if last { 2 } else { 1 }, Ordering::Release);
                doorbell.ring();
            }
        };
        let others = [thread::spawn(signaller(true)), thread::spawn(signaller(false))];
        let (doorbell, signal, window) = &*shared;
        while !doorbell.sleep_unless(|| signal.load(Ordering::Acquire) >= 2, LIMIT) {}
        // SAFETY: checked by loom against the writer above.
        assert_eq!(window.with(|place| unsafe { *place }), 7);
        others.into_iter().for_each(|other| other.join().expect("all end well"));
    });
}

/// A writer, a reader and an epoch want a region at once: whoever gets it has it alone.
#[test]
fn borrows_exclude_each_other() {
    explore(3, || {
        let shared = Arc::new((Borrow::default(), UnsafeCell::new(0u64)));
        let writer = |state: u32| {
            let shared = Arc::clone(&shared);
            move || {
                let (borrow, memory) = &*shared;
                if borrow.begin(state).is_ok() {
                    // SAFETY: checked by loom: only the holder of the borrow may be here.
                    memory.with_mut(|memory| unsafe { *memory += 1 });
                    borrow.end();
                }
            }
        };
        let others = [thread::spawn(writer(WRITER)), thread::spawn(writer(OPEN))];
        let (borrow, memory) = &*shared;
        if borrow.begin_read().is_ok() {
            // SAFETY: as above; readers share.
            memory.with(|memory| assert!(unsafe { *memory } <= 2));
            borrow.end_read();
        }
        others.into_iter().for_each(|other| other.join().expect("all end well"));
        assert_eq!(borrow.begin(WRITER), Ok(()));
    });
}

/// Two ranks report at once, with details: whoever looks sees the whole record of the one that was first.
#[test]
fn the_first_failure_comes_with_its_record() {
    explore(3, || {
        let shared = Arc::new((Cause::default(), [AtomicU64::new(0), AtomicU64::new(0)]));
        let reporter = |me: usize| {
            let shared = Arc::clone(&shared);
            move || {
                let (cause, records) = &*shared;
                records[me].store(100 + me as u64, Ordering::Relaxed);
                cause.set(1 + me as u64);
                cause.get().expect("someone has set it")
            }
        };
        let others = [thread::spawn(reporter(0)), thread::spawn(reporter(1))];
        let (cause, records) = &*shared;
        let seen = cause.get();
        if let Some(code) = seen {
            assert_eq!(records[code as usize - 1].load(Ordering::Relaxed), 99 + code, "a cause without its record");
        }
        let reported = others.map(|other| other.join().expect("reporters end well"));
        assert_eq!(reported[0], reported[1], "two first failures");
        assert!(cause.is_set() && seen.is_none_or(|code| code == reported[0]));
    });
}

/// A rank fails the group while another is on its way to sleep in a phase: that one wakes, and knows why.
#[test]
fn who_wakes_from_a_failed_phase_knows_the_cause() {
    explore(3, || {
        let shared = Arc::new((Turnstile::default(), Cause::default()));
        let reporter = Arc::clone(&shared);
        let reporter = thread::spawn(move || {
            reporter.1.set(7);
            reporter.0.fail();
        });
        let (turnstile, cause) = &*shared;
        assert!(!pass(turnstile, 2, &mut 0, 1), "a phase of two ended with one");
        assert_eq!(cause.get(), Some(7));
        reporter.join().expect("the reporter ends well");
    });
}

/// The same for one that waits for a core permit.
#[test]
fn who_is_refused_a_permit_knows_the_cause() {
    explore(3, || {
        let shared = Arc::new((Permits::default(), Cause::default()));
        shared.0.initialise(1);
        assert_eq!(shared.0.ask(), Asked::Granted);
        let waiter = Arc::clone(&shared);
        let waiter = thread::spawn(move || {
            let (permits, cause) = &*waiter;
            while let Asked::NoneFree(word) = permits.ask() {
                permits.sleep(word, LIMIT);
            }
            assert_eq!(cause.get(), Some(7), "refused without a cause");
        });
        shared.1.set(7);
        shared.0.fail();
        waiter.join().expect("the waiter ends well");
    });
}

/// The same for one that waits for a signal.
#[test]
fn who_wakes_from_a_failed_wait_for_a_signal_knows_the_cause() {
    explore(3, || {
        let shared = Arc::new((Doorbell::default(), Cause::default()));
        let reporter = Arc::clone(&shared);
        let reporter = thread::spawn(move || {
            reporter.1.set(7);
            reporter.0.fail();
        });
        let (doorbell, cause) = &*shared;
        while !cause.is_set() {
            assert!(!doorbell.sleep_unless(|| false, LIMIT), "nobody signals");
        }
        assert_eq!(cause.get(), Some(7));
        reporter.join().expect("the reporter ends well");
    });
}

/// A rank goes, a second waits for it, a third reads how it went: whoever finds that someone has gone finds who.
#[test]
fn who_meets_a_gone_rank_learns_how_it_went() {
    explore(2, || {
        let shared = Arc::new((Turnstile::default(), Status::default(), Cause::default()));
        assert!(shared.1.start());
        let leaver = Arc::clone(&shared);
        let leaver = thread::spawn(move || {
            let (turnstile, status, cause) = &*leaver;
            // As in `Segment::depart`.
            assert!(status.go(Gone::Dropped));
            if turnstile.go() {
                cause.set(1);
                turnstile.fail();
            }
            // Its endpoint's drop comes later, and changes nothing.
            assert!(!status.go(Gone::Left));
        });
        let (turnstile, status, cause) = &*shared;
        match turnstile.enter(2) {
            Entered::SomeoneGone => assert_eq!(status.gone(), Some(Gone::Dropped), "gone, and nobody knows how"),
            Entered::Last => panic!("a phase of two ended with one"),
            Entered::Waiting => {
                let mut word = turnstile.look();
                while word & FAILED == 0 {
                    turnstile.sleep(word, LIMIT);
                    word = turnstile.look();
                }
                assert_eq!((cause.get(), status.gone()), (Some(1), Some(Gone::Dropped)));
            }
        }
        leaver.join().expect("the leaver ends well");
    });
}

/// Two processes try to join as one rank: one of them is it.
#[test]
fn a_rank_is_taken_once() {
    explore(3, || {
        let status = Arc::new(Status::default());
        let other = Arc::clone(&status);
        let other = thread::spawn(move || other.start());
        let mine = status.start();
        assert!(mine != other.join().expect("it ends well"));
        assert!(status.is_in_group() && status.gone().is_none());
    });
}

/// What the model's workers of a tile engine touch: cells that loom watches, and the flags of two chunks.
struct Tiles {
    cells: [UnsafeCell<u64>; 3],
    flags: [loom::sync::atomic::AtomicU32; 2],
    schedule: schedule::Schedule,
    relayed: schedule::Schedule,
    next: AtomicU64,
    next_relayed: AtomicU64,
}

/// The home rank's workers write cells and count them; the relay reads them once their chunk is complete.
struct ModelHands<'a> {
    tiles: &'a Tiles,
    relays: bool,
}

impl worker::Hands for ModelHands<'_> {
    fn ready(&mut self, tile: &schedule::Tile) -> bool {
        let count = || self.tiles.flags[tile.chunk].load(Ordering::Acquire) as usize;
        !self.relays || count() == self.tiles.schedule.geometry().tiles(tile.chunk)
    }

    fn look_ahead(&mut self, _tile: &schedule::Tile) {}

    fn move_tile(&mut self, tile: &schedule::Tile) {
        let cell = tile.start / 64;
        if self.relays {
            // SAFETY: checked by loom: a read that is not ordered after the write fails the model.
            assert_eq!(self.tiles.cells[cell].with(|place| unsafe { *place }), cell as u64 + 7);
        } else {
            // SAFETY: as above.
            self.tiles.cells[cell].with_mut(|place| unsafe { *place = cell as u64 + 7 });
        }
    }

    fn publish(&mut self, tile: &schedule::Tile) {
        if !self.relays {
            self.tiles.flags[tile.chunk].fetch_add(1, Ordering::Release);
        }
    }
}

/// Two workers of the home rank share the tiles of two chunks; a relay reads each chunk as soon as it is complete.
#[test]
fn tiles_are_there_when_their_chunk_says_so() {
    explore(2, || {
        let mut schedule = schedule::Schedule::with_capacity(1);
        schedule.begin(schedule::Geometry::new(3 * 64, 2 * 64, 64), 1);
        schedule.push(0);
        let tiles = Arc::new(Tiles {
            cells: [0, 0, 0].map(UnsafeCell::new),
            flags: [0, 0].map(loom::sync::atomic::AtomicU32::new),
            relayed: schedule.clone(),
            schedule,
            next: AtomicU64::new(0),
            next_relayed: AtomicU64::new(0),
        });
        let home = || {
            let tiles = Arc::clone(&tiles);
            move || {
                let mut own = worker::Worker::default();
                let hands = &mut ModelHands { tiles: &tiles, relays: false };
                while own.step(&tiles.schedule, &tiles.next, hands) != worker::Step::Done {}
            }
        };
        let others = [thread::spawn(home()), thread::spawn(home())];
        let (mut relay, mut moved) = (worker::Worker::default(), 0);
        loop {
            match relay.step(&tiles.relayed, &tiles.next_relayed, &mut ModelHands { tiles: &tiles, relays: true }) {
                worker::Step::Moved => moved += 1,
                worker::Step::Blocked(_) => thread::yield_now(),
                worker::Step::Done => break,
            }
        }
        assert_eq!(moved, 3);
        others.into_iter().for_each(|other| other.join().expect("all end well"));
    });
}
