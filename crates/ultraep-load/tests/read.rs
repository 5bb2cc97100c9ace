//! Load files: what is read, and what is refused with which words.

use proptest::prelude::*;
use ultraep_load::{FileError, Format, LoadMatrix, parse, read_file, write};

fn ok(format: Format, bytes: &[u8]) -> LoadMatrix {
    parse(format, bytes).unwrap_or_else(|e| panic!("{format:?}: {e}"))
}

fn npy(descr: &str, order: bool, shape: &str, data: &[u8]) -> Vec<u8> {
    let order = if order { "True" } else { "False" };
    let text = format!("{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n");
    let mut file = b"\x93NUMPY\x01\x00".to_vec();
    file.extend((text.len() as u16).to_le_bytes());
    file.extend(text.bytes());
    file.extend(data);
    file
}

#[test]
fn all_formats_give_the_same_matrix() {
    let expected = LoadMatrix::new(2, 3, vec![1, 2, 3, 4, 5, 6]).unwrap();
    let wide: Vec<u8> = [1_i64, 2, 3, 4, 5, 6].iter().flat_map(|v| v.to_le_bytes()).collect();
    let big: Vec<u8> = [1_u16, 2, 3, 4, 5, 6].iter().flat_map(|v| v.to_be_bytes()).collect();
    assert_eq!(ok(Format::Json, br#"{"top_k": 8, "loads": [[1,2,3],[4,5,6]], "note": [[]]}"#), expected);
    assert_eq!(ok(Format::Csv, b"1, 2,3\r\n4,\"5\",6\n"), expected);
    assert_eq!(ok(Format::Npy, &npy("'<i8'", false, "(2, 3)", &wide)), expected);
    assert_eq!(ok(Format::Npy, &npy("'>u2'", false, "(2, 3)", &big)), expected);
    assert_eq!(ok(Format::Npy, &npy("'|u1'", true, "(2, 3)", &[1, 4, 2, 5, 3, 6])), expected, "Fortran order");
}

#[test]
fn bad_files_are_refused_with_place_and_reason() {
    let huge = format!("{{\"loads\": [[{}]]}}", u64::MAX);
    let wide = format!("{{\"loads\": [[{}0]]}}", "0,".repeat(4096));
    let tall = format!("{{\"loads\": [{}[]]}}", "[],".repeat(1024));
    let cases: &[(Format, &[u8], &str)] = &[
        (Format::Json, b"", "not JSON: EOF while parsing a value"),
        (Format::Json, b"{", "not JSON: EOF while parsing an object"),
        (Format::Json, br#"{"loads": [[1,2],[3"#, "not JSON: EOF while parsing a list"),
        (Format::Json, br#"{"loads": [[1]]} x"#, "not JSON: trailing characters"),
        (Format::Json, b"[[1]]", "not JSON: invalid type: sequence, expected an object with \"loads\""),
        (Format::Json, br#"{"load": [[1]]}"#, "no key \"loads\""),
        (Format::Json, br#"{"loads": [[1]], "loads": [[1]]}"#, "key \"loads\" twice"),
        (Format::Json, br#"{"loads": 3}"#, "expected a list of rows"),
        (Format::Json, br#"{"loads": [3]}"#, "expected a list of counts in row 0 (from 0)"),
        (Format::Json, br#"{"loads": []}"#, "0 rows"),
        (Format::Json, br#"{"loads": [[]]}"#, "0 columns"),
        (Format::Json, br#"{"loads": [[1,2],[3]]}"#, "row 1 (from 0) has 1 columns: allowed are 2"),
        (Format::Json, br#"{"loads": [[1,2],[3,-4]]}"#, "row 1, column 1 (from 0): -4 is no count"),
        (Format::Json, br#"{"loads": [[1.5]]}"#, "row 0, column 0 (from 0): 1.5 is no count"),
        (Format::Json, br#"{"loads": [[1e3]]}"#, "1000 is no count"),
        (Format::Json, br#"{"loads": [[NaN]]}"#, "not JSON: expected value"),
        (Format::Json, br#"{"loads": [["7"]]}"#, "\"7\" is no count"),
        (Format::Json, br#"{"loads": [[null]]}"#, "null is no count"),
        (Format::Json, br#"{"loads": [[true]]}"#, "true is no count"),
        (Format::Json, br#"{"loads": [[[1]]]}"#, "a list is no count"),
        (Format::Json, br#"{"loads": [[{}]]}"#, "an object is no count"),
        (Format::Json, br#"{"loads": [[2147483648]]}"#, "2147483648 is no count"),
        (Format::Json, br#"{"loads": [[2147483647, 1]]}"#, "2147483648 tokens in all"),
        (Format::Json, huge.as_bytes(), "18446744073709551615 is no count"),
        (Format::Json, wide.as_bytes(), "4097 columns"),
        (Format::Json, tall.as_bytes(), "1025 rows"),
        (Format::Csv, b"", "0 rows"),
        (Format::Csv, b"\n\n", "0 rows"),
        (Format::Csv, b"1,2\n3\n", "row 1 (from 0) has 1 columns"),
        (Format::Csv, b"1,2\n3,4,5\n", "row 1 (from 0) has 3 columns"),
        (Format::Csv, b"e0,e1\n1,2\n", "row 0, column 0 (from 0): \"e0\" is no count"),
        (Format::Csv, b"1,-2\n", "\"-2\" is no count"),
        (Format::Csv, b"1,+2\n", "\"+2\" is no count"),
        (Format::Csv, b"1,2.0\n", "\"2.0\" is no count"),
        (Format::Csv, b"1,nan\n", "\"nan\" is no count"),
        (Format::Csv, b"1,\n", "\"\" is no count"),
        (Format::Csv, b"1,99999999999999999999999\n", "is no count"),
        (Format::Csv, b"\xff\n", "is no count"),
    ];
    for (format, bytes, expected) in cases {
        let error = parse(*format, bytes).expect_err(expected).to_string();
        assert!(error.contains(expected), "{error:?} does not say {expected:?}");
    }
}

#[test]
fn bad_arrays_are_refused_with_their_reason() {
    let one = 1_i32.to_le_bytes();
    let negative: Vec<u8> = [1_i32, -1].iter().flat_map(|v| v.to_le_bytes()).collect();
    let good = npy("'<i4'", false, "(1, 1)", &one);
    let deep = npy("'<i4'", false, &"(".repeat(400), &one);
    let mut long = good.clone();
    long[8..10].copy_from_slice(&[0xff, 0xff]);
    let cases: &[(&[u8], &str)] = &[
        (b"", "no magic"),
        (b"\x93NUMPY\x01", "truncated header"),
        (&good[..40], "truncated header"),
        (b"\x93NUMPY\x09\x00\x00\x00\x00\x00", "unknown version"),
        (&long, "header of 65535 bytes"),
        (&good[..good.len() - 1], "3 bytes of data: allowed are 4"),
        (&[&good[..], b"x"].concat(), "5 bytes of data: allowed are 4"),
        (&npy("'<f4'", false, "(1, 1)", &one), "allowed are integers"),
        (&npy("'|O'", false, "(1, 1)", &one), "allowed are integers"),
        (&npy("[('a', '<i4')]", false, "(1, 1)", &one), "allowed are integers"),
        (&npy("'<i4'", false, "(1,)", &one), "array of 1 dimensions"),
        (&npy("'<i4'", false, "()", &one), "array of 0 dimensions"),
        (&npy("'<i4'", false, "(1, 1, 1)", &one), "array of 3 dimensions"),
        (&npy("'<i4'", false, "(0, 4)", &[]), "0 rows"),
        (&npy("'<i4'", false, "(4, 0)", &[]), "0 columns"),
        (&npy("'<i4'", false, "(9999, 9999)", &one), "9999 rows"),
        (&npy("'<i4'", false, "(18446744073709551615, 2)", &one), "larger numbers or more brackets"),
        (&npy("'<i4'", false, "(0xffffffffffffffff, 0xffffffffffffffff)", &one), "larger numbers or more brackets"),
        (&npy("'<i4'", false, "(-1, 1)", &one), "not NPY"),
        (&deep, "larger numbers or more brackets"),
        (&npy("'<i4'", false, "(1, 2)", &negative), "row 0, column 1 (from 0): -1 is no count"),
        (&npy("'<u8'", false, "(1, 1)", &[0xff; 8]), "18446744073709551615 is no count"),
    ];
    for (bytes, expected) in cases {
        let error = parse(Format::Npy, bytes).expect_err(expected).to_string();
        assert!(error.contains(expected), "{error:?} does not say {expected:?}");
    }
}

#[test]
fn files_are_named_in_errors() {
    let unknown = read_file("loads.txt".as_ref()).unwrap_err();
    assert_eq!(unknown.to_string(), "loads.txt: unknown extension: allowed are .json, .csv, .npy");
    let absent = read_file("no such folder/loads.csv".as_ref()).unwrap_err();
    assert!(matches!(absent, FileError::Io { .. }) && absent.to_string().starts_with("no such folder/loads.csv: "));
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(rows in 1_usize..6, columns in 1_usize..9, seed in any::<u32>()) {
        let count = |i: usize| (seed.wrapping_mul(i as u32 * 2 + 1)) >> (8 + i % 24);
        let matrix = LoadMatrix::new(rows, columns, (0..rows * columns).map(count).collect()).unwrap();
        for format in [Format::Json, Format::Csv, Format::Npy] {
            let mut file = Vec::new();
            write(&matrix, format, &mut file).unwrap();
            let read = parse(format, &file);
            prop_assert_eq!(read.as_ref(), Ok(&matrix));
        }
    }

    #[test]
    fn cut_and_changed_files_never_panic(cut in 0_usize..200, at in 0_usize..200, byte in any::<u8>()) {
        let files = [
            (Format::Json, br#"{"a": {"b": [1]}, "loads": [[1,2,3],[4,5,6]]}"#.to_vec()),
            (Format::Csv, b"1,2,3\n4,5,6\n".to_vec()),
            (Format::Npy, npy("'<i2'", false, "(2, 3)", &[0; 12])),
        ];
        for (format, mut file) in files {
            let (at, cut) = (at % file.len(), cut % (file.len() + 1));
            file[at] = byte;
            let _ = parse(format, &file);
            file.truncate(cut);
            let _ = parse(format, &file);
        }
    }
}
