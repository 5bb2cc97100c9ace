//! The simulated fabric: a group whose every interleaving follows from a seed.
//!
//! [`run_simulated`] runs the same `main` on each rank as [`run_threads`](crate::run_threads) does, over the same shared
//! segment, state machines and failure record. What differs is who decides: one rank runs at a time, and at every operation
//! and every phase of a collective a seeded scheduler says who goes on. Time is virtual; it passes when no one can run.
//!
//! ```text
//! at each turn of a rank:  strike it, if a fault is due          (it errs, panics, is killed, hangs, stalls)
//!                          put it to sleep for a while, or not   (a rank that computes, or is not scheduled)
//!                          land messages, or not                 (puts in pieces, signals)
//!                          pick who runs next among those who are not asleep or have something new to look at
//! no one can run:          time jumps to the next waking, landing, notice or timeout
//! ```
//!
//! The contract of [`Fabric`] is taken at its weakest. A put is captured when it is submitted; its pieces land at any time, in
//! any order, until its rank signals, enters a collective or gets from where it put. A signal lands at any time until its rank
//! enters a collective. A rank that is lost takes some of what has not landed with it.
//!
//! The tile engine puts and gets, or touches peers' windows directly, in the order of the turns ([`Simulation::direct`]).
//!
//! Each seed has habits of its own (how eagerly messages land, how often ranks change, how long they sleep, whether one of them
//! is slow), so that many seeds visit very different schedules. A seed and a list of faults give the same schedule and the
//! same [`Schedule::digest`] on every run, provided that `main` depends on nothing else.
//!
//! What is not simulated: the processor's memory ordering and the futex (loom explores those, `tests/loom.rs`), a kill in the
//! middle of the fabric's own code (ranks that are processes are killed in tests), and core permits (one rank at a time
//! obeys any number of them).
//!
//! A rank's main must wait for other ranks through the fabric alone, never through a lock or a channel.

mod endpoint;
mod habits;
mod scheduler;

use crate::failure::Failure;
use crate::shared::{Endpoint, Segment};
use crate::threads::{Outcome, panic_message, results};
use crate::{Fabric, GroupError, GroupSpec, Loss, OperationKind};
use core::time::Duration;
use endpoint::SimulatedEndpoint;
use scheduler::Scheduler;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;
use ultraep_plan::Rank;

/// What a simulated run follows from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Simulation {
    /// Every choice of the scheduler.
    pub seed: u64,
    /// What strikes the ranks.
    pub faults: Vec<Fault>,
    /// Whether the fabric gives [`Fabric::direct`] access. Then tile engines must have no background workers: those are threads
    /// that no seed governs, and virtual time would not wait for them.
    pub direct: bool,
}

/// One thing that goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// On which rank.
    pub rank: Rank,
    /// When.
    pub moment: Moment,
    /// What.
    pub kind: FaultKind,
}

/// When a fault strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Moment {
    /// As the rank submits its operation of this number, counted from 0; leaving counts as an operation.
    Before(u64),
    /// After the rank has submitted its operation of this number, before it knows that it is complete.
    InFlight(u64),
    /// At the rank's turn of this number, whatever it does: also between two phases of a collective.
    Turn(u64),
}

/// What a fault does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FaultKind {
    /// The operation returns an error to this rank alone, as its own code may: its main is expected to end with it.
    Fails,
    /// The rank panics.
    Panics,
    /// The rank's process is killed: it does nothing any more, and the supervisor notices after a while.
    Killed,
    /// The rank never does anything again.
    Hangs,
    /// The rank does nothing for this long, in virtual time.
    Stalls(Duration),
}

/// How a simulated group ended.
#[derive(Debug)]
pub struct Simulated<T, E> {
    /// As of [`run_threads`](crate::run_threads). A rank that hangs when all others have left ends with a timeout of `leave`.
    pub result: Result<Vec<T>, GroupError<E>>,
    /// What the seed made of it.
    pub schedule: Schedule,
}

/// One schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// Digest of every choice: equal for equal schedules.
    pub digest: u64,
    /// Turns of all ranks.
    pub turns: u64,
    /// Pieces of puts and signals that landed after their operation had completed on their rank.
    pub landed_late: u64,
    /// Virtual time that passed.
    pub time: Duration,
}

