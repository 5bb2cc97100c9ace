//! EP ranks as threads of this process.

use crate::failure::Failure;
use crate::shared::{Endpoint, Segment};
use crate::{Fabric, FabricError, GroupError, GroupSpec, Loss};
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;
use ultraep_plan::Rank;

/// How a rank's thread ended.
pub(crate) enum Outcome<T, E> {
    Returned(T),
    Failed(E),
    Panicked(String),
    NotStarted(FabricError),
    /// It ended between two instructions, without a word of its own (simulated ranks).
    Stopped,
}

/// Runs `main` on each rank of a group, each a thread of its own, and returns their results in rank order.
///
/// A rank ends properly when `main` returns `Ok`. When it returns an error or panics the rank is lost, and all others'
/// calls end with an error that names it. A rank that hangs is named by the others after the timeout; as a thread cannot be
/// killed, this function returns once the hanging rank does (processes are killed).
///
/// # Errors
/// [`GroupError`] names the rank that failed first, with its own error.
pub fn run_threads<T, E, F>(spec: &GroupSpec, main: F) -> Result<Vec<T>, GroupError<E>>
where
    T: Send,
    E: Send,
    F: Fn(Box<dyn Fabric>) -> Result<T, E> + Sync,
{
    let segment = Arc::new(Segment::anonymous(spec)?);
    let main = &main;
    let outcomes: Vec<Outcome<T, E>> = thread::scope(|scope| {
        let spawn = |rank: Rank| {
            segment.control(rank).status.start();
            let own = Arc::clone(&segment);
            thread::Builder::new()
                .name(format!("rank {rank}"))
                .spawn_scoped(scope, move || run_rank(own, rank, spec, main))
                .map_err(|error| {
                    segment.fail(rank, &Failure::Lost { rank, loss: Loss::Refused });
                    FabricError::os("spawn a thread", error)
                })
        };
        let threads: Vec<_> = segment.ranks().map(spawn).collect();
        let join = |thread: Result<thread::ScopedJoinHandle<'_, _>, FabricError>| match thread {
            Ok(thread) => thread.join().unwrap_or_else(|panic| Outcome::Panicked(panic_message(panic.as_ref()))),
            Err(error) => Outcome::NotStarted(error),
        };
        threads.into_iter().map(join).collect()
    });
    results(&segment, outcomes)
}

fn run_rank<T, E, F>(segment: Arc<Segment>, rank: Rank, spec: &GroupSpec, main: &F) -> Outcome<T, E>
where
    F: Fn(Box<dyn Fabric>) -> Result<T, E>,
{
    let started = Endpoint::new(Arc::clone(&segment), rank, spec).and_then(|mut endpoint| {
        endpoint.start()?;
        Ok(Box::new(endpoint))
    });
    let endpoint = match started {
        Ok(endpoint) => endpoint,
        Err(error) => return Outcome::NotStarted(error),
    };
    // `main` is only called once on this thread, and after a panic nothing of it is used but the message.
    let (loss, outcome) = match catch_unwind(AssertUnwindSafe(|| main(endpoint))) {
        Ok(Ok(value)) => return Outcome::Returned(value),
        Ok(Err(error)) => (Loss::Failed, Outcome::Failed(error)),
        Err(panic) => (Loss::Panicked, Outcome::Panicked(panic_message(panic.as_ref()))),
    };
    segment.fail(rank, &Failure::Lost { rank, loss });
    outcome
}

pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message").to_owned()
}

/// All results, or the failure that came first.
pub(crate) fn results<T, E>(segment: &Segment, outcomes: Vec<Outcome<T, E>>) -> Result<Vec<T>, GroupError<E>> {
    let Some(error) = segment.failure_error(crate::OperationKind::Compute) else {
        // Without a failure every rank has returned a value.
        return Ok(outcomes.into_iter().filter_map(Outcome::value).collect());
    };
    let rank = error.culprit().unwrap_or(Rank::new(0));
    let own = match error {
        FabricError::PeerLost { .. } => outcomes.into_iter().nth(rank.index()),
        _ => None,
    };
    Err(match own {
        Some(Outcome::Failed(error)) => GroupError::Failed { rank, error },
        Some(Outcome::Panicked(message)) => GroupError::Panicked { rank, message },
        Some(Outcome::NotStarted(error)) => GroupError::Start(error),
        Some(Outcome::Returned(_) | Outcome::Stopped) | None => GroupError::Fabric { rank, error },
    })
}

impl<T, E> Outcome<T, E> {
    fn value(self) -> Option<T> {
        match self {
            Self::Returned(value) => Some(value),
            _ => None,
        }
    }
}
