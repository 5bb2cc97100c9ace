//! What a rank did when: the raw material of a timeline.

/// What a rank's time goes to; streams of one rank run side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stream {
    /// Kernels.
    Compute,
    /// Links.
    Communication,
}

/// One thing that one rank did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// What.
    pub name: &'static str,
    /// Rank of the EP group.
    pub rank: u32,
    /// Where.
    pub stream: Stream,
    /// When it began.
    pub start_ps: u64,
    /// When it ended.
    pub end_ps: u64,
}
