//! Our traces as parquet: nothing is lost, what comes back is equal, and what lies is refused.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parquet::basic::Compression;
use parquet::data_type::{Int32Type, Int64Type};
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::file::writer::SerializedFileWriter;
use parquet::record::{Field, Row};
use parquet::schema::parser::parse_message_type;
use proptest::prelude::*;
use tempfile::TempDir;
use ultraep_import::{Format, Grouping, Load, PARQUET_KEY, Piece, SourceRule, Sources, open, write_parquet, write_uet};
use ultraep_plan::{Instance, PhysicalIndex, Rank, Topology, TopologySpec};
use ultraep_trace::{NO_EXPERT, PlanRecord, Record, TopKIds, TraceMeta, TraceReader, TraceWriter};

fn meta() -> TraceMeta {
    let spec = TopologySpec { ranks: 2, experts: 3, domain_ranks: 2, slots_per_rank: 1 };
    let mut meta = TraceMeta::of_topology(&Topology::new(spec).expect("a group"), 2);
    meta.top_k = Some(2);
    meta.metadata.insert("model".to_owned(), serde_json::json!("a \"model\""));
    meta
}

fn write_trace(path: &Path, records: &[Record]) {
    let mut writer = TraceWriter::new(File::create(path).expect("created"), meta()).expect("a header");
    records.iter().for_each(|record| writer.append(record).expect("appended"));
    writer.finish().expect("finished");
}

fn convert(folder: &Path, records: &[Record]) -> PathBuf {
    let (trace, parquet) = (folder.join("loads.uet"), folder.join("loads.parquet"));
    write_trace(&trace, records);
    let written = write_parquet(&trace, File::create(&parquet).expect("created")).expect("written");
    assert_eq!(written.records, records.len() as u64);
    parquet
}

/// A record with a plan, its split and ids where `parts` says so.
fn record(step: u64, counts: [u32; 6], parts: u8) -> Record {
    let at = |rank, physical, quota| Instance { rank: Rank::new(rank), physical: PhysicalIndex::new(physical), quota };
    let load = |expert: usize| counts[expert] + counts[3 + expert];
    let plan = PlanRecord {
        policy: "ultraep".to_owned(),
        digest: u64::MAX - step,
        offsets: vec![0, 2, 3, 4],
        instances: vec![at(0, 0, load(0)), at(1, 1, 0), at(0, 1, load(1)), at(1, 0, load(2))],
        split: (parts & 2 != 0)
            .then(|| counts.chunks(3).flat_map(|row| [row[0], 0, row[1], row[2]]).collect::<Vec<_>>()),
    };
    // A token for every choice, its second place empty.
    let ids = |row: &[u32]| {
        (0..3_u16)
            .flat_map(|e| std::iter::repeat_n([e, NO_EXPERT], row[usize::from(e)] as usize))
            .flatten()
            .collect::<Vec<_>>()
    };
    let top_k = (parts & 4 != 0).then(|| TopKIds {
        tokens: counts.chunks(3).map(|row| row.iter().sum()).collect(),
        ids: counts.chunks(3).flat_map(ids).collect(),
    });
    let after = (parts & 1 != 0).then_some(plan);
    Record { step, microbatch: 3, layer: u32::from(parts & 1), before: counts.to_vec(), after, top_k }
}

fn list(row: &Row, name: &str) -> Option<Vec<u64>> {
    match &row.get_column_iter().find(|(column, _)| *column == name).expect("a column").1 {
        Field::Null => None,
        Field::ListInternal(list) => Some(
            list.elements()
                .iter()
                .map(|field| if let Field::UInt(n) = field { u64::from(*n) } else { panic!("{field:?}") })
                .collect(),
        ),
        other => panic!("{name}: {other:?}"),
    }
}

