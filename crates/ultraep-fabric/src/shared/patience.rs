//! How long a wait has lasted, in time that this process ran.
//!
//! Waiters look around at least every [`NAP`]. A look that comes much later means that the process did not run meanwhile: it
//! was stopped by a signal (Ctrl-Z, SIGSTOP), or the machine had no time for it. The ranks of a group that were all suspended
//! and go on have not hung, so such a gap counts only as far as a machine under heavy load may make one.

use core::time::Duration;
use std::time::Instant;

/// Longest sleep before a waiter looks around again, whatever happens.
pub(crate) const NAP: Duration = Duration::from_millis(100);

/// Most that one gap between two looks counts, unless the limit is short.
const GAP_MAX: Duration = Duration::from_secs(1);

/// The patience of one wait.
pub(crate) struct Patience {
    limit: Duration,
    seen: Instant,
    waited: Duration,
}

impl Patience {
    /// A wait of at most `limit` begins.
    pub(crate) fn new(limit: Duration) -> Self {
        Self { limit, seen: Instant::now(), waited: Duration::ZERO }
    }

    /// Looks at the clock; gives the time that is left.
    pub(crate) fn left(&mut self) -> Duration {
        let now = Instant::now();
        let gap = now - core::mem::replace(&mut self.seen, now);
        self.count(gap);
        self.limit.saturating_sub(self.waited)
    }

    fn count(&mut self, gap: Duration) {
        let most = (self.limit / 4).clamp(2 * NAP, GAP_MAX);
        self.waited += gap.min(most);
    }

    /// How long it has lasted, as far as it counts.
    pub(crate) fn waited(&self) -> Duration {
        self.waited
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_without_this_process_hardly_counts() {
        let mut patience = Patience::new(Duration::from_secs(60));
        for _ in 0..590 {
            patience.count(NAP);
        }
        // Suspended for an hour.
        patience.count(Duration::from_secs(3600));
        assert_eq!(patience.waited(), Duration::from_secs(60));
        // With a short limit, too, one gap alone does not use it up.
        let mut patience = Patience::new(Duration::from_secs(1));
        patience.count(Duration::from_secs(3600));
        assert_eq!(patience.waited(), Duration::from_millis(250));
        assert!(!patience.left().is_zero());
    }
}
