//! `ultraep trace`: what is in a recording, its first records, and converting it.

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::json;
use ultraep_import::{
    ImportError, Load, OpenOptions, OutputFile, Piece, RecordingInfo, Sources, Survey, V1Options, WriteParquetError,
    WriteUetError, recorded_topology, v1_manifest_path, write_parquet, write_uet, write_ultra_ep_v1,
};

use super::recordings::{RecordingArgs, SourceArgs};
use super::{write_error, write_json};
use crate::error::{CliError, note};
use crate::options;
use crate::output::Output;
use crate::table::{Cell, Column, Table};

/// The subcommands.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Trace {
    /// What a recording is and what it holds, layer by layer; reads all of it
    Info(InfoArgs),
    /// The first pieces of a recording
    Head(HeadArgs),
    /// Convert a recording for a group of a given size
    Convert(ConvertArgs),
}

/// Arguments of `ultraep trace info`.
#[derive(Debug, clap::Args)]
pub(crate) struct InfoArgs {
    #[command(flatten)]
    recording: RecordingArgs,
    /// JSON (schema ultraep.trace-info/1) instead of a table
    #[arg(long)]
    json: bool,
}

/// Arguments of `ultraep trace head`.
#[derive(Debug, clap::Args)]
pub(crate) struct HeadArgs {
    #[command(flatten)]
    recording: RecordingArgs,
    /// Pieces to show
    #[arg(short = 'n', long, default_value_t = 10, value_name = "COUNT")]
    count: usize,
    /// JSON, a line for each piece with all its counts or choices
    #[arg(long)]
    json: bool,
}

/// Arguments of `ultraep trace convert`.
#[derive(Debug, clap::Args)]
pub(crate) struct ConvertArgs {
    #[command(flatten)]
    recording: RecordingArgs,
    #[command(flatten)]
    sources: SourceArgs,
    /// File to write, which must not exist; with --to v1 the folder and the name of the recording in it
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Format to write: our own, parquet with all that a trace of ours holds, or UltraEP v1's, which has no sources; the last
    /// two are written from traces of ours
    #[arg(long, value_enum, default_value = "uet")]
    to: Target,
    #[arg(long, value_name = "N", value_parser = options::ranks(),
          help = format!("{} [default: as recorded]", options::RANKS))]
    ranks: Option<usize>,
}

/// Formats that are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Target {
    Uet,
    Parquet,
    V1,
}

impl Trace {
    pub(crate) fn run(&self, out: &mut Output<'_>) -> Result<(), CliError> {
        match self {
            Self::Info(args) => info(args, out),
            Self::Head(args) => head(args, out),
            Self::Convert(args) if args.to == Target::V1 => convert_to_v1(args, out),
            Self::Convert(args) if args.to == Target::Parquet => convert_to_parquet(args, out),
            Self::Convert(args) => convert(args, out),
        }
    }
}

/// `ultraep.trace-info/1`.
#[derive(Debug, Serialize)]
struct Info {
    schema: &'static str,
    format: String,
    sources: &'static str,
    source_ranks: Option<usize>,
    experts: usize,
    top_k: Option<usize>,
    domain_ranks: Option<usize>,
    slots_per_rank: Option<usize>,
    steps: Option<(u64, u64)>,
    pieces: u64,
    ending: Option<String>,
    notes: Vec<String>,
    metadata: Vec<(String, String)>,
    layers: Vec<LayerInfo>,
}

#[derive(Debug, Serialize)]
struct LayerInfo {
    layer: u32,
    tokens: u64,
    microbatches: u64,
    choices: u64,
    /// Largest over mean load of the experts, over the whole recording.
    expert_imbalance: f64,
    busiest_expert: usize,
    idle_experts: usize,
}

fn info(args: &InfoArgs, out: &mut Output<'_>) -> Result<(), CliError> {
    let (info, survey, ending) = args.recording.survey()?;
    let info = Info::of(info, &survey, ending);
    if args.json { write_json(out, &info) } else { info.print(&args.recording.title(), out) }
}

