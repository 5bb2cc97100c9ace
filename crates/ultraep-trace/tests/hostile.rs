//! Torn, damaged and lying files: refused or told, never believed, in bounded memory.

mod common;

use std::io::{self, Cursor, Write};

use common::{Draws, Shape, meta, open, read_all, records, write};
use ultraep_trace::{
    BlockSize, DecodeError, MAX_BLOCK_BYTES, MAX_HEADER_BYTES, MetaError, Record, TraceError, TraceFile, TraceMeta,
    TraceReader, TraceWriter,
};

const SHAPE: Shape = Shape { ranks: 3, experts: 5, layers: 2, top_k: 2 };

/// A small trace of several blocks, compressed ones among them, and where each block begins and the index begins.
fn small() -> (Vec<Record>, Vec<u8>, Vec<usize>) {
    let records = records(23, SHAPE, &mut Draws(7));
    let bytes = write(&records, &meta(SHAPE), BlockSize { records: 5, ..BlockSize::default() });
    let mut starts: Vec<usize> = open(&bytes).blocks().iter().map(|b| b.offset as usize).collect();
    starts
        .push(open(&bytes).blocks().last().map(|b| b.offset as usize + 48 + b.payload_bytes as usize).expect("blocks"));
    (records, bytes, starts)
}

#[test]
fn a_file_cut_at_any_byte_gives_its_whole_blocks_and_says_what_is_torn() {
    let (records, bytes, starts) = small();
    for length in 0..bytes.len() {
        let cut = &bytes[..length];
        let (read, ending) = read_all(cut);
        if length < starts[0] {
            let refused = ending.expect_err("no header");
            assert!(matches!(refused, TraceError::NotATrace | TraceError::Header(_)), "{length}: {refused}");
            assert!(TraceFile::open(Cursor::new(cut)).is_err());
            continue;
        }
        let ending = ending.expect("a torn end is no error");
        let whole = starts.iter().rposition(|&start| start <= length).expect("header is whole");
        assert_eq!(read, records[..(5 * whole).min(23)], "{length}");
        assert_eq!(ending.dropped_bytes, (length - starts[whole]) as u64, "{length}");
        assert!(!ending.is_closed);
        let torn = length - starts[whole];
        let expected = match torn {
            0 => Some(0),
            1..48 => None,
            _ if whole == starts.len() - 1 => Some(0), // the index
            _ => Some(if whole == 4 { 3 } else { 5 }),
        };
        assert_eq!(ending.dropped_records, expected, "{length}");
        assert_eq!(ending.describe().is_some_and(|words| words.contains("torn")), torn > 0);

        let mut file = open(cut);
        assert_eq!((file.ending(), file.records()), (ending, read.len() as u64), "{length}: both readers agree");
        let mut record = Record::default();
        for (number, expected) in read.iter().enumerate().rev() {
            file.read(number as u64, &mut record).expect("record");
            assert_eq!(record, *expected);
        }
    }
}

#[test]
fn any_flipped_bit_is_refused_or_told() {
    let (records, bytes, _) = small();
    for bit in 0..8 * bytes.len() {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        let (read, ending) = read_all(&flipped);
        assert_eq!(read, records[..read.len()], "bit {bit}: what is read is right");
        assert!(ending.is_err() || ending.is_ok_and(|e| !e.is_closed && e.dropped_bytes > 0), "bit {bit}");

        let Ok(mut file) = TraceFile::open(Cursor::new(&flipped)) else { continue };
        let mut record = Record::default();
        let mut told = !file.ending().is_closed;
        for (number, expected) in records.iter().enumerate() {
            match file.read(number as u64, &mut record) {
                Ok(()) => assert_eq!(record, *expected, "bit {bit}"),
                Err(_) => told = true,
            }
        }
        assert!(told, "bit {bit}");
    }
}

