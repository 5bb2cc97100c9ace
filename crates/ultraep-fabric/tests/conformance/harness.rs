//! Runs cases on threads, on processes and simulated, and collects what each rank reports.

use std::collections::HashMap;
use std::fmt::Display;
use std::io::Read;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};
use ultraep_fabric::processes::{self, JoinInfo};
use ultraep_fabric::simulated::{Simulation, run_simulated};
use ultraep_fabric::{Capabilities, Fabric, FabricKind, GroupError, GroupSpec, run_threads};
use ultraep_plan::Rank;

/// What a rank's main returns: a digest of what it saw, or what was wrong.
pub(crate) type Report = Result<u64, String>;

/// One case. A rank's main gets the seed; what it must see is its own business, how the group must end is `verify`'s.
#[derive(Clone, Copy)]
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) ranks: &'static [usize],
    pub(crate) seeds: &'static [u64],
    pub(crate) needs: &'static [Need],
    pub(crate) spec: fn(usize) -> GroupSpec,
    pub(crate) main: fn(Box<dyn Fabric>, u64) -> Report,
    pub(crate) verify: fn(&Ending) -> Result<(), String>,
}

/// A capability that a case cannot do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    HostWindows,
    OneSided,
    Signals,
    CorePermits,
    /// Ranks that can be killed.
    OwnProcesses,
    /// Time that passes while a rank sleeps.
    RealTime,
}

/// What the suite runs on: every kind of fabric that a user can pick, and the simulated one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Picked(FabricKind),
    /// Under the schedule of this seed.
    Simulated(u64),
}

impl Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Picked(kind) => kind.fmt(f),
            Self::Simulated(seed) => write!(f, "simulated (schedule {seed})"),
        }
    }
}

/// Schedules under which each case is simulated.
const SCHEDULES: std::ops::Range<u64> = 0..2;

impl Need {
    fn missing(self, kind: Kind, has: Capabilities) -> Option<&'static str> {
        let (met, reason) = match self {
            Self::HostWindows => (has.host_windows, "windows are not host memory"),
            Self::OneSided => (has.one_sided, "no one-sided operations"),
            Self::Signals => (has.signals, "no signals"),
            Self::CorePermits => (has.core_permits, "no core permits"),
            Self::OwnProcesses => {
                (kind == Kind::Picked(FabricKind::Processes), "a rank is not a process that could be killed")
            }
            Self::RealTime => (!matches!(kind, Kind::Simulated(_)), "its time is virtual"),
        };
        (!met).then_some(reason)
    }
}

/// How a group ended.
pub(crate) struct Ending {
    pub(crate) ranks: usize,
    pub(crate) seed: u64,
    /// The rank that the group error names, and its text.
    pub(crate) failure: Option<(Option<Rank>, String)>,
    /// What each rank's main returned, where it did.
    pub(crate) reports: Vec<Option<u64>>,
    pub(crate) elapsed: Duration,
}

/// All ranks ended well.
pub(crate) fn all_well(ending: &Ending) -> Result<(), String> {
    if let Some((_, text)) = &ending.failure {
        return Err(format!("the group failed: {text}"));
    }
    match ending.reports.iter().position(Option::is_none) {
        Some(rank) => Err(format!("rank {rank} reported nothing")),
        None => Ok(()),
    }
}

/// All ranks ended well and saw the same.
pub(crate) fn all_equal(ending: &Ending) -> Result<(), String> {
    all_well(ending)?;
    ensure(ending.reports.windows(2).all(|pair| pair[0] == pair[1]), || format!("reports differ: {:?}", ending.reports))
}

pub(crate) fn ensure(condition: bool, otherwise: impl FnOnce() -> String) -> Result<(), String> {
    if condition { Ok(()) } else { Err(otherwise()) }
}

/// For `map_err`.
pub(crate) fn text(error: impl Display) -> String {
    error.to_string()
}

/// A spec with a timeout that no healthy case reaches.
pub(crate) fn plain(ranks: usize) -> GroupSpec {
    let mut spec = GroupSpec::new(ranks);
    spec.timeout = Duration::from_secs(20);
    spec
}

/// SplitMix64: enough randomness for test data, the same on each rank.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// Test bytes that tell sender, purpose and place.
pub(crate) fn bytes(purpose: u64, rank: usize, count: usize) -> Vec<u8> {
    let mut random = Random(purpose.wrapping_mul(1_000_003).wrapping_add(rank as u64));
    let words = (0..count.div_ceil(8)).flat_map(|_| random.next().to_le_bytes());
    words.take(count).collect()
}

