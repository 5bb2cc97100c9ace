//! JSON of counts, `{"layer": {"expert": count}}`: totals over a text, no tokens, no sources. A file is one step.

use std::fmt;
use std::path::Path;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, Visitor};

use crate::error::{count, expert_id, layer_id};
use crate::input::read_whole;
use crate::{Format, ImportError, OpenOptions, Piece, Place, Problem, Recording, RecordingInfo, Sources};

struct ExpertCounts {
    info: RecordingInfo,
    /// By layer, in order.
    layers: std::collections::btree_map::IntoIter<u32, Vec<u32>>,
}

type Layers = std::collections::BTreeMap<u32, Vec<u32>>;

/// Most counts in a file over all layers: 256 MiB.
const MAX_COUNTS: usize = 1 << 26;

pub(crate) fn open(path: &Path, options: &OpenOptions) -> Result<Box<dyn Recording>, ImportError> {
    let bytes = read_whole(path, options)?;
    let mut json = serde_json::Deserializer::from_slice(&bytes);
    let mut layers = Layers::new();
    let read = LayersSeed(&mut layers).deserialize(&mut json).and_then(|()| json.end());
    read.map_err(|error| Problem::syntax(error).at(path, Place::File))?;
    let experts = layers.values().map(Vec::len).max().unwrap_or(0);
    if experts == 0 {
        return Err(Problem::Missing("counts".to_owned()).at(path, Place::File));
    }
    if experts.saturating_mul(layers.len()) > MAX_COUNTS {
        let (got, max) = (experts.saturating_mul(layers.len()) as u64, MAX_COUNTS as u64);
        return Err(Problem::Limit { what: "counts over all layers:", got, max }.at(path, Place::File));
    }
    let mut info = RecordingInfo::new(Format::ExpertCounts, Sources::Totals);
    info.notes.push("experts that a file does not name count as 0; E is the highest named plus one".to_owned());
    Ok(Box::new(ExpertCounts { info, layers: layers.into_iter() }))
}

impl Recording for ExpertCounts {
    fn info(&self) -> &RecordingInfo {
        &self.info
    }

    fn next(&mut self, piece: &mut Piece) -> Result<bool, ImportError> {
        let Some((layer, of_layer)) = self.layers.next() else { return Ok(false) };
        (piece.step, piece.microbatch, piece.layer) = (0, 0, layer);
        piece.counts(1).extend_from_slice(&of_layer);
        Ok(true)
    }
}

struct LayersSeed<'a>(&'a mut Layers);
struct LayerSeed<'a>(&'a mut Vec<u32>);

impl<'de> DeserializeSeed<'de> for LayersSeed<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for LayersSeed<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of layers")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<std::borrow::Cow<'_, str>>()? {
            let layer = key.parse().map_err(|_| Problem::differs("layer", shown(&key), "a number"));
            let layer = layer.and_then(layer_id).map_err(A::Error::custom)?;
            if self.0.contains_key(&layer) {
                return Err(A::Error::custom(format_args!("layer {layer} twice")));
            }
            map.next_value_seed(LayerSeed(self.0.entry(layer).or_default()))?;
        }
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for LayerSeed<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for LayerSeed<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of counts by expert")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some((key, tokens)) = map.next_entry::<std::borrow::Cow<'_, str>, i64>()? {
            let expert = key.parse().map_err(|_| Problem::differs("expert", shown(&key), "a number"));
            let expert = usize::from(expert.and_then(expert_id).map_err(A::Error::custom)?);
            if expert >= self.0.len() {
                self.0.resize(expert + 1, 0);
            }
            self.0[expert] = count(i128::from(tokens)).map_err(A::Error::custom)?;
        }
        Ok(())
    }
}

fn shown(key: &str) -> String {
    key.chars().take(40).collect()
}
