//! Moving expert state, the pure part: which bytes go from which rank to which, in which order.
//!
//! * [`Transfers`]: the direct list, one entry a replica. Grad reduce and direct weight sync need no more.
//! * [`TransferPlanner`]: a tree of copies for every expert, so that replicas forward what they have (relays), and from
//!   it each rank's ordered tasks, a [`TransferPlan`].
//! * [`TransferClock`]: what a plan takes, chunk by chunk, under a [`TransferModel`].
//! * [`SyncPlanner`]: the three together, for one weight sync after another.
//! * [`TransferBound`]: what no plan can beat.

mod bound;
mod clock;
mod direct;
mod model;
mod planner;
mod relieve;
mod schedule;
mod sharing;
mod sync;
mod trees;

pub use bound::{BoundTables, TransferBound};
pub use clock::TransferClock;
pub use direct::{Transfer, Transfers};
pub use model::{
    MAX_CHUNKS, MAX_STRIPES, ParseTransferModeError, TransferMode, TransferModel, TransferModelError, TransferParams,
    TreeRule,
};
pub use planner::{Choice, TransferPlanner};
pub use schedule::{Stripe, TransferPlan, TransferTask};
pub use sync::{PlannedTransfers, SyncPlanner};
