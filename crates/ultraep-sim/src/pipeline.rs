//! Pipeline schedules: 1F1B and its interleaved form, as Megatron-LM runs them.
//!
//! ```text
//! 1F1B         stage s: p - 1 - s forwards, then forward and backward in turn, then the backwards left
//! interleaved  each stage holds v chunks of layers; forwards go chunk by chunk for p microbatches at a time;
//!              stage s warms up with 2 (p - 1 - s) + (v - 1) p forwards
//! ```
//!
//! Source: Narayanan et al., "Efficient large-scale language model training on GPU clusters using Megatron-LM", sections on
//! 1F1B and interleaving. The timeline is the longest path over the stages' orders and the hand-overs between stages.

use crate::layer::Direction;

/// Shape of a pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pipeline {
    /// `p`.
    pub stages: u32,
    /// `v`, chunks of layers on each stage; 1 is plain 1F1B.
    pub chunks: u32,
    /// `m`, microbatches of a step.
    pub microbatches: u32,
}

/// Why there is no schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PipelineError {
    /// Something is 0.
    #[error("{0} of a pipeline is 0: allowed are 1 and more")]
    Zero(&'static str),
    /// Interleaving deals microbatches in rounds of the stages.
    #[error("{microbatches} microbatches with interleaving on {stages} stages: allowed are multiples of {stages}")]
    Rounds {
        /// Asked for.
        microbatches: u32,
        /// Stages.
        stages: u32,
    },
    /// More stages and chunks than layers.
    #[error("{parts} pipeline parts for {layers} layers: allowed are up to {layers}")]
    Layers {
        /// Stages times chunks.
        parts: u32,
        /// Layers.
        layers: u32,
    },
}

/// One microbatch through one chunk of layers, one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Op {
    /// Stage.
    pub stage: u32,
    /// Chunk on that stage.
    pub chunk: u32,
    /// Microbatch.
    pub microbatch: u32,
    /// Which way.
    pub direction: Direction,
}

/// The order of every stage's ops.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    shape: Pipeline,
    stages: Vec<Vec<Op>>,
}

/// When each op ran.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Timeline {
    /// Ops in the order in which they were placed, with start and end.
    pub ops: Vec<(Op, u64, u64)>,
    /// End of the last op.
    pub total_ps: u64,
    /// Time at work, by stage.
    pub busy_ps: Vec<u64>,
}

impl Schedule {
    /// The schedule of a shape.
    pub fn new(shape: Pipeline) -> Result<Self, PipelineError> {
        let Pipeline { stages, chunks, microbatches } = shape;
        for (what, got) in [("stages", stages), ("chunks", chunks), ("microbatches", microbatches)] {
            if got == 0 {
                return Err(PipelineError::Zero(what));
            }
        }
        if chunks > 1 && microbatches % stages != 0 {
            return Err(PipelineError::Rounds { microbatches, stages });
        }
        Ok(Self { shape, stages: (0..stages).map(|stage| order(shape, stage)).collect() })
    }

    /// The ops of a stage, in order.
    pub fn stage(&self, stage: u32) -> &[Op] {
        self.stages.get(stage as usize).map_or(&[], Vec::as_slice)
    }

    /// Most ops of a stage that are between forward and backward.
    pub fn in_flight(&self, stage: u32) -> u32 {
        let (mut now, mut most) = (0u32, 0);
        for op in self.stage(stage) {
            now = if op.direction == Direction::Forward { now + 1 } else { now.saturating_sub(1) };
            most = most.max(now);
        }
        most
    }

    /// Places every op: after the one before on its stage, and `hand_over_ps` after what it needs from another stage.
    pub fn run(&self, hand_over_ps: u64, mut duration_ps: impl FnMut(Op) -> u64) -> Timeline {
        let Pipeline { stages, chunks, microbatches } = self.shape;
        let slot = |op: &Op| {
            let way = usize::from(op.direction == Direction::Backward);
            ((way * stages as usize + op.stage as usize) * chunks as usize + op.chunk as usize) * microbatches as usize
                + op.microbatch as usize
        };
        let mut ends: Vec<Option<u64>> = vec![None; 2 * (stages * chunks * microbatches) as usize];
        let mut next = vec![0; stages as usize];
        let mut free = vec![0u64; stages as usize];
        let mut timeline = Timeline { busy_ps: vec![0; stages as usize], ..Timeline::default() };
        loop {
            let placed = timeline.ops.len();
            for stage in 0..stages as usize {
                while let Some(op) = self.stages[stage].get(next[stage]) {
                    let ready = match self.needs(op) {
                        None => 0,
                        Some(before) => match ends[slot(&before)] {
                            Some(end) if before.stage == op.stage => end,
                            Some(end) => end.saturating_add(hand_over_ps),
                            None => break,
                        },
                    };
                    let start = ready.max(free[stage]);
                    let end = start.saturating_add(duration_ps(*op));
                    (ends[slot(op)], free[stage]) = (Some(end), end);
                    timeline.busy_ps[stage] = timeline.busy_ps[stage].saturating_add(end - start);
                    timeline.total_ps = timeline.total_ps.max(end);
                    timeline.ops.push((*op, start, end));
                    next[stage] += 1;
                }
            }
            if timeline.ops.len() == placed {
                return timeline;
            }
        }
    }

