//! Traces and runs to look at.

use std::path::Path;

use ultraep_baselines::{PolicyKind, PolicyParams};
use ultraep_load::{LoadParams, Workload, generate};
use ultraep_plan::{Ratio, Topology, TopologySpec, digest_plan};
use ultraep_replay::{LeastQuota, Scenario, replan};
use ultraep_run::{
    Imbalance, Metric, PolicyMeasurement, RunInfo, RunTrace, RunWriter, StepMetrics, StepParts, UtcTime,
};
use ultraep_trace::{PlanRecord, Record, TraceMeta};

/// The group of the small examples.
pub(crate) fn topology() -> Topology {
    Topology::new(TopologySpec { ranks: 8, experts: 32, domain_ranks: 8, slots_per_rank: 2 }).unwrap()
}

/// Layers of the small examples.
pub(crate) const LAYERS: usize = 4;

/// Loads of a layer in a step, whose hot ranks move.
pub(crate) fn counts(topology: &Topology, step: u64, layer: u32) -> Vec<u32> {
    let ratio = Ratio::new(13 + 4 * layer + (step as u32 * 5 + layer * 3) % 8, 10).unwrap();
    let params =
        LoadParams { tokens_per_rank: 2048, top_k: 4, ratio, seed: 7 + u64::from(layer), microbatch: step as u32 };
    generate(Workload::HotRankZipf, topology, &params).unwrap().counts().to_vec()
}

/// The record with its plan and split.
pub(crate) fn record(topology: &Topology, step: u64, layer: u32) -> Record {
    let (params, least_quota) = (PolicyParams::default(), LeastQuota::Tokens(64));
    let scenario = Scenario { kind: PolicyKind::Ultraep, topology: topology.clone(), params, least_quota };
    let before = counts(topology, step, layer);
    let anatomy = replan(&scenario, &before, &[]).unwrap().anatomy;
    let mut plan = PlanRecord::default();
    plan.capture("ultraep", digest_plan(&anatomy.plan), &anatomy.plan);
    plan.split = Some(anatomy.split);
    Record { step, microbatch: 0, layer, before, after: Some(plan), top_k: None }
}

/// A run at work: steps are added to it one by one.
pub(crate) struct Run {
    pub(crate) writer: RunWriter,
    pub(crate) trace: RunTrace,
    topology: Topology,
}

impl Run {
    pub(crate) fn begin(folder: &Path) -> Self {
        let mut info = RunInfo::starting(UtcTime::from_unix_s(1_795_000_000));
        info.command = vec!["ultraep".to_owned(), "train".to_owned()];
        for (key, value) in [("policy", serde_json::json!("ultraep")), ("beta", serde_json::json!("1.01"))] {
            info.config.insert(key.to_owned(), value);
        }
        for (key, value) in [("min_quota", 64), ("steps", 12), ("hidden", 512), ("intermediate", 256)] {
            info.config.insert(key.to_owned(), serde_json::json!(value));
        }
        let writer = RunWriter::create(folder, info).unwrap();
        let topology = topology();
        let trace = writer.create_trace(TraceMeta::of_topology(&topology, LAYERS)).unwrap();
        Self { writer, trace, topology }
    }

    pub(crate) fn step(&mut self, step: u64) {
        for layer in 0..LAYERS as u32 {
            self.trace.append(&record(&self.topology, step, layer)).unwrap();
        }
        self.trace.flush().unwrap();
        let (before, after) = (Imbalance { mean: 1.8, worst: 2.4 }, Imbalance { mean: 1.01, worst: 1.02 });
        let parts = StepParts { dense_ns: 4_000_000, experts_ns: 9_000_000, ..StepParts::default() };
        let metrics = StepMetrics {
            step,
            loss: 5.0 - 0.2 * step as f64,
            tokens: 16_384,
            tokens_per_s: 1e6,
            imbalance_before: before,
            imbalance_after: after,
            parallel_step_ns: 13_000_000 + step * 100_000,
            parts,
            wall_ns: None,
        };
        self.writer.append_metric(&Metric::Step(metrics)).unwrap();
        for policy in ["none", "ultraep"] {
            let measurement = PolicyMeasurement {
                policy: policy.to_owned(),
                step,
                tokens: 16_384,
                imbalance_before: before,
                imbalance_after: if policy == "none" { before } else { after },
                replicas_per_layer: if policy == "none" { 0.0 } else { 9.0 },
                tokens_crossed_fraction: 0.8,
                peak_tokens_per_rank: 9000,
                parallel_step_ns: 13_000_000,
                parts,
                wall_ns: None,
            };
            self.writer.append_metric(&Metric::Policy(measurement)).unwrap();
        }
    }
}
