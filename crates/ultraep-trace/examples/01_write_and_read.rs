//! Writes a trace to memory, reads it back, and says how large and how fast: the figures of the crate's documentation.
//!
//! `cargo run --release -p ultraep-trace --example 01_write_and_read`

use std::io::Cursor;
use std::time::Instant;

use ultraep_plan::{Instance, PhysicalIndex, Rank, Topology, TopologySpec};
use ultraep_trace::{PlanRecord, Record, TraceFile, TraceMeta, TraceReader, TraceWriter};

const RANKS: usize = 32;
const EXPERTS: usize = 64;
const RECORDS: usize = 2_000;
/// Tokens of a rank times top-k.
const ROW_TOKENS: u64 = 4096 * 6;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let spec = TopologySpec { ranks: RANKS, experts: EXPERTS, domain_ranks: RANKS, slots_per_rank: 2 };
    let topology = Topology::new(spec)?;
    let counts_only: Vec<Record> = (0..RECORDS as u64).map(|step| record(step, step)).collect();
    let with_plans: Vec<Record> = counts_only.iter().map(|r| with_masters(r, &topology)).collect();
    for (what, records) in [("counts", &counts_only), ("counts, plan and split", &with_plans)] {
        let start = Instant::now();
        let mut writer = TraceWriter::new(Vec::new(), TraceMeta::of_topology(&topology, 1))?;
        for record in records {
            writer.append(record)?;
        }
        let bytes = writer.finish()?;
        let write_ns = start.elapsed().as_nanos() / RECORDS as u128;

        let start = Instant::now();
        let mut reader = TraceReader::new(bytes.as_slice())?;
        let (mut record, mut tokens) = (Record::default(), 0_u64);
        while reader.read_into(&mut record)? {
            tokens += record.before.iter().map(|&c| u64::from(c)).sum::<u64>();
        }
        let read_ns = start.elapsed().as_nanos() / RECORDS as u128;

        let hundredths = 100 * bytes.len() / (RECORDS * RANKS * EXPERTS);
        println!(
            "{what}: {}.{:02} bytes a count, {write_ns} ns to write a record, {read_ns} ns to read one ({RANKS} ranks, \
             {EXPERTS} experts)",
            hundredths / 100,
            hundredths % 100,
        );
        let expected: u64 = records.iter().flat_map(|r| &r.before).map(|&c| u64::from(c)).sum();
        assert_eq!(tokens, expected);
        let mut file = TraceFile::open(Cursor::new(bytes))?;
        file.read(1_234, &mut record)?;
        assert_eq!(record, records[1_234]);
    }
    Ok(())
}

/// Counts as a router makes them: experts of very different popularity, sources that differ by chance.
fn record(step: u64, seed: u64) -> Record {
    let mut state = seed;
    let mut draw = move |bound: u64| {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    };
    let popularity: Vec<u64> = (0..EXPERTS).map(|_| 100 + draw(30) * draw(30)).collect();
    let total: u64 = popularity.iter().sum();
    let mut before = Vec::with_capacity(RANKS * EXPERTS);
    for _ in 0..RANKS {
        for weight in &popularity {
            let mean = ROW_TOKENS * weight / total;
            let spread = 4 * mean.isqrt() + 1; // about two standard deviations to each side
            before.push((mean + draw(spread) + draw(spread)).saturating_sub(spread) as u32);
        }
    }
    Record { step, before, ..Record::default() }
}

/// The record with a plan: every third expert has a replica that takes half of each source's tokens.
fn with_masters(record: &Record, topology: &Topology) -> Record {
    let mut plan = PlanRecord { policy: "example".into(), offsets: vec![0], ..PlanRecord::default() };
    for (expert, &home) in topology.homes().iter().enumerate() {
        plan.instances.push(Instance { rank: home, physical: PhysicalIndex::new(0), quota: 0 });
        if expert % 3 == 0 {
            let rank = Rank::new((home.index() + 1 + expert / 3) % RANKS);
            if rank != home {
                plan.instances.push(Instance { rank, physical: PhysicalIndex::new(2), quota: 0 });
            }
        }
        plan.offsets.push(plan.instances.len() as u32);
    }
    let instances = plan.instances.len();
    let mut split = vec![0; RANKS * instances];
    for source in 0..RANKS {
        for expert in 0..EXPERTS {
            let range = plan.range(expert);
            let (count, parts) = (record.before[source * EXPERTS + expert], range.len() as u32);
            for instance in range.clone() {
                let share = if instance == range.start { count - count / parts * (parts - 1) } else { count / parts };
                split[source * instances + instance] = share;
                plan.instances[instance].quota += share;
            }
        }
    }
    plan.split = Some(split);
    Record { after: Some(plan), ..record.clone() }
}
