//! Recordings of expert loads and routings made by other systems, and by ours, behind one streaming model.
//!
//! What it is for: people who run MoE models elsewhere have files; [`open`] finds out by content what they are and gives a
//! [`Recording`], which yields [`Piece`]s: token choices of a layer, or counts of one (step, microbatch, layer).
//! [`Microbatches`] makes counts `[N, E]` of them for a group of any size, by a stated [`SourceRule`] where the recording
//! does not know its sources, so that a replay or a converter needs no format.
//!
//! What it must never do: trust a file. No size is believed before it was compared with a limit, nothing in a file is ever
//! executed (a pickle is parsed with an allow-list of opcodes and classes), no path in a file leaves the file's folder, and
//! every refusal names the file and the line, row, key or byte. Nor may it invent: what a format does not hold is told in
//! [`RecordingInfo`], not guessed silently.
//!
//! Memory: one piece, and in [`Microbatches`] one window of tokens a layer, at most [`MAX_WINDOW_BYTES`] in all.
#![forbid(unsafe_code)]

mod archive;
mod array;
mod chain;
mod choices;
mod classify;
mod csv_rows;
mod detect;
mod error;
mod files;
mod input;
mod inputs;
mod json_array;
mod loads;
mod npy;
mod numbers;
mod options;
mod parquet_file;
mod pickle;
mod readers;
mod recording;
mod regroup;
mod survey;
mod watch;
mod write_parquet;
mod write_uet;
mod write_v1;

pub use detect::{open, open_with};
pub use error::{ImportError, Place, Problem};
pub use files::{OutputFile, TemporaryFile};
pub use input::{MAX_LINE_BYTES, MAX_WHOLE_FILE_BYTES};
pub use inputs::Inputs;
pub use loads::{Choice, LayerLoads, LoadsError, read_loads};
pub use options::{OpenOptions, Reading};
pub use recording::{Format, Load, Piece, Recording, RecordingInfo, Sources};
pub use regroup::{
    Grouping, GroupingError, Leftover, MAX_SORT_BYTES, MAX_WINDOW_BYTES, Microbatch, Microbatches, SourceRule, spread,
};
pub use survey::{LayerSurvey, Survey, survey};
pub use write_parquet::{KEY as PARQUET_KEY, ParquetWritten, WriteParquetError, write_parquet};
pub use write_uet::{UetWritten, WriteUetError, recorded_topology, write_uet};
pub use write_v1::{V1Options, V1Written, v1_manifest_path, write_ultra_ep_v1};
