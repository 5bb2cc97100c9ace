//! A small run, and what tests do with it.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use ultraep_fabric::{GroupError, run_threads};
use ultraep_runtime::StepTime;
use ultraep_text::{Corpus, TextDomain};
use ultraep_train::{
    Comparison, Observer, Outcome, Phase, RankJob, RouterChoice, Silent, StepReport, TrainConfig, TrainError, run_rank,
};

/// Four ranks, two small layers, seconds at most.
pub(crate) fn small() -> TrainConfig {
    TrainConfig {
        ranks: 4,
        domain_ranks: 4,
        slots: 2,
        policy: "ultraep".into(),
        min_quota: 4,
        beta: "1.01".into(),
        eplb_interval_steps: 2,
        hidden: 32,
        heads: 2,
        layers: 2,
        experts: 8,
        top_k: 2,
        intermediate: 16,
        router: RouterChoice::Softmax,
        aux_coefficient: 0.01,
        bias_rate: 0.01,
        steps: 4,
        microbatches: 2,
        sequences: 4,
        sequence_tokens: 24,
        learning_rate: 0.01,
        warmup_steps: 2,
        weight_decay: 0.1,
        clip_norm: 1.0,
        seed: 7,
        recompute: false,
        checked: true,
        link_gbps: 200.0,
        compare_every: 0,
        compare: Vec::new(),
        reference: false,
        save_every: 0,
        keep: 0,
        profile_every: 1,
        timeout_s: 30,
        cores: 2,
    }
}

/// Text of three kinds.
pub(crate) fn corpus() -> Arc<Corpus> {
    let domain = |name: &str, line: fn(usize) -> String| TextDomain {
        name: name.into(),
        bytes: (0..400).map(line).collect::<String>().into_bytes(),
        files: 1,
        origin: "a test".into(),
    };
    let domains = vec![
        domain("rust", |i| format!("    let value_{i} = compute(&input[{}..{}])?;\n", i % 17, i % 17 + 4)),
        domain("prose", |i| format!("The {i}th rank waits for the others, and then it goes on with its work.\n")),
        domain("data", |i| format!("{{\"id\": {i}, \"load\": [{}, {}, {}]}}\n", i * 7 % 101, i * 13 % 97, i * 3 % 89)),
    ];
    Arc::new(Corpus { domains, ..Corpus::default() })
}

/// What an observer heard.
#[derive(Debug, Default)]
pub(crate) struct Heard {
    pub(crate) losses: Vec<(Phase, u64, f32)>,
    pub(crate) times: Vec<(StepTime, u64)>,
    pub(crate) compared: Vec<(String, f32, Option<f64>)>,
    pub(crate) imbalance: Vec<(f64, f64)>,
    pub(crate) saved: Vec<u64>,
    /// Set this after this many steps.
    pub(crate) stop_after: Option<(u64, Arc<AtomicBool>)>,
}

impl Observer for Heard {
    fn begin(&mut self, _: Phase, _: u64) -> Result<(), TrainError> {
        Ok(())
    }

    fn step(&mut self, report: &StepReport<'_>) -> Result<(), TrainError> {
        self.losses.push((report.phase, report.step, report.loss));
        self.times.push((report.time, report.wall_ns));
        self.imbalance.extend(report.records.iter().map(|r| (r.imbalance_before(), r.imbalance_after())));
        if let Some((after, stop)) = &self.stop_after {
            stop.store(report.step + 1 >= *after, Ordering::Relaxed);
        }
        Ok(())
    }

    fn compared(&mut self, comparison: &Comparison<'_>) -> Result<(), TrainError> {
        let name = comparison.policy.name().to_string();
        self.compared.push((name, comparison.loss, comparison.gradient_difference));
        Ok(())
    }

    fn saved(&mut self, step: u64, _: &Path) -> Result<(), TrainError> {
        self.saved.push(step);
        Ok(())
    }
}

/// A job over the test's text.
pub(crate) fn job(config: TrainConfig, checkpoints: Option<&Path>) -> RankJob {
    RankJob {
        config,
        corpus: corpus(),
        resume: None,
        checkpoints: checkpoints.map(Path::to_path_buf),
        stop: Arc::new(AtomicBool::new(false)),
    }
}

/// Runs a job on threads; the outcome of rank 0 and what was heard there.
pub(crate) fn try_run(job: &RankJob, heard: Heard) -> Result<(Outcome, Heard), GroupError<TrainError>> {
    let group = job.config.group().unwrap_or_else(|error| panic!("{error}"));
    let heard = Mutex::new(heard);
    let mut outcomes = run_threads(&group, |fabric| match fabric.rank().index() {
        0 => run_rank(fabric, job, &mut *heard.lock().unwrap()),
        _ => run_rank(fabric, job, &mut Silent),
    })?;
    Ok((outcomes.swap_remove(0), heard.into_inner().unwrap_or_else(|e| e.into_inner())))
}

pub(crate) fn run(job: &RankJob) -> (Outcome, Heard) {
    try_run(job, Heard::default()).unwrap_or_else(|error| panic!("{error}"))
}

/// All files of a checkpoint with their bytes, but for the manifest, which holds the configuration.
pub(crate) fn tensor_files(checkpoint: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let entries = std::fs::read_dir(checkpoint).unwrap().map(|e| e.unwrap().path());
    let mut files: Vec<_> = entries.filter(|p| p.extension().is_some_and(|e| e == "safetensors")).collect();
    files.sort();
    files.into_iter().map(|p| (PathBuf::from(p.file_name().unwrap()), std::fs::read(p).unwrap())).collect()
}
