//! Where results go: prose, tables and JSON, in the format that the user asked for.
//!
//! Commands write prose with `writeln!` and hand over tables. With `--format csv` standard output holds tables alone and
//! prose goes to standard error, so that a spreadsheet can read what comes out.

use std::io::{self, Write};

use serde::Serialize;

use crate::error::CliError;
use crate::table::Table;

/// How tables are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum TableFormat {
    /// For a terminal
    #[default]
    Table,
    /// Comma-separated values: plain numbers, all columns
    Csv,
    /// Markdown, all columns
    Md,
}

/// Standard output of one command.
pub(crate) struct Output<'a> {
    stdout: &'a mut dyn Write,
    format: TableFormat,
    /// Columns of the terminal; `None` where nothing limits a line.
    width: Option<usize>,
    /// Tables written so far: CSV puts an empty line between two.
    tables: usize,
}

impl<'a> Output<'a> {
    pub(crate) fn new(stdout: &'a mut dyn Write, format: TableFormat, width: Option<usize>) -> Self {
        Self { stdout, format, width, tables: 0 }
    }

    /// Writes a table in the format asked for.
    pub(crate) fn table(&mut self, table: &Table) -> Result<(), CliError> {
        if self.format == TableFormat::Csv && self.tables > 0 {
            writeln!(self.stdout)?;
        }
        self.tables += 1;
        let text = match self.format {
            TableFormat::Table => table.for_terminal(self.width),
            TableFormat::Csv => table.to_csv()?,
            TableFormat::Md => table.to_markdown(),
        };
        self.stdout.write_all(text.as_bytes())?;
        Ok(())
    }

    /// Writes JSON on one line.
    pub(crate) fn json(&mut self, value: &impl Serialize) -> Result<(), CliError> {
        serde_json::to_writer(&mut *self.stdout, value)?;
        writeln!(self.stdout)?;
        Ok(())
    }

    /// Writes text that is a result of its own, neither prose nor table.
    pub(crate) fn text(&mut self, text: &[u8]) -> Result<(), CliError> {
        self.stdout.write_all(text)?;
        Ok(())
    }

    /// Writes prose in lines that fit, broken between words.
    pub(crate) fn wrapped(&mut self, text: &str) -> Result<(), CliError> {
        for line in crate::table::wrap(text, self.width.unwrap_or(MOST_PROSE).min(MOST_PROSE)) {
            writeln!(self, "{line}")?;
        }
        Ok(())
    }
}

/// Longest line of prose.
const MOST_PROSE: usize = 100;

impl Write for Output<'_> {
    fn write(&mut self, prose: &[u8]) -> io::Result<usize> {
        match self.format {
            TableFormat::Csv => io::stderr().write(prose),
            TableFormat::Table | TableFormat::Md => self.stdout.write(prose),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stdout.flush()
    }
}

/// Columns that tables may take: `COLUMNS` where it is a number, else those of the terminal; no limit for a pipe or a file.
pub(crate) fn terminal_width() -> Option<usize> {
    let asked = std::env::var("COLUMNS").ok().and_then(|columns| columns.trim().parse().ok());
    let of_terminal = || terminal_size::terminal_size_of(io::stdout()).map(|(width, _)| usize::from(width.0));
    asked.or_else(of_terminal).filter(|&width: &usize| width > 0).map(|width| width.max(LEAST_WIDTH))
}

/// Narrower terminals get lines of this length.
const LEAST_WIDTH: usize = 40;