impl Info {
    fn of(info: RecordingInfo, survey: &Survey, ending: Option<String>) -> Self {
        let experts = info.experts.unwrap_or(survey.experts);
        let layer = |(&layer, of_layer): (&u32, &ultraep_import::LayerSurvey)| {
            let busiest =
                of_layer.expert_loads.iter().enumerate().max_by_key(|&(e, &load)| (load, std::cmp::Reverse(e)));
            let used = of_layer.expert_loads.iter().filter(|&&load| load > 0).count();
            LayerInfo {
                layer,
                tokens: of_layer.tokens,
                microbatches: of_layer.microbatches,
                choices: of_layer.choices,
                expert_imbalance: of_layer.expert_imbalance(experts),
                busiest_expert: busiest.map_or(0, |(expert, _)| expert),
                idle_experts: experts.saturating_sub(used),
            }
        };
        let (sources, source_ranks) = match info.sources {
            Sources::Ranks(ranks) => ("ranks", Some(ranks)),
            Sources::Tokens => ("tokens", None),
            Sources::Totals => ("totals", None),
        };
        Self {
            schema: "ultraep.trace-info/1",
            format: info.format.to_string(),
            sources,
            source_ranks,
            experts,
            top_k: info.top_k,
            domain_ranks: info.domain_ranks,
            slots_per_rank: info.slots_per_rank,
            steps: survey.steps,
            pieces: survey.pieces,
            ending,
            notes: info.notes,
            metadata: info.metadata,
            layers: survey.layers.iter().map(layer).collect(),
        }
    }

    fn print(&self, title: &str, out: &mut Output<'_>) -> Result<(), CliError> {
        writeln!(out, "{title}: {}", self.format)?;
        let sources = match (self.sources, self.source_ranks) {
            (_, Some(ranks)) => format!("counts by source rank, {ranks} ranks"),
            ("tokens", _) => "single tokens; which rank they were on is not recorded".to_owned(),
            _ => "totals of experts only; no sources".to_owned(),
        };
        writeln!(out, "{} experts, {}; {sources}", self.experts, plural(self.layers.len(), "layer"))?;
        if let Some(top_k) = self.top_k {
            writeln!(out, "top-{top_k}")?;
        }
        if let (Some((first, last)), "ranks" | "totals") = (self.steps, self.sources) {
            writeln!(out, "steps {first} to {last}, {}", plural(self.pieces as usize, "record"))?;
        }
        for (key, value) in &self.metadata {
            writeln!(out, "{key}: {}", value.chars().take(200).collect::<String>())?;
        }
        for note in self.notes.iter().chain(&self.ending) {
            writeln!(out, "note: {note}")?;
        }
        let amount = match self.sources {
            "tokens" => Column::number("tokens", "tokens recorded of the layer"),
            _ => Column::number("microbatches", "microbatches recorded of the layer"),
        };
        let mut table = Table::new([
            Column::number("layer", "MoE layer, by the recording's own number"),
            amount,
            Column::number("choices", "(token, expert) pairs: top-k for each token"),
            Column::number("expert imbalance", "largest over mean load of the experts, over the whole recording"),
            Column::number("busiest expert", "expert with most choices"),
            Column::number("idle experts", "experts that nothing chose"),
        ]);
        for layer in &self.layers {
            table.row([
                Cell::count(layer.layer),
                Cell::count(if self.sources == "tokens" { layer.tokens } else { layer.microbatches }),
                Cell::count(layer.choices),
                Cell::number(layer.expert_imbalance, 3),
                Cell::count(layer.busiest_expert),
                Cell::count(layer.idle_experts),
            ]);
        }
        out.table(&table)
    }
}

pub(super) fn plural(count: usize, word: &str) -> String {
    format!("{count} {word}{}", if count == 1 { "" } else { "s" })
}

fn head(args: &HeadArgs, out: &mut Output<'_>) -> Result<(), CliError> {
    let mut recording = args.recording.open(&OpenOptions::default())?;
    let mut piece = Piece::default();
    for _ in 0..args.count {
        if !recording.next(&mut piece).map_err(CliError::input)? {
            break;
        }
        if args.json { write_json(out, &piece_json(&piece))? } else { print_piece(&piece, out)? }
    }
    Ok(())
}

fn piece_json(piece: &Piece) -> serde_json::Value {
    let Piece { step, microbatch, layer, load } = piece;
    match load {
        Load::Choices { per_token, ids } => {
            json!({ "layer": layer, "choices": ids.chunks(*per_token).collect::<Vec<_>>() })
        }
        Load::Counts { sources, counts } => {
            let rows: Vec<&[u32]> = counts.chunks((counts.len() / sources.max(&1)).max(1)).collect();
            json!({ "step": step, "microbatch": microbatch, "layer": layer, "counts": rows })
        }
    }
}

