//! Text tables: matrices with or without names of columns and rows, and tables with a row a (layer, expert) or a choice.
//!
//! ```text
//! matrix      10,20,30          rows = source ranks, columns = experts; `;`, tab and spaces separate as well
//! named       expert_0,expert_1,expert_2     a first line of names that end in the expert's number, in any order
//! indexed     ,0,1,2            a first column without a name (pandas) numbers the rows and is left out
//! keyed       layer,rank,0,1,2  columns step, layer, rank before the experts say which row it is
//! long        layer,expert,count             a row an expert; step and rank where they are there
//! choices     layer,expert      a row a choice: totals, top-k unknown
//! ```
//!
//! A column that is none of these is refused by its name: it may be anything.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ultraep_plan::{MAX_EXPERTS, MAX_RANKS};

use crate::array::{Array, Kind};
use crate::csv_rows::{CsvRows, Separator};
use crate::error::{expert_below, layer_id};
use crate::numbers::whole_text;
use crate::readers::arrays;
use crate::{Format, ImportError, OpenOptions, Piece, Place, Problem, Reading, Recording, RecordingInfo, Sources};

/// Most counts kept over all steps, layers and ranks: 256 MiB.
const MAX_COUNTS: usize = 1 << 26;
/// Fewest columns of a first line `0,1,2,..` that is taken for names.
const MIN_NUMBERED: usize = 4;

/// What a column holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Step,
    Layer,
    Rank,
    Expert,
    Count,
    /// The count of this expert.
    Of(usize),
    /// A row's number, a token, a gate: nothing that is counted.
    Ignored,
}

/// Whether a first line can begin a table that is read here.
pub(crate) fn is_table(first_line: &[u8]) -> bool {
    let separator = Separator::of(first_line);
    let fields = split(first_line, separator);
    match roles(&fields) {
        Ok(Some(_)) => true,
        Ok(None) => fields.iter().all(|field| looks_like_number(field)),
        Err(_) => false,
    }
}

/// What is wrong with a first line of names, in words.
pub(crate) fn refusal(first_line: &[u8]) -> Option<String> {
    match roles(&split(first_line, Separator::of(first_line))) {
        Err(Problem::Differs { what, got, expected }) => Some(format!("{what} {got}: expected {expected}")),
        _ => None,
    }
}

/// The fields of a line, without quotes.
fn split(line: &[u8], separator: Separator) -> Vec<Vec<u8>> {
    let mut reader = csv::ReaderBuilder::new();
    let byte = match separator {
        Separator::Byte(byte) => byte,
        Separator::Spaces => b' ',
    };
    let mut reader = reader.has_headers(false).flexible(true).delimiter(byte).from_reader(line.trim_ascii_end());
    let mut row = csv::ByteRecord::new();
    let read = reader.read_byte_record(&mut row).unwrap_or(false);
    let fields = row.iter().map(|field| field.trim_ascii().to_vec());
    let fields = fields.filter(|field| separator != Separator::Spaces || !field.is_empty());
    if read { fields.collect() } else { Vec::new() }
}

fn looks_like_number(field: &[u8]) -> bool {
    let field = field.trim_ascii();
    let text = field.to_ascii_lowercase();
    matches!(text.as_slice(), b"nan" | b"inf" | b"-inf" | b"")
        || field.first().is_some_and(|b| b"+-.0123456789".contains(b))
}

/// Roles of the columns by their names; `None` where the line is no line of names.
fn roles(fields: &[Vec<u8>]) -> Result<Option<Vec<Role>>, Problem> {
    let is_numbered = |fields: &[Vec<u8>]| fields.iter().enumerate().all(|(i, f)| *f == i.to_string().into_bytes());
    let has_index = fields.len() > 1 && fields[0].is_empty() && is_numbered(&fields[1..]);
    let has_names =
        fields.iter().any(|field| field.first().is_some_and(|b| b.is_ascii_alphabetic()) && !looks_like_number(field));
    if !has_index && !has_names {
        return Ok(None);
    }
    fields.iter().enumerate().map(|(column, field)| role(column, field)).collect::<Result<Vec<_>, _>>().map(Some)
}

