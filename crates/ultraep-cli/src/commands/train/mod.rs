//! `ultraep train`: train a model with live balancing, compare policies, write a run folder.

mod args;
mod job;
mod screen;

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ultraep_fabric::{FabricKind, processes, run_threads};
use ultraep_plan::Rank;
use ultraep_run::UtcTime;
use ultraep_text::Corpus;
use ultraep_train::{Origin, Place, RankJob, Silent, TENSOR_THREADS, TrainError, run_rank};

pub(crate) use args::Args;
pub(super) use args::cores;
pub(super) use job::read_text;
use job::{Handover, Job, Resume};
use screen::Screen;

use crate::error::CliError;
use crate::output::Output;

pub(crate) fn run(args: &Args, out: &mut Output<'_>) -> Result<(), CliError> {
    keep_tensors_on_one_thread()?;
    let job = prepare(args)?;
    match args.fabric {
        FabricKind::Threads => run_as_threads(job, out),
        FabricKind::Processes => run_as_processes(job),
    }
}

/// Starts this program anew with the tensor library told to use one thread, unless it was already. The library reads the
/// environment once, and a running program cannot change its environment safely.
pub(super) fn keep_tensors_on_one_thread() -> Result<(), CliError> {
    if TENSOR_THREADS.iter().all(|name| std::env::var_os(name).is_some_and(|value| value == "1")) {
        return Ok(());
    }
    let mut command = std::process::Command::new(own_program()?);
    // The name that it was called by is the one to tell when it says how to call it again.
    command.arg0(program_name());
    command.args(arguments()).envs(TENSOR_THREADS.map(|name| (name, "1")));
    Err(CliError::Failure(format!("start anew: {}", command.exec())))
}

fn own_program() -> Result<PathBuf, CliError> {
    std::env::current_exe().map_err(|error| CliError::Failure(format!("own program: {error}")))
}

/// Everything that can be wrong in the request is found here, before a rank starts.
fn prepare(args: &Args) -> Result<Job, CliError> {
    let origin = args.resume.as_deref().map(Origin::find).transpose().map_err(CliError::input)?;
    let config = match &origin {
        Some(origin) => args.config_over(origin.info.config.clone(), arguments()),
        None => args.config(),
    };
    config.validate().map_err(CliError::input)?;
    let corpus = text(args, origin.as_ref())?;
    job::check_text(&config, &corpus).map_err(CliError::input)?;
    let started = now();
    let new_folder = |runs: &Path| free_folder(runs, started);
    let Some(origin) = origin else {
        let folder = new_folder(&args.runs);
        return Ok(Job { config, corpus, folder, resume: None, started, fabric: args.fabric, json: args.json });
    };
    origin.check(&config, &corpus).map_err(CliError::input)?;
    let (place, continuation) = origin.continuation(&config, command_line());
    let folder = match place {
        Place::SameFolder(folder) => folder,
        Place::Beside(Some(beside)) if !args::given(arguments()).iter().any(|name| name == "runs") => {
            new_folder(&beside)
        }
        Place::Beside(_) => new_folder(&args.runs),
    };
    let resume = Some(Resume { checkpoint: origin.checkpoint, continuation });
    Ok(Job { config, corpus, folder, resume, started, fabric: args.fabric, json: args.json })
}

/// The text that was asked for; else of a run that goes on the text it keeps; else what this machine has.
fn text(args: &Args, origin: Option<&Origin>) -> Result<Arc<Corpus>, CliError> {
    let kept = match origin {
        Some(origin) if args.text.is_empty() => origin.text().map_err(CliError::input)?,
        _ => None,
    };
    let read = kept.map_or_else(|| job::read_text(&args.text, &args.runs), Ok);
    read.map(Arc::new).map_err(CliError::input)
}

/// Arguments of this program, from the name of the command on.
fn arguments() -> impl Iterator<Item = OsString> {
    std::env::args_os().skip(1)
}

/// The name that this program was called by.
fn program_name() -> OsString {
    std::env::args_os().next().unwrap_or_else(|| "ultraep".into())
}

/// The command line for people and files: program first.
fn command_line() -> Vec<String> {
    std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect()
}

pub(super) fn now() -> UtcTime {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    UtcTime::from_unix_s(since.as_secs())
}

/// A folder below `runs` that is not there yet, named by the time.
pub(super) fn free_folder(runs: &Path, started: UtcTime) -> PathBuf {
    let name = started.folder_name();
    let numbered = (2..).map(|n| runs.join(format!("{name}-{n}")));
    let mut candidates = std::iter::once(runs.join(&name)).chain(numbered);
    candidates.find(|path| !path.exists()).unwrap_or_else(|| runs.join(name))
}

