//! SGLang's expert distribution recorder, `.pt` files: an archive with a pickle and raw storages.
//!
//! *stat*: `logical_count` `[steps, layers, E]`, totals over all ranks. *detail*: `records[]`, one a forward pass, with
//! `topk_ids_of_layer` `[layers, tokens, K]` (-1 pads; tokens in order, no sources) or `global_physical_count`
//! `[layers, P]` (totals). Both name physical experts; `last_physical_to_logical_map` `[layers, P]` maps them to logical ones
//! where it is there.

use std::path::Path;

use ultraep_plan::MAX_EXPERTS;
use ultraep_trace::NO_EXPERT;

use crate::archive::Archive;
use crate::error::{count, expert_id, layer_id};
use crate::npy::{Element, integer};
use crate::pickle::{MAX_PICKLE_BYTES, Object, Pickle, StorageType, Tensor};
use crate::{Format, ImportError, OpenOptions, Piece, Problem, Recording, RecordingInfo, Sources};

/// Largest storage of a recording, in bytes.
const MAX_STORAGE_BYTES: u64 = 1 << 30;

/// Most physical experts of a layer.
const MAX_PHYSICAL: usize = 1 << 16;

/// A tensor with its numbers.
struct Loaded {
    shape: Vec<usize>,
    values: Vec<i64>,
}

struct Sglang {
    info: RecordingInfo,
    archive: Archive,
    prefix: String,
    /// What is to be read: a tensor each, with the pass it belongs to.
    parts: std::vec::IntoIter<Part>,
    map: Option<Loaded>,
    current: Option<(u64, Loaded)>,
    /// Position in `current`: row of a stat file, layer of a detail record, and token in it.
    at: usize,
}

struct Part {
    pass: u64,
    tensor: Tensor,
}

pub(crate) fn open(path: &Path, options: &OpenOptions) -> Result<Box<dyn Recording>, ImportError> {
    let mut archive = Archive::open(path, options)?;
    let Some(entry) = archive.names().find(|name| name.ends_with("/data.pkl")).map(str::to_owned) else {
        return Err(archive.refuse("data.pkl", Problem::Missing("such entry".to_owned())));
    };
    let prefix = entry.trim_end_matches("data.pkl").to_owned();
    let bytes = archive.read(&entry, MAX_PICKLE_BYTES)?;
    let pickle = Pickle::parse(&bytes).map_err(|problem| archive.refuse(&entry, problem))?;
    let big = format!("{prefix}byteorder");
    if archive.names().any(|name| name == big) && archive.read(&big, 16)? != b"little" {
        return Err(archive.refuse(&big, Problem::Unsupported("big-endian storages".to_owned())));
    }
    let refuse = |problem: Problem| archive.refuse(&entry, problem);
    let root = pickle.root();
    let (sources, parts) = if let Some(counts) = pickle.value(root, "logical_count") {
        (Sources::Totals, vec![Part { pass: 0, tensor: tensor(counts, "logical_count").map_err(refuse)? }])
    } else {
        records(&pickle).map_err(refuse)?
    };
    let map = match pickle.value(root, "last_physical_to_logical_map") {
        Some(map) if sources == Sources::Tokens || parts.len() > 1 || pickle.value(root, "records").is_some() => {
            Some(tensor(map, "last_physical_to_logical_map").map_err(refuse)?)
        }
        _ => None,
    };
    let mut info = RecordingInfo::new(Format::Sglang, sources);
    if map.is_none() && pickle.value(root, "records").is_some() {
        info.notes.push("no map from physical to logical experts: ids are taken as logical".to_owned());
    }
    let map = map.map(|map| load(&mut archive, &prefix, &map)).transpose()?;
    if let Some(experts) = map.as_ref().and_then(|m| m.values.iter().max()) {
        info.experts = usize::try_from(experts + 1).ok().filter(|experts| (1..=MAX_EXPERTS).contains(experts));
    }
    Ok(Box::new(Sglang { info, archive, prefix, parts: parts.into_iter(), map, current: None, at: 0 }))
}