fn role(column: usize, field: &[u8]) -> Result<Role, Problem> {
    let name = String::from_utf8_lossy(&field[..field.len().min(60)]).into_owned();
    let plain: String = name.chars().filter(char::is_ascii_alphanumeric).collect::<String>().to_ascii_lowercase();
    Ok(match plain.as_str() {
        "step" | "iteration" | "iter" | "forwardpass" | "forwardpassid" => Role::Step,
        "layer" | "layerid" | "layeridx" | "layerindex" => Role::Layer,
        "rank" | "rankid" | "eprank" | "source" | "sourcerank" => Role::Rank,
        "expert" | "expertid" | "expertidx" | "expertindex" => Role::Expert,
        "count" | "counts" | "tokens" | "tokencount" | "numtokens" | "load" | "loads" => Role::Count,
        "index" | "token" | "tokenid" | "tokenidx" | "position" | "weight" | "gate" | "score" => Role::Ignored,
        "" if column == 0 => Role::Ignored,
        _ if plain.starts_with("unnamed") && column == 0 => Role::Ignored,
        _ => {
            let digits = plain.bytes().rev().take_while(u8::is_ascii_digit).count();
            let (word, number) = plain.split_at(plain.len() - digits);
            match number.parse() {
                Ok(number) if word.is_empty() || word.starts_with('e') => Role::Of(number),
                _ => {
                    let allowed = "step, layer, rank, expert, count, or names that end in an expert's number";
                    return Err(Problem::differs("column", format!("{name:?}"), allowed));
                }
            }
        }
    })
}

/// Opens a table of any form.
pub(crate) fn open(path: &Path, first_line: &[u8], options: &OpenOptions) -> Result<Box<dyn Recording>, ImportError> {
    let separator = Separator::of(first_line);
    let fields = split(first_line, separator);
    let refuse = |problem: Problem| problem.at(path, Place::Line(1));
    let Some(roles) = roles(&fields).map_err(refuse)? else { return open_matrix(path, separator, None, options) };
    if roles.contains(&Role::Expert) || roles.iter().any(|r| matches!(r, Role::Step | Role::Layer | Role::Rank)) {
        return open_keyed(path, separator, roles, options);
    }
    if !roles.iter().any(|role| matches!(role, Role::Of(_))) {
        return Err(refuse(Problem::Missing("column of experts".to_owned())));
    }
    open_matrix(path, separator, Some(roles), options)
}

/// A matrix: every row a source rank.
fn open_matrix(
    path: &Path,
    separator: Separator,
    roles: Option<Vec<Role>>,
    options: &OpenOptions,
) -> Result<Box<dyn Recording>, ImportError> {
    let mut rows = CsvRows::open(path, separator, options)?;
    let has_names = roles.is_some() && rows.advance()?;
    let order = roles.as_deref().map(expert_columns).transpose().map_err(|problem| rows.refuse(problem))?;
    let (mut values, mut columns, mut count) = (Vec::new(), roles.as_ref().map(Vec::len), 0_u64);
    let mut has_decimals = false;
    while rows.advance()? {
        let expected = *columns.get_or_insert(rows.len());
        if rows.len() != expected {
            let words = format!("row {count} (from 0) has {} columns", rows.len());
            return Err(rows.refuse(Problem::Syntax(format!("{words}: allowed are {expected}, as in the rows before"))));
        }
        let of_row = order.as_ref().map_or(expected, Vec::len);
        if of_row > MAX_EXPERTS {
            let (got, max) = (of_row as u64, MAX_EXPERTS as u64);
            return Err(rows.refuse(Problem::Limit { what: "columns (experts):", got, max }));
        }
        if values.len() + of_row > MAX_COUNTS {
            let (got, max) = ((values.len() + of_row) as u64, MAX_COUNTS as u64);
            return Err(rows.refuse(Problem::Limit { what: "numbers in all:", got, max }));
        }
        for expert in 0..of_row {
            let field = rows.field(order.as_ref().map_or(expert, |order| order[expert]));
            has_decimals |= field.contains(&b'.');
            let place = |problem: Problem| Problem::Syntax(format!("row {count}, column {expert} (from 0): {problem}"));
            let value = whole_text(field).map_err(|problem| rows.refuse(place(problem)))?;
            values.push(value);
        }
        count += 1;
    }
    if rows.ending().is_some() {
        // A matrix without its last ranks is another matrix.
        return Err(rows.refuse(Problem::Syntax("the gzip stream is cut off".to_owned())));
    }
    let ends_open = rows.ends_open();
    let width = order.as_ref().map_or(columns.unwrap_or(0), Vec::len);
    let mut notes = Vec::new();
    let is_numbered = !has_names && width >= MIN_NUMBERED && count > 1 && options.reading != Some(Reading::Counts);
    if is_numbered && numbers_columns(&values, width) {
        values.drain(..width);
        count -= 1;
        notes.push("the first line 0, 1, 2, .. is taken for the names of the columns; --as counts takes it for counts");
    }
    let kind = if has_decimals { Kind::Floats } else { Kind::Integers };
    let recording = arrays::open(Array::whole(vec![count, width as u64], kind, values), path, options)?;
    if ends_open {
        notes.push("the last line has no line end: if the file was cut, its last number may be short");
    }
    Ok(arrays::noted(recording, notes))
}

