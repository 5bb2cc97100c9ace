//! What recording costs the rank that records, a layer: `cargo run --release -p ultraep-run --example profiler_cost`.
//!
//! Copies counts of 64 ranks x 256 experts with a plan of 300 instances into the ring, a layer each 2 ms, and prints the
//! median and the 99th percentile of the time that [`Profiler::record`] takes.

use std::time::{Duration, Instant};

use ultraep_plan::{Instance, PhysicalIndex, Rank, Topology, TopologySpec};
use ultraep_run::{Profiler, ProfilerOptions, RunInfo, RunWriter, UtcTime};
use ultraep_trace::TraceMeta;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    const LAYERS: usize = 1000;
    let folder = tempfile::TempDir::new()?;
    let writer = RunWriter::create(&folder.path().join("run"), RunInfo::starting(UtcTime::from_unix_s(0)))?;
    let topology = Topology::new(TopologySpec { ranks: 64, experts: 256, domain_ranks: 64, slots_per_rank: 2 })?;
    let trace = writer.create_trace(TraceMeta::of_topology(&topology, 1))?;
    let mut profiler = Profiler::start(trace, ProfilerOptions::default())?;
    let counts: Vec<u32> = (0..64 * 256).map(|i: u32| i.wrapping_mul(2_654_435_761) >> 22).collect();
    // Every expert's master, and a replica of the first 44 on another rank.
    let (mut offsets, mut instances, mut used) = (vec![0], Vec::new(), [0; 64]);
    for expert in 0..256_usize {
        let home = expert / 4;
        instances.push(Instance { rank: Rank::new(home), physical: PhysicalIndex::new(expert % 4), quota: 0 });
        if expert < 44 {
            let to = (home + 20 + expert % 4 * 11) % 64;
            instances.push(Instance { rank: Rank::new(to), physical: PhysicalIndex::new(4 + used[to]), quota: 0 });
            used[to] += 1;
        }
        offsets.push(instances.len() as u32);
    }
    let mut split = vec![0; 64 * instances.len()];
    for (source, row) in split.chunks_exact_mut(instances.len()).enumerate() {
        for (expert, &first) in offsets[..256].iter().enumerate() {
            row[first as usize] = counts[source * 256 + expert];
            instances[first as usize].quota += row[first as usize];
        }
    }
    let mut taken = Vec::with_capacity(LAYERS);
    for step in 0..LAYERS as u64 {
        let since = Instant::now();
        profiler.record(|record| {
            (record.step, record.microbatch, record.layer) = (step, 0, 0);
            record.before.clone_from(&counts);
            let plan = record.after.get_or_insert_default();
            plan.policy.clear();
            plan.policy.push_str("ultraep");
            plan.digest = step;
            plan.offsets.clone_from(&offsets);
            plan.instances.clone_from(&instances);
            plan.split.get_or_insert_default().clone_from(&split);
            record.top_k = None;
        })?;
        taken.push(since.elapsed());
        std::thread::sleep(Duration::from_millis(2));
    }
    let summary = profiler.finish()?;
    taken.sort_unstable();
    println!(
        "record: p50 {:?}, p99 {:?}; {} recorded, {} dropped",
        taken[LAYERS / 2],
        taken[LAYERS * 99 / 100],
        summary.recorded,
        summary.dropped
    );
    Ok(())
}
