//! The run folder: what a run was, what it measured step by step, its loads, and its final table.
//!
//! What it is for: training and serving write one with a [`RunWriter`]; the viewer, the report and `resume` read it with a
//! [`RunReader`], also while the run is at work. The types of its files are plain `serde` structs; `docs/run-folder.md`
//! describes them.
//!
//! ```text
//! runs/2026-11-24T14-39-16Z/
//!   run.json         what and how: config, versions, text, status          [`RunInfo`]
//!   metrics.jsonl    a line a step, and more, told apart by "type"         [`Metric`]
//!   loads.uet        counts and plans of every layer and microbatch        crate `ultraep-trace`
//!   table.json, .md  the policies side by side, written at the end         [`PolicyTable`]
//!   checkpoints/     left to whoever trains, as are text.json and text.uetext
//! ```
//!
//! What it must never do: read a clock or the environment (times come in); write into a folder that another run made;
//! leave half a file where a whole one is expected (whole files are written beside, synced and renamed; lines are
//! appended in one write each, and a torn last one is left out by readers); depend on the model or the training.
#![forbid(unsafe_code)]

mod error;
mod files;
mod info;
mod metrics;
mod profiler;
mod reader;
mod table;
mod time;
mod trace;
mod writer;

pub use error::RunError;
pub use files::write_atomically;
pub use info::{
    Continuation, CorpusSummary, Digest, DigestError, DomainSummary, RUN_SCHEMA, RunInfo, RunStatus, SettingChange,
};
pub use metrics::{Imbalance, Metric, PolicyMeasurement, ReferenceMetrics, StepMetrics, StepParts, ValidationMetrics};
pub use profiler::{ProfileSummary, Profiler, ProfilerOptions};
pub use reader::{LINE_BYTES_MAX, MetricsReader, RunReader};
pub use table::{PolicyRow, PolicyTable, TABLE_SCHEMA};
pub use time::{UtcTime, UtcTimeError};
pub use trace::RunTrace;
pub use writer::RunWriter;
