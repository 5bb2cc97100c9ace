//! EP ranks as threads of one process or as processes over shared memory: one trait, one implementation, one conformance
//! suite.
#![warn(missing_docs)]

mod copy;
mod error;
mod fabric;
mod operation;
pub mod processes;
mod region;
mod shared;
mod spec;
mod sync;
mod threads;

pub use bytemuck::Pod;
pub use error::{AccessError, FabricError, GroupError, JoinError, Loss, ProcessEnd};
pub use fabric::{Capabilities, Fabric};
pub use operation::{Collective, Completion, Operation, OperationKind, RemoteSpan, Span, Ticket};
pub use region::{REGION_ALIGN, ReadGuard, Region, WriteGuard};
pub use spec::{FabricKind, GroupSpec, MAX_WINDOWS, PROTOCOL_VERSION, SIGNALS, UnknownFabric, WindowId, WindowSpec};
pub use threads::run_threads;
