//! Placement maps: which logical expert lies in which slot of which rank, layer by layer, fixed for many microbatches.
//!
//! What it is for: serving engines load such a map at start or make one now and then from past loads, and share an expert's
//! tokens evenly among its copies. [`PlacementMap`] is the map, [`rebalance`] makes one from loads (DeepSeek's EPLB
//! heuristic, or a search that is never worse), [`Sharing`] says what a map does with a load, [`read`] and [`write`] speak
//! the engines' files.
//!
//! What it must never do: read a clock, the environment or a file (readers and writers take and give text); trust a text
//! (sizes are compared with limits before memory is taken, an alias in YAML is refused); let a float decide where an expert
//! lies.
#![forbid(unsafe_code)]

mod formats;
mod map;
mod rebalance;
mod search;
mod sharing;

pub use formats::{MAX_TEXT_BYTES, MapFormat, ParseMapFormatError, ReadError, ReadHints, WriteError, read, write};
pub use map::{EMPTY, Findings, MAX_LAYERS, MAX_PHYSICAL, MapError, MapShape, PlacementMap};
pub use rebalance::{Method, RebalanceError, RebalanceSpec, rebalance, rebalance_regions};
pub use sharing::Sharing;
pub use ultraep_baselines::{ExpertGroups, Region};
