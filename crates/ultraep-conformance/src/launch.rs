//! How groups are started for the suite: the trait, and the ways that launchers share.

use crate::case::{Case, Report, text};
use crate::cases;
use crate::recorder::{Recorder, Seen};
use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use ultraep_fabric::{Capabilities, Fabric, GroupError, GroupSpec};
use ultraep_plan::Rank;

/// After so long a group's processes are killed: far beyond what any case takes.
const PATIENCE: Duration = Duration::from_secs(120);

/// Something that starts groups of one kind of fabric.
pub trait Launcher {
    /// Name, for the lines that the suite prints.
    fn name(&self) -> String;

    /// What its ranks are.
    fn nature(&self) -> Nature;

    /// What its fabric says that it can do.
    fn capabilities(&self) -> Capabilities;

    /// Runs a case on all ranks, and waits for them.
    ///
    /// # Errors
    /// What kept the group from being started or watched.
    fn run(&self, run: &Run) -> Result<Ended, String>;
}

/// What the ranks of a launcher are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nature {
    /// Each is a process of its own, which may be killed.
    pub own_processes: bool,
    /// Time passes while a rank sleeps.
    pub real_time: bool,
}

/// One case with its number of ranks and seed.
#[derive(Clone, Copy)]
pub struct Run {
    /// The case.
    pub case: Case,
    /// Ranks of the group.
    pub ranks: usize,
    /// For the mains.
    pub seed: u64,
}

/// How a group ended.
#[derive(Clone, Debug, Default)]
pub struct Ended {
    /// The rank that the group error names, and its text.
    pub failure: Option<(Option<Rank>, String)>,
    /// What each rank's main returned, where it did.
    pub reports: Vec<Option<u64>>,
}

/// A rank's main, as the fabric's own launchers of threads take it.
pub type RankMain<'a> = &'a (dyn Fn(Box<dyn Fabric>) -> Result<(), String> + Sync);

impl Run {
    /// The group's specification.
    #[must_use]
    pub fn spec(&self) -> GroupSpec {
        (self.case.spec)(self.ranks)
    }

    /// The rank's part.
    ///
    /// # Errors
    /// What was wrong.
    pub fn main(&self, fabric: Box<dyn Fabric>) -> Report {
        (self.case.main)(fabric, self.seed)
    }

    /// Name, ranks and seed, for the command line of a rank's process.
    #[must_use]
    pub fn words(&self) -> [String; 3] {
        [self.case.name.to_owned(), self.ranks.to_string(), self.seed.to_string()]
    }

    /// From [`Run::words`]: `None` when there is no such case.
    #[must_use]
    pub fn from_words(words: &[String]) -> Option<Self> {
        let [name, ranks, seed] = words else { return None };
        let case = cases().into_iter().find(|case| case.name == name)?;
        Some(Self { case, ranks: ranks.parse().ok()?, seed: seed.parse().ok()? })
    }

