//! Archives and folders of other systems, written here as those systems write them, and the round trip ours -> v1 -> ours.

mod common;

use std::path::{Path, PathBuf};

use common::pieces;
use serde_json::json;
use tempfile::TempDir;
use ultraep_import::{Format, Load, Piece, Sources, V1Options, open, v1_manifest_path, write_ultra_ep_v1};
use ultraep_plan::{Instance, PhysicalIndex, Rank, Topology, TopologySpec};
use ultraep_trace::{PlanRecord, Record, TraceMeta, TraceWriter};

fn counts(step: u64, microbatch: u32, layer: u32, sources: usize, counts: &[u32]) -> Piece {
    Piece { step, microbatch, layer, load: Load::Counts { sources, counts: counts.to_vec() } }
}

fn write(path: PathBuf, contents: impl AsRef<[u8]>) -> PathBuf {
    std::fs::write(&path, contents).expect("written");
    path
}

/// Two ranks, four experts, one slot a rank; two steps of two microbatches of two layers; the second layer has a plan.
fn our_trace(path: &Path) -> Vec<Record> {
    let topology = Topology::new(TopologySpec { ranks: 2, experts: 4, domain_ranks: 2, slots_per_rank: 1 });
    let meta = TraceMeta::of_topology(&topology.expect("a group"), 2);
    let file = std::fs::File::create(path).expect("created");
    let mut writer = TraceWriter::new(file, meta).expect("a header");
    let mut records = Vec::new();
    for (step, microbatch, layer) in (0..8).map(|i| (i / 4, i as u32 / 2 % 2, i as u32 % 2)) {
        let before: Vec<u32> = (0..8).map(|i| i * 3 + step as u32 * 5 + microbatch + layer).collect();
        let load = |expert: usize| before[expert] + before[4 + expert];
        let at =
            |rank, physical, quota| Instance { rank: Rank::new(rank), physical: PhysicalIndex::new(physical), quota };
        let plan = PlanRecord {
            policy: "ultraep".into(),
            offsets: vec![0, 1, 2, 3, 5],
            instances: vec![
                at(0, 0, load(0)),
                at(0, 1, load(1)),
                at(1, 0, load(2)),
                at(1, 1, load(3) - 10),
                at(0, 2, 10),
            ],
            ..PlanRecord::default()
        };
        let after = (layer == 1).then_some(plan);
        records.push(Record { step, microbatch, layer, before, after, top_k: None });
    }
    records.iter().for_each(|record| writer.append(record).expect("appended"));
    writer.finish().expect("finished");
    records
}

#[test]
fn ours_to_v1_and_back_keeps_what_the_layout_can_hold() {
    let folder = TempDir::new().expect("a folder");
    let trace = folder.path().join("loads.uet");
    let records = our_trace(&trace);
    let options = V1Options { trace_id: "epg0_gr0".into(), created_unix: 1.0, records_per_chunk: 3 };
    let written = write_ultra_ep_v1(&trace, folder.path(), &options).expect("written");
    assert_eq!((written.records, written.chunks, written.without_plan), (8, 3, 4));
    let manifest = v1_manifest_path(folder.path(), "epg0_gr0");
    let mut recording = open(&[manifest]).expect("opened");
    let info = recording.info().clone();
    assert_eq!((info.format, info.sources), (Format::UltraEpV1, Sources::Totals));
    assert_eq!(
        (info.experts, info.ranks, info.domain_ranks, info.slots_per_rank),
        (Some(4), Some(2), Some(2), Some(1))
    );
    let total = |record: &Record| (0..4).map(|e| record.before[e] + record.before[4 + e]).collect::<Vec<_>>();
    let expected: Vec<Piece> = records.iter().map(|r| counts(r.step, r.microbatch, r.layer, 1, &total(r))).collect();
    assert_eq!(pieces(&mut *recording), expected);
    // A second time nothing is overwritten.
    assert!(write_ultra_ep_v1(&trace, folder.path(), &options).is_err());
}

