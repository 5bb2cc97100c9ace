//! Arrays as JSON: nested lists of whole numbers or bools of equal lengths, bare or as the value of a name that says what
//! they are. Memory: four bytes a number.

use std::cell::RefCell;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::array::{Array, Kind};
use crate::classify::{is_placement_name, known_names};
use crate::numbers::{whole, whole_float};
use crate::{Place, Problem};

/// Deepest nesting of lists.
const LEVELS: usize = 4;

/// Parses an array; `name` chooses the key of an object.
pub(crate) fn parse(bytes: &[u8], name: Option<&str>) -> Result<Array, (Place, Problem)> {
    let state = RefCell::new(State::default());
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let is_list = bytes.trim_ascii_start().first() == Some(&b'[');
    let read = if is_list {
        Nested { state: &state, level: 0 }.deserialize(&mut json)
    } else {
        Named { state: &state, asked: name }.deserialize(&mut json)
    };
    let read = read.and_then(|()| json.end());
    let state = state.into_inner();
    match (state.refused, read) {
        (Some(refused), _) => Err(refused),
        (None, Err(error)) => {
            Err((Place::Line(error.line() as u64), Problem::syntax(format_args!("not JSON: {error}"))))
        }
        (None, Ok(())) if state.deepest == 0 => {
            let allowed = known_names().join(", ");
            Err((Place::File, Problem::Missing(format!("lists of numbers under one of the keys {allowed}"))))
        }
        (None, Ok(())) => {
            let shape = state.lengths.iter().take(state.deepest).map(|l| l.unwrap_or(0)).collect();
            let kind = if state.has_bools {
                Kind::Bools
            } else if state.has_floats {
                Kind::Floats
            } else {
                Kind::Integers
            };
            let array = Array::whole(shape, kind, state.values);
            Ok(Array { name: state.name, ..array })
        }
    }
}

#[derive(Default)]
struct State {
    name: Option<String>,
    lengths: [Option<u64>; LEVELS],
    /// Where the value being read stands.
    index: Vec<u64>,
    deepest: usize,
    values: Vec<i32>,
    has_bools: bool,
    has_floats: bool,
    refused: Option<(Place, Problem)>,
}

impl State {
    /// Keeps the typed reason and stops the parser.
    fn refuse<T, E: Error>(&mut self, problem: Problem) -> Result<T, E> {
        let place = if self.index.is_empty() { Place::File } else { Place::Index(self.index.clone()) };
        self.refused.get_or_insert((place, problem));
        Err(E::custom("refused"))
    }

    fn value<E: Error>(&mut self, value: Result<i32, Problem>) -> Result<(), E> {
        let level = self.index.len();
        if level != self.deepest || level == 0 {
            let expected = format!("a list, {} levels deep as before", self.deepest.max(1));
            return self.refuse(Problem::differs("value", "a number", expected));
        }
        match value {
            Ok(value) => {
                self.values.push(value);
                Ok(())
            }
            Err(problem) => self.refuse(problem),
        }
    }
}

/// An object with the array under a known name.
struct Named<'a> {
    state: &'a RefCell<State>,
    asked: Option<&'a str>,
}

/// A value at a level: a list, or a number at the deepest.
struct Nested<'a> {
    state: &'a RefCell<State>,
    level: usize,
}

