//! Runs every scenario on every microbatch, layers in parallel.
//!
//! The reader deals microbatches to workers by layer, so that a layer's microbatches stay in order and historical policies
//! see what came before and nothing else. Channels are short: memory does not grow with the recording. What comes out does
//! not depend on the number of workers, but for times.

use std::collections::HashMap;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use ultraep_baselines::{PolicyKind, PolicyParams};
use ultraep_import::{GroupingError, Microbatch};
use ultraep_plan::Topology;

use crate::evaluate::balanced;
use crate::{EvaluateError, Evaluator, LeastQuota, NowNs, Outcomes, Worst};

/// One policy in one group.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Which policy.
    pub kind: PolicyKind,
    /// The group: ranks, experts, domains, slots, speeds.
    pub topology: Topology,
    /// Its parameters and the hardware to predict times for; `min_quota` is not looked at.
    pub params: PolicyParams,
    /// Least quota of a replica.
    pub least_quota: LeastQuota,
}

/// Why a replay ended early.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReplayError {
    /// No microbatch could be read or made.
    #[error(transparent)]
    Grouping(#[from] GroupingError),
    /// A policy could not be built, or made a plan that breaks a rule.
    #[error(transparent)]
    Evaluate(#[from] EvaluateError),
}

impl ReplayError {
    /// Whether the input is at fault, rather than the program.
    pub fn is_input(&self) -> bool {
        match self {
            Self::Grouping(_) => true,
            Self::Evaluate(error) => error.is_input(),
        }
    }
}

/// Microbatches that may wait for a worker.
const WAITING: usize = 64;

/// Replays what `next` gives (false at its end), one [`Outcomes`] a scenario. All scenarios have the same ranks and experts.
/// `threads` plan, at least one; `now_ns` times the solves. A microbatch that a policy cannot serve is counted, not an error.
pub fn replay(
    scenarios: &[Scenario],
    threads: usize,
    now_ns: NowNs,
    mut next: impl FnMut(&mut Microbatch) -> Result<bool, GroupingError>,
) -> Result<Vec<Outcomes>, ReplayError> {
    thread::scope(|scope| {
        let mut workers = Vec::new();
        for _ in 0..threads.max(1) {
            let (sender, receiver) = sync_channel(WAITING);
            workers.push((sender, scope.spawn(move || work(scenarios, now_ns, &receiver))));
        }
        let read = deal(&workers.iter().map(|(sender, _)| sender.clone()).collect::<Vec<_>>(), &mut next);
        let mut total = vec![Outcomes::default(); scenarios.len()];
        let mut failed = None;
        for (sender, worker) in workers {
            drop(sender);
            match worker.join() {
                Ok(Ok(outcomes)) => total.iter_mut().zip(outcomes).for_each(|(sum, part)| sum.merge(part)),
                Ok(Err(error)) => failed = failed.or(Some(error)),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        // What a worker found is the reason why dealing ended.
        failed.map_or(read, Err)?;
        Ok(total)
    })
}

fn deal(
    workers: &[SyncSender<Microbatch>],
    next: &mut impl FnMut(&mut Microbatch) -> Result<bool, GroupingError>,
) -> Result<(), ReplayError> {
    let mut worker_of_layer = HashMap::new();
    let mut microbatch = Microbatch::default();
    while next(&mut microbatch)? {
        let free = worker_of_layer.len() % workers.len();
        let worker = *worker_of_layer.entry(microbatch.layer).or_insert(free);
        if workers[worker].send(std::mem::take(&mut microbatch)).is_err() {
            break; // it failed, and says why when it is joined
        }
    }
    Ok(())
}

/// Policies at work for some layers.
struct Worker<'a> {
    scenarios: &'a [Scenario],
    now_ns: NowNs,
    /// Exact policies serve all layers.
    exact: Vec<Option<Evaluator>>,
    /// Historical ones have one instance a layer.
    historical: HashMap<(usize, u32), Evaluator>,
    outcomes: Vec<Outcomes>,
    balanced: Option<Vec<u32>>,
}

fn work(
    scenarios: &[Scenario],
    now_ns: NowNs,
    microbatches: &Receiver<Microbatch>,
) -> Result<Vec<Outcomes>, ReplayError> {
    let mut worker = Worker {
        scenarios,
        now_ns,
        exact: scenarios.iter().map(|_| None).collect(),
        historical: HashMap::new(),
        outcomes: vec![Outcomes::default(); scenarios.len()],
        balanced: None,
    };
    for microbatch in microbatches {
        worker.balanced = None;
        for index in 0..scenarios.len() {
            worker.run(index, &microbatch)?;
        }
    }
    Ok(worker.outcomes)
}

impl Worker<'_> {
    fn run(&mut self, index: usize, microbatch: &Microbatch) -> Result<(), EvaluateError> {
        let (scenario, now_ns) = (&self.scenarios[index], self.now_ns);
        let new = || Evaluator::new(scenario, now_ns);
        let evaluator = match scenario.kind.is_historical() {
            true => match self.historical.entry((index, microbatch.layer)) {
                std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
                std::collections::hash_map::Entry::Vacant(entry) => entry.insert(new()?),
            },
            false => match &mut self.exact[index] {
                Some(evaluator) => evaluator,
                empty => empty.insert(new()?),
            },
        };
        let counts = match scenario.kind.forces_routing() {
            true => self.balanced.get_or_insert_with(|| balanced(&scenario.topology, &microbatch.counts)),
            false => &microbatch.counts,
        };
        match evaluator.microbatch(counts, 1) {
            Ok(evaluated) => {
                let Microbatch { step, microbatch, layer, .. } = *microbatch;
                let place = Worst { step, microbatch, layer, imbalance: 0.0 };
                let predicted = evaluator.predict();
                self.outcomes[index].add(place, &evaluated, evaluator.plan(), &predicted);
                if let Some(finer) = evaluator.finer(counts, 1)? {
                    self.outcomes[index].add_finer(&evaluated, &finer);
                }
            }
            Err(error) if error.is_input() => self.outcomes[index].refuse(error.to_string()),
            Err(error) => return Err(error),
        }
        Ok(())
    }
}
