//! A fabric over messages: [`MessageFabric`] implements [`Fabric`](ultraep_fabric::Fabric) over any [`Transport`] that delivers
//! messages in order between pairs of ranks. MPI and sockets are such transports.
//!
//! What it is for: ranks that share no memory. Collectives, windows, one-sided operations and signals are made of messages; a rank that
//! is lost is named by all others, as on every fabric.
//!
//! What it must never do: make a call into the transport from more than one thread; block while a peer waits for it; buffer
//! without limit what a peer is too slow to take; give sums other bits than `((x0 + x1) + x2) + ...`; contain unsafe code.
//!
//! # How it works
//! ```text
//! rank's thread      submits operations to the machine, sleeps until they are complete          (`endpoint.rs`)
//! progress thread    the only one that touches the transport: feeds messages to the machine,
//!                    sends what that wants sent; serves peers while the rank computes    (`progress.rs`)
//! core               a state machine under one lock; no IO, no clock, no thread              (`machine/`)
//! ```
//!
//! * **Collectives.** Each rank tells rank 0 what it has entered. When all have, rank 0 compares, and sends `go` or the
//!   difference; then blocks go directly from rank to rank. Who is missing is known to rank 0 at any time.
//! * **One-sided operations** are active messages: the target's progress thread writes them into its window, or answers a get.
//!   Windows stay under the hold of [`Operation::Open`](ultraep_fabric::Operation::Open) meanwhile, so that safe code cannot see them.
//! * **Order.** A signal goes out when every put before it has been acknowledged or goes the same way; a collective is entered when
//!   everything submitted before it has been.
//! * **Credits.** Of data at most [`WINDOW_BYTES`] to each peer are not acknowledged. A chunk leaves the source's memory when a credit
//!   is there, so that a put needs no buffer; the operation is complete when all of it has left.
//! * **Sums.** Each rank sums a share of the elements, chunk by chunk, as soon as every rank's part is there, in the order of ranks.
//! * **Failures** go to rank 0, which spreads the first one, so that all ranks have the same; if rank 0 is gone or silent, whoever
//!   found one spreads it. After a timeout the rank that waited asks all others what they are doing, and so finds who is missing.
//!
//! What it costs: a collective is two messages to and from rank 0 before its data; an all-to-all sends its sizes there, `2 N` words a rank.

#![forbid(unsafe_code)]

mod endpoint;
mod frame;
mod machine;
mod progress;
mod transport;

pub use endpoint::MessageFabric;
pub use machine::{CHUNK_BYTES, WINDOW_BYTES};
pub use transport::{Event, Transport, TransportError, Waker};
