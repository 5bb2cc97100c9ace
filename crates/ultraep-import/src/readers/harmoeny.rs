//! HarMoEny's folders: a folder a rank, in it a CSV a layer (`moe_layer-N.csv`), in it a row an iteration, whose last column,
//! `expert distribution`, is the list of tokens that the rank routed to every expert. It has the source axis.
//!
//! Times in the other columns, `e2e.csv`, and what lies beside the ranks' folders (`data.json`, use of processors) are not
//! read. A (step, layer) that some rank lacks at its file's end is left out.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ultraep_plan::{MAX_EXPERTS, MAX_RANKS};

use crate::csv_rows::{CsvRows, Separator};
use crate::error::{count, layer_id};
use crate::readers::moe_beyond::read_list;
use crate::{Format, ImportError, OpenOptions, Piece, Place, Problem, Recording, RecordingInfo, Sources};

/// Name of the column that is read.
const COLUMN: &str = "expert distribution";
/// Most counts kept in all: 256 MiB.
const MAX_COUNTS: usize = 1 << 26;

struct Harmoeny {
    info: RecordingInfo,
    /// By (step, layer) in order: counts `[ranks, experts]`.
    ready: std::collections::btree_map::IntoIter<(u64, u32), Vec<u32>>,
    endings: Vec<String>,
}

/// The ranks' folders of a folder that is such a recording, in order of rank.
pub(crate) fn ranks_in(folder: &Path) -> Vec<PathBuf> {
    let folders = (0..MAX_RANKS).map(|rank| folder.join(rank.to_string()));
    folders.take_while(|folder| folder.join("moe_layer-0.csv").is_file() || !layers_in(folder).is_empty()).collect()
}

/// The files of a rank by layer.
fn layers_in(folder: &Path) -> BTreeMap<u32, PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return BTreeMap::new() };
    let paths = entries.filter_map(Result::ok).map(|entry| entry.path());
    paths.filter_map(|path| Some((layer_of(&path)?, path))).collect()
}

fn layer_of(path: &Path) -> Option<u32> {
    let name = path.file_name()?.to_str()?;
    name.strip_prefix("moe_layer-")?.strip_suffix(".csv")?.parse().ok().and_then(|layer| layer_id(layer).ok())
}

pub(crate) fn open(ranks: &[PathBuf], options: &OpenOptions) -> Result<Box<dyn Recording>, ImportError> {
    let mut info = RecordingInfo::new(Format::Harmoeny, Sources::Ranks(ranks.len()));
    let (mut all, mut endings) = (BTreeMap::<(u64, u32), Vec<Option<Vec<u32>>>>::new(), Vec::new());
    let (mut cells, mut experts) = (0, options.experts);
    for (rank, folder) in ranks.iter().enumerate() {
        for (layer, path) in layers_in(folder) {
            let mut file = RankLayer::open(&path, options)?;
            while let Some((step, counts)) = file.next(&mut experts)? {
                cells += counts.len();
                if cells > MAX_COUNTS {
                    let (got, max) = (cells as u64, MAX_COUNTS as u64);
                    return Err(Problem::Limit { what: "counts in all:", got, max }.at(&path, Place::File));
                }
                let of_ranks = all.entry((step, layer)).or_insert_with(|| vec![None; ranks.len()]);
                if of_ranks[rank].replace(counts).is_some() {
                    return Err(file.rows.refuse(Problem::Syntax(format!("iteration {step} twice"))));
                }
            }
            endings.extend(file.rows.ending().map(|ending| format!("{}: {ending}", path.display())));
        }
    }
    info.experts = experts;
    info.notes.push("times beside the counts, and files beside the ranks' folders, are not read".to_owned());
    let before = all.len();
    let whole = all.into_iter().filter_map(|(key, ranks)| {
        let rows: Option<Vec<Vec<u32>>> = ranks.into_iter().collect();
        Some((key, rows?.concat()))
    });
    let ready: BTreeMap<(u64, u32), Vec<u32>> = whole.collect();
    if ready.len() < before {
        endings.push(format!("{} records that some ranks lack are left out", before - ready.len()));
    }
    if ready.is_empty() {
        let folder = ranks.first().and_then(|folder| folder.parent()).unwrap_or(Path::new("."));
        return Err(Problem::Missing("iteration that every rank has".to_owned()).at(folder, Place::File));
    }
    Ok(Box::new(Harmoeny { info, ready: ready.into_iter(), endings }))
}

