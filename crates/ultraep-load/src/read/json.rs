//! `.json`: `{"loads": [[...], ...]}`, read cell by cell so that a hostile file costs no more memory than a matrix.

use std::cell::RefCell;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::{ReadError, Rows};
use crate::LoadMatrix;

pub(super) fn parse(bytes: &[u8]) -> Result<LoadMatrix, ReadError> {
    let state = RefCell::new(State::default());
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let read = Object(&state).deserialize(&mut json).and_then(|()| json.end());
    let state = state.into_inner();
    match (state.refused, read) {
        (Some(refused), _) => Err(refused),
        (None, Err(error)) => Err(ReadError::Syntax(format!("not JSON: {error}"))),
        (None, Ok(())) if !state.found => Err(ReadError::NoLoads),
        (None, Ok(())) => state.rows.finish(),
    }
}

/// What has been read, and the typed reason why reading stopped.
#[derive(Debug, Default)]
struct State {
    rows: Rows,
    found: bool,
    refused: Option<ReadError>,
}

/// Keeps the typed error aside and stops the parser.
fn refuse<T, E: Error>(state: &RefCell<State>, result: Result<T, ReadError>) -> Result<T, E> {
    result.map_err(|error| {
        state.borrow_mut().refused.get_or_insert(error);
        E::custom("refused")
    })
}

struct Object<'a>(&'a RefCell<State>);
struct Matrix<'a>(&'a RefCell<State>);
struct Row<'a>(&'a RefCell<State>);
struct Count<'a>(&'a RefCell<State>);

macro_rules! seed {
    ($name:ident) => {
        impl<'de> DeserializeSeed<'de> for $name<'_> {
            type Value = ();

            fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
                deserializer.deserialize_any(self)
            }
        }
    };
}

seed!(Object);
seed!(Matrix);
seed!(Row);
seed!(Count);

impl<'de> Visitor<'de> for Object<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with \"loads\"")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<std::borrow::Cow<'_, str>>()? {
            if key != "loads" {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            if std::mem::replace(&mut self.0.borrow_mut().found, true) {
                return refuse(self.0, Err(ReadError::Syntax("key \"loads\" twice".to_owned())));
            }
            map.next_value_seed(Matrix(self.0))?;
        }
        Ok(())
    }
}

impl<'de> Visitor<'de> for Matrix<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of rows")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut rows: A) -> Result<(), A::Error> {
        while rows.next_element_seed(Row(self.0))?.is_some() {
            let ended = self.0.borrow_mut().rows.end_row();
            refuse(self.0, ended)?;
        }
        Ok(())
    }
}

impl<'de> Visitor<'de> for Row<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of counts in row {} (from 0)", self.0.borrow().rows.cell().row)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut counts: A) -> Result<(), A::Error> {
        // An empty row, too, counts towards the limit on rows.
        let room = crate::matrix::check_shape(self.0.borrow().rows.rows + 1, 1);
        refuse(self.0, room.map_err(ReadError::from))?;
        while counts.next_element_seed(Count(self.0))?.is_some() {}
        Ok(())
    }
}

impl Count<'_> {
    fn take<E: Error>(&self, count: Option<u64>, got: impl fmt::Display) -> Result<(), E> {
        let taken = self.0.borrow_mut().rows.push(count, got);
        refuse(self.0, taken)
    }
}

impl<'de> Visitor<'de> for Count<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a count at {}", self.0.borrow().rows.cell())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<(), E> {
        self.take(Some(value), value)
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<(), E> {
        self.take(u64::try_from(value).ok(), value)
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<(), E> {
        self.take(None, value)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<(), E> {
        self.take(None, value)
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<(), E> {
        let shown: String = value.chars().take(40).collect();
        self.take(None, format_args!("{shown:?}"))
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        self.take(None, "null")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, _: A) -> Result<(), A::Error> {
        self.take(None, "a list")
    }

    fn visit_map<A: MapAccess<'de>>(self, _: A) -> Result<(), A::Error> {
        self.take(None, "an object")
    }
}