fn print_piece(piece: &Piece, out: &mut Output<'_>) -> Result<(), CliError> {
    match &piece.load {
        Load::Choices { per_token, ids } => {
            let shown = ids.chunks(*per_token).take(4).map(|ids| format!("{ids:?}")).collect::<Vec<_>>().join(" ");
            let more = (ids.len() / per_token).saturating_sub(4);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            writeln!(out, "layer {}: {shown}{more}", piece.layer)?;
        }
        Load::Counts { sources, counts } => {
            let experts = counts.len() / sources.max(&1);
            let mut loads = vec![0_u64; experts];
            for row in counts.chunks(experts.max(1)) {
                loads.iter_mut().zip(row).for_each(|(load, &count)| *load += u64::from(count));
            }
            let mut order: Vec<usize> = (0..experts).collect();
            order.sort_by_key(|&expert| (std::cmp::Reverse(loads[expert]), expert));
            let busiest: Vec<String> = order.iter().take(5).map(|&e| format!("{e}: {}", loads[e])).collect();
            writeln!(
                out,
                "step {}, microbatch {}, layer {}: {} tokens from {}; busiest experts {}",
                piece.step,
                piece.microbatch,
                piece.layer,
                loads.iter().sum::<u64>(),
                plural(*sources, "source"),
                busiest.join(", ")
            )?;
        }
    }
    Ok(())
}

fn convert(args: &ConvertArgs, out: &mut Output<'_>) -> Result<(), CliError> {
    let (info, survey, _) = args.recording.survey()?;
    let (_, experts) = args.recording.describe()?;
    let ranks = match args.ranks.or(info.ranks) {
        Some(ranks) => ranks,
        None => return Err(CliError::Input("--ranks: the recording does not know its ranks".to_owned())),
    };
    let layers = survey.layers.keys().next_back().map_or(1, |&layer| layer as usize + 1);
    // A group that cannot be is refused before there is a file.
    recorded_topology(&info, ranks, experts).map_err(CliError::input)?;
    let mut recording = args.recording.open(&OpenOptions::default())?;
    let output = OutputFile::new(&args.output).map_err(write_error(&args.output))?;
    let file = output.file().map_err(write_error(&args.output))?;
    let grouping = args.sources.grouping(ranks, experts);
    let written = write_uet(&mut *recording, grouping, layers, BufWriter::new(file)).map_err(|error| match error {
        WriteUetError::Write(error) => CliError::Failure(format!("{}: {error}", args.output.display())),
        error => CliError::input(error),
    })?;
    output.finish().map_err(write_error(&args.output))?;
    info.notes.iter().chain(&written.notes).for_each(note);
    writeln!(out, "{}: {}", args.output.display(), plural(written.records as usize, "record"))?;
    Ok(())
}

impl ConvertArgs {
    /// The trace of ours that is written for its own ranks.
    fn trace_as_it_is(&self) -> Result<PathBuf, CliError> {
        if self.ranks.is_some() {
            let reason = "--ranks: v1 and parquet are written for the ranks of the trace: convert to .uet first";
            return Err(CliError::Input(reason.to_owned()));
        }
        self.recording.our_trace()
    }
}

/// Writes a trace of ours, or of a run, as parquet.
fn convert_to_parquet(args: &ConvertArgs, out: &mut Output<'_>) -> Result<(), CliError> {
    let trace = args.trace_as_it_is()?;
    let output = OutputFile::new(&args.output).map_err(write_error(&args.output))?;
    let file = output.file().map_err(write_error(&args.output))?;
    let written = write_parquet(&trace, BufWriter::new(file)).map_err(|error| match error {
        WriteParquetError::Write(_) => CliError::Failure(format!("{}: {error}", args.output.display())),
        error => CliError::Input(format!("{}: {error}", args.recording.title())),
    })?;
    output.finish().map_err(write_error(&args.output))?;
    written.ending.iter().for_each(note);
    writeln!(out, "{}: {}", args.output.display(), plural(written.records as usize, "record"))?;
    Ok(())
}

/// Writes a trace of ours, or of a run, in UltraEP v1's layout.
fn convert_to_v1(args: &ConvertArgs, out: &mut Output<'_>) -> Result<(), CliError> {
    let trace = args.trace_as_it_is()?;
    let folder = args.output.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let trace_id = args.output.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
    let since_1970 = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let options = V1Options { trace_id, created_unix: since_1970.as_secs_f64(), records_per_chunk: 4096 };
    let written = write_ultra_ep_v1(&trace, folder, &options).map_err(|error| match error {
        ImportError::Io { path, source } if path != trace => write_error(&path)(source),
        error => CliError::input(error),
    })?;
    written.ending.iter().for_each(note);
    note(
        "the v1 layout has no place for sources, policies, digests, top-k ids and what a slot held: they are left out",
    );
    if written.without_plan > 0 {
        note(format!(
            "{} records have no plan: their loads after balancing are those of masters only",
            written.without_plan
        ));
    }
    let manifest = v1_manifest_path(folder, &options.trace_id);
    let (records, chunks) = (written.records as usize, written.chunks as usize);
    writeln!(out, "{}: {} in {}", manifest.display(), plural(records, "record"), plural(chunks, "chunk"))?;
    Ok(())
}