/// Whether the first row only numbers the columns: 0, 1, 2, .. and the next row does not go on counting.
fn numbers_columns(values: &[i32], width: usize) -> bool {
    let counts_up = |row: &[i32], from: usize| row.iter().enumerate().all(|(i, &v)| v as usize == from + i);
    counts_up(&values[..width], 0) && !counts_up(&values[width..2 * width], width)
}

/// The column of every expert.
fn expert_columns(roles: &[Role]) -> Result<Vec<usize>, Problem> {
    let mut columns = BTreeMap::new();
    for (column, role) in roles.iter().enumerate() {
        if let Role::Of(expert) = role
            && columns.insert(*expert, column).is_some()
        {
            return Err(Problem::Syntax(format!("two columns of expert {expert}")));
        }
    }
    let count = columns.len();
    match columns.keys().enumerate().find(|(expert, named)| expert != *named) {
        Some((expert, _)) => Err(Problem::Missing(format!("column of expert {expert}, though {count} are named"))),
        None => Ok(columns.into_values().collect()),
    }
}

/// A table whose rows say what they are of.
struct Keyed {
    info: RecordingInfo,
    path: PathBuf,
    rows: Option<(CsvRows, Columns)>,
    ready: std::collections::btree_map::IntoIter<(u64, u32), Vec<Vec<u32>>>,
    sources: usize,
    experts: Option<usize>,
    endings: Vec<String>,
}

/// Where a row's parts are.
struct Columns {
    width: usize,
    step: Option<usize>,
    layer: Option<usize>,
    rank: Option<usize>,
    expert: Option<usize>,
    count: Option<usize>,
    /// By expert, where a row has all of them.
    experts: Vec<usize>,
}

fn open_keyed(
    path: &Path,
    separator: Separator,
    roles: Vec<Role>,
    options: &OpenOptions,
) -> Result<Box<dyn Recording>, ImportError> {
    let refuse = |problem: Problem| problem.at(path, Place::Line(1));
    let find = |wanted: Role| match roles.iter().filter(|&&role| role == wanted).count() {
        0 | 1 => Ok(roles.iter().position(|&role| role == wanted)),
        _ => Err(refuse(Problem::Syntax(format!("two columns of {wanted:?}").to_lowercase()))),
    };
    let columns = Columns {
        width: roles.len(),
        step: find(Role::Step)?,
        layer: find(Role::Layer)?,
        rank: find(Role::Rank)?,
        expert: find(Role::Expert)?,
        count: find(Role::Count)?,
        experts: expert_columns(&roles).map_err(refuse)?,
    };
    if columns.expert.is_some() != columns.experts.is_empty() {
        return Err(refuse(Problem::Syntax("a column expert, or a column for each expert".to_owned())));
    }
    let mut rows = CsvRows::open(path, separator, options)?;
    rows.advance()?;
    // How many ranks there are is told before reading.
    let sources = match columns.rank {
        Some(column) => count_ranks(path, separator, column, roles.len(), options)?,
        None => 1,
    };
    let kind = if columns.rank.is_some() { Sources::Ranks(sources) } else { Sources::Totals };
    let mut info = RecordingInfo::new(Format::LongTable, kind);
    info.experts = options.experts.or((!columns.experts.is_empty()).then_some(columns.experts.len()));
    if columns.expert.is_some() && columns.count.is_none() {
        info.notes.push("a row a choice of an expert: totals, top-k is not recorded".to_owned());
    }
    let (ready, rows) = (BTreeMap::new().into_iter(), Some((rows, columns)));
    Ok(Box::new(Keyed {
        experts: info.experts,
        info,
        path: path.to_owned(),
        rows,
        ready,
        sources,
        endings: Vec::new(),
    }))
}

fn count_ranks(
    path: &Path,
    separator: Separator,
    column: usize,
    width: usize,
    options: &OpenOptions,
) -> Result<usize, ImportError> {
    let mut rows = CsvRows::open(path, separator, &options.unshown())?;
    rows.advance()?;
    let mut ranks = 0;
    while rows.advance()? {
        if rows.len() == width {
            ranks = ranks.max(rank_of(rows.field(column)).map_err(|problem| rows.refuse(problem))? + 1);
        }
    }
    Ok(ranks.max(1))
}