/// A flag that Ctrl-C and a request to terminate set; a second one ends the process at once.
pub(super) fn stop_flag() -> Result<Arc<AtomicBool>, CliError> {
    // Two flags: being told by the parent sets only the first, so that an interrupt after it is the first one.
    let (stop, interrupted) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        let twice = signal_hook::flag::register_conditional_shutdown(signal, 1, interrupted.clone());
        let once = signal_hook::flag::register(signal, interrupted.clone());
        let stops = signal_hook::flag::register(signal, stop.clone());
        twice.and(once).and(stops).map_err(|error| CliError::Failure(format!("signal {signal}: {error}")))?;
    }
    Ok(stop)
}

fn rank_job(job: &Job, stop: Arc<AtomicBool>) -> RankJob {
    RankJob {
        config: job.config.clone(),
        corpus: job.corpus.clone(),
        resume: job.resume.as_ref().map(|resume| resume.checkpoint.clone()),
        checkpoints: Some(job.folder.join("checkpoints")),
        stop,
    }
}

fn run_as_threads(job: Job, out: &mut Output<'_>) -> Result<(), CliError> {
    let rank_job = rank_job(&job, stop_flag()?);
    let group = job.config.group().map_err(CliError::input)?;
    let screen = std::sync::Mutex::new(Screen::new(&job)?);
    let result = run_threads(&group, |fabric| match fabric.rank().index() {
        0 => run_rank(fabric, &rank_job, &mut *screen.lock().unwrap_or_else(|e| e.into_inner())),
        _ => run_rank(fabric, &rank_job, &mut Silent),
    });
    let screen = screen.into_inner().unwrap_or_else(|e| e.into_inner());
    let result = result.map(|mut outcomes| outcomes.swap_remove(0)).map_err(CliError::failure);
    screen.finish(result, now(), out)
}

fn run_as_processes(job: Job) -> Result<(), CliError> {
    let stop = stop_flag()?;
    let group = job.config.group().map_err(CliError::input)?;
    let handover = Handover::write(&job)?;
    let program = own_program()?;
    let mut failed = None;
    let launched = processes::launch(&group, |_, info| {
        let mut command = std::process::Command::new(&program);
        command.arg("rank").arg("--join").arg(info.to_string());
        match handover.stdin() {
            Ok(stdin) => command.stdin(stdin),
            Err(error) => {
                failed = Some(error);
                command.stdin(std::process::Stdio::null())
            }
        };
        command
    });
    if let Some(error) = failed {
        return Err(error);
    }
    // A rank that ends by itself says why on stderr.
    let mut group = launched.map_err(CliError::failure)?;
    let mut told = false;
    while !group.supervise(WATCH).map_err(CliError::failure)? {
        // A terminal interrupts all processes, others only this one; being told twice is no second interrupt.
        if stop.load(Ordering::Relaxed) && !told {
            group.notify(Rank::new(0));
            told = true;
        }
    }
    group.wait().map_err(CliError::failure)
}

/// Longest time between two looks at the wish to stop.
const WATCH: Duration = Duration::from_millis(50);

/// Arguments of the hidden command that is one rank of a group of processes.
#[derive(Debug, clap::Args)]
pub(crate) struct RankArgs {
    /// How to join the group
    #[arg(long)]
    join: processes::JoinInfo,
}

/// One rank of a group of processes.
pub(crate) fn run_as_rank(args: &RankArgs, out: &mut Output<'_>) -> Result<(), CliError> {
    let stop = stop_flag()?;
    let told = signal_hook::flag::register(signal_hook::consts::SIGUSR1, stop.clone());
    told.map_err(|error| CliError::Failure(format!("signal SIGUSR1: {error}")))?;
    let job = Handover::read()?;
    let group = job.config.group().map_err(CliError::input)?;
    let rank = args.join.rank();
    let fabric = processes::join(&group, args.join).map_err(CliError::failure)?;
    let rank_job = rank_job(&job, stop);
    let named = |error: TrainError| CliError::Failure(format!("rank {rank}: {error}"));
    if rank.index() > 0 {
        return run_rank(fabric, &rank_job, &mut Silent).map(drop).map_err(named);
    }
    let mut screen = Screen::new(&job)?;
    let result = run_rank(fabric, &rank_job, &mut screen);
    screen.finish(result.map_err(named), now(), out)
}
