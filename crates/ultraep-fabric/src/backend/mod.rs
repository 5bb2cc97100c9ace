//! What a backend of another crate needs, beside the traits: rights to use memory, checks of operands, failures, identity.
//!
//! A backend implements [`Fabric`](crate::Fabric) for its endpoint and passes the suite of `ultraep-conformance`. Nothing here needs
//! `unsafe` of a backend that moves bytes with [`Hold::read_bytes`] and [`Hold::write_bytes`]; one that hands addresses to a
//! library has [`Hold::start`], and [`Region::adopt`](crate::Region::adopt) for memory that the library owns.
//! `ultraep-messages` is a backend without unsafe code.
//!
//! # What a backend must check
//! An operation is refused before it changes anything; [`Operands`] has the checks and their errors.
//!
//! | operation        | to check                                                                        | memory to hold until it is complete |
//! |------------------|---------------------------------------------------------------------------------|-------------------------------------|
//! | every one        | the group has not failed ([`Failure::error`]); a collective: none is in flight  | |
//! | `Open`           | the window is there                                                             | own part: [`Use::Open`], until `Close` is complete |
//! | `Close`          | the window is open; forbids puts and gets from its submission on                | |
//! | `Put`, `Get`     | span, each remote span, windows open on this rank                               | local span: [`Use::Read`] / [`Use::Write`], unless it lies in the own part of an open window |
//! | `Signal`, `AwaitSignal` | rank, number of the word                                                 | |
//! | `Send`, `Recv`   | rank, span; both ends have one length                                           | span: `Read` / `Write`, unless it lies in the own part of an open window |
//! | `AllGather`      | [`Operands::all_gather`]                                                        | `recv`: `Write`; `send`: `Read`, unless it is in place |
//! | `AllToAll`       | [`Operands::all_to_all`]; each block has one size at both ends                  | `send`: `Read`; window: [`Use::Receive`], released when all is there |
//! | `AllReduceSumF32`| [`Operands::all_reduce`]                                                        | `data`: `Write` |
//!
//! * The right to a span's memory comes from [`Span::right`](crate::Span::right): the caller may hold the region itself.
//! * Collectives are compared over ranks ([`Collective`](crate::Collective)): a difference is [`Failure::Mismatch`] on every rank.
//! * An operand that is refused leaves no hold behind. A receiving hold of a group that has failed is dropped, never released, when
//!   a peer may still write.
//! * Every wait ends within the group's timeout, with [`Failure::Timeout`] that names who is missing.
//! * The first failure is the group's: every later call of every rank returns its error, with the operation of the call.
//! * Ranks that differ in [`Identity`] are refused when they join.

mod identity;
mod operands;

pub use crate::failure::{FAILURE_WORDS, Failure};
pub use crate::operation::Right;
pub use crate::region::{Hold, Use};
pub use identity::{Identity, VectorFamily};
pub use operands::Operands;