fn rank_of(field: &[u8]) -> Result<usize, Problem> {
    match whole_text(field)? {
        rank if (0..MAX_RANKS as i32).contains(&rank) => Ok(rank as usize),
        rank => Err(Problem::differs("rank", rank, format!("0 to {}", MAX_RANKS - 1))),
    }
}

impl Columns {
    /// Step, layer and rank of a row.
    fn key(&self, rows: &CsvRows) -> Result<(u64, u32, usize), Problem> {
        let number = |column: Option<usize>| match column.map(|column| whole_text(rows.field(column))).transpose()? {
            Some(-1) => Err(Problem::differs("key", -1, "0 and up")),
            number => Ok(number.map_or(0, |number| number as u64)),
        };
        let rank = self.rank.map(|column| rank_of(rows.field(column))).transpose()?;
        Ok((number(self.step)?, layer_id(number(self.layer)?)?, rank.unwrap_or(0)))
    }
}

impl Keyed {
    /// Reads the whole table into counts.
    fn read(&mut self, mut rows: CsvRows, columns: &Columns) -> Result<(), ImportError> {
        let mut all: BTreeMap<(u64, u32), Vec<Vec<u32>>> = BTreeMap::new();
        let mut cells = 0;
        while rows.advance()? {
            let (got, expected) = (rows.len(), columns.width);
            if got != expected {
                rows.torn_or(Problem::differs("number of columns", got, expected))?;
                break;
            }
            if rows.field(expected - 1).is_empty() {
                rows.torn_or(Problem::Missing("number in the last column".to_owned()))?;
                break;
            }
            let added = self.add_row(&rows, columns, &mut all).map_err(|problem| rows.refuse(problem))?;
            cells += added;
            if cells > MAX_COUNTS {
                let (got, max) = (cells as u64, MAX_COUNTS as u64);
                return Err(rows.refuse(Problem::Limit { what: "counts in all:", got, max }));
            }
        }
        self.endings.extend(rows.ending());
        if self.endings.is_empty() && rows.ends_open() {
            self.endings
                .push("the last line has no line end: if the file was cut, its last number may be short".to_owned());
        }
        self.ready = all.into_iter();
        Ok(())
    }

    /// Adds a row; how much longer the counts are.
    fn add_row(
        &self,
        rows: &CsvRows,
        columns: &Columns,
        all: &mut BTreeMap<(u64, u32), Vec<Vec<u32>>>,
    ) -> Result<usize, Problem> {
        let (step, layer, rank) = columns.key(rows)?;
        let of_layer = all.entry((step, layer)).or_insert_with(|| vec![Vec::new(); self.sources]);
        let Some(counts) = of_layer.get_mut(rank) else {
            return Err(Problem::differs("rank", rank, format!("below {}", self.sources)));
        };
        let before = counts.len();
        let mut add = |expert: usize, tokens: i32| -> Result<(), Problem> {
            if expert >= counts.len() {
                counts.resize(expert + 1, 0);
            }
            let sum = i128::from(counts[expert]) + i128::from(tokens);
            counts[expert] = crate::error::count(if tokens < 0 { tokens.into() } else { sum })?;
            Ok(())
        };
        match columns.expert {
            Some(column) => {
                let expert = usize::from(expert_below(i64::from(whole_text(rows.field(column))?), self.experts)?);
                add(expert, columns.count.map_or(Ok(1), |column| whole_text(rows.field(column)))?)?;
            }
            None => {
                for (expert, &column) in columns.experts.iter().enumerate() {
                    add(expert, whole_text(rows.field(column))?)?;
                }
            }
        }
        Ok(counts.len() - before)
    }
}

impl Recording for Keyed {
    fn info(&self) -> &RecordingInfo {
        &self.info
    }

    fn next(&mut self, piece: &mut Piece) -> Result<bool, ImportError> {
        if let Some((rows, columns)) = self.rows.take() {
            self.read(rows, &columns)?;
        }
        let Some(((step, layer), rows)) = self.ready.next() else { return Ok(false) };
        (piece.step, piece.microbatch, piece.layer) = (step, 0, layer);
        let experts = rows.iter().map(Vec::len).max().unwrap_or(0).max(self.experts.unwrap_or(0));
        if experts > MAX_EXPERTS {
            let (got, max) = (experts as u64, MAX_EXPERTS as u64);
            return Err(Problem::Limit { what: "experts:", got, max }.at(&self.path, Place::File));
        }
        let counts = piece.counts(rows.len());
        for row in &rows {
            counts.extend_from_slice(row);
            counts.resize(counts.len() + experts - row.len(), 0);
        }
        Ok(true)
    }

    fn ending(&self) -> Option<String> {
        if self.endings.is_empty() { None } else { Some(self.endings.join("; ")) }
    }
}