/// One layer of one rank.
struct RankLayer {
    rows: CsvRows,
    columns: usize,
    iteration: Option<usize>,
    counts: usize,
    read: u64,
}

impl RankLayer {
    fn open(path: &Path, options: &OpenOptions) -> Result<Self, ImportError> {
        let mut rows = CsvRows::open(path, Separator::Byte(b','), options)?;
        let names: Vec<Vec<u8>> = if rows.advance()? {
            (0..rows.len()).map(|column| rows.field(column).trim_ascii().to_vec()).collect()
        } else {
            Vec::new()
        };
        let find = |name: &str| names.iter().position(|found| found == name.as_bytes());
        let Some(counts) = find(COLUMN) else {
            return Err(Problem::Missing(format!("column {COLUMN:?}")).at(path, Place::Line(1)));
        };
        Ok(Self { columns: names.len(), iteration: find("iteration"), counts, rows, read: 0 })
    }

    /// The next iteration and its counts.
    fn next(&mut self, experts: &mut Option<usize>) -> Result<Option<(u64, Vec<u32>)>, ImportError> {
        if !self.rows.advance()? {
            return Ok(None);
        }
        match self.read(experts) {
            Ok(row) => {
                self.read += 1;
                Ok(Some(row))
            }
            Err(problem @ Problem::Differs { what: "number of columns" | "list", .. }) => {
                self.rows.torn_or(problem).map(|()| None)
            }
            Err(problem) => Err(self.rows.refuse(problem)),
        }
    }

    fn read(&self, experts: &mut Option<usize>) -> Result<(u64, Vec<u32>), Problem> {
        if self.rows.len() != self.columns {
            return Err(Problem::differs("number of columns", self.rows.len(), self.columns));
        }
        let mut row = Vec::new();
        read_list(self.rows.field(self.counts), &mut row)?;
        let expected = *experts.get_or_insert(row.len());
        if row.len() != expected {
            return Err(Problem::differs("number of experts", row.len(), expected));
        }
        if row.len() > MAX_EXPERTS {
            return Err(Problem::Limit { what: "experts:", got: row.len() as u64, max: MAX_EXPERTS as u64 });
        }
        let counts = row.into_iter().map(|value| count(value.into())).collect::<Result<Vec<u32>, Problem>>()?;
        let step = match self.iteration.and_then(|column| std::str::from_utf8(self.rows.field(column)).ok()) {
            Some(text) => text.trim().parse().map_err(|_| Problem::differs("iteration", shown(text), "a number"))?,
            None => self.read,
        };
        Ok((step, counts))
    }
}

fn shown(text: &str) -> String {
    text.chars().take(40).collect()
}

impl Recording for Harmoeny {
    fn info(&self) -> &RecordingInfo {
        &self.info
    }

    fn next(&mut self, piece: &mut Piece) -> Result<bool, ImportError> {
        let Some(((step, layer), of_layer)) = self.ready.next() else { return Ok(false) };
        (piece.step, piece.microbatch, piece.layer) = (step, 0, layer);
        let ranks = self.info.ranks.unwrap_or(1);
        *piece.counts(ranks) = of_layer;
        Ok(true)
    }

    fn ending(&self) -> Option<String> {
        if self.endings.is_empty() { None } else { Some(self.endings.join("; ")) }
    }
}
