//! What the runtime must withstand: every order of microbatches that a pipeline asks for, and ranks that disagree.

mod common;
mod disagreement;
#[path = "../noise/mod.rs"]
mod noise;
mod pipeline;
