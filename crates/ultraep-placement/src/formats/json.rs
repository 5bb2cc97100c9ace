//! The JSON formats: SGLang, vLLM, vLLM-Ascend, and TensorRT-LLM's settings where someone keeps them as JSON.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{MapFormat, ReadError, ReadHints, experts_on, map_of_entries, map_of_rows};
use crate::{EMPTY, PlacementMap};

#[derive(Deserialize, Serialize)]
struct Ascend {
    moe_layer_count: usize,
    layer_list: Vec<AscendLayer>,
}

#[derive(Deserialize, Serialize)]
struct AscendLayer {
    layer_id: u32,
    device_count: usize,
    device_list: Vec<AscendDevice>,
}

#[derive(Deserialize, Serialize)]
struct AscendDevice {
    device_id: usize,
    device_expert: Vec<i64>,
}

pub(super) fn read(text: &str, hints: ReadHints) -> Result<(PlacementMap, MapFormat), ReadError> {
    let file: Value = serde_json::from_str(text).map_err(|error| {
        let reason = error.to_string();
        let reason = reason.split(" at line").next().unwrap_or_default().to_owned();
        ReadError::Syntax { line: error.line(), reason }
    })?;
    match file {
        // One row, which all layers share.
        Value::Array(row) if !row.iter().any(Value::is_array) => {
            Ok((map_of_rows(vec![experts(&row, 0)?], None, hints)?, MapFormat::Vllm))
        }
        Value::Array(rows) => Ok((map_of_rows(lists(&rows)?, None, hints)?, MapFormat::Vllm)),
        Value::Object(mut keys) => {
            if let Some(rows) = keys.get("physical_to_logical_map") {
                let rows = rows.as_array().ok_or_else(|| no_list("physical_to_logical_map"))?;
                Ok((map_of_rows(lists(rows)?, None, hints)?, MapFormat::Sglang))
            } else if keys.contains_key("layer_list") {
                let file = serde_json::from_value(Value::Object(keys)).map_err(|error| at_start(error.to_string()))?;
                Ok((read_ascend(file, hints)?, MapFormat::VllmAscend))
            } else if let Some(Value::Object(layers)) = keys.remove("initial_global_assignments") {
                Ok((read_assignments(&layers, hints)?, MapFormat::TrtLlm))
            } else {
                Err(ReadError::Unknown)
            }
        }
        _ => Err(ReadError::Unknown),
    }
}

fn at_start(reason: impl Into<String>) -> ReadError {
    ReadError::Syntax { line: 1, reason: reason.into() }
}

fn no_list(what: &str) -> ReadError {
    at_start(format!("{what}: a list of lists is expected"))
}

fn lists(rows: &[Value]) -> Result<Vec<Vec<i64>>, ReadError> {
    let row = |(layer, row): (usize, &Value)| match row {
        Value::Array(row) => experts(row, layer),
        _ => Err(no_list(&format!("layer {layer}"))),
    };
    rows.iter().enumerate().map(row).collect()
}

fn experts(row: &[Value], layer: usize) -> Result<Vec<i64>, ReadError> {
    let expert = |(at, value): (usize, &Value)| {
        let wrong =
            || at_start(format!("layer {layer}, entry {at}: {} is no expert", super::shortened(&value.to_string())));
        value.as_i64().ok_or_else(wrong)
    };
    row.iter().enumerate().map(expert).collect()
}

fn read_assignments(layers: &Map<String, Value>, hints: ReadHints) -> Result<PlacementMap, ReadError> {
    let mut rows = BTreeMap::new();
    for (key, row) in layers {
        let layer: u32 = key.parse().map_err(|_| at_start(format!("{:?} is no layer", super::shortened(key))))?;
        let row = row.as_array().ok_or_else(|| no_list(&format!("layer {layer}")))?;
        rows.insert(layer, experts(row, layer as usize)?);
    }
    let (numbers, rows) = rows.into_iter().unzip();
    map_of_rows(rows, Some(numbers), hints)
}

