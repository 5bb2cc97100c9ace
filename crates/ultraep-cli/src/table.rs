//! Tables, written once and shown three ways: fitted to a terminal, as CSV, as Markdown.
//!
//! Every column says in one line what it holds; the lines stand under the table. A terminal that is too narrow leaves out
//! minor columns first and says so; CSV and Markdown hold all of them. CSV holds plain numbers where people see rounded ones.

use comfy_table::{CellAlignment, ContentArrangement, presets};

use crate::error::CliError;
use crate::timing::pretty;

/// A column.
#[derive(Clone, Debug)]
pub(crate) struct Column {
    name: String,
    /// What it holds, in one line; empty where another column's line speaks for it.
    help: String,
    /// Unit of the plain numbers in CSV.
    unit: &'static str,
    is_number: bool,
    /// Left out first where a terminal is too narrow; 0 is never left out.
    rank: u8,
}

impl Column {
    /// Of words.
    pub(crate) fn text(name: impl Into<String>, help: impl Into<String>) -> Self {
        Self { name: name.into(), help: help.into(), unit: "", is_number: false, rank: 0 }
    }

    /// Of numbers, aligned right.
    pub(crate) fn number(name: impl Into<String>, help: impl Into<String>) -> Self {
        Self { is_number: true, ..Self::text(name, help) }
    }

    /// Of times in nanoseconds.
    pub(crate) fn time(name: impl Into<String>, help: impl Into<String>) -> Self {
        Self { unit: "ns", ..Self::number(name, help) }
    }

    /// Of bytes.
    pub(crate) fn bytes(name: impl Into<String>, help: impl Into<String>) -> Self {
        Self { unit: "bytes", ..Self::number(name, help) }
    }

    /// May be left out on a narrow terminal, those of the highest rank first.
    pub(crate) fn minor(self, rank: u8) -> Self {
        Self { rank, ..self }
    }
}

/// A cell: for people, and plain for machines.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cell {
    text: String,
    plain: String,
}

impl Cell {
    /// Words, the same for both.
    pub(crate) fn text(text: impl Into<String>) -> Self {
        let text = text.into();
        Self { plain: text.clone(), text }
    }

    /// A whole number.
    pub(crate) fn count(count: impl ToString) -> Self {
        Self::text(count.to_string())
    }

    /// A number shown with `digits` behind the point.
    pub(crate) fn number(value: f64, digits: usize) -> Self {
        Self { text: format!("{value:.digits$}"), plain: value.to_string() }
    }

    /// A share, shown in percent with one digit behind the point.
    pub(crate) fn share(value: f64) -> Self {
        Self { text: format!("{:.1}%", 100.0 * value), plain: value.to_string() }
    }

    /// A time.
    pub(crate) fn ns(ns: u64) -> Self {
        Self { text: pretty(ns), plain: ns.to_string() }
    }

    /// A size, shown in MiB or GiB.
    pub(crate) fn bytes(bytes: u64) -> Self {
        Self { text: pretty_bytes(bytes), plain: bytes.to_string() }
    }

    /// A value shown in its own way.
    pub(crate) fn shown(text: impl Into<String>, plain: impl ToString) -> Self {
        Self { text: text.into(), plain: plain.to_string() }
    }

    /// What `cell` makes of a value that may be missing: a dash for people, nothing for machines.
    pub(crate) fn maybe<T>(value: Option<T>, cell: impl FnOnce(T) -> Self) -> Self {
        value.map_or_else(|| Self { text: "-".to_owned(), plain: String::new() }, cell)
    }
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self::text(text)
    }
}

/// Bytes for people.
pub(crate) fn pretty_bytes(bytes: u64) -> String {
    const UNITS: [(u64, &str); 3] = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match UNITS.into_iter().find(|&(unit, _)| bytes >= unit) {
        Some((unit, name)) => format!("{:.1} {name}", bytes as f64 / unit as f64),
        None => format!("{bytes} B"),
    }
}

/// A table.
#[derive(Clone, Debug, Default)]
pub(crate) struct Table {
    columns: Vec<Column>,
    rows: Vec<Vec<Cell>>,
    /// First columns that people see only where they change.
    groups: usize,
}

impl Table {
    pub(crate) fn new(columns: impl IntoIterator<Item = Column>) -> Self {
        Self { columns: columns.into_iter().collect(), ..Self::default() }
    }