/// The tensors of a detail file.
fn records(pickle: &Pickle) -> Result<(Sources, Vec<Part>), Problem> {
    let names = ["physical_to_logical_map", "logical_to_all_physical_map", "logical_to_physical_map"];
    let placement = names.into_iter().find(|name| pickle.value(pickle.root(), name).is_some());
    if let (Some(name), None) = (placement, pickle.value(pickle.root(), "records")) {
        return Err(Problem::Placement(name.to_owned()));
    }
    let Some(Object::List(records)) = pickle.value(pickle.root(), "records") else {
        return Err(Problem::Missing("logical_count and no records".to_owned()));
    };
    let (mut parts, mut sources) = (Vec::new(), None);
    for (index, &record) in records.iter().enumerate() {
        let record = pickle.get(record);
        let found = ["topk_ids_of_layer", "global_physical_count"].into_iter().find_map(|key| {
            let value = pickle.value(record, key).filter(|value| matches!(value, Object::Tensor(_)));
            value.map(|value| (key, value))
        });
        let Some((key, value)) = found else {
            return Err(Problem::Missing(format!("topk_ids_of_layer or global_physical_count in record {index}")));
        };
        let of_record = if key == "topk_ids_of_layer" { Sources::Tokens } else { Sources::Totals };
        if *sources.get_or_insert(of_record) != of_record {
            return Err(Problem::Unsupported("records of tokens and of counts in one file".to_owned()));
        }
        let pass = match pickle.value(record, "forward_pass_id") {
            Some(Object::Int(pass)) if *pass >= 0 => *pass as u64,
            _ => index as u64,
        };
        parts.push(Part { pass, tensor: tensor(value, key)? });
    }
    match sources {
        Some(sources) => Ok((sources, parts)),
        None => Err(Problem::Missing("records".to_owned())),
    }
}

fn tensor(object: &Object, what: &'static str) -> Result<Tensor, Problem> {
    match object {
        Object::Tensor(tensor) => Ok(tensor.clone()),
        _ => Err(Problem::differs(what, "something else", "a tensor")),
    }
}

/// Reads a tensor's numbers in row-major order; its shape must fit its storage.
fn load(archive: &mut Archive, prefix: &str, tensor: &Tensor) -> Result<Loaded, ImportError> {
    let name = format!("{prefix}data/{}", tensor.storage.key);
    let StorageType::Integer { bytes: width, is_signed } = tensor.storage.kind else {
        return Err(archive.refuse(&name, Problem::differs("elements", "floats", "integers")));
    };
    let storage = archive.read(&name, MAX_STORAGE_BYTES)?;
    let elements = tensor.shape.iter().try_fold(1_u64, |n, &d| n.checked_mul(d)).unwrap_or(u64::MAX);
    let room = (storage.len() / width) as u64;
    // A stride of 0 would repeat numbers: no recorder writes one, and a lying shape could be of any size.
    let mut dense = 1;
    let is_dense = tensor.shape.iter().zip(&tensor.stride).rev().all(|(&size, &stride)| {
        let fits = size <= 1 || stride == dense;
        dense = size.saturating_mul(dense);
        fits
    });
    if !is_dense {
        return Err(archive.refuse(&name, Problem::Unsupported("a tensor that is not contiguous".to_owned())));
    }
    if tensor.offset.checked_add(elements).is_none_or(|end| end > room) {
        let got = format!("{:?} at {}", tensor.shape, tensor.offset);
        return Err(archive.refuse(&name, Problem::differs("tensor", got, format!("at most {room} elements"))));
    }
    let element = Element::Integer { bytes: width, is_signed, is_big_endian: false };
    let start = tensor.offset as usize * width;
    let bytes = &storage[start..start + elements as usize * width];
    let values = bytes.chunks_exact(width).map(|b| integer(b, element) as i64).collect();
    Ok(Loaded { shape: tensor.shape.iter().map(|&d| d as usize).collect(), values })
}

