//! Arguments by which a recording is opened and made into microbatches, shared by `replay` and `trace`.

use std::cell::OnceCell;
use std::path::{Path, PathBuf};

use ultraep_import::{
    Choice, Format, Grouping, GroupingError, Inputs, LayerLoads, OpenOptions, Reading, Recording, RecordingInfo,
    SourceRule, Survey, read_loads, survey,
};

use crate::error::{CliError, note};
use crate::options;
use crate::shell_word::quoted;

/// Which recording.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct RecordingArgs {
    /// The recording: files, or a folder of them, - for standard input; the format is found by content
    #[arg(required = true, value_name = "TRACE")]
    paths: Vec<PathBuf>,
    #[command(flatten)]
    reading: ReadingArgs,
    /// Standard input and pipes are copied once, when they are first opened.
    #[arg(skip)]
    inputs: OnceCell<Inputs>,
}

/// How a recording is read where its content does not tell.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct ReadingArgs {
    /// What the numbers of an array are, where content cannot tell: counts, ids (experts of tokens) or map (tokens x experts)
    #[arg(long = "as", value_name = "READING")]
    reading: Option<Reading>,
    /// Which array of a file of several
    #[arg(long, value_name = "NAME")]
    array: Option<String>,
    /// Leave out an engine's profiling (dummy) runs: long stretches of tokens that all choose the same experts
    #[arg(long)]
    drop_dummy_run: bool,
    #[arg(long, value_name = "E", value_parser = options::experts(), help = options::RECORDED_EXPERTS)]
    experts: Option<usize>,
}

impl ReadingArgs {
    /// For the import crate; bytes read are not shown.
    pub(crate) fn options(&self) -> OpenOptions {
        OpenOptions {
            drop_dummy_run: self.drop_dummy_run,
            reading: self.reading,
            array: self.array.clone(),
            experts: self.experts,
            ..OpenOptions::default()
        }
    }
}

/// The loads of one layer, for commands that plan it.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct LoadArgs {
    /// Layer to take, where there are several
    #[arg(long, value_name = "L")]
    layer: Option<u32>,
    /// Step to take, where there are several
    #[arg(long, value_name = "STEP")]
    step: Option<u64>,
    #[arg(long, value_name = "N", value_parser = options::ranks(),
          help = format!("{} [default: as recorded]", options::RANKS))]
    ranks: Option<usize>,
    #[command(flatten)]
    reading: ReadingArgs,
    #[command(flatten)]
    sources: SourceArgs,
}

impl LoadArgs {
    /// Reads the loads of one layer, a matrix a microbatch; notes go to standard error.
    pub(crate) fn read(&self, path: &Path) -> Result<LayerLoads, CliError> {
        let SourceArgs { microbatch_tokens, sources: rule, scale } = self.sources;
        let choice = Choice {
            layer: self.layer,
            step: self.step,
            ranks: self.ranks,
            microbatch_tokens: microbatch_tokens as usize,
            rule,
            scale,
        };
        let inputs = Inputs::new(&[path.to_path_buf()]).map_err(CliError::input)?;
        let name = path.display().to_string();
        let loads = read_loads(&inputs, &self.reading.options(), &choice, &name).map_err(CliError::input)?;
        loads.notes.iter().for_each(note);
        Ok(loads)
    }
}

/// The load that something else is judged by.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct LoadPaths {
    /// The load: a recording, as replay takes it
    #[arg(long = "load", required = true, value_name = "TRACE", num_args = 1..)]
    loads: Vec<PathBuf>,
    #[command(flatten)]
    reading: ReadingArgs,
}

impl LoadPaths {
    /// As a recording.
    pub(crate) fn recording(&self) -> RecordingArgs {
        RecordingArgs { paths: self.loads.clone(), reading: self.reading.clone(), inputs: OnceCell::new() }
    }
}

/// How microbatches are made where single tokens are recorded.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct SourceArgs {
    /// Tokens of a microbatch over all ranks, where single tokens are recorded
    #[arg(long, default_value_t = MICROBATCH_TOKENS, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
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
    /// Its arguments as a user types them.
    pub(crate) fn as_typed(&self) -> String {
        let mut words: Vec<String> = self.paths.iter().map(|path| quoted(&path.display().to_string())).collect();
        let ReadingArgs { reading, array, drop_dummy_run, experts } = &self.reading;
        words.extend(reading.map(|reading| format!("--as {}", reading.name())));
        words.extend(array.iter().map(|array| format!("--array {}", quoted(array))));
        words.extend(drop_dummy_run.then(|| "--drop-dummy-run".to_owned()));
        words.extend(experts.map(|experts| format!("--experts {experts}")));
        words.join(" ")
    }

    /// Opens the recording from its beginning.
    pub(crate) fn open(&self, options: &OpenOptions) -> Result<Box<dyn Recording>, CliError> {
        let options = OpenOptions { bytes_read: options.bytes_read.clone(), ..self.reading.options() };
        self.inputs()?.open(&options).map_err(CliError::input)
    }

    fn inputs(&self) -> Result<&Inputs, CliError> {
        if let Some(inputs) = self.inputs.get() {
            return Ok(inputs);
        }
        let inputs = Inputs::new(&self.paths).map_err(CliError::input)?;
        Ok(self.inputs.get_or_init(|| inputs))
    }

    /// The one trace of ours that is named, also by its run folder.
    pub(crate) fn our_trace(&self) -> Result<PathBuf, CliError> {
        let info = self.open(&OpenOptions::default())?.info().clone();
        match (self.inputs()?.paths(), info.format) {
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
        let paths = self.inputs().map_or(self.paths.as_slice(), Inputs::paths);
        paths.iter().map(|path| bytes_of(path, 0)).sum()
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
        if let Some(asked) = self.reading.experts.filter(|&asked| asked < found.experts) {
            let (title, experts) = (self.title(), found.experts);
            return Err(CliError::Input(format!(
                "{title}: {experts} experts are recorded: --experts {asked} are too few"
            )));
        }
        Ok((recording.info().clone(), found, recording.ending()))
    }

    /// What the recording is, and its number of experts: as asked, as recorded, or from reading all of it once.
    pub(crate) fn describe(&self) -> Result<(RecordingInfo, usize), CliError> {
        let info = self.open(&OpenOptions::default())?.info().clone();
        let experts = match (self.reading.experts, info.experts) {
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

/// What a microbatch holds where nobody says.
const MICROBATCH_TOKENS: u32 = 8192;

impl SourceArgs {
    /// What differs from the defaults, as a user types it, with a space before each.
    pub(crate) fn as_typed(&self) -> String {
        let &Self { microbatch_tokens, sources, scale } = self;
        let mut words = String::new();
        if microbatch_tokens != MICROBATCH_TOKENS {
            words += &format!(" --microbatch-tokens {microbatch_tokens}");
        }
        if sources != SourceRule::default() {
            words += &format!(" --sources {}", sources.name());
        }
        if scale != 1 {
            words += &format!(" --scale {scale}");
        }
        words
    }

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
