//! Every point at which a rank can be lost.

use ultraep_fabric::simulated::{Fault, FaultKind, Moment};
use ultraep_plan::Rank;

use crate::Profile;

/// Kinds of fault that end a rank, in the order in which they are tried.
pub const KINDS: [FaultKind; 4] = [FaultKind::Fails, FaultKind::Panics, FaultKind::Killed, FaultKind::Hangs];

/// Every (rank, operation, before it or in flight, kind) of the runs of `profile`, ranks slowest, for the kinds given.
pub fn fault_points<'a>(profile: &'a Profile, kinds: &'a [FaultKind]) -> impl Iterator<Item = Fault> + 'a {
    profile.operations.iter().enumerate().flat_map(move |(rank, operations)| {
        let moments =
            (0..operations.len() as u64).flat_map(|number| [Moment::Before(number), Moment::InFlight(number)]);
        // A rank that leaves has nothing in flight.
        let leaving = Moment::InFlight(operations.len() as u64 - 1);
        let moments = moments.filter(move |&moment| moment != leaving);
        moments.flat_map(move |moment| kinds.iter().map(move |&kind| Fault { rank: Rank::new(rank), moment, kind }))
    })
}
