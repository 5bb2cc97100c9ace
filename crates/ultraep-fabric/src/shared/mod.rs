//! The fabric of one machine: ranks over a shared memory segment, whether they are threads or processes.

mod blame;
mod cause;
mod collective;
mod direct;
mod doorbell;
mod driven;
mod endpoint;
mod failure;
mod layout;
mod one_sided;
mod patience;
mod permits;
mod segment;
mod status;
mod turnstile;
mod word;

pub(crate) use endpoint::Endpoint;
pub(crate) use layout::Layout;
pub(crate) use patience::Patience;
#[cfg(test)]
pub(crate) use segment::MAGIC;
pub(crate) use segment::{SEALS, Segment};
pub(crate) use status::Gone;
