//! What a group is started with.

use crate::FabricError;
use core::fmt;
use core::str::FromStr;
use core::time::Duration;
use ultraep_plan::MAX_RANKS;

/// Signal words on each rank.
pub const SIGNALS: usize = 64;

/// The most windows a group may have.
pub const MAX_WINDOWS: usize = 1024;

/// Version of the layout and protocol of the shared segment. Ranks of another version are refused when they join.
pub const PROTOCOL_VERSION: u32 = 3;

/// What a group is started with. Everything is sized here; nothing is allocated while running.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupSpec {
    /// Ranks of the group, `1..=MAX_RANKS`.
    pub ranks: usize,
    /// Symmetric windows: each rank has a part of the same size of each.
    pub windows: Vec<WindowSpec>,
    /// After this long, a wait ends with [`FabricError::Timeout`], which names who is missing and the operation. Time in which the
    /// waiting process did not run (it was suspended) hardly counts.
    pub timeout: Duration,
    /// At most this many ranks compute at a time ("core permits"); 0 for no limit.
    pub cores: usize,
    /// Digest of the run's configuration; ranks whose digests differ are refused when they join.
    pub config_digest: u64,
}

/// One symmetric window.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WindowSpec {
    /// For messages.
    pub name: String,
    /// Bytes of each rank's part; 0 is allowed.
    pub bytes: usize,
}

/// Index of a window in [`GroupSpec::windows`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WindowId(u16);

impl WindowId {
    /// The window at `index`.
    ///
    /// # Panics
    /// When `index` is not below [`MAX_WINDOWS`]: a bug of the caller.
    #[must_use]
    pub const fn new(index: usize) -> Self {
        assert!(index < MAX_WINDOWS, "window index over the limit");
        Self(index as u16)
    }

    /// As an index into [`GroupSpec::windows`].
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for WindowId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl GroupSpec {
    /// A group of `ranks` without windows, with a timeout of 60 s, no core permits and digest 0.
    #[must_use]
    pub fn new(ranks: usize) -> Self {
        Self { ranks, windows: Vec::new(), timeout: Duration::from_secs(60), cores: 0, config_digest: 0 }
    }

    /// Adds a window of `bytes` bytes a rank and returns its id.
    pub fn add_window(&mut self, name: impl Into<String>, bytes: usize) -> WindowId {
        let id = WindowId::new(self.windows.len());
        self.windows.push(WindowSpec { name: name.into(), bytes });
        id
    }

    /// Refuses what no backend can start.
    ///
    /// # Errors
    /// [`FabricError::Spec`].
    pub fn check(&self) -> Result<(), FabricError> {
        let refuse = |what, asked, limit| Err(FabricError::Spec { what, asked, limit });
        if !(1..=MAX_RANKS).contains(&self.ranks) {
            return refuse("ranks (1 or more)", self.ranks, MAX_RANKS);
        }
        if self.windows.len() > MAX_WINDOWS {
            return refuse("windows", self.windows.len(), MAX_WINDOWS);
        }
        Ok(())
    }

    /// A digest of the windows' number and sizes, for [`Identity`](crate::backend::Identity): FNV-1a over words.
    #[must_use]
    pub fn windows_digest(&self) -> u64 {
        let words = self.windows.iter().map(|window| window.bytes as u64);
        words.fold(0xcbf2_9ce4_8422_2325, |digest, word| (digest ^ word).wrapping_mul(0x0000_0100_0000_01b3))
    }

    /// Core permits, if the group needs any.
    #[must_use]
    pub fn permits(&self) -> Option<usize> {
        (self.cores != 0 && self.cores < self.ranks).then_some(self.cores)
    }
}

/// The kinds of fabric that a user picks from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FabricKind {
    /// Ranks are threads of this process.
    Threads,
    /// Ranks are processes of this machine over a shared memory segment.
    Processes,
}

impl FabricKind {
    /// Every kind, in the order in which help texts list them.
    pub const ALL: [Self; 2] = [Self::Threads, Self::Processes];
}

impl fmt::Display for FabricKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Threads => "threads",
            Self::Processes => "processes",
        })
    }
}

/// A name that is no fabric.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no fabric is called `{0}`: allowed are threads and processes")]
pub struct UnknownFabric(pub String);

impl FromStr for FabricKind {
    type Err = UnknownFabric;

    fn from_str(name: &str) -> Result<Self, UnknownFabric> {
        Self::ALL.into_iter().find(|kind| kind.to_string() == name).ok_or_else(|| UnknownFabric(name.to_owned()))
    }
}
