//! What kind of schedule a seed makes: drawn once, so that seeds differ in more than luck.

use core::time::Duration;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// The scheduler's random numbers.
pub(super) struct Random(ChaCha8Rng);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    /// Uniform below `limit`, which is not 0 (the bias of the remainder does not matter here).
    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.0.next_u64() % limit
    }

    /// True in `odds` of 1,024 cases.
    pub(super) fn chance(&mut self, odds: u64) -> bool {
        self.below(1024) < odds
    }

    fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }
}

/// The habits of a seed; odds are of 1,024.
pub(super) struct Habits {
    /// That a message lands before the next rank runs.
    pub(super) lands: u64,
    /// That the rank that runs goes on running.
    pub(super) stays: u64,
    /// That a rank goes to sleep at its turn.
    pub(super) sleeps: u64,
    /// Longest sleep and longest delay of a message, in virtual nanoseconds.
    pub(super) nap_ns_max: u64,
    /// Pieces into which a put falls at most.
    pub(super) pieces_max: u64,
    /// A rank that runs only when no other can, mostly.
    pub(super) slow: Option<usize>,
}

impl Habits {
    pub(super) fn draw(random: &mut Random, ranks: usize, timeout: Duration) -> Self {
        // Sleeps never add up to a timeout: a healthy group ends well under each seed.
        let most = u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX) / 1000;
        Self {
            lands: random.one_of(&[0, 16, 128, 512]),
            stays: random.one_of(&[0, 512, 896]),
            sleeps: random.one_of(&[0, 8, 100]),
            nap_ns_max: random.one_of(&[1_000, 100_000, most]).clamp(1, most.max(1)),
            pieces_max: random.one_of(&[1, 2, 5]),
            slow: (random.below(4) == 0).then(|| random.below(ranks as u64) as usize),
        }
    }
}
