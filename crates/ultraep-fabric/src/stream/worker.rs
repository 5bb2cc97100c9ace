//! A worker: takes the next tile from one counter, waits for its chunk, moves it, says that it is there.
//!
//! One step is a function of the schedule, the counter and what the worker touches ([`Hands`]), so that real threads, loom
//! (`tests/loom.rs`) and a seeded scheduler (`stream/simulated.rs`) drive the same code.

use super::schedule::{Schedule, Tile};
use crate::sync::{AtomicU64, Ordering};

/// What a worker touches: memory and flags.
pub(crate) trait Hands {
    /// Whether the tile's chunk is where it is to be read (acquire: then its bytes are, too). Masters always are.
    fn ready(&mut self, tile: &Tile) -> bool;

    /// Says which tile comes after the one that is about to be moved: its look-up, and a hint to the memory.
    fn look_ahead(&mut self, tile: &Tile);

    /// Reads the tile once and writes it to all its destinations, or adds and zeroes.
    fn move_tile(&mut self, tile: &Tile);

    /// Tells those who wait for the tile (release: its bytes first).
    fn publish(&mut self, tile: &Tile);
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// It moved a tile.
    Moved,
    /// The worker's tile waits for its chunk: nothing was done.
    Blocked(Tile),
    /// There is nothing left to take, and nothing in hand.
    Done,
}

/// One worker's state within one piece of work: the tile in hand, and the one taken ahead.
#[derive(Debug, Default)]
pub(crate) struct Worker {
    in_hand: Option<Tile>,
}

impl Worker {
    /// Takes on the tile that another worker had in hand; this one has none.
    pub(crate) fn take_back(&mut self, tile: Tile) {
        self.in_hand = Some(tile);
    }

    /// Does one tile, if its chunk is there.
    pub(crate) fn step(&mut self, schedule: &Schedule, next: &AtomicU64, hands: &mut impl Hands) -> Step {
        let Some(tile) = self.in_hand.or_else(|| take(schedule, next)) else { return Step::Done };
        self.in_hand = Some(tile);
        if !hands.ready(&tile) {
            return Step::Blocked(tile);
        }
        // Two in turn: while this tile is moved, the next is looked up and on its way from memory. (On a host whose look-up is
        // arithmetic this gains nothing that can be measured; it is there for tables that lie in another memory.)
        self.in_hand = take(schedule, next);
        if let Some(ahead) = &self.in_hand {
            hands.look_ahead(ahead);
        }
        hands.move_tile(&tile);
        hands.publish(&tile);
        Step::Moved
    }
}

/// The next tile, if there is one.
fn take(schedule: &Schedule, next: &AtomicU64) -> Option<Tile> {
    // Relaxed: the counter hands out numbers, each once, and orders nothing. Past the end it is not raised further.
    if next.load(Ordering::Relaxed) >= schedule.tiles() {
        return None;
    }
    schedule.tile(next.fetch_add(1, Ordering::Relaxed))
}
