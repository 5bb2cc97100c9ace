//! Every reader on a small recording written here, and the rules by which sources are made.

mod common;

use std::io::Write;
use std::path::PathBuf;

use common::{Folder, pieces};
use ultraep_import::{
    Format, Grouping, Load, Microbatch, Microbatches, OpenOptions, Piece, Recording, SourceRule, Sources, open,
    open_with, spread, survey,
};

fn choices(pieces: &[Piece]) -> Vec<(u32, Vec<u16>)> {
    let tokens = |piece: &Piece| match &piece.load {
        Load::Choices { per_token, ids } => {
            ids.chunks(*per_token).map(|token| (piece.layer, token.to_vec())).collect::<Vec<_>>()
        }
        Load::Counts { .. } => panic!("counts"),
    };
    pieces.iter().flat_map(tokens).collect()
}

fn microbatches(recording: &mut dyn Recording, grouping: Grouping) -> Vec<Microbatch> {
    let mut made = Microbatches::new(recording, grouping).expect("a grouping");
    let (mut all, mut microbatch) = (Vec::new(), Microbatch::default());
    while made.next(&mut microbatch).expect("a microbatch") {
        all.push(microbatch.clone());
    }
    all
}

#[test]
fn moe_beyond_rows_with_tokens_of_any_character() {
    let folder = Folder::new();
    let text = "Layer ID,Batch Number,Token,Activated Expert IDs\n\
                1,0,What,\"[8, 2]\"\n1,0,\",\",\"[1, 0]\"\n1,0,\"a \"\"\nb\",\"[3,4]\"\n26,0,\u{120}are,\"[5, 6]\"\n";
    let path = folder.with("prompt.csv", text);
    let mut recording = open(&[path]).expect("opened");
    assert_eq!(recording.info().format, Format::MoeBeyond);
    assert_eq!(recording.info().sources, Sources::Tokens);
    let all = choices(&pieces(&mut *recording));
    assert_eq!(all, [(1, vec![8, 2]), (1, vec![1, 0]), (1, vec![3, 4]), (26, vec![5, 6])]);
}

fn vllm_log() -> String {
    let row = |token: usize, ids: &str| {
        format!(
            "{{\"type\": \"route\", \"req_id\": \"r1\", \"token_idx\": {token}, \"layer\": 3, \"topk_ids\": {ids}, \
                 \"topk_weights\": [0.5, 0.25]}}\n"
        )
    };
    let mut log = "{\"type\": \"meta\", \"model_id\": \"m\", \"layers_logged\": [3], \"top_k\": 2}\n".to_owned();
    (0..8).for_each(|token| log += &row(token, if token % 2 == 0 { "[4, 5]" } else { "[5, 4]" }));
    (0..4).for_each(|token| log += &row(token, "[4, 5]"));
    // A real pass that begins with equal tokens.
    for (token, ids) in ["[1, 2]", "[2, 1]", "[7, 2]", "[0, 2]"].into_iter().enumerate() {
        log += &row(token, ids);
    }
    log
}

#[test]
fn vllm_logs_with_and_without_their_dummy_run() {
    let folder = Folder::new();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gzip.write_all(vllm_log().as_bytes()).expect("packed");
    let path = folder.with("log.jsonl.gz", gzip.finish().expect("packed"));
    let mut all = open(std::slice::from_ref(&path)).expect("opened");
    assert_eq!((all.info().format, all.info().top_k), (Format::VllmLogger, Some(2)));
    assert_eq!(pieces(&mut *all).len(), 16);
    let options = OpenOptions { drop_dummy_run: true, ..OpenOptions::default() };
    let mut real = open_with(&[path], &options).expect("opened");
    let rows = choices(&pieces(&mut *real));
    assert_eq!(rows, [(3, vec![1, 2]), (3, vec![2, 1]), (3, vec![7, 2]), (3, vec![0, 2])]);
    assert_eq!(real.ending().as_deref(), Some("12 rows of the engine's profiling (dummy) run left out"));
}