#[test]
fn every_part_of_a_record_has_its_column() {
    let folder = TempDir::new().expect("a folder");
    let records: Vec<Record> = (0..8).map(|parts| record(u64::from(parts), [4, 0, 2, 1, 5, 0], parts)).collect();
    let path = convert(folder.path(), &records);
    let file = SerializedFileReader::new(File::open(path).expect("opened")).expect("parquet");
    let pairs = file.metadata().file_metadata().key_value_metadata().expect("pairs");
    let header =
        pairs.iter().find(|pair| pair.key == PARQUET_KEY).and_then(|pair| pair.value.clone()).expect("a header");
    assert_eq!(serde_json::from_str::<TraceMeta>(&header).expect("JSON"), meta());
    let rows: Vec<Row> = file.get_row_iter(None).expect("rows").map(|row| row.expect("a row")).collect();
    assert_eq!(rows.len(), records.len());
    let wide = |list: &[u32]| list.iter().map(|&n| u64::from(n)).collect::<Vec<_>>();
    for (row, record) in rows.iter().zip(&records) {
        assert_eq!(row.get_column_iter().next().expect("step").1, &Field::ULong(record.step));
        assert_eq!(list(row, "counts").expect("counts"), wide(&record.before));
        let plan = record.after.as_ref();
        let part = |part: fn(&Instance) -> u32| {
            plan.map(|p| p.instances.iter().map(|i| u64::from(part(i))).collect::<Vec<_>>())
        };
        assert_eq!(list(row, "instance_expert"), plan.map(|_| vec![0, 0, 1, 2]));
        assert_eq!(list(row, "instance_rank"), part(|i| i.rank.index() as u32));
        assert_eq!(list(row, "instance_physical"), part(|i| i.physical.index() as u32));
        assert_eq!(list(row, "instance_quota"), part(|i| i.quota));
        assert_eq!(list(row, "split"), plan.and_then(|p| p.split.as_deref().map(wide)));
        let ids = record.top_k.as_ref();
        assert_eq!(list(row, "top_k_tokens"), ids.map(|ids| wide(&ids.tokens)));
        assert_eq!(list(row, "top_k_ids"), ids.map(|ids| ids.ids.iter().map(|&id| u64::from(id)).collect()));
        let digest = row.get_column_iter().find(|(name, _)| *name == "digest").expect("digest").1;
        assert_eq!(*digest, plan.map_or(Field::Null, |p| Field::ULong(p.digest)));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// ours -> parquet -> ours: loads are equal; plans and ids are not carried back.
    #[test]
    fn there_and_back(rows in prop::collection::vec((0_u64..3, prop::array::uniform6(0_u32..50), 0_u8..8), 0..12)) {
        let folder = TempDir::new().expect("a folder");
        let mut step = u64::from(u32::MAX);
        let records: Vec<Record> = rows.into_iter().map(|(more, counts, parts)| {
            step += more;
            record(step, counts, parts)
        }).collect();
        let path = convert(folder.path(), &records);
        let mut recording = open(&[path]).expect("opened");
        let info = recording.info().clone();
        prop_assert_eq!((info.format, info.sources, info.experts), (Format::UetParquet, Sources::Ranks(2), Some(3)));
        prop_assert_eq!((info.domain_ranks, info.slots_per_rank, info.top_k), (Some(2), Some(1), Some(2)));
        let grouping = Grouping { ranks: 2, experts: 3, microbatch_tokens: 1, rule: SourceRule::Blocks, scale: 1 };
        let mut bytes = Vec::new();
        let written = write_uet(&mut *recording, grouping, 2, &mut bytes).expect("written");
        prop_assert_eq!((written.records, written.notes), (records.len() as u64, vec![]));
        let back: Vec<Record> = TraceReader::new(bytes.as_slice()).expect("a trace").map(|r| r.expect("a record")).collect();
        let loads: Vec<Record> = records.into_iter().map(|r| Record { after: None, top_k: None, ..r }).collect();
        prop_assert_eq!(back, loads);
    }
}

const SCHEMA: &str = "message trace {
    required int64 step (INTEGER(64,false));
    required int32 microbatch (INTEGER(32,false));
    required int32 layer (INTEGER(32,false));
    required group counts (LIST) { repeated group list { required int32 element (INTEGER(32,false)); } }
}";

/// A file with one row of these counts and a header that says `meta`.
fn lying(path: &Path, meta: &TraceMeta, (step, layer): (i64, i32), counts: &[i32]) {
    let header = KeyValue::new(PARQUET_KEY.to_owned(), serde_json::to_string(meta).expect("JSON"));
    let properties =
        WriterProperties::builder().set_compression(Compression::SNAPPY).set_key_value_metadata(Some(vec![header]));
    let schema = Arc::new(parse_message_type(SCHEMA).expect("a schema"));
    let file = File::create(path).expect("created");
    let mut file = SerializedFileWriter::new(file, schema, Arc::new(properties.build())).expect("a writer");
    let mut group = file.next_row_group().expect("a group");
    let mut column = group.next_column().expect("a column").expect("step");
    column.typed::<Int64Type>().write_batch(&[step], None, None).expect("written");
    column.close().expect("closed");
    for value in [0, layer] {
        let mut column = group.next_column().expect("a column").expect("a number");
        column.typed::<Int32Type>().write_batch(&[value], None, None).expect("written");
        column.close().expect("closed");
    }
    let mut column = group.next_column().expect("a column").expect("counts");
    let levels = vec![1_i16; counts.len()];
    let begins: Vec<i16> = (0..counts.len()).map(|i| i16::from(i > 0)).collect();
    column.typed::<Int32Type>().write_batch(counts, Some(&levels), Some(&begins)).expect("written");
    column.close().expect("closed");
    group.close().expect("closed");
    file.close().expect("closed");
}

#[test]
fn what_lies_is_refused() {
    let folder = TempDir::new().expect("a folder");
    let path = folder.path().join("lie.parquet");
    let first = |meta: &TraceMeta, place: (i64, i32), counts: &[i32]| {
        lying(&path, meta, place, counts);
        let mut piece = Piece::default();
        let read = open(std::slice::from_ref(&path)).and_then(|mut recording| recording.next(&mut piece));
        read.map(|_| piece).map_err(|error| error.to_string())
    };
    let piece = first(&meta(), (7, 1), &[1, 2, 3, 4, 5, 6]).expect("a good one");
    assert_eq!(piece.load, Load::Counts { sources: 2, counts: vec![1, 2, 3, 4, 5, 6] });
    let refused = |meta: &TraceMeta, place, counts: &[i32], word: &str| {
        let error = first(meta, place, counts).expect_err(word);
        assert!(error.contains(word) && !error.contains('\n'), "{error}");
    };
    refused(&meta(), (7, 1), &[1, 2, 3], "number of counts: 3");
    // A million values in a few bytes, where six are allowed.
    refused(&meta(), (7, 1), &vec![1; 1_000_000], "allowed are up to");
    refused(&meta(), (7, 1), &[1, -2, 3, 4, 5, 6], "no count of tokens");
    refused(&meta(), (7, 2), &[1, 2, 3, 4, 5, 6], "layer 2");
    refused(&meta(), (7, 1), &[i32::MAX, 2, 3, 4, 5, 6], "tokens of a record");
    let huge = TraceMeta { ranks: 1 << 40, ..meta() };
    refused(&huge, (7, 1), &[1, 2, 3, 4, 5, 6], "ranks");
}
