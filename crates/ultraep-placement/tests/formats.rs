//! Files of engines: written as documented, read back, and refused in words where they are wrong.

use serde_json::{Value, json};
use ultraep_placement::{
    EMPTY, MapFormat, MapShape, Method, PlacementMap, ReadError, ReadHints, RebalanceSpec, WriteError, read, rebalance,
    write,
};

/// Two layers (3 and 5 of the model), 4 experts, 3 ranks with 2 slots.
fn map() -> PlacementMap {
    let spec = RebalanceSpec { physical: 6, groups: 1, nodes: 1, ranks: 3, method: Method::Search };
    let map = rebalance(&[90, 10, 20, 30, 1, 2, 3, 94], 4, &spec).unwrap();
    map.with_layer_numbers(vec![3, 5]).unwrap()
}

fn hints(ranks: usize) -> ReadHints {
    ReadHints { ranks: Some(ranks), experts: None }
}

#[test]
fn every_format_is_read_back() {
    for format in MapFormat::ALL {
        let text = write(&map(), format, None).unwrap();
        let (back, found) = read(&text, hints(3)).unwrap();
        assert_eq!(found, format);
        assert_eq!(format.name().parse::<MapFormat>().unwrap(), format);
        let rows = if format == MapFormat::Sglang { [3, 5] } else { [0, 1] };
        for (row, written) in rows.into_iter().enumerate() {
            assert_eq!(back.row(written), map().row(row), "{format}");
        }
        assert!(back.findings().is_valid());
    }
    let (back, _) = read(&write(&map(), MapFormat::TrtLlm, None).unwrap(), hints(3)).unwrap();
    assert_eq!(back, map(), "TensorRT-LLM's file holds the layers' numbers");
}

/// SGLang passes the file's keys on as arguments and indexes rows by the model's layer: one key, a row for every layer.
#[test]
fn sglang_has_one_key_and_a_row_for_every_layer() {
    let text = write(&map(), MapFormat::Sglang, Some(8)).unwrap();
    let Value::Object(keys) = serde_json::from_str(&text).unwrap() else { panic!("{text}") };
    assert_eq!(keys.keys().collect::<Vec<_>>(), ["physical_to_logical_map"]);
    let rows: Vec<Vec<i32>> = serde_json::from_value(keys["physical_to_logical_map"].clone()).unwrap();
    assert_eq!(rows.len(), 8);
    assert!(rows.iter().all(|row| row.len() == 6));
    assert_eq!(rows[0], [0, 1, 2, 3, 0, 1], "the engine's own first placement");
    assert_eq!(rows[3], map().row(0));
    assert_eq!(rows[5], map().row(1));
}

/// Shape `(num_moe_layers, num_physical_experts)`.
#[test]
fn vllm_has_a_row_for_each_moe_layer() {
    let text = write(&map(), MapFormat::Vllm, Some(8)).unwrap();
    let rows: Vec<Vec<i32>> = serde_json::from_str(&text).unwrap();
    assert_eq!(rows, [map().row(0), map().row(1)]);
    let (shared, _) = read("[0, 1, 2, 3, 0, 1]", hints(3)).unwrap();
    assert_eq!(shared.shape(), MapShape { layers: 1, ranks: 3, slots_per_rank: 2, experts: 4 });
}

#[test]
fn vllm_ascend_has_a_list_for_each_device() {
    let file: Value = serde_json::from_str(&write(&map(), MapFormat::VllmAscend, None).unwrap()).unwrap();
    assert_eq!(file["moe_layer_count"], 2);
    for (layer, of_layer) in file["layer_list"].as_array().unwrap().iter().enumerate() {
        assert_eq!((&of_layer["layer_id"], &of_layer["device_count"]), (&json!(layer), &json!(3)));
        for (rank, device) in of_layer["device_list"].as_array().unwrap().iter().enumerate() {
            assert_eq!(device, &json!({ "device_id": rank, "device_expert": map().on(layer, rank) }));
        }
    }
}

#[test]
fn tensorrt_llm_has_layers_by_number_and_the_slots_of_all_ranks() {
    let text = write(&map(), MapFormat::TrtLlm, None).unwrap();
    let list = |row: usize| map().row(row).iter().map(i32::to_string).collect::<Vec<_>>().join(", ");
    let expected = format!(
        "initial_global_assignments:\n  3: [{}]\n  5: [{}]\nlayer_updates_per_iter: 0\nnum_slots: 6\n",
        list(0),
        list(1)
    );
    assert_eq!(text, expected);
    let json = json!({ "num_slots": 6, "initial_global_assignments": { "5": map().row(1), "3": map().row(0) } });
    assert_eq!(read(&json.to_string(), hints(3)).unwrap(), (map(), MapFormat::TrtLlm));
}

