//! Damaged checkpoints, other text, other models, no room: one clear error, and what was saved stays.

mod common;

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use common::{Heard, corpus, job, run, small, try_run};
use tempfile::TempDir;
use ultraep_train::{CheckpointInfo, RankJob, TrainConfig, Weights, find_checkpoint};

fn saved() -> (TempDir, PathBuf) {
    let folder = TempDir::new().unwrap();
    let (outcome, _) = run(&job(TrainConfig { steps: 1, ..small() }, Some(folder.path())));
    let checkpoint = outcome.checkpoint.unwrap();
    (folder, checkpoint)
}

fn resumed(checkpoint: &std::path::Path) -> RankJob {
    RankJob { resume: Some(checkpoint.to_path_buf()), ..job(small(), None) }
}

fn error_of(job: &RankJob) -> String {
    match try_run(job, Heard::default()) {
        Ok((outcome, _)) => panic!("it ran: {outcome:?}"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn every_kind_of_damage_is_told_with_the_file() {
    let (_folder, checkpoint) = saved();
    for file in ["dense.safetensors", "experts-00002-of-00004.safetensors"] {
        let path = checkpoint.join(file);
        let whole = fs::read(&path).unwrap();
        let mut flipped = whole.clone();
        let middle = whole.len() / 2;
        flipped[middle] ^= 1;
        let cases = [("a flipped bit", flipped), ("a cut end", whole[..middle].to_vec()), ("nothing", Vec::new())];
        for (damage, bytes) in cases {
            fs::write(&path, bytes).unwrap();
            let error = error_of(&resumed(&checkpoint));
            assert!(error.contains("damaged") && error.contains(file), "{damage} in {file}: {error}");
        }
        fs::remove_file(&path).unwrap();
        let error = error_of(&resumed(&checkpoint));
        assert!(error.contains(file), "{file} missing: {error}");
        fs::write(&path, whole).unwrap();
    }
    run(&resumed(&checkpoint));
}

#[test]
fn a_manifest_names_files_of_its_own_folder_only() {
    let (_folder, checkpoint) = saved();
    let manifest = checkpoint.join("checkpoint.json");
    let whole = fs::read_to_string(&manifest).unwrap();
    let name = "experts-00002-of-00004.safetensors";
    assert!(whole.contains(name));
    for other in ["../escaped.safetensors", "/etc/passwd", "a/b", "..", ".", "", "a\\\\b", "c:d", "a\\u0000b"] {
        fs::write(&manifest, whole.replace(name, other)).unwrap();
        let error = error_of(&resumed(&checkpoint));
        assert!(error.contains("names of files in the checkpoint's folder"), "{other:?}: {error}");
    }
    fs::write(&manifest, whole).unwrap();
    run(&resumed(&checkpoint));
}

#[test]
fn another_model_or_text_is_refused_with_the_difference() {
    let (_folder, checkpoint) = saved();
    let wider = RankJob { config: TrainConfig { intermediate: 24, ..small() }, ..resumed(&checkpoint) };
    let error = error_of(&wider);
    assert!(error.contains("intermediate is 16 there, 24 here"), "{error}");
    let mut other = (*corpus()).clone();
    other.domains[0].bytes.extend_from_slice(b"one more line\n");
    let error = error_of(&RankJob { corpus: Arc::new(other), ..resumed(&checkpoint) });
    assert!(error.contains("other text"), "{error}");
}

#[test]
fn a_partial_checkpoint_is_passed_over() {
    let (folder, checkpoint) = saved();
    let run_folder = TempDir::new().unwrap();
    let checkpoints = run_folder.path().join("checkpoints");
    fs::create_dir(&checkpoints).unwrap();
    fs::rename(&checkpoint, checkpoints.join("step-00000001")).unwrap();
    fs::create_dir(checkpoints.join("step-00000002.partial")).unwrap();
    fs::create_dir(checkpoints.join("step-00000003")).unwrap();
    assert_eq!(find_checkpoint(run_folder.path()).unwrap(), checkpoints.join("step-00000001"));
    let error = find_checkpoint(folder.path()).unwrap_err().to_string();
    assert!(error.contains("neither a checkpoint nor a run folder"), "{error}");
}

#[test]
fn a_place_that_cannot_be_written_is_named() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "not a folder").unwrap();
    let error = error_of(&job(TrainConfig { steps: 1, ..small() }, Some(&file)));
    assert!(error.contains(&file.display().to_string()) && error.contains("Not a directory"), "{error}");
}

#[test]
fn sizes_in_a_manifest_are_believed_only_as_far_as_the_files_go() {
    let (_folder, checkpoint) = saved();
    let path = checkpoint.join("checkpoint.json");
    let manifest: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let changed = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut changed = manifest.clone();
        change(&mut changed);
        fs::write(&path, serde_json::to_vec(&changed).unwrap()).unwrap();
        CheckpointInfo::read(&checkpoint)
    };
    let refused = |change: &dyn Fn(&mut serde_json::Value)| changed(change).unwrap_err().to_string();
    let error = refused(&|manifest| manifest["expert_files"][1][2] = u64::MAX.into());
    assert!(error.contains("is said to have experts") && error.contains("checkpoint.json"), "{error}");
    for (field, value) in [("hidden", u64::MAX), ("intermediate", 1 << 62), ("sequences", 1 << 63), ("layers", 1 << 40)]
    {
        let error = refused(&|manifest| manifest["config"][field] = value.into());
        assert!(error.contains("at most") && error.contains("checkpoint.json"), "{field}: {error}");
    }
    // Sizes that a machine could have, but these files have not: no memory is taken for them.
    let large = changed(&|manifest| {
        manifest["config"]["intermediate"] = (1 << 20).into();
        manifest["config"]["layers"] = (1 << 15).into();
    });
    let error = Weights::read(&checkpoint, &large.unwrap()).err().unwrap().to_string();
    assert!(error.contains("too few for the model"), "{error}");
}
