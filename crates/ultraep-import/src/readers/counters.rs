//! A pickled list of `collections.Counter`, expert to choices, one a layer: totals, no tokens, no sources. A file is a step.
//!
//! The pickle is parsed with an allow-list and never run. It holds no numbers of layers: a list of three is taken as OLMoE's,
//! which are of layers 0, 7 and 15 (as in its published counts); any other list counts layers from 0.

use std::path::Path;

use crate::error::{count, expert_below, layer_id};
use crate::input::read_whole;
use crate::pickle::{MAX_PICKLE_BYTES, Object, Pickle};
use crate::{Format, ImportError, OpenOptions, Piece, Place, Problem, Recording, RecordingInfo, Sources};

/// Layers of OLMoE's three counters.
const OLMOE_LAYERS: [u32; 3] = [0, 7, 15];

struct Counters {
    info: RecordingInfo,
    layers: std::vec::IntoIter<(u32, Vec<u32>)>,
}

pub(crate) fn open(path: &Path, options: &OpenOptions) -> Result<Box<dyn Recording>, ImportError> {
    let refuse = |problem: Problem| problem.at(path, Place::File);
    let bytes = read_whole(path, options)?;
    if bytes.len() as u64 > MAX_PICKLE_BYTES {
        let (got, max) = (bytes.len() as u64, MAX_PICKLE_BYTES);
        return Err(refuse(Problem::Limit { what: "bytes of a pickle:", got, max }));
    }
    let pickle = Pickle::parse(&bytes).map_err(refuse)?;
    let counters: Vec<&Object> = match pickle.root() {
        Object::List(items) | Object::Tuple(items) => items.iter().map(|&item| pickle.get(item)).collect(),
        one @ Object::Dict(_) => vec![one],
        _ => Vec::new(),
    };
    if counters.is_empty() || counters.iter().any(|counter| !matches!(counter, Object::Dict(_))) {
        let words =
            "a bare pickle: read are lists of counters by layer; torch.save of PyTorch 1.6 and later writes an archive";
        return Err(refuse(Problem::Unsupported(words.to_owned())));
    }
    let mut layers = Vec::new();
    for (index, counter) in counters.iter().enumerate() {
        let counts = counts_of(&pickle, counter, options.experts)
            .map_err(|problem| problem.at(path, Place::Key(format!("counter {index}"))))?;
        let layer = if counters.len() == OLMOE_LAYERS.len() {
            OLMOE_LAYERS[index]
        } else {
            layer_id(index as u64).map_err(refuse)?
        };
        layers.push((layer, counts));
    }
    let mut info = RecordingInfo::new(Format::Counters, Sources::Totals);
    info.experts = options.experts;
    info.notes.push(if counters.len() == OLMOE_LAYERS.len() {
        "three counters without layer numbers: taken as OLMoE's layers 0, 7 and 15".to_owned()
    } else {
        "counters have no layer numbers: counted from 0".to_owned()
    });
    info.notes.push("experts that a counter does not name count as 0".to_owned());
    Ok(Box::new(Counters { info, layers: layers.into_iter() }))
}

/// The counts of one counter, as long as its highest expert.
fn counts_of(pickle: &Pickle, counter: &Object, experts: Option<usize>) -> Result<Vec<u32>, Problem> {
    let Object::Dict(entries) = counter else { return Ok(Vec::new()) };
    let mut counts: Vec<u32> = Vec::new();
    for &(expert, tokens) in entries {
        let (Object::Int(expert), Object::Int(tokens)) = (pickle.get(expert), pickle.get(tokens)) else {
            return Err(Problem::differs("entry", "something else", "an expert and its count"));
        };
        let expert = usize::from(expert_below(*expert, experts)?);
        if expert >= counts.len() {
            counts.resize(expert + 1, 0);
        }
        counts[expert] = count(i128::from(*tokens))?;
    }
    if counts.is_empty() { Err(Problem::Missing("experts".to_owned())) } else { Ok(counts) }
}

impl Recording for Counters {
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