#[test]
fn damage_in_the_middle_is_an_error_and_not_a_torn_end() {
    let (records, bytes, starts) = small();
    for at in [starts[1], starts[1] + 10, starts[1] + 60] {
        let mut damaged = bytes[..starts[3]].to_vec(); // without an index
        damaged[at] ^= 0xff;
        let (read, ending) = read_all(&damaged);
        assert_eq!(read, records[..5]);
        let error = ending.expect_err("damaged");
        assert!(matches!(error, TraceError::Damaged { offset, .. } if offset == starts[1] as u64), "{error}");
    }
    let block = bytes[starts[1]..starts[2]].to_vec();
    let tail = &bytes[starts[2]..];
    let (twice, lost) = ([&bytes[..starts[2]], &block, tail].concat(), [&bytes[..starts[1]], tail].concat());
    let doubled = [&bytes[..], &bytes[..]].concat();
    for (name, bytes) in [("a block twice", twice), ("a block lost", lost), ("two files in one", doubled)] {
        let error = read_all(&bytes).1.expect_err(name);
        assert!(matches!(error, TraceError::Damaged { .. }), "{name}: {error}");
        assert!(TraceFile::open(Cursor::new(&bytes)).is_err(), "{name}");
    }
    let mut zeros = bytes[..starts[2]].to_vec();
    zeros.resize(starts[2] + 10_000, 0); // as file systems leave after a power cut
    let (read, ending) = read_all(&zeros);
    assert_eq!((read.len(), ending.expect("torn").dropped_bytes), (10, 10_000));
    assert_eq!(open(&zeros).ending().dropped_bytes, 10_000);
}

/// A file with one block whose header has right checksums and says what it is told.
struct Forged {
    marker: [u8; 4],
    record_count: u32,
    payload_bytes: u32,
    raw_bytes: u32,
    payload: Vec<u8>,
}

impl Forged {
    /// A block of stored records, sizes right.
    fn stored(payload: Vec<u8>) -> Self {
        let bytes = payload.len() as u32;
        Self { marker: *b"UETB", record_count: 1, payload_bytes: bytes, raw_bytes: bytes, payload }
    }

    fn file(&self, meta: &TraceMeta) -> Vec<u8> {
        let mut file = TraceWriter::new(Vec::new(), meta.clone()).expect("writer").output().clone();
        let mut header = self.marker.to_vec();
        header.extend_from_slice(&self.record_count.to_le_bytes());
        header.extend_from_slice(&[0; 24]);
        header.extend_from_slice(&self.payload_bytes.to_le_bytes());
        header.extend_from_slice(&self.raw_bytes.to_le_bytes());
        header.extend_from_slice(&crc32fast::hash(&self.payload).to_le_bytes());
        header.extend_from_slice(&crc32fast::hash(&header).to_le_bytes());
        file.extend(header);
        file.extend_from_slice(&self.payload);
        file
    }
}

#[test]
fn lying_sizes_are_refused_before_anything_is_allocated() {
    let meta = meta(SHAPE);
    let bomb = {
        let mut compressor = flate2::Compress::new(flate2::Compression::best(), false);
        let mut out = Vec::with_capacity(1 << 20);
        let zeros = vec![0; MAX_BLOCK_BYTES as usize + 1];
        compressor.compress_vec(&zeros, &mut out, flate2::FlushCompress::Finish).expect("compress");
        out
    };
    assert!(bomb.len() < 40_000, "a thousandfold");
    type Expected = fn(&TraceError) -> bool;
    let limit: Expected = |e| matches!(e, TraceError::Limit { .. });
    let damaged: Expected = |e| matches!(e, TraceError::Damaged { .. });
    let bytes = bomb.len() as u32;
    let forged = |raw_bytes| Forged { payload_bytes: bytes, raw_bytes, ..Forged::stored(bomb.clone()) };
    let cases: Vec<(&str, Forged, Expected)> = vec![
        ("raw size over the limit", forged(u32::MAX), limit),
        ("raw size over the limit by one", forged(MAX_BLOCK_BYTES + 1), limit),
        ("expands to more than it says", forged(MAX_BLOCK_BYTES), damaged),
        ("expands to far more than it says", forged(100), damaged),
        ("payload over the limit", Forged { payload_bytes: u32::MAX, ..forged(100) }, limit),
        ("records over the limit", Forged { record_count: u32::MAX, ..forged(100) }, limit),
        ("no records", Forged { record_count: 0, ..forged(100) }, damaged),
        ("not DEFLATE", Forged { raw_bytes: 9, ..Forged::stored(vec![0xff; 8]) }, damaged),
    ];
    for (name, forged, expected) in cases {
        let error = read_all(&forged.file(&meta)).1.expect_err(name);
        assert!(expected(&error), "{name}: {error}");
        let mut record = Record::default();
        let opened = TraceFile::open(Cursor::new(forged.file(&meta)));
        let error = opened.and_then(|mut file| file.read(0, &mut record)).expect_err(name);
        assert!(expected(&error), "{name}: {error}");
    }
    for (record_count, payload_bytes) in [(u32::MAX, 40), (1, 40), (0, 40), (1 << 30, u32::MAX)] {
        let index = Forged { marker: *b"UETI", record_count, payload_bytes, raw_bytes: 40, payload: vec![0; 40] };
        let mut file = index.file(&meta);
        let offset = (file.len() - 88) as u64;
        file.extend_from_slice(&offset.to_le_bytes());
        file.extend_from_slice(b"UETEND\r\n");
        let error = TraceFile::open(Cursor::new(&file)).expect_err("a lying index");
        assert!(damaged(&error), "{record_count}: {error}");
        assert!(read_all(&file).1.is_err(), "{record_count}");
    }
}

