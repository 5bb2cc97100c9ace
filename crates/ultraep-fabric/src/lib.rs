//! The fabric: EP ranks as threads of one process, or as processes of one machine over shared memory. One trait, one
//! implementation behind both, one conformance suite (`ultraep-conformance`) for these and for backends of other crates, which
//! find what they need in [`backend`].
//!
//! What it is for: everything that the ranks of an EP group exchange. Collectives (counts, token rows, dense gradients),
//! symmetric windows with one-sided put and get (weights), signals, and the certainty that a rank that dies or hangs makes
//! every other one end with an error that names it.
//!
//! What it must never do: let safe code race on memory; allocate once it runs (errors excepted); wait without end; leave a process,
//! a descriptor or a file behind; assume, in [`Fabric`], that a rank is a thread or that memory is the host's (the trait is to
//! carry MPI and GPU backends: operations are plain structs, submitted and polled).
//!
//! # Use
//! A [`GroupSpec`] sizes everything. [`run_threads`] runs a closure on each rank; [`processes::launch`] and
//! [`processes::join`] do the same with programs; processes that something else has started find each other with
//! [`attach`](attach::attach) (`examples/4_started_by_hand.rs`). All hand out a `Box<dyn Fabric>`: [`Fabric::submit`], [`Fabric::poll`],
//! [`Fabric::wait`] take an [`Operation`] through its life, [`Fabric::run`] does all at once, [`Fabric::leave`] ends. Who measures
//! passes a stamp along ([`Fabric::run_stamped`]). Memory is a [`Region`], read and written through guards. `examples/1_hello_ranks.rs` shows all of it on a page,
//! `examples/2_measure_fabric.rs` measures it. [`simulated`] runs ranks under a seeded scheduler, for tests:
//! `examples/3_find_a_bug.rs`.
//!
//! Experts' weights and gradients go through the tile engine ([`stream`]): worker threads of its own, relays, and direct loads
//! and stores where the fabric gives them ([`Fabric::direct`]).
//!
//! # How it works
//! All state that ranks share lies in one segment (`shared/layout.rs` has the table of its sections); references between
//! ranks are (section, rank, offset), never addresses. Each collective is a chain of *phases*; a phase ends when every rank
//! has entered it (`shared/turnstile.rs`), and the last to enter compares what all have published. Between phases ranks move
//! bytes (`shared/collective.rs`). The failure word is set once and names the first cause; every futex word has a bit that
//! says that it is set, so that no one can fall asleep past it.
//!
//! A rank that waits gives its core permit back and sleeps on a shared futex. When a phase ends, as many sleepers wake as
//! permits are free; the rest are moved over to the permits' queue by the kernel, asleep, and wake one by one.
//!
//! # Atomics
//! Each pair is marked `SYNC POINT` with its name at both ends. All of them come from `sync.rs`.
//!
//! | name       | word                         | releases (who, what)                                      | acquires |
//! |------------|------------------------------|-----------------------------------------------------------|----------|
//! | turn       | `Turnstile::turn`            | `enter`: what a rank published (control, sizes, staging) and put; `go`: its status | the last to `enter`; who meets a gone rank |
//! | generation | `Turnstile::generation`      | `turn`, by the last to enter: all that it acquired, the largest stamp | `look`, by everyone else |
//! | permits    | `Permits::word`              | `give_back`: nothing but order                            | `ask` |
//! | signal     | a signal word                | `signal`: the rank's earlier puts                         | `signal_value` |
//! | event      | `Doorbell::event`            | `ring`: the signal word                                   | `sleep_unless` |
//! | failure    | `Cause::word`, and bit 0 of each futex word | `Cause::set`: the reporter's record; `mark_failed`: that the group has failed | `Cause::get`; every waiter |
//! | borrow     | `Borrow::state` of a region  | the end of a guard, hold or epoch: the content            | the start of the next |
//! | credit     | `Credit::epoch` of a rank and window | `give`: the owner's use of its slots, lowered flags | `covers`: peers' workers |
//! | admitted   | a stream's word in a `Job`   | `is_ready`: credits that one worker has seen              | `is_ready`: the others of the rank |
//! | tile       | a chunk's flag in a window of slots | `publish`: a tile's bytes                          | `has_come`: a relay, and the owner |
//! | reach      | count of a window's `Reach`es | `Reach::drop`: what this rank's workers did there        | `claim`, on the same rank |
//! | status     | `Status::word`               | `start`, `go`: that a rank is there or gone               | `gone`: the supervisor or the watch, who meets a gone rank |
//!
//! Two places need a sequentially consistent fence at both ends, as each side writes one word and reads the other's (store
//! buffering): `generation` against `sleepers` (`turn` / `sleep`), and `event` against `listening` (`ring` / `sleep_unless`).
//! Either the sleeper sees the change, or the waker sees the sleeper. `tests/loom.rs` explores the interleavings of all of
//! these.
//!
//! Relaxed words: those ordered by `turn` and `generation` (the control block, sizes, stamp), and hints for messages
//! (`activity`, `computing`, `Permits::taken`).

pub mod attach;
pub mod backend;
mod borrow;
mod copy;
mod error;
mod fabric;
mod failure;
mod operation;
mod pages;
pub mod processes;
mod region;
mod shared;
pub mod simulated;
mod spec;
pub mod stream;
mod sync;
#[cfg(test)]
mod tests;
mod threads;

pub use bytemuck::Pod;
pub use error::{AccessError, FabricError, GroupError, JoinError, Loss, ProcessEnd};
pub use fabric::{Capabilities, Fabric};
pub use operation::{Collective, Completion, Operation, OperationKind, RemoteSpan, Span, Ticket};
pub use region::{REGION_ALIGN, ReadGuard, Region, WriteGuard};
pub use spec::{FabricKind, GroupSpec, MAX_WINDOWS, PROTOCOL_VERSION, SIGNALS, UnknownFabric, WindowId, WindowSpec};
pub use threads::run_threads;
