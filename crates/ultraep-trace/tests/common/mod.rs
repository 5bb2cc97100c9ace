//! Valid traces of any shape, made from a seed.
#![allow(dead_code)] // each test binary uses its part

use std::io::Cursor;

use ultraep_plan::{Instance, PhysicalIndex, Rank, Topology, TopologySpec};
use ultraep_trace::{
    BlockSize, NO_EXPERT, PlanRecord, Record, TopKIds, TraceFile, TraceMeta, TraceReader, TraceWriter,
};

/// SplitMix64.
pub(crate) struct Draws(pub(crate) u64);

impl Draws {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) ranks: usize,
    pub(crate) experts: usize,
    pub(crate) layers: usize,
    pub(crate) top_k: usize,
}

pub(crate) fn meta(shape: Shape) -> TraceMeta {
    let spec = TopologySpec { ranks: shape.ranks, experts: shape.experts, domain_ranks: 1, slots_per_rank: 2 };
    let mut meta = TraceMeta::of_topology(&Topology::new(spec).expect("topology"), shape.layers);
    meta.top_k = Some(shape.top_k);
    meta.metadata.insert("model".into(), "test".into());
    meta
}

/// A record with a plan, a split and ids, each present by chance.
pub(crate) fn record(step: u64, shape: Shape, draws: &mut Draws) -> Record {
    let mut before = vec![0; shape.ranks * shape.experts];
    let top_k = (draws.below(2) == 0).then(|| top_k(shape, &mut before, draws));
    if top_k.is_none() {
        // Mostly small, at times none, at times large.
        let largest = [0, 3, 200, 70_000][draws.below(4)];
        before.iter_mut().for_each(|count| *count = draws.below(largest + 1) as u32);
    }
    let after = (draws.below(3) > 0).then(|| plan(shape, &before, draws));
    let (microbatch, layer) = (draws.below(300) as u32, draws.below(shape.layers) as u32);
    Record { step, microbatch, layer, before, after, top_k }
}

fn top_k(shape: Shape, before: &mut [u32], draws: &mut Draws) -> TopKIds {
    let tokens: Vec<u32> = (0..shape.ranks).map(|_| draws.below(9) as u32).collect();
    let mut ids = Vec::new();
    for (source, &tokens) in tokens.iter().enumerate() {
        for _ in 0..tokens as usize * shape.top_k {
            if draws.below(10) == 0 {
                ids.push(NO_EXPERT);
            } else {
                let expert = draws.below(shape.experts);
                ids.push(expert as u16);
                before[source * shape.experts + expert] += 1;
            }
        }
    }
    TopKIds { tokens, ids }
}

fn plan(shape: Shape, before: &[u32], draws: &mut Draws) -> PlanRecord {
    let mut plan =
        PlanRecord { policy: "ultraep".into(), digest: draws.next(), offsets: vec![0], ..PlanRecord::default() };
    for _ in 0..shape.experts {
        let count = 1 + draws.below(shape.ranks.min(3));
        let first = draws.below(shape.ranks);
        for i in 0..count {
            let rank = Rank::new((first + i) % shape.ranks);
            plan.instances.push(Instance { rank, physical: PhysicalIndex::new(draws.below(70_000 % 300)), quota: 0 });
        }
        plan.offsets.push(plan.instances.len() as u32);
    }
    let instances = plan.instances.len();
    let mut split = vec![0; shape.ranks * instances];
    for source in 0..shape.ranks {
        for expert in 0..shape.experts {
            let range = plan.range(expert);
            let mut left = before[source * shape.experts + expert];
            for instance in range.clone() {
                let share = if instance + 1 == range.end { left } else { draws.below(left as usize + 1) as u32 };
                split[source * instances + instance] = share;
                plan.instances[instance].quota += share;
                left -= share;
            }
        }
    }
    plan.split = (draws.below(2) == 0).then_some(split);
    plan
}

pub(crate) fn records(count: usize, shape: Shape, draws: &mut Draws) -> Vec<Record> {
    let mut step = draws.below(1_000) as u64;
    (0..count)
        .map(|_| {
            step += [0, 0, 1, 1_000][draws.below(4)];
            record(step, shape, draws)
        })
        .collect()
}

pub(crate) fn write(records: &[Record], meta: &TraceMeta, size: BlockSize) -> Vec<u8> {
    let mut writer = TraceWriter::with_block_size(Vec::new(), meta.clone(), size).expect("writer");
    for record in records {
        writer.append(record).expect("append");
    }
    assert_eq!(writer.records(), records.len() as u64);
    writer.finish().expect("finish")
}

pub(crate) fn open(bytes: &[u8]) -> TraceFile<Cursor<&[u8]>> {
    TraceFile::open(Cursor::new(bytes)).expect("open")
}

/// Everything a sequential reader gives before it ends or fails.
pub(crate) fn read_all(bytes: &[u8]) -> (Vec<Record>, Result<ultraep_trace::Ending, ultraep_trace::TraceError>) {
    let mut reader = match TraceReader::new(bytes) {
        Ok(reader) => reader,
        Err(error) => return (Vec::new(), Err(error)),
    };
    let mut records = Vec::new();
    let mut record = Record::default();
    loop {
        match reader.read_into(&mut record) {
            Ok(true) => records.push(record.clone()),
            Ok(false) => return (records, Ok(reader.ending().expect("known at the end"))),
            Err(error) => return (records, Err(error)),
        }
    }
}
