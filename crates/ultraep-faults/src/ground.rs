//! Where a scenario runs: threads, processes, or simulated.

use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ultraep_fabric::processes::{self, BadJoinInfo, Group, JoinInfo};
use ultraep_fabric::simulated::{Fault, Simulation, run_simulated};
use ultraep_fabric::{Fabric, FabricError, GroupError, run_threads};
use ultraep_plan::{Rank, TopologyError};
use ultraep_runtime::RuntimeError;

use crate::{Bystanders, Ending, FaultText, FaultyEndpoint, Profile, RankEnd, Scenario};

/// The first argument of a rank's process; see [`rank_process`].
pub const JOIN_FLAG: &str = "--as-rank";

/// Where the ranks run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ground<'a> {
    /// As threads.
    Threads,
    /// As processes of this program, which calls [`rank_process`].
    Processes(&'a Path),
    /// As threads under the schedule of a seed; odd seeds give direct access to peers' windows, even ones only put and get.
    Simulated(u64),
}

/// Why a scenario could not be run at all.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// The group cannot be started.
    #[error(transparent)]
    Fabric(#[from] FabricError),
    /// No group has such ranks.
    #[error(transparent)]
    Topology(#[from] TopologyError),
    /// The processes cannot be started or read.
    #[error("ranks' processes: {0}")]
    Io(#[from] std::io::Error),
    /// The undisturbed run failed.
    #[error("without a fault: {0}")]
    Unhealthy(String),
    /// Not the text of a join.
    #[error(transparent)]
    Join(#[from] BadJoinInfo),
}

/// Runs `scenario` with `faults`. On threads and processes only the first fault of the list strikes.
///
/// # Errors
/// [`RunError`] when the group does not start; what the faults do is in the [`Ending`].
pub fn run(scenario: &Scenario, ground: Ground<'_>, faults: &[Fault]) -> Result<Ending, RunError> {
    Ok(match ground {
        Ground::Threads => on_threads(scenario, faults.first().copied(), &Arc::new(Bystanders::new(scenario.ranks)))?,
        Ground::Simulated(seed) => {
            simulated(scenario, &Simulation { seed, faults: faults.to_vec(), direct: seed % 2 == 1 })?
        }
        Ground::Processes(program) => on_processes(scenario, program, faults.first().copied(), |_| Ok(()))?,
    })
}

impl Scenario {
    /// What an undisturbed run on threads does and gives.
    ///
    /// # Errors
    /// [`RunError`].
    pub fn profile(&self) -> Result<Profile, RunError> {
        let bystanders = Arc::new(Bystanders::new(self.ranks));
        let ending = on_threads(self, None, &bystanders)?;
        let digest = |end: &RankEnd| match end {
            RankEnd::Finished(digest) => Ok(*digest),
            other => Err(RunError::Unhealthy(other.to_string())),
        };
        let digests = ending.ends.iter().map(digest).collect::<Result<_, _>>()?;
        Ok(Profile { operations: bystanders.operations(), digests })
    }
}

/// Where ranks of this process report.
struct Ends(Mutex<Vec<RankEnd>>);

impl Ends {
    fn new(ranks: usize) -> Self {
        Self(Mutex::new(vec![RankEnd::Lost; ranks]))
    }

    fn report(&self, rank: Rank, result: &Result<u64, RuntimeError>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)[rank.index()] = RankEnd::of(result);
    }

    fn all(self) -> Vec<RankEnd> {
        self.0.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

fn failure<T, E: std::fmt::Display>(result: Result<T, GroupError<E>>) -> Option<(Option<Rank>, String)> {
    result.err().map(|error| (error.rank(), error.to_string()))
}

/// Tells the others that a rank's main is over, whichever way it ends.
struct EndsWithMe<'a>(&'a Bystanders);

impl Drop for EndsWithMe<'_> {
    fn drop(&mut self) {
        self.0.end();
    }
}

fn on_threads(scenario: &Scenario, fault: Option<Fault>, bystanders: &Arc<Bystanders>) -> Result<Ending, RunError> {
    let (config, ends) = (scenario.config()?, Ends::new(scenario.ranks));
    let result = run_threads(&scenario.group()?, |fabric: Box<dyn Fabric>| {
        let _over = EndsWithMe(bystanders);
        let rank = fabric.rank();
        let faulty = FaultyEndpoint::new(fabric, fault, false, Arc::clone(bystanders));
        let result = scenario.run_rank(config.clone(), Box::new(faulty));
        ends.report(rank, &result);
        result
    });
    Ok(Ending { failure: failure(result), ends: ends.all(), schedule: None })
}

fn simulated(scenario: &Scenario, simulation: &Simulation) -> Result<Ending, RunError> {
    let (config, ends) = (scenario.config()?, Ends::new(scenario.ranks));
    let run = run_simulated(&scenario.group()?, simulation, |fabric: Box<dyn Fabric>| {
        let rank = fabric.rank();
        let result = scenario.run_rank(config.clone(), fabric);
        ends.report(rank, &result);
        result
    })?;
    Ok(Ending { failure: failure(run.result), ends: ends.all(), schedule: Some(run.schedule) })
}

/// Runs `scenario` as processes of `program` and kills the process of `rank` from outside after `delay`: at whatever
/// instruction it is by then, in the fabric's code or out of it.
///
/// # Errors
/// As for [`run`].
pub fn run_and_kill(scenario: &Scenario, program: &Path, rank: Rank, delay: Duration) -> Result<Ending, RunError> {
    on_processes(scenario, program, None, |group| {
        let since = Instant::now();
        while let Some(left) = delay.checked_sub(since.elapsed()) {
            if group.supervise(left)? {
                return Ok(());
            }
        }
        group.kill(rank);
        Ok(())
    })
}

fn on_processes(
    scenario: &Scenario,
    program: &Path,
    fault: Option<Fault>,
    meanwhile: impl FnOnce(&mut Group) -> Result<(), FabricError>,
) -> Result<Ending, RunError> {
    let Scenario { ranks, layers, microbatches, timeout } = *scenario;
    let start = |_, info: JoinInfo| {
        let mut command = Command::new(program);
        let sizes =
            [ranks as u64, layers as u64, microbatches, timeout.as_millis() as u64].map(|size| size.to_string());
        command.args([JOIN_FLAG, &info.to_string()]).args(sizes).stdout(Stdio::piped());
        if let Some(fault) = fault {
            command.arg(FaultText(fault).to_string());
        }
        command
    };
    let mut group = processes::launch(&scenario.group()?, start)?;
    let outputs: Vec<_> = (0..ranks).map(|rank| group.take_stdout(Rank::new(rank))).collect();
    meanwhile(&mut group)?;
    let failure = failure(group.wait());
    let mut ends = Vec::new();
    for output in outputs {
        let mut line = String::new();
        if let Some(mut output) = output {
            output.read_to_string(&mut line)?;
        }
        let Ok(end) = line.parse();
        ends.push(end);
    }
    Ok(Ending { failure, ends, schedule: None })
}

/// The other side of [`Ground::Processes`]: this process is a rank, if its arguments say so. Returns how it ended.
///
/// # Errors
/// [`RunError`] when it cannot join.
pub fn rank_process(arguments: &[String]) -> Option<Result<RankEnd, RunError>> {
    let (flag, rest) = arguments.split_first()?;
    if flag != JOIN_FLAG {
        return None;
    }
    let [info, sizes @ ..] = rest else { return None };
    let number = |index: usize| sizes.get(index)?.parse::<u64>().ok();
    let scenario = Scenario {
        ranks: number(0)? as usize,
        layers: number(1)? as usize,
        microbatches: number(2)?,
        timeout: Duration::from_millis(number(3)?),
    };
    let fault = sizes.get(4).and_then(|text| text.parse::<FaultText>().ok()).map(|text| text.0);
    Some(join(&scenario, info, fault))
}

fn join(scenario: &Scenario, info: &str, fault: Option<Fault>) -> Result<RankEnd, RunError> {
    let fabric = processes::join(&scenario.group()?, info.parse()?)?;
    let bystanders = Arc::new(Bystanders::new(scenario.ranks));
    let faulty = FaultyEndpoint::new(fabric, fault, true, bystanders);
    Ok(RankEnd::of(&scenario.run_rank(scenario.config()?, Box::new(faulty))))
}