/// Folds bytes into a digest (FNV-1a).
pub(crate) fn digest(so_far: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(so_far ^ 0xcbf2_9ce4_8422_2325, |digest, &byte| {
        (digest ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// What the command line asks for.
pub(crate) struct Wanted {
    names: Vec<String>,
    seed: Option<u64>,
    pub(crate) list: bool,
}

impl Wanted {
    pub(crate) fn parse(arguments: &[String]) -> Self {
        let mut wanted = Self { names: Vec::new(), seed: None, list: false };
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--seed" => wanted.seed = arguments.next().and_then(|seed| seed.parse().ok()),
                "--list" => wanted.list = true,
                // Flags of the usual test harness that mean nothing here.
                flag if flag.starts_with('-') => {}
                name => wanted.names.push(name.to_owned()),
            }
        }
        wanted
    }

    pub(crate) fn name(&self, name: &str) -> bool {
        self.names.is_empty() || self.names.iter().any(|wanted| name.contains(wanted.as_str()))
    }
}

/// Counts outcomes.
#[derive(Default)]
pub(crate) struct Tally {
    passed: usize,
    skipped: usize,
    failed: Vec<String>,
}

impl Tally {
    pub(crate) fn note(&mut self, what: &str, result: Result<(), String>) {
        match result {
            Ok(()) => self.passed += 1,
            Err(why) => {
                println!("FAILED {what}: {why}");
                self.failed.push(what.to_owned());
            }
        }
    }

    pub(crate) fn finish(self) -> ExitCode {
        println!("{} passed, {} failed, {} skipped", self.passed, self.failed.len(), self.skipped);
        self.failed.iter().for_each(|what| println!("  failed: {what}"));
        if self.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

pub(crate) fn run_cases(cases: &[Case], wanted: &Wanted) -> Tally {
    let mut tally = Tally::default();
    let mut earlier: HashMap<String, Vec<Option<u64>>> = HashMap::new();
    let kinds = FabricKind::ALL.into_iter().map(Kind::Picked).chain(SCHEDULES.map(Kind::Simulated));
    for kind in kinds {
        let capabilities = capabilities(kind);
        for case in cases.iter().filter(|case| wanted.name(case.name)) {
            if let Some(reason) = case.needs.iter().find_map(|need| need.missing(kind, capabilities)) {
                println!("SKIP {kind} {}: {reason}", case.name);
                tally.skipped += 1;
                continue;
            }
            let seeds = wanted.seed.map_or(case.seeds.to_vec(), |seed| vec![seed]);
            for &ranks in case.ranks {
                for &seed in &seeds {
                    let point = format!("{} with {ranks} ranks, seed {seed}", case.name);
                    let result = run_one(kind, case, ranks, seed).and_then(|ending| {
                        let before = earlier.entry(point.clone()).or_insert_with(|| ending.reports.clone());
                        let same = ending.failure.is_some() || *before == ending.reports;
                        ensure(same, || "ranks saw something else on another fabric".to_owned())
                    });
                    let result = result.map_err(|why| {
                        let again = "cargo test -p ultraep-fabric --test conformance --";
                        format!("{why}\n  again: {again} {} --seed {seed}", case.name)
                    });
                    tally.note(&format!("{kind} {point}"), result);
                }
            }
        }
    }
    tally
}

/// Runs a case once, checks how it ended and that nothing is left of it.
fn run_one(kind: Kind, case: &Case, ranks: usize, seed: u64) -> Result<Ending, String> {
    let before = Leftovers::now();
    let start = Instant::now();
    let mut ending = match kind {
        Kind::Picked(FabricKind::Threads) => in_this_process(case, ranks, seed, |spec, main| run_threads(spec, main)),
        Kind::Picked(FabricKind::Processes) => on_processes(case, ranks, seed)?,
        Kind::Simulated(schedule) => {
            let simulation = Simulation::new(schedule);
            in_this_process(case, ranks, seed, |spec, main| run_simulated(spec, &simulation, main)?.result)
        }
    };
    ending.elapsed = start.elapsed();
    (case.verify)(&ending)?;
    before.compare()?;
    Ok(ending)
}

type RankMain<'a> = &'a (dyn Fn(Box<dyn Fabric>) -> Result<(), String> + Sync);

fn in_this_process(
    case: &Case,
    ranks: usize,
    seed: u64,
    run: impl FnOnce(&GroupSpec, RankMain<'_>) -> Result<Vec<()>, GroupError<String>>,
) -> Ending {
    let reports: Vec<Mutex<Option<u64>>> = (0..ranks).map(|_| Mutex::new(None)).collect();
    let main = |fabric: Box<dyn Fabric>| {
        let rank = fabric.rank().index();
        let report = (case.main)(fabric, seed)?;
        *reports[rank].lock().expect("no rank panics while it reports") = Some(report);
        Ok(())
    };
    let result = run(&(case.spec)(ranks), &main);
    let failure = result.err().map(|error| (error.rank(), error.to_string()));
    let reports = reports.into_iter().map(|report| report.into_inner().expect("as above")).collect();
    Ending { ranks, seed, failure, reports, elapsed: Duration::ZERO }
}

fn on_processes(case: &Case, ranks: usize, seed: u64) -> Result<Ending, String> {
    let myself = std::env::current_exe().map_err(text)?;
    let start = |_, info: JoinInfo| {
        let mut command = Command::new(&myself);
        command.args(["--as-rank", &info.to_string(), case.name, &ranks.to_string(), &seed.to_string()]);
        command.stdout(Stdio::piped());
        command
    };
    let mut group = processes::launch(&(case.spec)(ranks), start).map_err(text)?;
    let mut outputs: Vec<_> = (0..ranks).map(|rank| group.take_stdout(Rank::new(rank))).collect();
    let failure = group.wait().err().map(|error| (error.rank(), error.to_string()));
    let mut reports = Vec::new();
    for output in &mut outputs {
        let mut said = String::new();
        output.as_mut().ok_or("no pipe")?.read_to_string(&mut said).map_err(text)?;
        reports.push(said.strip_prefix("report ").and_then(|report| report.trim().parse().ok()));
    }
    Ok(Ending { ranks, seed, failure, reports, elapsed: Duration::ZERO })
}

/// The other side of [`on_processes`]: this process is a rank.
pub(crate) fn run_child(arguments: &[String], cases: &[Case]) -> Option<ExitCode> {
    let [flag, info, name, ranks, seed] = arguments else { return None };
    if flag != "--as-rank" {
        return None;
    }
    let run = || -> Report {
        let case = cases.iter().find(|case| case.name == name).ok_or("no such case")?;
        let ranks = ranks.parse().map_err(text)?;
        let seed = seed.parse().map_err(text)?;
        let fabric = processes::join(&(case.spec)(ranks), info.parse().map_err(text)?).map_err(text)?;
        (case.main)(fabric, seed)
    };
    Some(match run() {
        Ok(report) => {
            println!("report {report}");
            ExitCode::SUCCESS
        }
        Err(why) => {
            eprintln!("rank {info} of {name}: {why}");
            ExitCode::FAILURE
        }
    })
}

fn capabilities(kind: Kind) -> Capabilities {
    let ask = |fabric: Box<dyn Fabric>| Ok::<_, String>(fabric.capabilities());
    let found = match kind {
        // Processes share the implementation, and so what it can do.
        Kind::Picked(_) => run_threads(&plain(1), ask).ok(),
        Kind::Simulated(seed) => {
            run_simulated(&plain(1), &Simulation::new(seed), ask).ok().and_then(|run| run.result.ok())
        }
    };
    found.and_then(|all| all.first().copied()).expect("a group of one rank starts")
}

/// What a group could leave behind in this process or on the machine.
pub(crate) struct Leftovers {
    descriptors: usize,
}

impl Leftovers {
    pub(crate) fn now() -> Self {
        Self { descriptors: count("/proc/self/fd") }
    }

    /// That no child, descriptor, mapping or file is left.
    pub(crate) fn compare(&self) -> Result<(), String> {
        let children = rustix::process::wait(rustix::process::WaitOptions::NOHANG);
        ensure(matches!(children, Err(rustix::io::Errno::CHILD)), || format!("children are left: {children:?}"))?;
        let descriptors = count("/proc/self/fd");
        ensure(descriptors == self.descriptors, || {
            format!("{} descriptors, before {}", descriptors, self.descriptors)
        })?;
        let maps = std::fs::read_to_string("/proc/self/maps").map_err(text)?;
        ensure(!maps.contains("ultraep-fabric:") && !maps.contains("memfd:ultraep"), || {
            "a mapping is left".to_owned()
        })?;
        let shared = std::fs::read_dir("/dev/shm").map_err(text)?.filter_map(Result::ok);
        let named = shared.filter(|entry| entry.file_name().to_string_lossy().contains("ultraep")).count();
        ensure(named == 0, || "a file is left in /dev/shm".to_owned())
    }
}

fn count(folder: &str) -> usize {
    std::fs::read_dir(folder).map_or(0, Iterator::count)
}