/// Ends a rank's thread from within a call; nothing of the rank's own.
struct Stopped;

/// Runs `main` on each rank of a group under the scheduler of `simulation`.
///
/// `spec.timeout` is virtual: a wait that nothing can end costs no time. `spec.cores` has no effect.
///
/// # Errors
/// [`FabricError::Spec`](crate::FabricError::Spec), and [`FabricError::Os`](crate::FabricError::Os) when memory or threads
/// cannot be had. What the ranks make of the faults is in [`Simulated::result`].
pub fn run_simulated<T, E, F>(
    spec: &GroupSpec,
    simulation: &Simulation,
    main: F,
) -> Result<Simulated<T, E>, crate::FabricError>
where
    T: Send,
    E: Send,
    F: Fn(Box<dyn Fabric>) -> Result<T, E> + Sync,
{
    let segment = Arc::new(Segment::anonymous(spec)?);
    let scheduler = Arc::new(Scheduler::new(Arc::clone(&segment), simulation, spec.timeout));
    let main = &main;
    let outcomes: Vec<Outcome<T, E>> = thread::scope(|scope| {
        let spawn = |rank: Rank| {
            segment.control(rank).status.start();
            let endpoint = Endpoint::new(Arc::clone(&segment), rank, spec).map_err(std::io::Error::other)?;
            let endpoint = endpoint.without_permits();
            let fabric = SimulatedEndpoint::new(endpoint, Arc::clone(&scheduler), spec.timeout, simulation.direct);
            let (segment, scheduler) = (Arc::clone(&segment), Arc::clone(&scheduler));
            thread::Builder::new()
                .name(format!("rank {rank}"))
                .spawn_scoped(scope, move || run_rank(&segment, &scheduler, Box::new(fabric), main))
        };
        // A thread that does not start is a rank that is lost at once; the others then end by themselves.
        let threads: Vec<_> = segment.ranks().map(spawn).collect();
        for (rank, _) in segment.ranks().zip(&threads).filter(|(_, thread)| thread.is_err()) {
            scheduler.never_starts(rank);
            segment.fail(rank, &Failure::Lost { rank, loss: Loss::Refused });
        }
        scheduler.start();
        let join = |thread: std::io::Result<thread::ScopedJoinHandle<'_, _>>| match thread {
            Ok(thread) => thread.join().unwrap_or_else(|panic| Outcome::Panicked(panic_message(panic.as_ref()))),
            Err(error) => Outcome::NotStarted(crate::FabricError::os("spawn a thread", error)),
        };
        threads.into_iter().map(join).collect()
    });
    let schedule = scheduler.finish();
    Ok(Simulated { result: results(&segment, outcomes), schedule })
}

fn run_rank<T, E, F>(segment: &Segment, scheduler: &Scheduler, fabric: Box<dyn Fabric>, main: &F) -> Outcome<T, E>
where
    F: Fn(Box<dyn Fabric>) -> Result<T, E>,
{
    let rank = fabric.rank();
    scheduler.await_turn(rank);
    // `main` is only called once on this thread, and after a panic nothing of it is used but the message.
    let (loss, outcome) = match catch_unwind(AssertUnwindSafe(|| main(fabric))) {
        Ok(Ok(value)) => (None, Outcome::Returned(value)),
        Ok(Err(error)) => (Some(Loss::Failed), Outcome::Failed(error)),
        Err(panic) if panic.is::<Stopped>() => (None, Outcome::Stopped),
        Err(panic) => (Some(Loss::Panicked), Outcome::Panicked(panic_message(panic.as_ref()))),
    };
    if let Some(loss) = loss {
        segment.fail(rank, &Failure::Lost { rank, loss });
    }
    scheduler.end(rank);
    outcome
}

impl Simulation {
    /// Without faults.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self { seed, ..Self::default() }
    }

    /// With one fault.
    #[must_use]
    pub fn with_fault(seed: u64, fault: Fault) -> Self {
        Self { seed, faults: vec![fault], ..Self::default() }
    }
}

/// What a hanging rank is blamed with when nobody waited for it.
fn never_left(rank: Rank, waited: Duration) -> Failure {
    Failure::Timeout { missing: vec![rank], operation: OperationKind::Leave, waited }
}