#[test]
fn counts_by_layer_and_expert_are_totals_and_files_are_steps() {
    let folder = Folder::new();
    let first = folder.with("a.json", "{\"0\": {\"0\": 5, \"3\": 7}, \"15\": {\"1\": 2}}");
    let second = folder.with("b.json", "{\"15\": {\"3\": 9}}");
    let mut recording = open(&[first, second]).expect("opened");
    let all = pieces(&mut *recording);
    let counts = |step, layer, counts: &[u32]| Piece {
        step,
        microbatch: 0,
        layer,
        load: Load::Counts { sources: 1, counts: counts.to_vec() },
    };
    assert_eq!(all, [counts(0, 0, &[5, 0, 0, 7]), counts(0, 15, &[0, 2]), counts(1, 15, &[0, 0, 0, 9])]);
}

#[test]
fn plain_matrices_of_every_shape() {
    let folder = Folder::new();
    let paths = [
        folder.with("a.json", "[[[1, 2], [3, 4]], [[5, 6], [7, 8]]]"),
        folder.with("b.csv", "1,2\n3,4\n"),
        folder.with("c.json", "{\"loads\": [[1, 2], [3, 4]]}"),
        folder.with("d.npy", npy("<i8", "(2, 1, 2, 2)", (1..=8_i64).flat_map(i64::to_le_bytes).collect())),
        folder.with("e.npy", npy(">u2", "(2, 2)", (1..=4_u16).flat_map(u16::to_be_bytes).collect())),
    ];
    let expected: [&[(u64, u32, [u32; 4])]; 5] = [
        &[(0, 0, [1, 2, 3, 4]), (0, 1, [5, 6, 7, 8])],
        &[(0, 0, [1, 2, 3, 4])],
        &[(0, 0, [1, 2, 3, 4])],
        &[(0, 0, [1, 2, 3, 4]), (1, 0, [5, 6, 7, 8])],
        &[(0, 0, [1, 2, 3, 4])],
    ];
    for (path, expected) in paths.into_iter().zip(expected) {
        let mut recording = open(&[path]).expect("opened");
        assert_eq!(recording.info().sources, Sources::Ranks(2));
        let all = pieces(&mut *recording);
        let got = all.iter().map(|p| match &p.load {
            Load::Counts { sources: 2, counts } => (p.step, p.layer, counts.clone()),
            other => panic!("{other:?}"),
        });
        assert!(got.eq(expected.iter().map(|(s, l, c)| (*s, *l, c.to_vec()))));
    }
}

fn npy(descr: &str, shape: &str, data: Vec<u8>) -> Vec<u8> {
    let header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n");
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.bytes());
    bytes.extend(data);
    bytes
}

#[test]
fn windows_of_tokens_keep_every_choice_and_share_them_by_the_rule() {
    let folder = Folder::new();
    let mut text = "Layer ID,Batch Number,Token,Activated Expert IDs\n".to_owned();
    for token in 0..11 {
        text += &format!("2,0,t,\"[{}, {}]\"\n", token % 4, (token + 1) % 4);
    }
    let path = folder.with("p.csv", text);
    let grouping = Grouping { ranks: 2, experts: 4, microbatch_tokens: 4, rule: SourceRule::Blocks, scale: 3 };
    let mut recording = open(std::slice::from_ref(&path)).expect("opened");
    let mut made = Microbatches::new(&mut *recording, grouping).expect("a grouping");
    let mut first = Microbatch::default();
    assert!(made.next(&mut first).expect("a microbatch"));
    // Tokens 0 and 1 on rank 0, 2 and 3 on rank 1; each stands for three.
    assert_eq!((first.layer, first.step, first.counts), (2, 0, vec![3, 6, 3, 0, 3, 0, 3, 6]));
    let mut second = Microbatch::default();
    assert!(made.next(&mut second).expect("a microbatch"));
    assert_eq!(second.step, 1);
    assert!(!made.next(&mut second).expect("the end"));
    assert_eq!((made.leftover().tokens, made.leftover().used_tokens), (3, 8));
    // Fewer tokens than a window holds: the only window is kept, and its tokens go to all ranks.
    let whole = Grouping { microbatch_tokens: 100, rule: SourceRule::RoundRobin, scale: 1, ..grouping };
    let mut recording = open(&[path]).expect("opened");
    let all = microbatches(&mut *recording, whole);
    assert_eq!(all.len(), 1);
    assert_eq!(all[0].counts.iter().sum::<u32>(), 22);
    assert_eq!(all[0].counts[..4].iter().sum::<u32>(), 12);
}

