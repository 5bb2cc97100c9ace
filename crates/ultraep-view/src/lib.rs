//! The viewer: runs and recordings as pages in a browser, and as a report in one file.
//!
//! What it is for: [`Viewer`] opens what the user names ([`Settings`] say how loads without a plan are planned), follows runs
//! at work, and reduces everything on this side, so that no answer exceeds [`ANSWER_BYTES_MAX`] however large the trace;
//! [`serve`] answers a browser; [`report`] writes the main pictures into one HTML file that opens offline. Pages, styles and
//! scripts are part of the program.
//!
//! ```text
//! overview      heat map of layers and time, distribution, time series, worst cases, layers; of a run its table and losses
//! layer         one layer over time, loads of its experts, its worst cases
//! microbatch    experts on ranks before and after, replicas, flow of tokens, transfers, predicted times; what if
//! ```
//!
//! What it must never do: open a file that the user did not name (requests name recordings by number); answer a request
//! whose `Host` is a name other than the one it was told (DNS rebinding); load anything from elsewhere (the
//! Content-Security-Policy forbids it); write anywhere but to temporary files and the report that was asked for.
#![forbid(unsafe_code)]

mod assets;
mod entry;
mod error;
mod metrics;
mod overview;
mod picture;
mod report;
mod scan;
mod server;
mod settings;
mod source;
mod summary;
mod viewer;
mod words;

pub use error::ViewError;
pub use report::report;
pub use server::serve;
pub use settings::Settings;
pub use viewer::Viewer;

/// Most bytes of one answer of JSON.
pub const ANSWER_BYTES_MAX: usize = 1_000_000;