    /// With a launcher of threads that supervises them and says who failed.
    pub fn in_this_process(
        &self,
        run: impl FnOnce(&GroupSpec, RankMain<'_>) -> Result<Vec<()>, GroupError<String>>,
    ) -> Ended {
        let reports: Vec<Mutex<Option<u64>>> = (0..self.ranks).map(|_| Mutex::new(None)).collect();
        let main = |fabric: Box<dyn Fabric>| {
            let rank = fabric.rank().index();
            let report = self.main(fabric)?;
            *reports[rank].lock().unwrap_or_else(PoisonError::into_inner) = Some(report);
            Ok(())
        };
        let failure = run(&self.spec(), &main).err().map(|error| (error.rank(), error.to_string()));
        let taken = |report: Mutex<Option<u64>>| report.into_inner().unwrap_or_else(PoisonError::into_inner);
        Ended { failure, reports: reports.into_iter().map(taken).collect() }
    }

    /// On a thread a rank, with endpoints that `start` makes there; nobody supervises them.
    ///
    /// # Errors
    /// Ranks that name different culprits; a rank that could not be started.
    pub fn on_threads(&self, start: impl Fn(Rank) -> Result<Box<dyn Fabric>, String> + Sync) -> Result<Ended, String> {
        let one = |rank: Rank| {
            let seen = Seen::default();
            let fabric =
                Recorder::boxed(start(rank).map_err(|why| format!("rank {rank} did not start: {why}"))?, &seen);
            // The fabric goes with the panic; nothing of it is used afterwards.
            let report = catch_unwind(AssertUnwindSafe(|| self.main(fabric)));
            Ok((rank, Saw::new(report.unwrap_or_else(|_| Err("it panicked".to_owned())), &seen)))
        };
        let ended: Result<Vec<_>, String> = thread::scope(|scope| {
            let spawn =
                |rank| thread::Builder::new().name(format!("rank {rank}")).spawn_scoped(scope, move || one(rank));
            let threads: Vec<_> = (0..self.ranks).map(|rank| spawn(Rank::new(rank))).collect();
            let joined =
                threads.into_iter().map(|thread| thread.map_err(text)?.join().map_err(|_| "panic".to_owned())?);
            joined.collect()
        });
        together(ended?)
    }

    /// As processes, one a rank, that `command` starts and that end with [`Run::as_process`]; nobody supervises them.
    ///
    /// # Errors
    /// Ranks that name different culprits; a process that could not be started, or did not end.
    pub fn on_processes(&self, mut command: impl FnMut(Rank) -> Command) -> Result<Ended, String> {
        let mut children = Children::default();
        for rank in (0..self.ranks).map(Rank::new) {
            children.0.push(command(rank).stdout(Stdio::piped()).spawn().map_err(text)?);
        }
        let deadline = Instant::now() + PATIENCE;
        while !children.all_ended()? {
            if Instant::now() > deadline {
                return Err("processes that do not end".to_owned());
            }
            thread::sleep(Duration::from_millis(2));
        }
        let mut saw = Vec::new();
        for (rank, child) in children.0.iter_mut().enumerate() {
            let mut said = String::new();
            child.stdout.take().ok_or("no pipe")?.read_to_string(&mut said).map_err(text)?;
            saw.push((Rank::new(rank), Saw::read(&said)));
        }
        together(saw)
    }

    /// The rank's part, in a process of its own: what it saw goes to the standard output, for [`Run::on_processes`].
    pub fn as_process(&self, fabric: Box<dyn Fabric>) -> ExitCode {
        let (rank, seen) = (fabric.rank(), Seen::default());
        let saw = Saw::new(self.main(Recorder::boxed(fabric, &seen)), &seen);
        saw.print();
        match &saw.wrong {
            None => ExitCode::SUCCESS,
            Some(why) => {
                eprintln!("rank {rank} of {}: {why}", self.case.name);
                ExitCode::FAILURE
            }
        }
    }
}

/// What one rank saw.
struct Saw {
    report: Option<u64>,
    wrong: Option<String>,
    failure: Option<(Option<Rank>, String)>,
}

impl Saw {
    fn new(report: Report, seen: &Seen) -> Self {
        let failure = seen.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Self { report: report.as_ref().ok().copied(), wrong: report.err(), failure }
    }

    fn print(&self) {
        if let Some((rank, why)) = &self.failure {
            println!("failure {} {why}", rank.map_or_else(|| "-".to_owned(), |rank| rank.to_string()));
        }
        if let Some(report) = self.report {
            println!("report {report}");
        }
        if let Some(why) = &self.wrong {
            println!("wrong {why}");
        }
    }

    fn read(said: &str) -> Self {
        let rest = |word: &str| said.lines().find_map(|line| line.strip_prefix(word));
        let failure = rest("failure ")
            .and_then(|line| line.split_once(' '))
            .map(|(rank, why)| (rank.parse::<u16>().ok().map(|rank| Rank::new(usize::from(rank))), why.to_owned()));
        let report = rest("report ").and_then(|report| report.parse().ok());
        Self { report, wrong: rest("wrong ").map(str::to_owned), failure }
    }
}

/// What the group says: what its ranks agree on. A rank that is wrong for another reason than the group's failure is the failure.
fn together(ranks: Vec<(Rank, Saw)>) -> Result<Ended, String> {
    let mut ended = Ended::default();
    for (rank, saw) in &ranks {
        match (&ended.failure, &saw.failure) {
            (None, Some(_)) => ended.failure.clone_from(&saw.failure),
            (Some((one, why)), Some((other, also))) if one != other => {
                return Err(format!("ranks name different culprits: {why}; rank {rank}: {also}"));
            }
            _ => {}
        }
        ended.reports.push(saw.report);
    }
    let wrong = ranks.iter().find_map(|(rank, saw)| saw.wrong.as_ref().map(|why| (Some(*rank), why.clone())));
    ended.failure = ended.failure.or(wrong);
    Ok(ended)
}

/// Processes that are killed and reaped when they are dropped.
#[derive(Default)]
struct Children(Vec<Child>);

impl Children {
    fn all_ended(&mut self) -> Result<bool, String> {
        let mut all = true;
        for child in &mut self.0 {
            all &= child.try_wait().map_err(text)?.is_some();
        }
        Ok(all)
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // One that has ended is reaped already, and both do nothing.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
