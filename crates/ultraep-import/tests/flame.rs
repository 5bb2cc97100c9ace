//! FLAME-MoE recordings, written here with the same columns, codecs and folders.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use parquet::basic::{Compression, GzipLevel};
use parquet::data_type::{FloatType, Int32Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use tempfile::TempDir;
use ultraep_import::{Format, Load, Piece, Sources, open, survey};

const SCHEMA: &str = "message schema {
    optional group scores (LIST) { repeated group list { optional float element; } }
    optional group indices (LIST) { repeated group list { optional int32 element (INTEGER(16,true)); } }
}";

/// A row group a call; `rows` are the experts of each token.
fn write(path: &Path, codec: Compression, groups: &[Vec<Vec<i32>>]) {
    std::fs::create_dir_all(path.parent().expect("a folder")).expect("folders");
    let schema = Arc::new(parse_message_type(SCHEMA).expect("a schema"));
    let properties = Arc::new(WriterProperties::builder().set_compression(codec).build());
    let mut file =
        SerializedFileWriter::new(File::create(path).expect("created"), schema, properties).expect("a writer");
    for rows in groups {
        let (mut definitions, mut repetitions, mut values) = (Vec::new(), Vec::new(), Vec::new());
        for row in rows {
            if row.is_empty() {
                definitions.push(1_i16);
                repetitions.push(0_i16);
            }
            for (index, &value) in row.iter().enumerate() {
                definitions.push(3);
                repetitions.push(i16::from(index > 0));
                values.push(value);
            }
        }
        let scores: Vec<f32> = values.iter().map(|&v| v as f32).collect();
        let mut group = file.next_row_group().expect("a group");
        let mut column = group.next_column().expect("a column").expect("scores");
        column.typed::<FloatType>().write_batch(&scores, Some(&definitions), Some(&repetitions)).expect("written");
        column.close().expect("closed");
        let mut column = group.next_column().expect("a column").expect("indices");
        column.typed::<Int32Type>().write_batch(&values, Some(&definitions), Some(&repetitions)).expect("written");
        column.close().expect("closed");
        group.close().expect("closed");
    }
    file.close().expect("closed");
}

#[test]
fn layers_of_iterations_are_read_in_order() {
    let folder = TempDir::new().expect("a folder");
    let layer = |iteration: u32, layer: u32| {
        folder.path().join(format!("actives/iter_{iteration:04}/layer_{layer:02}.parquet"))
    };
    write(&layer(10, 3), Compression::SNAPPY, &[vec![vec![1, 2], vec![3, 4]], vec![vec![5, 6]]]);
    write(&layer(9, 3), Compression::GZIP(GzipLevel::default()), &[vec![vec![7, 8], vec![], vec![9]]]);
    write(&layer(9, 12), Compression::UNCOMPRESSED, &[(0..10_000).map(|i| vec![i % 16, i % 15, 17]).collect()]);
    let mut recording = open(&[folder.path().to_owned()]).expect("opened");
    assert_eq!((recording.info().format, recording.info().sources), (Format::FlameMoe, Sources::Tokens));
    let (mut piece, mut tokens) = (Piece::default(), Vec::new());
    while recording.next(&mut piece).expect("a piece") {
        let Load::Choices { per_token, ids } = &piece.load else { panic!("counts") };
        tokens.extend(ids.chunks(*per_token).map(|ids| (piece.layer, ids.to_vec())));
    }
    assert_eq!(tokens.len(), 2 + 10_000 + 3);
    assert_eq!(tokens[..2], [(3, vec![7, 8]), (3, vec![9])]);
    for (index, token) in tokens[2..10_002].iter().enumerate() {
        assert_eq!(*token, (12, vec![index as u16 % 16, index as u16 % 15, 17]));
    }
    assert_eq!(tokens[10_002..], [(3, vec![1, 2]), (3, vec![3, 4]), (3, vec![5, 6])]);
    let found = survey(&mut *open(&[layer(9, 12)]).expect("opened")).expect("surveyed");
    assert_eq!((found.experts, found.layers[&12].tokens), (18, 10_000));
}

#[test]
fn damaged_files_are_errors() {
    let folder = TempDir::new().expect("a folder");
    let path = folder.path().join("layer_01.parquet");
    write(&path, Compression::SNAPPY, &[(0..500).map(|i| vec![i % 60, 61]).collect()]);
    let good = std::fs::read(&path).expect("read");
    let read = |bytes: &[u8]| {
        std::fs::write(&path, bytes).expect("written");
        open(std::slice::from_ref(&path)).and_then(|mut recording| survey(&mut *recording))
    };
    assert!(read(&good).is_ok());
    for length in [0, 3, 4, 8, good.len() / 2, good.len() - 9, good.len() - 1] {
        assert!(read(&good[..length]).is_err(), "{length}");
    }
    for at in (0..good.len()).step_by(7) {
        let mut changed = good.clone();
        changed[at] ^= 0x55;
        let _ = read(&changed); // some bytes do not matter; none may panic
    }
    write(&path, Compression::SNAPPY, &[vec![vec![5000]]]);
    let error = open(std::slice::from_ref(&path)).and_then(|mut r| survey(&mut *r)).expect_err("an expert too many");
    assert!(error.to_string().contains("row 0 (from 0): expert 5000"), "{error}");
    let other = folder.path().join("other.parquet");
    std::fs::write(&other, &good).expect("written");
    assert!(open(&[other]).map(|_| ()).expect_err("a name").to_string().contains("layer_NN.parquet"));
}