#[test]
fn devices_with_fewer_experts_end_in_empty_slots() {
    let device = |id: usize, experts: &[i64]| json!({ "device_id": id, "device_expert": experts });
    let layer = |devices: Value| json!({ "layer_id": 0, "device_count": 2, "device_list": devices });
    let file = |layer: Value| json!({ "moe_layer_count": 1, "layer_list": [layer] }).to_string();
    // Devices in any order.
    let text = file(layer(json!([device(1, &[2]), device(0, &[0, 1])])));
    let (map, format) = read(&text, ReadHints::default()).unwrap();
    assert_eq!((format, map.row(0)), (MapFormat::VllmAscend, &[0, 1, 2, EMPTY][..]));
    let findings = map.findings();
    assert_eq!((findings.empty_slots, findings.unequal_rows), (1, 1));
    for format in MapFormat::ALL {
        assert_eq!(write(&map, format, None), Err(WriteError::Empty { layer: 0, rank: 1, format }));
    }
    let twice = file(layer(json!([device(0, &[0, 0]), device(1, &[1, 2])])));
    let (map, _) = read(&twice, ReadHints::default()).unwrap();
    assert_eq!(map.findings().twice, [(0, 0, 0)]);
    assert_eq!(write(&map, MapFormat::VllmAscend, None), Err(WriteError::Twice { layer: 0, rank: 0, expert: 0 }));
    assert!(write(&map, MapFormat::Vllm, None).is_ok());
    assert_eq!(read(&twice, hints(4)), Err(ReadError::Ranks { got: 2, expected: 4 }));
    let two_zeros = file(layer(json!([device(0, &[0]), device(0, &[1])])));
    assert!(read(&two_zeros, ReadHints::default()).unwrap_err().to_string().contains("device_id must count from 0"));
}

#[test]
fn a_missing_expert_is_found_and_not_written() {
    let (map, _) = read("[[0, 1, 0, 3]]", ReadHints { ranks: Some(2), experts: Some(5) }).unwrap();
    let findings = map.findings();
    assert!(!findings.is_valid());
    assert_eq!(findings.missing, [(0, 2), (0, 4)]);
    assert_eq!(write(&map, MapFormat::Vllm, None), Err(WriteError::Missing { layer: 0, expert: 2 }));
}

#[test]
fn wrong_texts_are_refused_in_words() {
    for (text, words) in [
        ("", "no placement: allowed are"),
        ("[[0, 1], [0, 1, 2]]", "layer 1: 3 physical experts; the first has 2"),
        ("[[0, 1.5]]", "layer 0, entry 1: 1.5 is no expert"),
        ("[[0, 1], 7]", "layer 1: a list of lists is expected"),
        ("[[0, -2]]", "layer 0, rank 1, slot 0: expert -2: allowed are 0 to 0"),
        ("[[0, 5000]]", "experts 5001: allowed are 1 to 4096"),
        ("[[0, 9223372036854775807]]", "experts 9223372036854775808: allowed are 1 to 4096"),
        ("[[0, 1, 2]]", "3 physical experts on 2 ranks"),
        ("[]", "0 physical experts"),
        ("[[]]", "0 physical experts"),
        ("{\"physical_to_logical_map\": 3}", "physical_to_logical_map: a list of lists is expected"),
        ("{\"logical_count\": [[1, 2]]}", "no placement: allowed are"),
        ("{\"layer_list\": []}", "missing field `moe_layer_count`"),
        ("{\"moe_layer_count\": 2, \"layer_list\": []}", "moe_layer_count 2: layer_list has 0"),
        ("[[0, 1", "line 1: EOF"),
        ("hello", "no placement"),
        ("num_slots: 4\n", "no placement"),
        ("initial_global_assignments:\n  a: [0, 1]\n", "line 2: \"a\" is no layer"),
        ("initial_global_assignments:\n  0: [0, x]\n", "line 2: \"x\" is no expert"),
        ("initial_global_assignments:\n  0: [0, 1]\n  0: [0, 1]\n", "line 3: layer 0 a second time"),
        ("initial_global_assignments:\n  0: &a [0, 1]\n  1: *a\n", "line 3: an alias"),
        ("num_slots: 4\ninitial_global_assignments:\n  0: [0, 1]\n", "num_slots 4: every layer's list"),
        ("initial_global_assignments: [0, 1]\n", "must map layers to lists"),
        ("a: [[[[", "did not find expected node content"),
    ] {
        let error = read(text, hints(2)).unwrap_err().to_string();
        assert!(error.contains(words) && !error.contains('\n'), "{text:?}: {error}");
    }
    assert_eq!(read("[[0, 1]]", ReadHints::default()), Err(ReadError::NoRanks));
}

/// Flips, cuts and repeats of good files: a map or a refusal, never a panic.
#[test]
fn mutated_files_never_panic() {
    let texts: Vec<String> = MapFormat::ALL.map(|format| write(&map(), format, None).unwrap()).to_vec();
    let mut state = 1_u64;
    let mut below = |most: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) as usize % most.max(1)
    };
    for round in 0..4000 {
        let mut bytes = texts[round % texts.len()].clone().into_bytes();
        for _ in 0..1 + below(3) {
            let (at, end) = (below(bytes.len()), below(bytes.len()));
            match below(4) {
                0 => bytes[at] = b"0123456789-,:[]{}\"\n *&x"[below(23)],
                1 => bytes.truncate(at.max(1)),
                2 => drop(bytes.drain(at.min(end)..at.max(end))),
                _ => {
                    let part = bytes[at.min(end)..at.max(end)].to_vec();
                    bytes.splice(at..at, part);
                }
            }
            if bytes.is_empty() {
                bytes.push(b'[');
            }
        }
        if let Ok((map, _)) = read(&String::from_utf8_lossy(&bytes), hints(3)) {
            let _ = map.findings();
            let _ = map.logical_to_physical();
        }
    }
}