    /// The first `columns` columns are shown to people only in rows where one of them differs from the row before.
    pub(crate) fn grouped_by(self, columns: usize) -> Self {
        Self { groups: columns, ..self }
    }

    /// Adds a row, a cell for each column.
    pub(crate) fn row<C: Into<Cell>>(&mut self, cells: impl IntoIterator<Item = C>) {
        let cells: Vec<Cell> = cells.into_iter().map(Into::into).collect();
        debug_assert_eq!(cells.len(), self.columns.len(), "a cell for each column");
        self.rows.push(cells);
    }

    /// What people see in a row: repeated groups are blank.
    fn shown(&self, row: usize) -> Vec<&str> {
        let cells = &self.rows[row];
        let same = |column: usize| row > 0 && self.rows[row - 1][column].text == cells[column].text;
        let repeats = (0..self.groups).take_while(|&column| same(column)).count();
        let blank = if repeats == self.groups { repeats } else { 0 };
        cells.iter().enumerate().map(|(column, cell)| if column < blank { "" } else { cell.text.as_str() }).collect()
    }

    /// For a terminal of `width` columns, with what the columns hold below.
    pub(crate) fn for_terminal(&self, width: Option<usize>) -> String {
        let kept = self.fitting(width);
        let mut table = comfy_table::Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED);
        table.set_header(kept.iter().map(|&column| self.columns[column].name.as_str()));
        for row in 0..self.rows.len() {
            let cells = self.shown(row);
            table.add_row(kept.iter().map(|&column| cells[column]));
        }
        for (column, &kept) in table.column_iter_mut().zip(&kept) {
            if self.columns[kept].is_number {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        if let Some(width) = width {
            table.set_content_arrangement(ContentArrangement::Dynamic);
            table.set_width(u16::try_from(width).unwrap_or(u16::MAX));
        }
        let mut text = format!("{table}\n");
        for line in self.explained(&kept, width) {
            text.push_str(&line);
            text.push('\n');
        }
        text
    }

    /// Columns that fit: minor ones are left out, the least needed first, the last of equals first.
    fn fitting(&self, width: Option<usize>) -> Vec<usize> {
        let mut kept: Vec<usize> = (0..self.columns.len()).collect();
        let Some(width) = width else { return kept };
        let widest = |column: usize| {
            let cells = self.rows.iter().map(|row| row[column].text.as_str());
            let names = self.columns[column].name.lines();
            cells.chain(names).map(|text| text.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.columns.len()).map(widest).collect();
        while kept.iter().map(|&column| widths[column] + 3).sum::<usize>() + 1 > width {
            let least = kept.iter().enumerate().filter(|(_, column)| self.columns[**column].rank > 0);
            let Some((at, _)) = least.max_by_key(|&(at, &column)| (self.columns[column].rank, at)) else { break };
            kept.remove(at);
        }
        kept
    }

    fn explained(&self, kept: &[usize], width: Option<usize>) -> Vec<String> {
        let one_line = |name: &str| name.replace('\n', " ");
        let explained = || kept.iter().map(|&column| &self.columns[column]).filter(|column| !column.help.is_empty());
        let longest = explained().map(|column| column.name.chars().count()).max().unwrap_or(0);
        let width = width.unwrap_or(MOST_WIDTH).min(MOST_WIDTH);
        let mut lines = Vec::new();
        for column in explained() {
            let wrapped = wrap(&column.help, width.saturating_sub(longest + 4).max(20));
            for (at, line) in wrapped.into_iter().enumerate() {
                let name = if at == 0 { one_line(&column.name) } else { String::new() };
                lines.push(format!("  {name:<longest$}  {line}"));
            }
        }
        let left_out: Vec<String> =
            (0..self.columns.len()).filter(|c| !kept.contains(c)).map(|c| one_line(&self.columns[c].name)).collect();
        if !left_out.is_empty() {
            let text = format!("left out to fit {width} columns: {} (--format csv or md has all)", left_out.join(", "));
            lines.extend(wrap(&text, width));
        }
        lines
    }

    /// Comma-separated values with a header, all columns.
    pub(crate) fn to_csv(&self) -> Result<String, CliError> {
        let mut writer = csv::Writer::from_writer(Vec::new());
        let name = |column: &Column| match column.unit {
            "" => column.name.replace('\n', " "),
            unit => format!("{} ({unit})", column.name.replace('\n', " ")),
        };
        writer.write_record(self.columns.iter().map(name)).map_err(CliError::failure)?;
        for row in &self.rows {
            writer.write_record(row.iter().map(|cell| &cell.plain)).map_err(CliError::failure)?;
        }
        let bytes = writer.into_inner().map_err(CliError::failure)?;
        String::from_utf8(bytes).map_err(CliError::failure)
    }

    /// A Markdown table with what the columns hold below, all columns.
    pub(crate) fn to_markdown(&self) -> String {
        let escape = |text: &str| text.replace('|', "\\|").replace('\n', " ");
        let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
        let mut text = String::from("\n");
        text.push_str(&line(self.columns.iter().map(|column| escape(&column.name)).collect()));
        text.push_str(&line(
            self.columns.iter().map(|c| if c.is_number { "---:" } else { "---" }.to_owned()).collect(),
        ));
        for row in 0..self.rows.len() {
            text.push_str(&line(self.shown(row).into_iter().map(escape).collect()));
        }
        text.push('\n');
        for column in self.columns.iter().filter(|column| !column.help.is_empty()) {
            text.push_str(&format!("* {}: {}\n", escape(&column.name), column.help));
        }
        text.push('\n');
        text
    }
}

/// Longest line under a table.
const MOST_WIDTH: usize = 100;

/// Lines of at most `width` characters, broken between words.
pub(crate) fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let line = lines.last_mut().expect("there is a first line");
        if line.is_empty() {
            line.push_str(word);
        } else if line.chars().count() + 1 + word.chars().count() <= width {
            line.push(' ');
            line.push_str(word);
        } else {
            lines.push(word.to_owned());
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut table = Table::new([
            Column::text("policy", "which policy planned"),
            Column::number("imbalance", "largest over mean rank load").minor(1),
            Column::time("predicted", "forward of a layer").minor(2),
            Column::number("of ideal", "share of ideal's throughput"),
        ])
        .grouped_by(1);
        table.row([Cell::text("none | masters"), Cell::number(2.0 / 3.0, 3), Cell::ns(1_234_567), Cell::share(0.5)]);
        table.row([Cell::text("none | masters"), Cell::number(1.0, 3), Cell::ns(999), Cell::maybe(None, Cell::share)]);
        table
    }

    #[test]
    fn a_terminal_gets_what_fits_and_hears_of_the_rest() {
        let wide = table().for_terminal(None);
        assert!(
            wide.contains("1.23 ms") && wide.contains("50.0%") && wide.contains("  policy     which policy planned")
        );
        assert_eq!(wide.matches("none | masters").count(), 1, "a repeated group is shown once:\n{wide}");
        let narrow = table().for_terminal(Some(44));
        assert!(narrow.lines().all(|line| line.chars().count() <= 44), "{narrow}");
        assert!(!narrow.contains("1.23 ms") && narrow.contains("left out to fit 44 columns: predicted"), "{narrow}");
        assert!(narrow.contains("0.667"), "the column needed more stays:\n{narrow}");
    }

    #[test]
    fn csv_has_plain_numbers_and_repeats_groups() {
        let csv = table().to_csv().unwrap();
        let lines: Vec<&str> = csv.lines().collect();
        assert_eq!(lines[0], "policy,imbalance,predicted (ns),of ideal");
        assert_eq!(lines[1], format!("none | masters,{},1234567,0.5", 2.0 / 3.0));
        assert_eq!(lines[2], "none | masters,1,999,");
    }

    #[test]
    fn markdown_escapes_its_bars() {
        let text = table().to_markdown();
        assert!(text.contains("| none \\| masters | 0.667 | 1.23 ms | 50.0% |\n|  | 1.000 | 999 ns | - |\n"), "{text}");
        assert!(text.contains("| --- | ---: |") && text.contains("* predicted: forward of a layer"), "{text}");
    }

    #[test]
    fn sizes_are_for_people() {
        assert_eq!(
            [0, 1023, 1024, 3 << 20, 5 << 30].map(pretty_bytes),
            ["0 B", "1023 B", "1.0 KiB", "3.0 MiB", "5.0 GiB"]
        );
    }
}