/// Devices may hold different numbers of experts: short lists end in empty slots.
fn read_ascend(file: Ascend, hints: ReadHints) -> Result<PlacementMap, ReadError> {
    let wrong = |layer: usize, what: &str| at_start(format!("layer_list[{layer}]: {what}"));
    if file.moe_layer_count != file.layer_list.len() {
        let (count, layers) = (file.moe_layer_count, file.layer_list.len());
        return Err(at_start(format!("moe_layer_count {count}: layer_list has {layers}")));
    }
    let ranks = file.layer_list.first().map_or(0, |layer| layer.device_list.len());
    if let Some(expected) = hints.ranks.filter(|&expected| expected != ranks) {
        return Err(ReadError::Ranks { got: ranks, expected });
    }
    let mut layers = file.layer_list;
    layers.sort_by_key(|layer| layer.layer_id);
    for (at, layer) in layers.iter_mut().enumerate() {
        if layer.device_list.len() != ranks || layer.device_count != ranks {
            return Err(wrong(at, "device_count and devices must be as in the first layer"));
        }
        layer.device_list.sort_by_key(|device| device.device_id);
        if layer.device_list.iter().enumerate().any(|(rank, device)| device.device_id != rank) {
            return Err(wrong(at, "device_id must count from 0, each once"));
        }
    }
    let devices = || layers.iter().flat_map(|layer| &layer.device_list);
    let slots = devices().map(|device| device.device_expert.len()).max().unwrap_or(0);
    // A list longer than any rank can hold is refused before it is copied for all others.
    if slots.saturating_mul(ranks) > crate::MAX_PHYSICAL {
        return Err(ReadError::Uneven { physical: slots.saturating_mul(ranks), ranks });
    }
    let padded = |device: &AscendDevice| {
        let empty = std::iter::repeat_n(i64::from(EMPTY), slots - device.device_expert.len());
        device.device_expert.iter().copied().chain(empty).collect::<Vec<_>>()
    };
    let entries: Vec<i64> = devices().flat_map(padded).collect();
    map_of_entries(layers.len(), ranks, slots, &entries, None, hints.experts)
}

/// Rows on a line each.
pub(super) fn write_rows<T: ToString>(rows: impl Iterator<Item = Vec<T>>) -> String {
    let line = |row: Vec<T>| format!("[{}]", row.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "));
    format!("[{}]", rows.map(line).collect::<Vec<_>>().join(",\n"))
}

/// A row for every layer of the model. Layers that the map does not know have the engine's own first placement: expert `i
/// mod E` in slot `i`.
pub(super) fn write_sglang(map: &PlacementMap, model_layers: Option<usize>) -> String {
    let shape = map.shape();
    let numbers: Vec<usize> = match map.layer_numbers() {
        Some(numbers) => numbers.iter().map(|&number| number as usize).collect(),
        None => (0..shape.layers).collect(),
    };
    let known = numbers.last().map_or(0, |&last| last + 1);
    let layers = model_layers.unwrap_or(known).max(known);
    let row = |layer: usize| match numbers.binary_search(&layer) {
        Ok(row) => map.row(row).to_vec(),
        Err(_) => (0..shape.physical()).map(|physical| (physical % shape.experts) as i32).collect(),
    };
    format!("{{\"physical_to_logical_map\": {}}}\n", write_rows((0..layers).map(row)))
}

pub(super) fn write_ascend(map: &PlacementMap) -> String {
    let shape = map.shape();
    let device = |layer: usize, rank: usize| AscendDevice {
        device_id: rank,
        device_expert: experts_on(map, layer, rank).into_iter().map(|expert| expert as i64).collect(),
    };
    let layer = |layer: usize| AscendLayer {
        layer_id: layer as u32,
        device_count: shape.ranks,
        device_list: (0..shape.ranks).map(|rank| device(layer, rank)).collect(),
    };
    let file = Ascend { moe_layer_count: shape.layers, layer_list: (0..shape.layers).map(layer).collect() };
    serde_json::to_string_pretty(&file).expect("numbers and lists have a JSON") + "\n"
}
