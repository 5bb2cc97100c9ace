//! Persistent tile streaming: moving experts' weights to their replicas, and adding replicas' gradients, at the speed of
//! memory (paper, section on weight synchronisation).
//!
//! ```text
//! start   the plan becomes a list of streams: one source, its destinations, the chunks to wait for (`job.rs`)
//! worker  take the next tile's number from one counter               (`worker.rs`; `schedule.rs` says which tile it is)
//!         wait until its chunk's flag says that the chunk is here     relays only
//!         read the tile once, write it to every destination           (`kernel.rs`)
//!         count it in the chunk's flag at each destination that relays
//! wait    the rank's own thread works, too, until no tile is left
//! ```
//!
//! * No barrier between stages: a relay forwards a chunk as soon as it has it. No deadlock, with any number of workers:
//!   `schedule.rs` has the proof.
//! * Threads are created once ([`TileEngine::new`]); work is handed over in memory that is taken once. How many work is a
//!   parameter: all of them when the rank waits for its weights, few beside its computation.
//! * References between ranks are (window, rank, offset) until a piece of work starts; then they become addresses of this
//!   process, under the right ([`Reach`]) that keeps the window open.
//! * Grad reduce is the same walk in the other direction: the home rank reads its replicas' tiles, adds them to the
//!   master's in the plan's order, and zeroes them where they are, in one pass.
//!
//! # Unsafe
//! Only `kernel.rs` (instructions; `plain.rs` offers them on slices), `job.rs` (addresses within checked places) and `reach.rs` have unsafe code; the scheduling
//! is safe. Memory is soundly shared for two reasons: private regions are held by the job; window parts are open to peers, so
//! that no reference to them exists, and are touched by copies that may race.
//!
//! # Atomics
//! `tile` (a chunk's flag: `publish` releases, `is_ready` acquires) and `reach` (`Reach::drop` releases, closing the window
//! acquires). The counter of tiles is relaxed: numbers order nothing. Everything else that workers share lies under locks.
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
mod slots;
mod worker;

pub use engine::{EngineSpec, TileEngine};
pub use job::{GradReduce, Moved, WeightSync};
pub use layout::{
    Element, ExpertLayout, LayoutError, MasterShard, Masters, SHARD_ALIGN, Shard, UnknownFormat, WeightFormat,
};
pub use plain::{PlainCopy, plain_add_and_zero};
pub use reach::{Direct, Reach};
pub use slots::{Slots, TileSizes};
