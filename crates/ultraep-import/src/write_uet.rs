//! Writes any recording as a trace of ours, for a group of a given size: loads only.

use std::io::Write;

use serde_json::json;
use ultraep_plan::{Topology, TopologyError, TopologySpec};
use ultraep_trace::{Record, TraceError, TraceMeta, TraceWriter};

use crate::{Grouping, GroupingError, Microbatch, Microbatches, Recording, RecordingInfo, Sources};

/// Why a trace was not written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteUetError {
    /// No microbatches could be made.
    #[error(transparent)]
    Grouping(#[from] GroupingError),
    /// The group is refused.
    #[error(transparent)]
    Topology(#[from] TopologyError),
    /// The trace could not be written.
    #[error("{0}")]
    Write(TraceError),
}

/// What was written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UetWritten {
    /// Records.
    pub records: u64,
    /// Tokens at the ends of layers that fill no microbatch.
    pub leftover_tokens: u64,
    /// What a user should know: how sources came about, what is missing at the end.
    pub notes: Vec<String>,
}

/// The group of a recording: the one recorded where it has as many ranks, else one domain without slots.
pub fn recorded_topology(info: &RecordingInfo, ranks: usize, experts: usize) -> Result<Topology, TopologyError> {
    let is_same = info.sources == Sources::Ranks(ranks);
    let domain_ranks = info.domain_ranks.filter(|_| is_same).unwrap_or(ranks);
    let slots_per_rank = info.slots_per_rank.filter(|_| is_same).unwrap_or(0);
    Topology::new(TopologySpec { ranks, experts, domain_ranks, slots_per_rank })
}

/// Writes what is left of `recording` to `out`, which is best buffered. `layers` is the highest layer plus one. Recordings
/// of single tokens are put in the order of steps in memory ([`Microbatches::in_order`]); others stream.
pub fn write_uet<W: Write>(
    recording: &mut dyn Recording,
    grouping: Grouping,
    layers: usize,
    out: W,
) -> Result<UetWritten, WriteUetError> {
    let info = recording.info().clone();
    let mut meta = TraceMeta::of_topology(&recorded_topology(&info, grouping.ranks, grouping.experts)?, layers);
    meta.top_k = info.top_k;
    meta.metadata.extend(info.metadata.iter().map(|(key, value)| (key.clone(), json!(value))));
    meta.metadata.insert("imported_from".to_owned(), json!(info.format.to_string()));
    let mut written = UetWritten::default();
    if let Some(note) = grouping.describe_sources(info.sources) {
        meta.metadata.insert("sources".to_owned(), json!(note));
        written.notes.push(note);
    }
    let mut microbatches = Microbatches::new(&mut *recording, grouping)?;
    let mut writer = TraceWriter::new(out, meta).map_err(WriteUetError::Write)?;
    let mut append = |microbatch: Microbatch| {
        let Microbatch { step, microbatch, layer, counts } = microbatch;
        let record = Record { step, microbatch, layer, before: counts, ..Record::default() };
        writer.append(&record).map_err(WriteUetError::Write)
    };
    if matches!(info.sources, Sources::Ranks(_)) {
        let mut microbatch = Microbatch::default();
        while microbatches.next(&mut microbatch)? {
            append(std::mem::take(&mut microbatch))?;
        }
    } else {
        microbatches.in_order()?.into_iter().try_for_each(&mut append)?;
    }
    written.leftover_tokens = microbatches.leftover().tokens;
    written.records = writer.records();
    writer.finish().map_err(WriteUetError::Write)?;
    if written.leftover_tokens > 0 {
        let tokens = written.leftover_tokens;
        written.notes.push(format!("{tokens} tokens at the ends of layers fill no microbatch and are left out"));
    }
    written.notes.extend(recording.ending());
    Ok(written)
}