#[test]
fn records_that_lie_inside_a_right_block_are_refused() {
    let meta = meta(SHAPE);
    let counts = [0_u8; 15];
    let plan_until_instances = [&counts[..], &[0], &[0; 8]].concat(); // counts, no policy name, digest
    let body = |flags: u8, rest: &[u8]| [&[0, 0, 0, flags], rest].concat();
    let huge = [0xff, 0xff, 0xff, 0xff, 0x0f]; // u32::MAX
    type Expected = fn(&DecodeError) -> bool;
    let cases: Vec<(&str, Vec<u8>, Expected)> = vec![
        ("counts missing", body(0, &counts[1..]), |e| matches!(e, DecodeError::Short("counts"))),
        ("a byte too many", body(0, &[0; 16]), |e| matches!(e, DecodeError::Trailing(1))),
        ("unknown flags", body(8, &counts), |e| matches!(e, DecodeError::Flags(8))),
        ("split without plan", body(2, &counts), |e| matches!(e, DecodeError::Flags(2))),
        ("a count below zero", body(0, &[&[0; 5][..], &[1], &[0; 9]].concat()), |e| {
            matches!(e, DecodeError::Range("counts"))
        }),
        ("too many tokens", body(0, &[&huge[..], &counts[1..]].concat()), |e| matches!(e, DecodeError::Record(_))),
        ("an endless varint", body(0, &[0xff; 40]), |e| matches!(e, DecodeError::Range("counts"))),
        ("a policy name of 2 GiB", body(1, &[&counts[..], &huge].concat()), |e| {
            matches!(e, DecodeError::Range("policy"))
        }),
        ("a policy name that is not there", body(1, &[&counts[..], &[9]].concat()), |e| {
            matches!(e, DecodeError::Short("policy"))
        }),
        ("not UTF-8", body(1, &[&counts[..], &[1, 0xff], &[0; 20]].concat()), |e| matches!(e, DecodeError::Policy)),
        ("more instances than ranks", body(1, &[&plan_until_instances[..], &huge].concat()), |e| {
            matches!(e, DecodeError::Range("instances"))
        }),
        ("instances that are not there", body(1, &[&plan_until_instances[..], &[3, 0, 0]].concat()), |e| {
            matches!(e, DecodeError::Short("instances"))
        }),
        ("rank out of range", body(1, &[&plan_until_instances[..], &[1], &huge, &[0, 0]].concat()), |e| {
            matches!(e, DecodeError::Range("rank of an instance"))
        }),
        ("tokens for 2 Gi ids", body(4, &[&counts[..], &[0xff, 0xff, 0xff, 0xff, 7], &[0, 0]].concat()), |e| {
            matches!(e, DecodeError::Short("top-k ids"))
        }),
        ("tokens past the limit", body(4, &[&counts[..], &huge, &huge, &huge].concat()), |e| {
            matches!(e, DecodeError::Record(_))
        }),
    ];
    for (name, body, expected) in cases {
        let payload = [&[body.len() as u8][..], &body].concat();
        let error = read_all(&Forged::stored(payload).file(&meta)).1.expect_err(name);
        match &error {
            TraceError::Decode { record: 0, source, .. } => assert!(expected(source), "{name}: {source:?}"),
            _ => panic!("{name}: {error:?}"),
        }
    }
    for (name, length) in [("past the block", 200_u8), ("of many bytes", 0xff)] {
        let payload = [&[length][..], &body(0, &counts)].concat();
        let error = read_all(&Forged::stored(payload).file(&meta)).1.expect_err(name);
        assert!(matches!(error, TraceError::Decode { source: DecodeError::Short(_), .. }), "{name}: {error}");
    }
    let payload = [&[19_u8][..], &body(0, &counts), &[0]].concat();
    let error = read_all(&Forged::stored(payload).file(&meta)).1.expect_err("a byte behind the last record");
    assert!(matches!(error, TraceError::Damaged { .. }), "{error}");
}

/// A file header around any JSON, with right lengths and checksum.
fn with_json(json: &[u8]) -> Vec<u8> {
    let mut file = b"\x89UET\r\n\x1a\n\x01\0\0\0".to_vec();
    file.extend_from_slice(&(json.len() as u32).to_le_bytes());
    file.extend_from_slice(&crc32fast::hash(json).to_le_bytes());
    file.extend_from_slice(json);
    file
}

