//! Megatron-core's `mcore_ep_load_dump_v1`: a file a rank, `mcore_ep_loads_rank{r}_{capture}.npz`, with `loads`
//! `[layers, forwards, P]`: what that source rank routed to every physical expert; `layer_numbers` `[layers]`, and
//! `forward_counts` `[layers]`: how many forwards of a layer were recorded (the rest of its rows is no load).
//!
//! The files hold no map from physical to logical experts. Where no expert is redundant the two are the same, which only the
//! user can know: `--experts P` says so, and without it the recording is refused. Forwards are steps.

use std::path::{Path, PathBuf};

use ultraep_plan::{MAX_EXPERTS, MAX_RANKS};

use crate::archive::Archive;
use crate::array::{Array, Numbers};
use crate::error::layer_id;
use crate::npy;
use crate::{Format, ImportError, OpenOptions, Piece, Place, Problem, Recording, RecordingInfo, Sources};

/// `dump_version`.
const VERSION: &str = "mcore_ep_load_dump_v1";
/// Largest array, in bytes.
const MAX_ARRAY_BYTES: u64 = 256 << 20;
/// Most counts kept over all ranks: 1 GiB.
const MAX_COUNTS: u64 = 1 << 28;

struct Dump {
    info: RecordingInfo,
    ranks: Vec<RankDump>,
    layers: Vec<u32>,
    forwards: Vec<u64>,
    experts: usize,
    /// Forward and layer to give out next.
    next: (u64, usize),
}

/// One rank's file.
struct RankDump {
    path: PathBuf,
    rank: usize,
    ranks: usize,
    capture: String,
    shape: [u64; 3],
    loads: Vec<i32>,
    layers: Vec<u32>,
    forwards: Vec<u64>,
}

/// Whether an archive is such a file.
pub(crate) fn is_dump(archive: &Archive) -> bool {
    let has = |entry: &str| archive.names().any(|name| name == entry);
    has("dump_version.npy") && has("forward_counts.npy") && has("loads.npy")
}

/// Opens the files of all ranks of a recording.
pub(crate) fn open_ranks(paths: &[PathBuf], options: &OpenOptions) -> Result<Box<dyn Recording>, ImportError> {
    let mut ranks: Vec<RankDump> = Vec::new();
    let mut counts = 0;
    for path in paths {
        let rank = RankDump::open(path, options)?;
        let refuse = |problem: Problem| problem.at(path, Place::File);
        counts += rank.loads.len() as u64;
        if counts > MAX_COUNTS {
            return Err(refuse(Problem::Limit { what: "counts of all ranks:", got: counts, max: MAX_COUNTS }));
        }
        if let Some(first) = ranks.first() {
            if rank.capture != first.capture {
                return Err(refuse(Problem::differs("capture", &rank.capture, &first.capture)));
            }
            if (rank.ranks, rank.shape[0], rank.shape[2]) != (first.ranks, first.shape[0], first.shape[2])
                || rank.layers != first.layers
            {
                return Err(refuse(Problem::differs(
                    "shape",
                    format!("{:?}", rank.shape),
                    format!("{:?}", first.shape),
                )));
            }
            if let Some(other) = ranks.iter().find(|other| other.rank == rank.rank) {
                let first = other.path.display().to_string();
                return Err(refuse(Problem::differs("ep_rank", rank.rank, format!("another than in {first}"))));
            }
        }
        ranks.push(rank);
    }
    ranks.sort_by_key(|rank| rank.rank);
    let Some(first) = ranks.first() else {
        return Err(ImportError::Unknown { path: PathBuf::new(), reason: "no files".to_owned() });
    };
    let refuse = |problem: Problem| problem.at(&first.path, Place::File);
    if ranks.len() != first.ranks {
        return Err(refuse(Problem::differs(
            "files of ranks:",
            ranks.len(),
            format!("{}, as ep_size says", first.ranks),
        )));
    }
    let physical = first.shape[2] as usize; // checked to be at most MAX_EXPERTS
    if options.experts != Some(physical) {
        return Err(refuse(Problem::Ambiguous(format!(
            "{physical} physical experts and no map to logical ones: where none is redundant, --experts {physical} says so"
        ))));
    }
    let mut info = RecordingInfo::new(Format::McoreLoadDump, Sources::Ranks(ranks.len()));
    info.experts = Some(physical);
    info.notes.push("physical experts are taken as logical ones, as --experts says; forwards are steps".to_owned());
    let layers = first.layers.clone();
    let least = |layer: usize| ranks.iter().map(|rank| rank.forwards[layer]).min().unwrap_or(0);
    let forwards: Vec<u64> = (0..layers.len()).map(least).collect();
    if ranks.iter().any(|rank| rank.forwards != forwards) {
        info.notes.push("forwards that some ranks lack are left out".to_owned());
    }
    Ok(Box::new(Dump { info, ranks, layers, forwards, experts: physical, next: (0, 0) }))
}