impl<'de> DeserializeSeed<'de> for Named<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Named<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with \"loads\"")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<std::borrow::Cow<'_, str>>()? {
            if is_placement_name(&key) {
                return self.state.borrow_mut().refuse(Problem::Placement(key.into_owned()));
            }
            let is_it = self.asked.map_or_else(|| known_names().contains(&&*key), |asked| asked == key);
            if !is_it {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            {
                let mut state = self.state.borrow_mut();
                if let Some(first) = state.name.replace(key.clone().into_owned()) {
                    let words = if first == key {
                        format!("key {key:?} twice")
                    } else {
                        format!("keys {first:?} and {key:?}: choose one with --array")
                    };
                    return state.refuse(Problem::Ambiguous(words));
                }
            }
            map.next_value_seed(Nested { state: self.state, level: 0 })?;
        }
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for Nested<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Nested<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("lists of counts")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let level = self.level;
        {
            let mut state = self.state.borrow_mut();
            if level == LEVELS || (level == state.deepest && !state.values.is_empty()) {
                let expected = if level == LEVELS {
                    format!("up to {LEVELS} levels of lists")
                } else {
                    "a number, as before".to_owned()
                };
                return state.refuse(Problem::differs("value", "a list", expected));
            }
            state.deepest = state.deepest.max(level + 1);
            state.index.push(0);
        }
        while list.next_element_seed(Nested { state: self.state, level: level + 1 })?.is_some() {
            if let Some(at) = self.state.borrow_mut().index.last_mut() {
                *at += 1;
            }
        }
        let mut state = self.state.borrow_mut();
        let got = state.index.pop().unwrap_or(0);
        let expected = *state.lengths[level].get_or_insert(got);
        if got != expected || got == 0 {
            return state.refuse(Problem::differs("length of a list:", got, expected.max(1)));
        }
        Ok(())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<(), E> {
        self.state.borrow_mut().value(whole(i128::from(value)))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<(), E> {
        self.state.borrow_mut().value(whole(i128::from(value)))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<(), E> {
        let mut state = self.state.borrow_mut();
        state.has_floats = true;
        state.value(whole_float(value))
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<(), E> {
        let mut state = self.state.borrow_mut();
        state.has_bools = true;
        state.value(Ok(i32::from(value)))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<(), E> {
        let got = format!("{:?}", value.chars().take(40).collect::<String>());
        self.state.borrow_mut().refuse(Problem::Count { got })
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        self.state.borrow_mut().refuse(Problem::Count { got: "null".to_owned() })
    }

    fn visit_map<A: MapAccess<'de>>(self, _: A) -> Result<(), A::Error> {
        self.state.borrow_mut().refuse(Problem::Count { got: "an object".to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::array::Numbers;

    fn read(text: &str) -> Result<(Vec<u64>, Vec<i32>), String> {
        match parse(text.as_bytes(), None) {
            Ok(Array { shape, numbers: Numbers::Memory { values, .. }, .. }) => Ok((shape, values)),
            Ok(_) => panic!("a stream"),
            Err((place, problem)) => Err(format!("{place}: {problem}")),
        }
    }

    #[test]
    fn lists_of_any_depth_alone_and_named() {
        assert_eq!(read("[[1,2],[3,4],[5,6]]"), Ok((vec![3, 2], vec![1, 2, 3, 4, 5, 6])));
        assert_eq!(read(" [ [[1 ,2]] ,[[3.0,4]]]\n"), Ok((vec![2, 1, 2], vec![1, 2, 3, 4])));
        assert_eq!(read("{\"a\": {\"loads\": 3}, \"loads\": [[7]]}"), Ok((vec![1, 1], vec![7])));
        assert_eq!(read("{\"routed_experts\": [[[-1]]]}"), Ok((vec![1, 1, 1], vec![-1])));
        for (bad, words) in [
            ("[[1,2],[3]]", "[1] (from 0): length of a list: 1: expected 2"),
            ("[[1,2],3]", "a number"),
            ("[1,[2]]", "a list"),
            ("[[1,]]", "trailing comma"),
            ("[[]]", "length of a list: 0"),
            ("[[1 2]]", "not JSON"),
            ("[[-2]]", "[0, 0] (from 0): -2 is no count"),
            ("[[1]", "not JSON: EOF"),
            ("[[1]]x", "trailing characters"),
            ("[[[[[1]]]]]", "up to 4 levels"),
            ("[[1.5]]", "1.5 is no count"),
            ("[[null]]", "null is no count"),
            ("[[\"7\"]]", "\"7\" is no count"),
            ("{\"load\": [[1]]}", "no lists of numbers under one of the keys loads"),
            ("{\"loads\": [[1]], \"loads\": [[1]]}", "\"loads\" twice"),
            ("{\"physical_to_logical_map\": [[1]]}", "a placement map"),
            ("{\"loads\": 3}", "a number"),
        ] {
            let got = read(bad).expect_err(bad);
            assert!(got.contains(words), "{bad}: {got}");
        }
    }
}