#[test]
fn headers_that_lie_are_refused() {
    let refused = |bytes: &[u8]| TraceReader::new(bytes).map(|_| ()).expect_err("refused");
    assert!(matches!(refused(b""), TraceError::NotATrace));
    assert!(matches!(refused(b"PK\x03\x04 something else entirely"), TraceError::NotATrace));
    let mut version = with_json(b"{}");
    version[8] = 2;
    assert_eq!(refused(&version).to_string(), "trace version 2; this reader knows version 1");
    let mut long = with_json(b"{}");
    long[12..16].copy_from_slice(&(MAX_HEADER_BYTES + 1).to_le_bytes());
    assert!(matches!(refused(&long), TraceError::Limit { offset: 12, .. }));
    assert!(matches!(refused(&with_json(b"{}")), TraceError::Header(_)));
    assert!(matches!(refused(&with_json(b"[".repeat(5_000).as_slice())), TraceError::Header(_)), "no stack overflow");

    type Expected = fn(&MetaError) -> bool;
    let change = |change: &dyn Fn(&mut TraceMeta)| {
        let mut meta = meta(SHAPE);
        change(&mut meta);
        meta
    };
    let cases: Vec<(TraceMeta, Expected)> = vec![
        (change(&|m| m.schema = "ultraep.trace/2".into()), |e| matches!(e, MetaError::Schema { .. })),
        (change(&|m| m.ranks = 0), |e| matches!(e, MetaError::Range { what: "ranks", got: 0, .. })),
        (change(&|m| m.ranks = 1 << 40), |e| matches!(e, MetaError::Range { what: "ranks", .. })),
        (change(&|m| m.experts = 4097), |e| matches!(e, MetaError::Range { what: "experts", max: 4096, .. })),
        (change(&|m| m.layers = 0), |e| matches!(e, MetaError::Range { what: "layers", .. })),
        (change(&|m| m.top_k = Some(6)), |e| matches!(e, MetaError::Range { what: "top_k", got: 6, max: 5, .. })),
        (change(&|m| m.slots_per_rank.truncate(2)), |e| matches!(e, MetaError::Length { got: 2, ranks: 3, .. })),
        (change(&|m| m.slots_per_rank[0] = 5_000), |e| matches!(e, MetaError::Range { what: "slots_per_rank", .. })),
        (change(&|m| m.masters_per_rank[0] = 9), |e| matches!(e, MetaError::Masters { experts: 5, .. })),
        (change(&|m| m.domain_ranks = 2), |e| matches!(e, MetaError::Domain { domain_ranks: 2, ranks: 3 })),
        (change(&|m| m.domain_ranks = 0), |e| matches!(e, MetaError::Domain { domain_ranks: 0, .. })),
    ];
    for (meta, expected) in cases {
        let json = serde_json::to_vec(&meta).expect("JSON");
        match refused(&with_json(&json)) {
            TraceError::Meta(error) => assert!(expected(&error), "{error}"),
            error => panic!("{error}"),
        }
        assert!(matches!(TraceWriter::new(Vec::new(), meta), Err(TraceError::Meta(_))), "the writer refuses it too");
    }
}

/// An output that is full after some bytes.
struct Full {
    bytes: Vec<u8>,
    capacity: usize,
}

impl Write for Full {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let fits = bytes.len().min(self.capacity - self.bytes.len());
        self.bytes.extend_from_slice(&bytes[..fits]);
        if fits == 0 { Err(io::ErrorKind::StorageFull.into()) } else { Ok(fits) }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_full_disk_ends_the_trace_and_keeps_whole_blocks() {
    let (records, bytes, starts) = small();
    let output = Full { bytes: Vec::new(), capacity: starts[2] + 30 };
    let size = BlockSize { records: 5, ..BlockSize::default() };
    let mut writer = TraceWriter::with_block_size(output, meta(SHAPE), size).expect("room for the header");
    let failed = records.iter().position(|r| writer.append(r).is_err()).expect("the disk is full");
    assert_eq!(failed, 14, "at the end of the third block");
    assert!(matches!(writer.append(&records[14]), Err(TraceError::Ended { records: 10 })));
    assert!(matches!(writer.flush(), Err(TraceError::Ended { .. })));
    assert_eq!(writer.written_records(), 10);
    let kept = &writer.output().bytes;
    assert_eq!(kept[..], bytes[..starts[2] + 30]);
    let (read, ending) = read_all(kept);
    assert_eq!((read.len(), ending.expect("torn").dropped_bytes), (10, 30));
}