impl RankDump {
    fn open(path: &Path, options: &OpenOptions) -> Result<Self, ImportError> {
        let mut archive = Archive::open(path, options)?;
        let version = read_text(&mut archive, "dump_version")?;
        if version != VERSION {
            return Err(archive.refuse("dump_version", Problem::differs("version", version, VERSION)));
        }
        let capture = read_text(&mut archive, "capture_id")?;
        let (rank, ranks) = (read_one(&mut archive, "ep_rank")?, read_one(&mut archive, "ep_size")?);
        if !(1..=MAX_RANKS).contains(&ranks) || rank >= ranks {
            return Err(archive
                .refuse("ep_rank", Problem::differs("rank", rank, format!("one of {ranks}, at most {MAX_RANKS}"))));
        }
        let (shape, loads) = read_array(&mut archive, "loads")?;
        let &[layers, forwards, physical] = shape.as_slice() else {
            let got = format!("{shape:?}");
            return Err(archive.refuse("loads", Problem::differs("shape", got, "[layers, forwards, physical experts]")));
        };
        if physical == 0 || physical > MAX_EXPERTS as u64 {
            let max = MAX_EXPERTS as u64;
            return Err(archive.refuse("loads", Problem::Limit { what: "experts, at least 1:", got: physical, max }));
        }
        let mut numbers = |name: &'static str, most: u64| -> Result<Vec<u64>, ImportError> {
            let (shape, values) = read_array(&mut archive, name)?;
            let bad = values.iter().find(|&&value| value < 0 || value as u64 > most);
            let problem = match bad {
                Some(&value) => Problem::differs("value", value, format!("0 to {most}")),
                None if shape != [layers] => Problem::differs("shape", format!("{shape:?}"), format!("[{layers}]")),
                None => return Ok(values.into_iter().map(|value| value as u64).collect()),
            };
            Err(archive.refuse(name, problem))
        };
        let layer_numbers = numbers("layer_numbers", ultraep_trace::MAX_LAYERS as u64 - 1)?;
        let forward_counts = numbers("forward_counts", forwards)?;
        let layers = layer_numbers.into_iter().map(layer_id).collect::<Result<Vec<u32>, _>>();
        let layers = layers.map_err(|problem| problem.at(path, Place::Key("layer_numbers".to_owned())))?;
        if layers.iter().enumerate().any(|(at, layer)| layers[..at].contains(layer)) {
            return Err(Problem::Syntax("a layer twice".to_owned()).at(path, Place::Key("layer_numbers".to_owned())));
        }
        let shape = [shape[0], shape[1], shape[2]];
        Ok(Self { path: path.to_owned(), rank, ranks, capture, shape, loads, layers, forwards: forward_counts })
    }
}

fn read_text(archive: &mut Archive, name: &str) -> Result<String, ImportError> {
    let bytes = archive.read(&format!("{name}.npy"), 1 << 16)?;
    let mut rest = bytes.as_slice();
    let read = npy::read_header(&mut rest).and_then(|header| npy::read_text(&mut rest, &header, 1 << 10));
    read.map_err(|problem| archive.refuse(name, problem))
}

fn read_one(archive: &mut Archive, name: &str) -> Result<usize, ImportError> {
    let (_, values) = read_array(archive, name)?;
    match values.as_slice() {
        &[value] if value >= 0 => Ok(value as usize),
        _ => Err(archive.refuse(name, Problem::differs("array", format!("{} numbers", values.len()), "one number"))),
    }
}

fn read_array(archive: &mut Archive, name: &str) -> Result<(Vec<u64>, Vec<i32>), ImportError> {
    let bytes = archive.read(&format!("{name}.npy"), MAX_ARRAY_BYTES)?;
    let mut rest = bytes.as_slice();
    let header = npy::read_header(&mut rest).map_err(|problem| archive.refuse(name, problem))?;
    let array = Array::of_bytes(&header, rest);
    let array = array.map_err(|(index, problem)| archive.refuse(&format!("{name} {index:?}"), problem))?;
    match array.numbers {
        Numbers::Memory { values, .. } => Ok((array.shape, values)),
        Numbers::Stream { .. } => Ok((array.shape, Vec::new())),
    }
}

impl Recording for Dump {
    fn info(&self) -> &RecordingInfo {
        &self.info
    }

    fn next(&mut self, piece: &mut Piece) -> Result<bool, ImportError> {
        let last = self.forwards.iter().copied().max().unwrap_or(0);
        loop {
            let (forward, layer) = self.next;
            if forward >= last {
                return Ok(false);
            }
            self.next = if layer + 1 >= self.layers.len() { (forward + 1, 0) } else { (forward, layer + 1) };
            if self.layers.is_empty() || forward >= self.forwards[layer] {
                continue;
            }
            (piece.step, piece.microbatch, piece.layer) = (forward, 0, self.layers[layer]);
            let counts = piece.counts(self.ranks.len());
            for rank in &self.ranks {
                let start = (layer * rank.shape[1] as usize + forward as usize) * self.experts;
                for (expert, &value) in rank.loads[start..start + self.experts].iter().enumerate() {
                    let refuse = |problem: Problem| {
                        problem.at(&rank.path, Place::Key(format!("loads [{layer}, {forward}, {expert}]")))
                    };
                    let value = u32::try_from(value).map_err(|_| refuse(Problem::Count { got: value.to_string() }))?;
                    counts.push(value);
                }
            }
            return Ok(true);
        }
    }
}
