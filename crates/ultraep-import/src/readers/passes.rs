//! JSON of forward passes, as people write them for Llama 4: a list of passes `{"layer": [[ids of a token], ...] or null}`, or
//! one such object. The first pass of a request holds its prompt, each later one a token. Tokens only.
//!
//! Memory: the file (up to [`crate::MAX_WHOLE_FILE_BYTES`]) and two bytes a choice.

use std::cell::RefCell;
use std::fmt;
use std::path::Path;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};

use crate::choices::push_choices;
use crate::error::layer_id;
use crate::input::read_whole;
use crate::{Format, ImportError, OpenOptions, Piece, Place, Problem, Recording, RecordingInfo, Sources};

/// Tokens of one layer and width, in order.
struct Block {
    pass: u64,
    layer: u32,
    per_token: usize,
    ids: Vec<u16>,
}

struct Passes {
    info: RecordingInfo,
    blocks: std::vec::IntoIter<Block>,
}

#[derive(Default)]
struct State {
    blocks: Vec<Block>,
    pass: u64,
    layer: u32,
    row: Vec<i64>,
    experts: Option<usize>,
    refused: Option<Problem>,
}

pub(crate) fn open(path: &Path, options: &OpenOptions) -> Result<Box<dyn Recording>, ImportError> {
    let bytes = read_whole(path, options)?;
    let state = RefCell::new(State { experts: options.experts, ..State::default() });
    let mut json = serde_json::Deserializer::from_slice(&bytes);
    let read = if bytes.trim_ascii_start().first() == Some(&b'[') {
        PassList(&state).deserialize(&mut json)
    } else {
        Pass(&state).deserialize(&mut json)
    };
    let read = read.and_then(|()| json.end());
    let state = state.into_inner();
    match (state.refused, read) {
        (Some(problem), Err(error)) => return Err(problem.at(path, Place::Line(error.line() as u64))),
        (None, Err(error)) => return Err(Problem::syntax(&error).at(path, Place::Line(error.line() as u64))),
        (_, Ok(())) => {}
    }
    if state.blocks.is_empty() {
        return Err(Problem::Missing("tokens in any pass".to_owned()).at(path, Place::File));
    }
    let mut info = RecordingInfo::new(Format::Passes, Sources::Tokens);
    let first = state.blocks[0].per_token;
    info.top_k = Some(first).filter(|_| state.blocks.iter().all(|block| block.per_token == first));
    info.experts = options.experts;
    if state.pass > 1 {
        info.notes
            .push(format!("{} passes, one after another: the tokens of a pass of one are of decoding", state.pass));
    }
    Ok(Box::new(Passes { info, blocks: state.blocks.into_iter() }))
}

impl Recording for Passes {
    fn info(&self) -> &RecordingInfo {
        &self.info
    }

    fn next(&mut self, piece: &mut Piece) -> Result<bool, ImportError> {
        let Some(block) = self.blocks.next() else { return Ok(false) };
        (piece.step, piece.microbatch, piece.layer) = (block.pass, 0, block.layer);
        *piece.choices(block.per_token) = block.ids;
        Ok(true)
    }
}

struct PassList<'a>(&'a RefCell<State>);
struct Pass<'a>(&'a RefCell<State>);
struct Tokens<'a>(&'a RefCell<State>);
struct Token<'a>(&'a RefCell<State>);

macro_rules! seed {
    ($name:ident, $how:ident) => {
        impl<'de> DeserializeSeed<'de> for $name<'_> {
            type Value = ();

            fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
                deserializer.$how(self)
            }
        }
    };
}

seed!(PassList, deserialize_seq);
seed!(Pass, deserialize_map);
seed!(Tokens, deserialize_any);
seed!(Token, deserialize_seq);

impl State {
    fn refuse<T, E: Error>(&mut self, problem: Problem) -> Result<T, E> {
        self.refused.get_or_insert(problem);
        Err(E::custom("refused"))
    }
}

impl<'de> Visitor<'de> for PassList<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of passes")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut passes: A) -> Result<(), A::Error> {
        while passes.next_element_seed(Pass(self.0))?.is_some() {}
        Ok(())
    }
}

impl<'de> Visitor<'de> for Pass<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a pass: an object of layers")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut layers: A) -> Result<(), A::Error> {
        while let Some(key) = layers.next_key::<std::borrow::Cow<'_, str>>()? {
            let number = key.parse().map_err(|_| {
                Problem::differs("layer", format!("{:?}", key.chars().take(40).collect::<String>()), "a number")
            });
            match number.and_then(layer_id) {
                Ok(layer) => self.0.borrow_mut().layer = layer,
                Err(problem) => return self.0.borrow_mut().refuse(problem),
            }
            layers.next_value_seed(Tokens(self.0))?;
        }
        self.0.borrow_mut().pass += 1;
        Ok(())
    }
}

impl<'de> Visitor<'de> for Tokens<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of tokens' experts, or null")
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut tokens: A) -> Result<(), A::Error> {
        while tokens.next_element_seed(Token(self.0))?.is_some() {}
        Ok(())
    }
}

impl<'de> Visitor<'de> for Token<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the list of a token's experts")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut ids: A) -> Result<(), A::Error> {
        let mut row = std::mem::take(&mut self.0.borrow_mut().row);
        row.clear();
        while let Some(id) = ids.next_element::<i64>()? {
            row.push(id);
        }
        let mut state = self.0.borrow_mut();
        let (pass, layer, experts) = (state.pass, state.layer, state.experts);
        if !row.is_empty() {
            let is_next = |block: &&mut Block| (block.pass, block.layer, block.per_token) == (pass, layer, row.len());
            if state.blocks.last_mut().as_ref().filter(|block| is_next(block)).is_none() {
                state.blocks.push(Block { pass, layer, per_token: row.len(), ids: Vec::new() });
            }
            let pushed = match state.blocks.last_mut() {
                Some(block) => push_choices(&row, experts, &mut block.ids),
                None => Ok(()),
            };
            if let Err(problem) = pushed {
                return state.refuse(problem);
            }
        }
        state.row = row;
        Ok(())
    }
}
