//! How a group ended, and whether that is as it must be.

use std::fmt;
use std::str::FromStr;

use ultraep_fabric::simulated::{Fault, FaultKind, Moment, Schedule};
use ultraep_fabric::{FabricError, OperationKind};
use ultraep_plan::Rank;
use ultraep_runtime::RuntimeError;

use crate::{FaultText, Profile};

/// How one rank's main ended. As text it crosses processes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RankEnd {
    /// Well, with this digest of its results.
    Finished(u64),
    /// With an error of the group that names a rank and what this rank was doing.
    Named {
        /// The first rank that is named.
        culprit: Rank,
        /// Whether it is the only one.
        alone: bool,
        /// `operation: message`.
        message: String,
    },
    /// With another error.
    Failed(String),
    /// It did not return.
    Lost,
}

impl RankEnd {
    /// From what the main returned.
    pub fn of(result: &Result<u64, RuntimeError>) -> Self {
        let error = match result {
            Ok(digest) => return Self::Finished(*digest),
            Err(RuntimeError::Fabric(error)) if error.ends_group() => error,
            Err(other) => return Self::Failed(other.to_string()),
        };
        let operation = match error {
            FabricError::PeerLost { operation, .. }
            | FabricError::Timeout { operation, .. }
            | FabricError::Suspended { operation, .. } => *operation,
            FabricError::SizeMismatch { .. } => OperationKind::AllToAll,
            FabricError::Mismatch { operation, .. } => operation.kind,
            _ => OperationKind::Compute,
        };
        let alone = match error {
            FabricError::Timeout { missing: ranks, .. } | FabricError::Suspended { ranks, .. } => ranks.len() == 1,
            _ => true,
        };
        match error.culprit() {
            Some(culprit) if operation != OperationKind::Compute => {
                Self::Named { culprit, alone, message: error.to_string() }
            }
            _ => Self::Failed(error.to_string()),
        }
    }
}

impl fmt::Display for RankEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Finished(digest) => write!(f, "finished {digest}"),
            Self::Named { culprit, alone: true, message } => write!(f, "named {culprit} {message}"),
            Self::Named { culprit, alone: false, message } => write!(f, "named-first {culprit} {message}"),
            Self::Failed(message) => write!(f, "failed {message}"),
            Self::Lost => f.write_str("lost"),
        }
    }
}

impl FromStr for RankEnd {
    type Err = std::convert::Infallible;

    /// Whatever is no end of a rank is one of a rank that did not return.
    fn from_str(line: &str) -> Result<Self, Self::Err> {
        let (word, rest) = line.trim_end().split_once(' ').unwrap_or((line, ""));
        let named = |alone| {
            let (culprit, message) = rest.split_once(' ')?;
            let culprit = Rank::new(usize::from(culprit.parse::<u16>().ok()?));
            Some(Self::Named { culprit, alone, message: message.to_owned() })
        };
        let end = match word {
            "finished" => rest.parse().ok().map(Self::Finished),
            "named" => named(true),
            "named-first" => named(false),
            "failed" => Some(Self::Failed(rest.to_owned())),
            _ => None,
        };
        Ok(end.unwrap_or(Self::Lost))
    }
}

/// How a group ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ending {
    /// Each rank's end, `[ranks]`.
    pub ends: Vec<RankEnd>,
    /// The rank that the group's error names, and the error; `None` when the group ended well.
    pub failure: Option<(Option<Rank>, String)>,
    /// The schedule, of a simulated group.
    pub schedule: Option<Schedule>,
}

impl Ending {
    /// That every rank ended well with the results of `profile`.
    ///
    /// # Errors
    /// What is different.
    pub fn check_healthy(&self, profile: &Profile) -> Result<(), String> {
        if let Some((_, failure)) = &self.failure {
            return Err(format!("the group failed: {failure}"));
        }
        for (rank, (end, &digest)) in self.ends.iter().zip(&profile.digests).enumerate() {
            if *end != RankEnd::Finished(digest) {
                return Err(format!("rank {rank}: {end}, expected finished {digest}"));
            }
        }
        Ok(())
    }

    /// That every rank but `victim`, which was killed some time, has ended well with the results of `profile` or names it.
    /// Whether the kill came in time to be noticed.
    ///
    /// # Errors
    /// What is not so.
    pub fn check_killed(&self, profile: &Profile, victim: Rank) -> Result<bool, String> {
        let Some((blamed, message)) = &self.failure else {
            return self.check_healthy(profile).map(|()| false);
        };
        if *blamed != Some(victim) {
            return Err(format!("rank {victim} was killed, the group says {message}"));
        }
        for (rank, end) in self.ends.iter().enumerate().filter(|&(rank, _)| rank != victim.index()) {
            match end {
                RankEnd::Named { culprit, alone: true, .. } if *culprit == victim => {}
                RankEnd::Finished(digest) if *digest == profile.digests[rank] => {}
                // It had not joined yet and was refused, which names the victim, too.
                RankEnd::Failed(message) if message.contains(&format!("rank {victim} was lost")) => {}
                other => return Err(format!("rank {victim} was killed, rank {rank} says {other}")),
            }
        }
        Ok(true)
    }

    /// That `fault`'s rank is named by the group and by every other rank, except by those that had all they needed when it
    /// struck: those have ended well, with the results of `profile`.
    ///
    /// # Errors
    /// What is not so.
    pub fn check(&self, profile: &Profile, fault: &Fault) -> Result<(), String> {
        let victim = fault.rank;
        let wrong = |what: String| Err(format!("{}: {what}", FaultText(*fault)));
        match &self.failure {
            Some((Some(rank), _)) if *rank == victim => {}
            other => return wrong(format!("the group names {other:?}")),
        }
        let last = profile.last_collective(victim);
        let needed = match fault.moment {
            Moment::Before(number) => number <= last,
            Moment::InFlight(number) => number < last,
            _ => false,
        };
        for (rank, end) in self.ends.iter().enumerate().filter(|&(rank, _)| rank != victim.index()) {
            match end {
                RankEnd::Named { culprit, alone: true, .. } if *culprit == victim => {}
                RankEnd::Finished(digest) if !needed && *digest == profile.digests[rank] => {}
                other => return wrong(format!("rank {rank} of {}: {other}", self.ends.len())),
            }
        }
        match &self.ends[victim.index()] {
            RankEnd::Finished(_) => wrong("its rank finished".to_owned()),
            // A rank that hangs is told in the end, or never returns.
            RankEnd::Failed(message) if fault.kind != FaultKind::Fails => wrong(format!("its rank says {message}")),
            _ => Ok(()),
        }
    }
}
