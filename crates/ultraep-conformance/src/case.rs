//! What a case is, and what cases share.

use crate::launch::Nature;
use core::fmt::Display;
use core::time::Duration;
use ultraep_fabric::{Capabilities, Fabric, GroupSpec};
use ultraep_plan::Rank;

/// What a rank's main returns: a digest of what it saw, or what was wrong.
pub type Report = Result<u64, String>;

/// One case. A rank's main gets the seed; what it must see is its own business, how the group must end is `verify`'s.
#[derive(Clone, Copy)]
pub struct Case {
    /// Name, unique in the suite.
    pub name: &'static str,
    /// Sizes of the groups that it is run with.
    pub ranks: &'static [usize],
    /// Seeds that it is run with.
    pub seeds: &'static [u64],
    /// What it cannot do without.
    pub needs: &'static [Need],
    /// The group's specification for so many ranks.
    pub spec: fn(usize) -> GroupSpec,
    /// A rank's main.
    pub main: fn(Box<dyn Fabric>, u64) -> Report,
    /// How the group must end.
    pub verify: fn(&Ending) -> Result<(), String>,
}

/// Something that a case cannot do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// A fabric that obeys core permits.
    CorePermits,
    /// A fabric with sends and receives.
    PointToPoint,
    /// A launcher whose ranks can be killed.
    OwnProcesses,
    /// A launcher under which time passes while a rank sleeps.
    RealTime,
}

impl Need {
    /// Why a case with this need is skipped, if it is.
    #[must_use]
    pub fn missing(self, nature: Nature, has: Capabilities) -> Option<&'static str> {
        let (met, reason) = match self {
            Self::CorePermits => (has.core_permits, "no core permits"),
            Self::PointToPoint => (has.point_to_point, "no sends and receives"),
            Self::OwnProcesses => (nature.own_processes, "a rank is not a process that could be killed"),
            Self::RealTime => (nature.real_time, "its time is virtual"),
        };
        (!met).then_some(reason)
    }
}

/// How a group ended.
#[derive(Clone, Debug)]
pub struct Ending {
    /// Ranks of the group.
    pub ranks: usize,
    /// The seed that the mains got.
    pub seed: u64,
    /// The rank that the group error names, and its text.
    pub failure: Option<(Option<Rank>, String)>,
    /// What each rank's main returned, where it did.
    pub reports: Vec<Option<u64>>,
    /// Wall time from start to end.
    pub elapsed: Duration,
}

/// All ranks ended well.
pub(crate) fn all_well(ending: &Ending) -> Result<(), String> {
    if let Some((_, text)) = &ending.failure {
        return Err(format!("the group failed: {text}"));
    }
    match ending.reports.iter().position(Option::is_none) {
        Some(rank) => Err(format!("rank {rank} reported nothing")),
        None => Ok(()),
    }
}

/// All ranks ended well and saw the same.
pub(crate) fn all_equal(ending: &Ending) -> Result<(), String> {
    all_well(ending)?;
    ensure(ending.reports.windows(2).all(|pair| pair[0] == pair[1]), || format!("reports differ: {:?}", ending.reports))
}

pub(crate) fn ensure(condition: bool, otherwise: impl FnOnce() -> String) -> Result<(), String> {
    if condition { Ok(()) } else { Err(otherwise()) }
}

/// For `map_err`.
pub(crate) fn text(error: impl Display) -> String {
    error.to_string()
}

/// A spec with a timeout that no healthy case reaches.
pub(crate) fn plain(ranks: usize) -> GroupSpec {
    let mut spec = GroupSpec::new(ranks);
    spec.timeout = Duration::from_secs(20);
    spec
}

/// The stamp that a completion must have: a fabric that ignores stamps gives 0.
pub(crate) fn stamp(fabric: &dyn Fabric, stamp: u64) -> u64 {
    if fabric.capabilities().stamps { stamp } else { 0 }
}

/// SplitMix64: enough randomness for test data, the same on each rank.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// Test bytes that tell sender, purpose and place.
pub(crate) fn bytes(purpose: u64, rank: usize, count: usize) -> Vec<u8> {
    let mut random = Random(purpose.wrapping_mul(1_000_003).wrapping_add(rank as u64));
    let words = (0..count.div_ceil(8)).flat_map(|_| random.next().to_le_bytes());
    words.take(count).collect()
}

/// Folds bytes into a digest (FNV-1a).
pub(crate) fn digest(so_far: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(so_far ^ 0xcbf2_9ce4_8422_2325, |digest, &byte| {
        (digest ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}
