//! Going on from a checkpoint: what may change, and in which folder the run goes on.
//!
//! * Model, seed and text are those of the checkpoint: with others it would be another training, and is refused.
//! * What neither the numbers nor the recorded loads and times depend on ([`OF_THE_SAME_RUN`]) may change: the run goes on in
//!   its own folder. Of the number of steps the learning rate's decay depends; more of them are asked for on purpose, and the
//!   run folder says from which step on.
//! * With anything else changed (ranks, policy, learning rate, ...), and from a checkpoint that was named by itself, a new run
//!   begins beside the first. Its `run.json` names the checkpoint and what is different. No folder holds two trainings.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use ultraep_run::{Continuation, SettingChange};
use ultraep_text::Corpus;

use crate::checkpoint::refuse;
use crate::pinned::{pinned_text, text_difference};
use crate::{CheckpointInfo, TrainConfig, TrainError, find_checkpoint};

/// Fields of the configuration that may change within one run.
const OF_THE_SAME_RUN: [&str; 10] = [
    "steps",
    "checked",
    "compare_every",
    "compare",
    "reference",
    "save_every",
    "keep",
    "profile_every",
    "timeout_s",
    "cores",
];

/// A checkpoint to go on from.
#[derive(Clone, Debug)]
pub struct Origin {
    /// Its folder.
    pub checkpoint: PathBuf,
    /// Its manifest.
    pub info: CheckpointInfo,
    /// The run that it belongs to, where that is there.
    run: Option<PathBuf>,
    /// Whether the run was named, and so its latest checkpoint meant.
    is_latest: bool,
}

/// Where a run goes on.
#[derive(Clone, Debug, PartialEq)]
pub enum Place {
    /// In the folder that it was begun in.
    SameFolder(PathBuf),
    /// In a new folder, best made in this one; `None` where the checkpoint belongs to no run.
    Beside(Option<PathBuf>),
}

impl Origin {
    /// The checkpoint at `path`, or the latest of the run at `path`.
    pub fn find(path: &Path) -> Result<Self, TrainError> {
        let checkpoint = find_checkpoint(path)?;
        let info = CheckpointInfo::read(&checkpoint)?;
        let is_latest = checkpoint != path;
        let run = if is_latest { Some(path.to_path_buf()) } else { run_of(&checkpoint) };
        Ok(Self { checkpoint, info, run: run.filter(|run| run.join("run.json").is_file()), is_latest })
    }

    /// The text that its run keeps; `None` where there is none.
    pub fn text(&self) -> Result<Option<Corpus>, TrainError> {
        self.run.as_deref().map_or(Ok(None), pinned_text)
    }

    /// Refuses a configuration and a text with which it would be another training, and too few steps.
    pub fn check(&self, config: &TrainConfig, corpus: &Corpus) -> Result<(), TrainError> {
        self.info.check_model(config, &self.checkpoint)?;
        let digest = corpus.digest();
        if let Err(error) = self.info.check_text(digest, &self.checkpoint) {
            let file = self.run.as_deref().and_then(|run| text_difference(run, corpus));
            return Err(
                file.map_or(error, |file| refuse(&self.checkpoint, format!("it was trained on other text: {file}")))
            );
        }
        if self.info.step >= config.steps {
            let reason = "it has as many as asked for; ask for more with --steps";
            return Err(refuse(&self.checkpoint, format!("{} steps: {reason}", self.info.step)));
        }
        Ok(())
    }

    /// Where a run with `config` goes on, and what its folder says about that. `command` is the command line.
    pub fn continuation(&self, config: &TrainConfig, command: Vec<String>) -> (Place, Continuation) {
        let changed = changes(&self.info.config, config);
        let same_run = changed.iter().all(|change| OF_THE_SAME_RUN.contains(&change.name.as_str()));
        let (place, from) = match &self.run {
            Some(run) if self.is_latest && same_run => (Place::SameFolder(run.clone()), None),
            run => {
                let beside = run.as_deref().and_then(Path::parent).map(|folder| match folder.as_os_str().is_empty() {
                    true => PathBuf::from("."),
                    false => folder.to_path_buf(),
                });
                (Place::Beside(beside), Some(self.checkpoint.display().to_string()))
            }
        };
        (place, Continuation { step: self.info.step, from, command, changed })
    }
}

/// The run that a checkpoint lies in.
fn run_of(checkpoint: &Path) -> Option<PathBuf> {
    let whole = fs::canonicalize(checkpoint).ok()?;
    whole.parent()?.parent().map(Path::to_path_buf)
}

/// Fields with other values, in the order of their names.
fn changes(before: &TrainConfig, after: &TrainConfig) -> Vec<SettingChange> {
    let fields = |config: &TrainConfig| match serde_json::to_value(config) {
        Ok(Value::Object(fields)) => fields,
        _ => Map::new(),
    };
    let (before, after) = (fields(before), fields(after));
    let of = |(name, after): (&String, &Value)| {
        let before = before.get(name).cloned().unwrap_or(Value::Null);
        let change = SettingChange { name: name.clone(), before, after: after.clone() };
        (!same_value(&change)).then_some(change)
    };
    after.iter().filter_map(of).collect()
}

/// Whether both values mean the same: a target imbalance may be written as `1.01` and as `101/100`.
fn same_value(change: &SettingChange) -> bool {
    let ratio = |value: &Value| value.as_str()?.parse::<ultraep_plan::Ratio>().ok();
    let cross = |a: ultraep_plan::Ratio, b: ultraep_plan::Ratio| {
        u64::from(a.num()) * u64::from(b.den()) == u64::from(b.num()) * u64::from(a.den())
    };
    change.before == change.after
        || (change.name == "beta" && ratio(&change.before).zip(ratio(&change.after)).is_some_and(|(a, b)| cross(a, b)))
}
