//! One thing that is viewed: a run, a trace, or a recording that was made into a temporary trace.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use ultraep_baselines::PolicyKind;
use ultraep_import::{Format, Grouping, Inputs, TemporaryFile, recorded_topology, survey, write_uet};
use ultraep_plan::{MAX_SLOTS, Rank, Ratio, Topology, TopologyError, TopologySpec};
use ultraep_replay::{ExpertShape, Hardware, LeastQuota};
use ultraep_run::RunReader;
use ultraep_trace::{TraceFile, TraceMeta};

use crate::settings::WhatIf;
use crate::{Settings, ViewError};

/// Ranks of a group where nothing says how many.
const DEFAULT_RANKS: usize = 8;
/// Slots on a rank where none are recorded.
const DEFAULT_SLOTS: usize = 2;
/// Hardware that times are predicted for.
const DEFAULT_HARDWARE: &str = "gb200-nvl72";

/// A trace open for reading.
pub(crate) type Trace = TraceFile<BufReader<File>>;

/// What is viewed.
pub(crate) struct Source {
    /// As the user named it.
    pub(crate) title: String,
    /// What it is, in words.
    pub(crate) format: String,
    /// The run's folder.
    pub(crate) run: Option<PathBuf>,
    pub(crate) trace: PathBuf,
    pub(crate) meta: TraceMeta,
    /// As recorded.
    pub(crate) topology: Topology,
    /// How loads without a plan are planned, and where what-if begins.
    pub(crate) planned: WhatIf,
    pub(crate) notes: Vec<String>,
    /// The trace made of a recording, and what was read from a pipe; they go with this.
    _temporary: (Option<TemporaryFile>, Inputs),
}

impl Source {
    /// Opens a run folder, a trace, or any recording that can be read.
    pub(crate) fn open(path: &Path, settings: &Settings) -> Result<Self, ViewError> {
        let inputs = Inputs::new(&[path.to_owned()])?;
        let recording = inputs.open(&settings.reading)?;
        let format = recording.info().format;
        let is_ours = matches!(format, Format::Uet | Format::RunFolder);
        let same_ranks = settings.ranks.is_none() || recording.info().ranks == settings.ranks;
        let file = inputs.paths().first().cloned().unwrap_or_default();
        if is_ours && same_ranks && !is_gzip(&file) {
            let run = (format == Format::RunFolder).then(|| path.to_owned());
            let trace = run.as_ref().map_or(file, |folder| folder.join("loads.uet"));
            return Self::of_trace(path, format, run, trace, (None, inputs), settings);
        }
        drop(recording);
        let (trace, notes) = import(path, &inputs, settings)?;
        let file = trace.path().to_owned();
        let mut source = Self::of_trace(path, format, None, file, (Some(trace), inputs), settings)?;
        source.notes = notes;
        Ok(source)
    }

    fn of_trace(
        path: &Path,
        format: Format,
        run: Option<PathBuf>,
        trace: PathBuf,
        temporary: (Option<TemporaryFile>, Inputs),
        settings: &Settings,
    ) -> Result<Self, ViewError> {
        let meta = open_trace(&trace)?.meta().clone();
        let topology = topology(path, &meta)?;
        let planned = planned(&meta, run.as_deref(), settings)?;
        // Settings that cannot be are told now, not on the page.
        planned.scenario(meta.ranks, meta.experts)?;
        let title = path.display().to_string();
        Ok(Self {
            title,
            format: format.to_string(),
            run,
            trace,
            meta,
            topology,
            planned,
            notes: Vec::new(),
            _temporary: temporary,
        })
    }
}

pub(crate) fn open_trace(path: &Path) -> Result<Trace, ViewError> {
    let file = File::open(path).map_err(|source| ViewError::Io { path: path.to_owned(), source })?;
    TraceFile::open(BufReader::new(file)).map_err(|source| ViewError::Trace { path: path.to_owned(), source })
}

/// A trace packed with gzip has no random access.
fn is_gzip(path: &Path) -> bool {
    let mut start = [0; 2];
    File::open(path).and_then(|mut file| std::io::Read::read_exact(&mut file, &mut start)).is_ok()
        && start == [0x1f, 0x8b]
}