impl Sglang {
    /// The logical expert of a physical one.
    fn logical(&self, layer: usize, physical: i64) -> Result<u16, Problem> {
        let Some(map) = &self.map else { return expert_id(physical) };
        let &[layers, width] = map.shape.as_slice() else {
            return Err(Problem::differs("shape of the map", format!("{:?}", map.shape), "[layers, physical experts]"));
        };
        match usize::try_from(physical) {
            Ok(index) if index < width && layer < layers => expert_id(map.values[layer * width + index]),
            _ => Err(Problem::Expert { got: physical, most: width.max(1) }),
        }
    }

    /// Fills the piece from the tensor being read; false when it is used up.
    fn fill(&mut self, piece: &mut Piece) -> Result<bool, Problem> {
        let Some((pass, loaded)) = &self.current else { return Ok(false) };
        let at = self.at;
        match (self.info.sources, loaded.shape.as_slice()) {
            (Sources::Tokens, &[layers, tokens, choices]) => {
                let choices_max = MAX_EXPERTS as u64;
                if choices == 0 || choices > MAX_EXPERTS {
                    return Err(Problem::Limit {
                        what: "experts a token, at least 1:",
                        got: choices as u64,
                        max: choices_max,
                    });
                }
                if at >= layers || tokens == 0 {
                    return Ok(false);
                }
                let ids = &loaded.values[at * tokens * choices..][..tokens * choices];
                let ids = ids.iter().map(|&id| if id < 0 { Ok(NO_EXPERT) } else { self.logical(at, id) });
                let ids = ids.collect::<Result<Vec<u16>, Problem>>()?;
                (piece.step, piece.microbatch, piece.layer) = (*pass, 0, layer_id(at as u64)?);
                piece.choices(choices).extend_from_slice(&ids);
            }
            // One pass with logical experts, or many.
            (Sources::Totals, &[layers, physical]) => {
                if at >= layers || physical == 0 {
                    return Ok(false);
                }
                if physical > MAX_PHYSICAL {
                    let (got, max) = (physical as u64, MAX_PHYSICAL as u64);
                    return Err(Problem::Limit { what: "physical experts:", got, max });
                }
                let mut loads = vec![0_u32; self.info.experts.unwrap_or(physical)];
                for (index, &tokens) in loaded.values[at * physical..][..physical].iter().enumerate() {
                    let expert = usize::from(self.logical(at, index as i64)?);
                    if expert >= loads.len() {
                        return Err(Problem::Expert { got: expert as i64, most: loads.len() });
                    }
                    loads[expert] = count(i128::from(loads[expert]) + i128::from(tokens))?;
                }
                (piece.step, piece.microbatch, piece.layer) = (*pass, 0, layer_id(at as u64)?);
                piece.counts(1).extend_from_slice(&loads);
            }
            (Sources::Totals, &[steps, layers, experts]) => {
                if experts == 0 || experts > MAX_EXPERTS {
                    let max = MAX_EXPERTS as u64;
                    return Err(Problem::Limit { what: "experts, at least 1:", got: experts as u64, max });
                }
                if at >= steps * layers {
                    return Ok(false);
                }
                (piece.step, piece.microbatch, piece.layer) =
                    ((at / layers) as u64, 0, layer_id((at % layers) as u64)?);
                let counts = piece.counts(1);
                for &value in &loaded.values[at * experts..][..experts] {
                    counts.push(count(i128::from(value))?);
                }
            }
            (_, shape) => {
                return Err(Problem::differs(
                    "shape",
                    format!("{shape:?}"),
                    "[layers, tokens, k] or [steps, layers, experts]",
                ));
            }
        }
        self.at += 1;
        Ok(true)
    }
}

impl Recording for Sglang {
    fn info(&self) -> &RecordingInfo {
        &self.info
    }

    fn next(&mut self, piece: &mut Piece) -> Result<bool, ImportError> {
        loop {
            if self.fill(piece).map_err(|problem| self.archive.refuse("data.pkl", problem))? {
                return Ok(true);
            }
            let Some(part) = self.parts.next() else { return Ok(false) };
            self.current = Some((part.pass, load(&mut self.archive, &self.prefix, &part.tensor)?));
            self.at = 0;
        }
    }
}