    /// The op whose output this one takes.
    fn needs(&self, op: &Op) -> Option<Op> {
        let Pipeline { stages, chunks, .. } = self.shape;
        let (last_stage, last_chunk) = (stages - 1, chunks - 1);
        match op.direction {
            Direction::Forward if op.stage > 0 => Some(Op { stage: op.stage - 1, ..*op }),
            Direction::Forward if op.chunk > 0 => Some(Op { stage: last_stage, chunk: op.chunk - 1, ..*op }),
            Direction::Forward => None,
            Direction::Backward if op.stage < last_stage => Some(Op { stage: op.stage + 1, ..*op }),
            Direction::Backward if op.chunk < last_chunk => Some(Op { stage: 0, chunk: op.chunk + 1, ..*op }),
            Direction::Backward => Some(Op { direction: Direction::Forward, ..*op }),
        }
    }
}

fn order(shape: Pipeline, stage: u32) -> Vec<Op> {
    let Pipeline { stages, chunks, microbatches } = shape;
    let total = microbatches * chunks;
    let op = |index: u32, direction| {
        let (round, within) = (index / (stages * chunks), index % (stages * chunks));
        // Without interleaving a round is one microbatch after another all the same.
        let (chunk, microbatch) = match chunks {
            1 => (0, index),
            _ => (within / stages, round * stages + within % stages),
        };
        let chunk = if direction == Direction::Backward { chunks - 1 - chunk } else { chunk };
        Op { stage, chunk, microbatch, direction }
    };
    let later = stages - 1 - stage;
    let warm = if chunks == 1 { later } else { 2 * later + (chunks - 1) * stages }.min(total);
    let mut ops: Vec<Op> = (0..warm).map(|i| op(i, Direction::Forward)).collect();
    for i in warm..total {
        ops.extend([op(i, Direction::Forward), op(i - warm, Direction::Backward)]);
    }
    ops.extend((total - warm..total).map(|i| op(i, Direction::Backward)));
    ops
}

#[cfg(test)]
mod tests {
    use super::*;

    fn total(stages: u32, chunks: u32, microbatches: u32) -> u64 {
        let schedule = Schedule::new(Pipeline { stages, chunks, microbatches }).unwrap();
        let duration = |op: Op| if op.direction == Direction::Forward { 10 } else { 20 };
        let timeline = schedule.run(0, duration);
        assert_eq!(timeline.ops.len() as u32, 2 * stages * chunks * microbatches, "every op runs once");
        timeline.total_ps
    }

    #[test]
    fn equal_ops_take_the_textbook_time() {
        // (m + p - 1) (f + b), and with interleaving the bubble shrinks by v.
        for (p, m) in [(1, 1), (1, 8), (4, 4), (4, 16), (8, 8), (4, 2)] {
            assert_eq!(total(p, 1, m), u64::from(m + p - 1) * 30, "p {p} m {m}");
        }
        for (p, v, m) in [(4, 2, 8), (4, 3, 16), (2, 4, 4)] {
            assert_eq!(total(p, v, m), u64::from(m * v + p - 1) * 30, "p {p} v {v} m {m}");
        }
    }

    #[test]
    fn nothing_starts_before_what_it_needs() {
        let schedule = Schedule::new(Pipeline { stages: 3, chunks: 2, microbatches: 6 }).unwrap();
        let timeline = schedule.run(7, |op| 5 + u64::from(op.microbatch * 3 + op.stage) % 11);
        let end_of = |wanted: Op| timeline.ops.iter().find(|(op, ..)| *op == wanted).unwrap().2;
        for (op, start, _) in &timeline.ops {
            if let Some(before) = schedule.needs(op) {
                let hand_over = if before.stage == op.stage { 0 } else { 7 };
                assert!(*start >= end_of(before) + hand_over, "{op:?} before {before:?}");
            }
        }
    }

    #[test]
    fn shapes_are_checked() {
        let refused =
            |stages, chunks, microbatches| Schedule::new(Pipeline { stages, chunks, microbatches }).unwrap_err();
        assert_eq!(refused(0, 1, 1), PipelineError::Zero("stages"));
        assert_eq!(refused(4, 2, 6), PipelineError::Rounds { microbatches: 6, stages: 4 });
    }
}
