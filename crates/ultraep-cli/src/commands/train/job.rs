//! What is to be trained on what, and how a process hands it to the processes of its ranks.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use ultraep_fabric::FabricKind;
use ultraep_run::{Continuation, UtcTime};
use ultraep_text::{Corpus, Discovery, Limits, Sampler, SamplerSpec, TextError};
use ultraep_train::TrainConfig;

use crate::error::CliError;

/// A run.
#[derive(Clone, Debug)]
pub(super) struct Job {
    pub(super) config: TrainConfig,
    pub(super) corpus: Arc<Corpus>,
    pub(super) folder: PathBuf,
    pub(super) resume: Option<Resume>,
    pub(super) started: UtcTime,
    pub(super) fabric: FabricKind,
    pub(super) json: bool,
}

/// What a run goes on from.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Resume {
    pub(super) checkpoint: PathBuf,
    pub(super) continuation: Continuation,
}

/// The text that was asked for, or what this machine has.
pub(crate) fn read_text(paths: &[PathBuf], runs: &Path) -> Result<Corpus, TextError> {
    if !paths.is_empty() {
        return Corpus::from_paths(paths, &Limits::GIVEN);
    }
    let sources =
        Discovery { cargo_home: cargo_home(), sysroot: sysroot(), project: project(), skip: vec![runs.to_path_buf()] };
    Corpus::discover(&sources, &Limits::DISCOVERED)
}

fn cargo_home() -> Option<PathBuf> {
    let home = || std::env::home_dir().map(|home| home.join(".cargo"));
    std::env::var_os("CARGO_HOME").map(PathBuf::from).or_else(home)
}

/// The toolchain's folder, as the compiler says.
fn sysroot() -> Option<PathBuf> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = std::process::Command::new(rustc).args(["--print", "sysroot"]).output().ok()?;
    let path = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| PathBuf::from(path.trim_end()))
}

/// The project's folder: where its lock file is, from here upwards.
fn project() -> Option<PathBuf> {
    let here = std::env::current_dir().ok()?;
    here.ancestors().find(|folder| folder.join("Cargo.lock").is_file()).map(Path::to_path_buf)
}

/// Refuses text that is too short for the run.
pub(super) fn check_text(config: &TrainConfig, corpus: &Corpus) -> Result<(), TextError> {
    let spec = SamplerSpec { sequence_tokens: config.sequence_tokens, seed: config.seed, ..SamplerSpec::default() };
    Sampler::new(Arc::new(corpus.clone()), spec).map(drop)
}

/// The part of a job that goes before the text.
#[derive(Serialize, Deserialize)]
struct Header {
    config: TrainConfig,
    folder: PathBuf,
    resume: Option<Resume>,
    started: UtcTime,
    json: bool,
}

/// A job in a file without a name, given to every child as its standard input. All children read the same open file, so
/// they read by offset.
pub(super) struct Handover {
    file: File,
}

impl Handover {
    pub(super) fn write(job: &Job) -> Result<Self, CliError> {
        let header = Header {
            config: job.config.clone(),
            folder: job.folder.clone(),
            resume: job.resume.clone(),
            started: job.started,
            json: job.json,
        };
        let header = serde_json::to_vec(&header)?;
        let mut file = BufWriter::new(tempfile::tempfile().map_err(failure)?);
        file.write_all(&(header.len() as u64).to_le_bytes()).map_err(failure)?;
        file.write_all(&header).map_err(failure)?;
        job.corpus.write_snapshot(&mut file).map_err(failure)?;
        Ok(Self { file: file.into_inner().map_err(|error| failure(error.into_error()))? })
    }

    pub(super) fn stdin(&self) -> Result<Stdio, CliError> {
        Ok(self.file.try_clone().map_err(failure)?.into())
    }

    /// The job that this process was started with.
    pub(super) fn read() -> Result<Job, CliError> {
        let stdin = std::io::stdin().as_fd().try_clone_to_owned().map_err(failure)?;
        let mut input = BufReader::with_capacity(1 << 20, AtOffset { file: File::from(stdin), offset: 0 });
        let mut length = [0; 8];
        input.read_exact(&mut length).map_err(failure)?;
        let mut header = Vec::new();
        input.by_ref().take(u64::from_le_bytes(length)).read_to_end(&mut header).map_err(failure)?;
        let header: Header = serde_json::from_slice(&header).map_err(|_| {
            CliError::Input("rank: started by `ultraep train` only, with its job as standard input".into())
        })?;
        let corpus = Corpus::read_snapshot(&mut input).map_err(failure)?;
        Ok(Job {
            config: header.config,
            corpus: Arc::new(corpus),
            folder: header.folder,
            resume: header.resume,
            started: header.started,
            // Threads are handed nothing.
            fabric: FabricKind::Processes,
            json: header.json,
        })
    }
}

fn failure(error: impl std::fmt::Display) -> CliError {
    CliError::Failure(format!("hand the job over to the ranks: {error}"))
}

/// Reads by offset, leaving the shared position of the open file alone.
struct AtOffset {
    file: File,
    offset: u64,
}

impl Read for AtOffset {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.file.read_at(buffer, self.offset)?;
        self.offset += read as u64;
        Ok(read)
    }
}
