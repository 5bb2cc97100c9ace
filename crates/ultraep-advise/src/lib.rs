//! Decisions from recordings: is the placement that runs now any good, what would one placement for the whole recording be,
//! and how many slots in how large a domain is balancing worth.
//!
//! What it is for: the commands `check`, `advise`, and `--out` of `plan` and `replay`, which only read, print and write.
//!
//! What it must never do: predict times in a way of its own (all are those of [`ultraep_replay`], so that `replay` shows the
//! same), print, or open a file.
#![forbid(unsafe_code)]

mod advice;
mod judge;
mod page;
mod totals;

pub use advice::{Advice, Layer, Offer, Question, QuestionError, Typical};
pub use judge::{Judge, JudgeError, Judged, same_room};
pub use page::{Page, Subject};
pub use totals::{StaticError, Totals};