/// Makes a temporary trace of a recording.
fn import(path: &Path, inputs: &Inputs, settings: &Settings) -> Result<(TemporaryFile, Vec<String>), ViewError> {
    let options = &settings.reading;
    let mut recording = inputs.open(options)?;
    let info = recording.info().clone();
    let found = survey(&mut *recording)?;
    let experts = options.experts.or(info.experts).unwrap_or(found.experts);
    let Some(layers) = found.layers.keys().next_back().map(|&layer| layer as usize + 1).filter(|_| experts > 0) else {
        return Err(ViewError::Empty { path: path.to_owned() });
    };
    let recorded = info.ranks.filter(|&ranks| ranks > 1);
    let ranks = settings.ranks.or(recorded).unwrap_or(DEFAULT_RANKS.min(experts));
    recorded_topology(&info, ranks, experts).map_err(|source| group_error(path, experts, source))?;
    let Settings { microbatch_tokens, rule, scale, .. } = *settings;
    let grouping = Grouping { ranks, experts, microbatch_tokens, rule, scale };
    let io = |source| ViewError::Io { path: PathBuf::from("a temporary trace"), source };
    let temporary = TemporaryFile::new().map_err(io)?;
    let out = temporary.writer().map_err(io)?;
    let mut recording = inputs.open(options)?;
    let written = write_uet(&mut *recording, grouping, layers, out)
        .map_err(|source| ViewError::Convert { path: path.to_owned(), source: Box::new(source) })?;
    if written.records == 0 {
        return Err(ViewError::Empty { path: path.to_owned() });
    }
    let mut notes = info.notes;
    notes.extend(written.notes);
    if !experts.is_multiple_of(ranks) {
        let most = experts.div_ceil(ranks);
        notes.push(format!(
            "{experts} experts do not divide by {ranks} ranks: ranks have {most} or {} masters",
            most - 1
        ));
    }
    Ok((temporary, notes))
}

fn group_error(path: &Path, experts: usize, source: TopologyError) -> ViewError {
    let divisors: Vec<String> = (1..=experts).filter(|n| experts.is_multiple_of(*n)).map(|n| n.to_string()).collect();
    ViewError::Group { path: path.to_owned(), source, experts, divisors: divisors.join(", ") }
}

/// The recorded group; one whose masters lie otherwise than ours cannot be planned for.
fn topology(path: &Path, meta: &TraceMeta) -> Result<Topology, ViewError> {
    let TraceMeta { ranks, experts, domain_ranks, .. } = *meta;
    let spec = TopologySpec { ranks, experts, domain_ranks, slots_per_rank: 0 };
    let topology = Topology::new(spec).map_err(|source| group_error(path, experts, source))?;
    let masters = (0..ranks).map(|rank| topology.masters(Rank::new(rank)).len() as u32).collect::<Vec<_>>();
    if masters != meta.masters_per_rank {
        let start = |list: &[u32]| list.iter().copied().take(8).collect();
        let (got, expected) = (start(&meta.masters_per_rank), start(&masters));
        return Err(ViewError::Masters { path: path.to_owned(), got, expected });
    }
    let slots: Vec<usize> = meta.slots_per_rank.iter().map(|&slots| (slots as usize).min(MAX_SLOTS)).collect();
    Ok(topology.with_slots(&slots)?)
}

/// What the settings leave open is as the run had it, or a default.
fn planned(meta: &TraceMeta, run: Option<&Path>, settings: &Settings) -> Result<WhatIf, ViewError> {
    let config = match run {
        Some(folder) => RunReader::open(folder)?.info().config.clone(),
        None => serde_json::Map::new(),
    };
    let number = |key: &str| config.get(key).and_then(serde_json::Value::as_u64).and_then(|n| u32::try_from(n).ok());
    let text = |key: &str| config.get(key).and_then(serde_json::Value::as_str);
    let recorded_slots = meta.slots_per_rank.iter().copied().max().filter(|&slots| slots > 0);
    let recorded_slots = recorded_slots.map(|slots| (slots as usize).min(MAX_SLOTS));
    let hardware_name = settings.hardware.clone().unwrap_or_else(|| DEFAULT_HARDWARE.to_owned());
    Ok(WhatIf {
        policy: settings.policy.or_else(|| text("policy")?.parse().ok()).unwrap_or(PolicyKind::Ultraep),
        slots: settings.slots.or(recorded_slots).unwrap_or(DEFAULT_SLOTS),
        domain_ranks: settings.domain_ranks.unwrap_or(meta.domain_ranks),
        beta: settings.beta.or_else(|| text("beta")?.parse().ok()).unwrap_or(Ratio::BETA),
        min_quota: settings
            .min_quota
            .or_else(|| number("min_quota").map(|tokens| LeastQuota::Tokens(tokens.max(1))))
            .unwrap_or_default(),
        window: 1,
        hardware: Hardware::find(&hardware_name)?,
        hardware_name,
        shape: ExpertShape {
            hidden: settings.hidden.or_else(|| number("hidden")).unwrap_or(4096).max(1),
            width: settings.expert_width.or_else(|| number("intermediate")).unwrap_or(1536).max(1),
        },
    })
}
