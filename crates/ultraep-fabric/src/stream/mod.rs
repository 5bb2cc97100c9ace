//! Persistent tile streaming: moving experts' weights to their replicas, and adding replicas' gradients, at the speed of
//! memory (paper, section on weight synchronisation).
//!
//! ```text
//! start   the plan becomes a list of streams: one source, its destinations, the chunks to wait for (`job.rs`);
//!         credit is given to those who will touch this rank's slots (`slot_set.rs`)
//! worker  take the next tile's number from one counter               (`worker.rs`; `schedule.rs` says which tile it is)
//!         wait until its chunk's flag says that the chunk is here     relays only
//!         wait until its destinations have given credit
//!         read the tile once, write it to every destination           (`kernel.rs`)
//!         count it in the chunk's flag at each destination
//! join    the rank's own thread works, too, until its slots' flags are up
//! ```
//!
//! * No barrier, neither between stages nor around the work: a relay forwards a chunk as soon as it has it. No deadlock, with any number of workers:
//!   `schedule.rs` has the proof.
//! * Threads are created once (`engine.rs`); work is handed over in memory that is taken once. How many work is a
//!   parameter: all of them when the rank waits for its weights, few beside its computation.
//! * References between ranks are (window, rank, offset) until a piece of work starts; then they become addresses of this
//!   process, under the right ([`Reach`]) to a claimed window.
//! * Grad reduce is the same walk in the other direction: the home rank reads its replicas' tiles, adds them to the
//!   master's in the plan's order, and zeroes them where they are, in one pass.
//!
//! # Unsafe
//! Only `kernel.rs` (instructions; `plain.rs` offers them on slices), `job.rs` (addresses within checked places), `reach.rs` and
//! `slot_set.rs` (views of the own slots) have unsafe code; the scheduling is safe. Memory is soundly shared for two reasons:
//! private regions are held by the job; window parts are claimed, so that only `SlotSet` refers to its own, between two pieces
//! of work, and peers touch it within them, as credits and flags say.
//!
//! # Atomics
//! `credit` (`give` releases, `covers` acquires), `admitted` (one worker's acquired credits to the next, both in `is_ready`), `tile` (a
//! chunk's flag: `publish` releases, `has_come` acquires) and `reach` (`Reach::drop` releases, the next `claim` acquires). The counter of tiles is relaxed: numbers order nothing. Everything else that workers share lies under locks.
//! `tests/loom.rs` explores counter and flags; `simulated.rs` runs workers under a seeded scheduler with delayed stores.

mod engine;
mod job;
mod kernel;
mod layout;
mod plain;
mod portable;
mod reach;
mod schedule;
#[cfg(test)]
mod simulated;
mod slot_set;
mod slots;
mod worker;

pub use engine::EngineSpec;
pub use job::{GradReduce, Moved, WeightSync};
pub use layout::{
    Element, ExpertLayout, LayoutError, MasterShard, MasterTensor, Masters, SHARD_ALIGN, Shard, UnknownFormat,
    WeightFormat,
};
pub use plain::{PlainCopy, plain_add_and_zero};
pub(crate) use reach::Credit;
pub use reach::{Direct, Reach};
pub use slot_set::SlotSet;
pub use slots::{Slots, TileSizes};