#[test]
fn merging_sources_is_exact_and_splitting_is_even() {
    let mut out = Vec::new();
    spread(&[1, 2, 3, 4, 5, 6, 7, 8], 4, 2, 2, &mut out);
    assert_eq!(out, [4, 6, 12, 14]);
    spread(&[10, 3], 1, 4, 2, &mut out);
    let of = |expert: usize| out.iter().skip(expert).step_by(2).copied().collect::<Vec<_>>();
    assert_eq!(of(0).iter().sum::<u32>(), 10);
    assert_eq!(of(1).iter().sum::<u32>(), 3);
    assert!(of(0).iter().all(|c| (2..=3).contains(c)) && of(1).iter().all(|&c| c <= 1), "{out:?}");
}

proptest::proptest! {
    #[test]
    fn spreading_loses_no_token(
        sources in 1..20_usize, ranks in 1..20_usize, experts in 1..9_usize, seed in proptest::prelude::any::<u64>()
    ) {
        let count = |i: usize| (seed.rotate_left(i as u32 % 63) >> (i % 50)) as u32 % 1000;
        let counts: Vec<u32> = (0..sources * experts).map(count).collect();
        let mut out = Vec::new();
        spread(&counts, sources, ranks, experts, &mut out);
        for expert in 0..experts {
            let total = |c: &[u32]| c.iter().skip(expert).step_by(experts).sum::<u32>();
            proptest::prop_assert_eq!(total(&counts), total(&out));
        }
        // Seen over all experts, no rank is more than a token an expert and source off its even share.
        let even = counts.iter().sum::<u32>() as f64 / ranks as f64;
        if sources == 1 {
            for row in out.chunks(experts) {
                proptest::prop_assert!((f64::from(row.iter().sum::<u32>()) - even).abs() <= experts as f64);
            }
        }
    }
}

#[test]
fn a_survey_tells_what_only_reading_tells() {
    let folder = Folder::new();
    let path = folder.with("log.jsonl", vllm_log());
    let found = survey(&mut *open(&[path]).expect("opened")).expect("surveyed");
    assert_eq!(found.experts, 8);
    assert_eq!(found.layers[&3].tokens, 16);
    assert_eq!(found.layers[&3].choices, 32);
}

/// The folder of real recordings, where there is one.
fn real(name: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("ULTRAEP_TRACES").map(PathBuf::from).filter(|f| f.is_dir());
    if folder.is_none() {
        println!("SKIP {name}: set ULTRAEP_TRACES to the folder of real recordings");
    }
    folder.map(|f| f.join(name))
}

#[test]
fn real_moe_beyond_recordings() {
    let Some(folder) = real("deepseek-v2-lite") else { return };
    let found = survey(&mut *open(&[folder]).expect("opened")).expect("surveyed");
    assert_eq!(found.experts, 64);
    assert!(found.layers.keys().copied().eq(1..=26));
    assert!(
        found.layers.values().all(|layer| layer.tokens == found.layers[&1].tokens && layer.choices == 6 * layer.tokens)
    );
}

#[test]
fn real_vllm_logs_and_their_dummy_run() {
    let Some(folder) = real("qwen1.5-moe") else { return };
    let options = OpenOptions { drop_dummy_run: true, ..OpenOptions::default() };
    let mut recording = open_with(&[folder], &options).expect("opened");
    let found = survey(&mut *recording).expect("surveyed");
    assert_eq!(found.experts, 60);
    assert!(found.layers.keys().copied().eq([0, 12, 23]));
    assert!(found.layers.values().all(|layer| layer.tokens == 12_805 - 8448 && layer.choices == 4 * layer.tokens));
}

#[test]
fn real_expert_counts() {
    let Some(folder) = real("olmoe") else { return };
    let found = survey(&mut *open(&[folder]).expect("opened")).expect("surveyed");
    assert_eq!((found.experts, found.steps), (64, Some((0, 5))));
    assert!(found.layers.keys().copied().eq([0, 7, 15]));
}
