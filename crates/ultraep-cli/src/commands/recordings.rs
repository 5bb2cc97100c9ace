//! Arguments by which a recording is opened and made into microbatches, shared by `replay` and `trace`.

use std::path::PathBuf;

use ultraep_import::{
    Format, Grouping, GroupingError, OpenOptions, Recording, RecordingInfo, SourceRule, Survey, open_with, survey,
};

use crate::error::CliError;
use crate::options;

/// Which recording.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct RecordingArgs {
    /// The recording: files, or a folder of them; the format is found by content
    #[arg(required = true, value_name = "TRACE")]
    paths: Vec<PathBuf>,
    /// Leave out the engine's profiling run at the beginning of a vLLM log
    #[arg(long)]
    drop_dummy_run: bool,
    #[arg(long, value_name = "E", value_parser = options::experts(), help = options::RECORDED_EXPERTS)]
    experts: Option<usize>,
}

/// How microbatches are made where single tokens are recorded.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct SourceArgs {
    /// Tokens of a microbatch over all ranks, where single tokens are recorded
    #[arg(long, default_value_t = 8192, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    microbatch_tokens: u32,
    /// How tokens without a recorded rank are given to ranks: blocks or round-robin
    #[arg(long, default_value = "blocks", value_name = "RULE", value_parser = source_rule)]
    sources: SourceRule,
    /// Tokens that each recorded token stands for: short recordings at the load of long ones
    #[arg(long, default_value_t = 1, value_name = "FACTOR", value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    scale: u32,
}

fn source_rule(text: &str) -> Result<SourceRule, String> {
    let known = [SourceRule::Blocks, SourceRule::RoundRobin];
    known.into_iter().find(|rule| rule.name() == text).ok_or_else(|| "allowed are blocks and round-robin".to_owned())
}

impl RecordingArgs {
    /// Opens the recording from its beginning.
    pub(crate) fn open(&self, options: &OpenOptions) -> Result<Box<dyn Recording>, CliError> {
        let options = OpenOptions { drop_dummy_run: self.drop_dummy_run, ..options.clone() };
        open_with(&self.paths, &options).map_err(CliError::input)
    }

    /// The one trace of ours that is named, also by its run folder.
    pub(crate) fn our_trace(&self) -> Result<PathBuf, CliError> {
        let info = self.open(&OpenOptions::default())?.info().clone();
        match (self.paths.as_slice(), info.format) {
            ([path], Format::Uet) => Ok(path.clone()),
            ([path], Format::RunFolder) => Ok(path.join("loads.uet")),
            _ => Err(CliError::Input(format!(
                "{}: allowed is one trace of ours: convert it to .uet first",
                self.title()
            ))),
        }
    }

    /// Bytes of all files, for a progress bar; 0 where that cannot be told.
    pub(crate) fn bytes(&self) -> u64 {
        self.paths.iter().map(|path| bytes_of(path, 0)).sum()
    }

    /// For people: the first path and how many more.
    pub(crate) fn title(&self) -> String {
        let first = self.paths.first().map_or_else(String::new, |path| path.display().to_string());
        if self.paths.len() > 1 { format!("{first} and {} more", self.paths.len() - 1) } else { first }
    }

    /// Reads all of it once.
    pub(crate) fn survey(&self) -> Result<(RecordingInfo, Survey, Option<String>), CliError> {
        let mut recording = self.open(&OpenOptions::default())?;
        let found = survey(&mut *recording).map_err(CliError::input)?;
        Ok((recording.info().clone(), found, recording.ending()))
    }

    /// What the recording is, and its number of experts: as asked, as recorded, or from reading all of it once.
    pub(crate) fn describe(&self) -> Result<(RecordingInfo, usize), CliError> {
        let info = self.open(&OpenOptions::default())?.info().clone();
        let experts = match (self.experts, info.experts) {
            (Some(asked), _) => asked,
            (None, Some(recorded)) => recorded,
            (None, None) => self.survey()?.1.experts,
        };
        if experts == 0 {
            return Err(CliError::Input(format!("{}: nothing is recorded in it", self.title())));
        }
        Ok((info, experts))
    }
}

impl SourceArgs {
    pub(crate) fn grouping(&self, ranks: usize, experts: usize) -> Grouping {
        let &Self { microbatch_tokens, sources: rule, scale } = self;
        Grouping { ranks, experts, microbatch_tokens: microbatch_tokens as usize, rule, scale }
    }
}

/// Every failure to make microbatches lies in the recording or the arguments.
pub(crate) fn grouping_error(error: GroupingError) -> CliError {
    CliError::input(error)
}

fn bytes_of(path: &std::path::Path, depth: usize) -> u64 {
    let Ok(metadata) = std::fs::metadata(path) else { return 0 };
    if !metadata.is_dir() {
        return metadata.len();
    }
    if depth > 4 {
        return 0;
    }
    let Ok(entries) = std::fs::read_dir(path) else { return 0 };
    entries.filter_map(Result::ok).map(|entry| bytes_of(&entry.path(), depth + 1)).sum()
}
