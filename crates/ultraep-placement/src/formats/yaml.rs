//! TensorRT-LLM's YAML: a mapping whose `initial_global_assignments` maps layers to lists of experts.
//!
//! The text is taken as events, one after another: nothing grows that is not in the text, and an alias, which could make
//! a small file large, is refused.

use std::collections::BTreeMap;
use std::fmt::Write;

use saphyr_parser::{Event, Parser, ScanError, Span};

use super::{ReadError, ReadHints, map_of_rows, shortened};
use crate::{MAX_LAYERS, PlacementMap};

/// Deepest nesting of what is skipped.
const MAX_DEPTH: usize = 64;

pub(super) fn read(text: &str, hints: ReadHints) -> Result<PlacementMap, ReadError> {
    let mut events = Events { parser: Parser::new_from_str(text), line: 1 };
    if !events.enter_mapping()? {
        return Err(ReadError::Unknown);
    }
    let mut rows: Option<BTreeMap<u32, Vec<i64>>> = None;
    let mut slots = None;
    while let Some(key) = events.key()? {
        match key.as_str() {
            "initial_global_assignments" => rows = Some(events.assignments()?),
            "num_slots" => slots = Some(events.number()?),
            _ => events.skip()?,
        }
    }
    let rows = rows.ok_or(ReadError::Unknown)?;
    if let Some(slots) = slots.filter(|&slots| rows.values().any(|row| row.len() as i64 != slots)) {
        return Err(events.wrong(format!("num_slots {slots}: every layer's list must have as many")));
    }
    let (numbers, rows) = rows.into_iter().unzip();
    map_of_rows(rows, Some(numbers), hints)
}

struct Events<'a> {
    parser: Parser<'a, saphyr_parser::StrInput<'a>>,
    /// Of the last event, from 1.
    line: usize,
}

impl<'a> Events<'a> {
    fn wrong(&self, reason: impl Into<String>) -> ReadError {
        ReadError::Syntax { line: self.line, reason: reason.into() }
    }

    fn next(&mut self) -> Result<Event<'a>, ReadError> {
        let next: Option<Result<(Event<'a>, Span), ScanError>> = self.parser.next_event();
        match next {
            Some(Ok((Event::Alias(_), span))) => {
                self.line = span.start.line();
                Err(self.wrong("an alias: write the list out"))
            }
            Some(Ok((event, span))) => {
                self.line = span.start.line();
                Ok(event)
            }
            Some(Err(error)) => {
                self.line = error.marker().line();
                Err(self.wrong(error.info().to_owned()))
            }
            None => Err(self.wrong("the text ends too early")),
        }
    }

    /// To the inside of the document's mapping; false where the document is something else.
    fn enter_mapping(&mut self) -> Result<bool, ReadError> {
        loop {
            match self.next()? {
                Event::StreamStart | Event::DocumentStart(_) | Event::Nothing => {}
                Event::MappingStart(..) => return Ok(true),
                _ => return Ok(false),
            }
        }
    }

    /// The next key of a mapping, `None` at its end.
    fn key(&mut self) -> Result<Option<String>, ReadError> {
        match self.next()? {
            Event::Scalar(text, ..) => Ok(Some(text.into_owned())),
            Event::MappingEnd => Ok(None),
            _ => Err(self.wrong("a key must be a word or a number")),
        }
    }

    fn number(&mut self) -> Result<i64, ReadError> {
        match self.next()? {
            Event::Scalar(text, ..) => {
                text.parse().map_err(|_| self.wrong(format!("{:?} is no whole number", shortened(&text))))
            }
            _ => Err(self.wrong("a whole number is expected")),
        }
    }

    fn assignments(&mut self) -> Result<BTreeMap<u32, Vec<i64>>, ReadError> {
        if !matches!(self.next()?, Event::MappingStart(..)) {
            return Err(self.wrong("initial_global_assignments must map layers to lists"));
        }
        let mut rows = BTreeMap::new();
        while let Some(key) = self.key()? {
            let layer = key.parse().map_err(|_| self.wrong(format!("{:?} is no layer", shortened(&key))))?;
            if rows.len() >= MAX_LAYERS {
                return Err(self.wrong(format!("over {MAX_LAYERS} layers")));
            }
            if rows.insert(layer, self.list()?).is_some() {
                return Err(self.wrong(format!("layer {layer} a second time")));
            }
        }
        Ok(rows)
    }

    fn list(&mut self) -> Result<Vec<i64>, ReadError> {
        if !matches!(self.next()?, Event::SequenceStart(..)) {
            return Err(self.wrong("a layer's experts must be a list"));
        }
        let mut list = Vec::new();
        loop {
            match self.next()? {
                Event::SequenceEnd => return Ok(list),
                Event::Scalar(text, ..) => {
                    let number =
                        text.parse().map_err(|_| self.wrong(format!("{:?} is no expert", shortened(&text))))?;
                    list.push(number);
                }
                _ => return Err(self.wrong("a layer's experts must be numbers")),
            }
        }
    }

    /// Passes over one value.
    fn skip(&mut self) -> Result<(), ReadError> {
        let mut depth = 0_usize;
        loop {
            match self.next()? {
                Event::MappingStart(..) | Event::SequenceStart(..) => depth += 1,
                Event::MappingEnd | Event::SequenceEnd => depth = depth.saturating_sub(1),
                _ => {}
            }
            if depth > MAX_DEPTH {
                return Err(self.wrong("nested too deep"));
            }
            if depth == 0 {
                return Ok(());
            }
        }
    }
}

/// As TensorRT-LLM's own script writes it. Rows whose layers are not known count from 0.
pub(super) fn write(map: &PlacementMap) -> String {
    let shape = map.shape();
    let mut text = String::from("initial_global_assignments:\n");
    for row in 0..shape.layers {
        let layer = map.layer_numbers().map_or(row as u32, |numbers| numbers[row]);
        let experts: Vec<String> = map.row(row).iter().map(i32::to_string).collect();
        // A string takes whatever is written to it.
        let _ = writeln!(text, "  {layer}: [{}]", experts.join(", "));
    }
    let _ = write!(text, "layer_updates_per_iter: 0\nnum_slots: {}\n", shape.physical());
    text
}