/// Field by field as the released viewer reads it: `post` is `[n, ep_size, physical]`, its rank sums the loads after.
#[test]
fn the_v1_layout_is_met_field_by_field() {
    let folder = TempDir::new().expect("a folder");
    let trace = folder.path().join("loads.uet");
    let records = our_trace(&trace);
    let options = V1Options { trace_id: "t".into(), created_unix: 1.5, records_per_chunk: 100 };
    write_ultra_ep_v1(&trace, folder.path(), &options).expect("written");
    let file = std::fs::File::open(folder.path().join("t.chunk000000.npz")).expect("a chunk");
    let mut zip = zip::ZipArchive::new(file).expect("an archive");
    let mut array = |name: &str| {
        let mut bytes = Vec::new();
        let mut entry = zip.by_name(&format!("{name}.npy")).expect("an entry");
        assert_eq!(entry.compression(), zip::CompressionMethod::Stored);
        std::io::Read::read_to_end(&mut entry, &mut bytes).expect("read");
        let header_bytes = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
        assert_eq!(header_bytes % 64, 0, "{name}");
        let data = bytes.split_off(header_bytes);
        (String::from_utf8_lossy(&bytes[10..]).into_owned(), data)
    };
    let i32s = |data: &[u8]| data.chunks(4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect::<Vec<_>>();
    let (header, data) = array("layers");
    assert!(header.starts_with("{'descr': '<i4', 'fortran_order': False, 'shape': (8,), }"), "{header}");
    assert_eq!(i32s(&data), [0, 1, 0, 1, 0, 1, 0, 1]);
    assert_eq!(i32s(&array("virtual_layers").1), [0, 2, 1, 3, 0, 2, 1, 3]);
    let (header, data) = array("microbatches");
    assert!(header.contains("'<i8'"), "{header}");
    assert_eq!(data.chunks(8).map(|b| b[0]).collect::<Vec<_>>(), [0, 0, 1, 1, 2, 2, 3, 3]);
    let (header, data) = array("post_physical_loads");
    assert!(header.contains("'shape': (8, 6)"), "{header}");
    let after = i32s(&data);
    for (record, row) in records.iter().zip(after.chunks(6)) {
        let load = |e: usize| (record.before[e] + record.before[4 + e]) as i32;
        let moved = if record.layer == 1 { 10 } else { 0 };
        assert_eq!(row, [load(0), load(1), moved, load(2), load(3) - moved, 0]);
    }
    let (header, data) = array("metadata");
    assert!(header.contains("'<U") && header.contains("'shape': ()"), "{header}");
    let text: String = data.chunks(4).map(|b| char::from(b[0])).collect();
    let metadata: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let expected = json!({
        "schema": "ultra_ep_trace_v1", "trace_id": "t", "ep_size": 2, "num_layers": 2, "nvl_domain_size": 2,
        "num_local_master_experts": 2, "num_local_redundant_experts": 1, "num_local_physical_experts": 3,
        "num_global_logical_experts": 4, "num_global_physical_experts": 6, "chunk_id": 0, "records": 8,
    });
    for (key, value) in expected.as_object().expect("an object") {
        assert_eq!(&metadata[key], value, "{key}");
    }
}

#[test]
fn tensorrt_statistics_keep_their_sources() {
    let folder = TempDir::new().expect("a folder");
    write(folder.path().join("meta_info.json"), "{\"num_experts\": 2, \"num_experts_per_token\": 1}");
    for rank in 0..2_i64 {
        let keys = if rank == 0 { vec!["0_3", "10_3", "2_3"] } else { vec!["0_3", "10_3"] };
        let mut header = serde_json::Map::new();
        header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
        let mut data = Vec::new();
        for (index, key) in keys.iter().enumerate() {
            header.insert(
                (*key).to_owned(),
                json!({"dtype": "I64", "shape": [2], "data_offsets": [index * 16, index * 16 + 16]}),
            );
            for expert in 0..2 {
                data.extend((100 * rank + 10 * index as i64 + expert).to_le_bytes());
            }
        }
        let header = serde_json::Value::Object(header).to_string();
        let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
        write(folder.path().join(format!("rank{rank}.safetensors")), bytes);
    }
    let mut recording = open(&[folder.path().to_owned()]).expect("opened");
    assert_eq!((recording.info().sources, recording.info().top_k), (Sources::Ranks(2), Some(1)));
    let expected = [
        counts(0, 0, 3, 2, &[0, 1, 100, 101]),
        counts(2, 0, 3, 2, &[20, 21, 0, 0]),
        counts(10, 0, 3, 2, &[10, 11, 110, 111]),
    ];
    assert_eq!(pieces(&mut *recording), expected);
    assert!(recording.ending().is_some_and(|words| words.starts_with("1 records lack")));
}

#[test]
fn megatron_traces_keep_their_sources_and_put_layers_in_order() {
    let folder = TempDir::new().expect("a folder");
    let row = |rank: usize, step: u64, layer: u32, indices: &str, tokens: usize| {
        format!(
            "{{\"step\": {step}, \"stage\": \"train\", \"layer\": {layer}, \"rank\": {rank}, \"num_tokens\": {tokens}, \
                 \"topk\": 2, \"top_indices\": {indices}}}\n"
        )
    };
    let first = row(0, 1, 2, "[[0, 1], [0, 3]]", 2) + &row(0, 1, 1, "[[1, 2]]", 1) + &row(0, 1, 1, "[[2, 2]]", 1);
    let second = row(1, 1, 1, "[[3, 0]]", 1) + &row(1, 2, 1, "[]", 0);
    let paths = [
        write(folder.path().join("router_trace_rank0.jsonl"), &first),
        write(folder.path().join("router_trace_rank10.jsonl"), second),
    ];
    let mut recording = open(&[folder.path().to_owned()]).expect("opened");
    assert_eq!((recording.info().sources, recording.info().top_k), (Sources::Ranks(2), Some(2)));
    let expected = [
        counts(1, 0, 1, 2, &[0, 1, 1, 0, 1, 0, 0, 1]),
        counts(1, 1, 1, 2, &[0, 0, 2, 0, 0, 0]),
        counts(1, 0, 2, 2, &[2, 1, 0, 1, 0, 0, 0, 0]),
    ];
    let all = pieces(&mut *recording);
    assert_eq!(all[0], expected[0]);
    assert_eq!(all[1], counts(1, 1, 1, 2, &[0, 0, 2, 0, 0, 0]));
    assert_eq!(all[2..], expected[2..]);
    // The first rank's file ended before step 2; in step 1 the second lacks two records.
    let ending = recording.ending().expect("words");
    assert!(ending.contains("1 records that some ranks lack at their end are left out"), "{ending}");
    assert!(ending.contains("2 records lack some ranks"), "{ending}");
    assert!(ending.contains("1 tokens with an expert twice"), "{ending}");
    // One file alone knows no other rank: its tokens in order.
    let mut alone = open(&paths[..1]).expect("opened");
    assert_eq!(alone.info().sources, Sources::Tokens);
    // A token with one expert in both places is padding where single tokens are read.
    assert_eq!(pieces(&mut *alone).len(), 3);
}
