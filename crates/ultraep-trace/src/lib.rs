//! The trace format: exact loads with their source axis, and the plans made for them.
//!
//! What it is for: a training or serving run records what its router did and what the balancer made of it; a viewer, a
//! replay and a report read it later. One [`Record`] is one (step, microbatch, layer): counts `[N, E]` before, optionally
//! the plan after (instances with quotas, the realised split `[N, instances]`, policy, digest), optionally the top-k ids.
//! A [`TraceWriter`] appends records in bounded memory; a [`TraceReader`] reads them in order, in constant memory, from
//! anything that can be read; a [`TraceFile`] reads any of them by number.
//!
//! What it must never do: trust a size before its checksum and its limit were checked; allocate more than the limits
//! allow, whatever a file says; return a record that does not fit the header; drop data without saying so; read a clock or
//! the environment.
//!
//! # Format, version 1
//!
//! ```text
//! file   = magic "\x89UET\r\n\x1a\n", version u32 = 1, json_bytes u32, json_crc u32, JSON header ([`TraceMeta`]),
//!          block*, [index, footer]
//! block  = header of 48 bytes with its own CRC-32, payload with its CRC-32: records, each behind its length, compressed
//!          with DEFLATE (raw) unless that does not help
//! index  = header of 48 bytes, 40 bytes a block, uncompressed
//! footer = offset of the index u64, "UETEND\r\n"
//! ```
//!
//! `docs/trace-format.md` has every field. Blocks are independent; steps never go back. A crash costs at most the block
//! being written: a reader takes every whole block and says how many bytes and records are torn ([`Ending`]). Damage
//! anywhere else is an error with its offset, never a silent gap. Without an index one is rebuilt from block headers.
//!
//! Cost: O(values) to write and to read; at 32 ranks and 64 experts about one byte a count and 12 us a record each way on
//! one core (`examples/01_write_and_read.rs` measures it). Memory: one block; a hostile file can make a reader take about
//! 300 MiB and no more.
//!
//! ```
//! use ultraep_trace::{Record, TraceMeta, TraceReader, TraceWriter};
//! use ultraep_plan::{Topology, TopologySpec};
//!
//! let topology = Topology::new(TopologySpec { ranks: 2, experts: 4, domain_ranks: 2, slots_per_rank: 1 })?;
//! let mut writer = TraceWriter::new(Vec::new(), TraceMeta::of_topology(&topology, 1))?;
//! writer.append(&Record { step: 0, before: vec![5, 0, 1, 2, 4, 1, 1, 2], ..Record::default() })?;
//! let bytes = writer.finish()?;
//!
//! let mut reader = TraceReader::new(bytes.as_slice())?;
//! let record = reader.next().expect("one record")?;
//! assert_eq!(record.before[4..], [4, 1, 1, 2]);
//! assert!(reader.next().is_none() && reader.ending().is_some_and(|e| e.is_closed));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

mod block;
mod codec;
mod error;
mod index;
mod meta;
mod reader;
mod record;
mod writer;

pub use block::{MAX_BLOCK_BYTES, MAX_BLOCK_RECORDS, MAX_BLOCKS, MAX_HEADER_BYTES, VERSION};
pub use codec::DecodeError;
pub use error::TraceError;
pub use index::{BlockEntry, Resumed, TraceFile};
pub use meta::{MAX_LAYERS, MAX_RECORDED_SLOTS, MetaError, SCHEMA, TraceMeta};
pub use reader::{Ending, TraceReader};
pub use record::{MAX_POLICY_BYTES, NO_EXPERT, PlanRecord, Record, RecordError, TopKIds};
pub use writer::{BlockSize, TraceWriter};
