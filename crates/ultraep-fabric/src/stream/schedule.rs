//! The order of a rank's tiles: from a number to the tile that has it, in constant time.
//!
//! ```text
//! for each chunk of an expert, ascending
//!   for each of the rank's streams that has this chunk (of its stripe), in the plan's order: by hops from home
//!     for each tile of the chunk, ascending
//! ```
//!
//! # No deadlock
//! A tile waits, if it waits at all, for one chunk that another rank sends: the same chunk, one hop nearer to home. So each
//! tile waits for tiles with a smaller (chunk, hops) only, and each rank hands its tiles out in an order in which
//! (chunk, hops) never falls. Take the waiting or not yet handed out tile with the smallest (chunk, hops) in the whole
//! group, the first of its rank among equals. What it waits for is smaller, so done; and on its rank all tiles before it are
//! done, so a worker is free to take it, or has it. It is done in the end, whatever the number of workers (at least one a
//! rank); by induction all are. A worker that takes its next tile before it has done the last (look-ahead) holds two, in this
//! order, and does the smaller one first: nothing changes.
//!
//! Plain arithmetic, no memory access: `tests/loom.rs` compiles this file, too.

/// Most stripes of an expert.
pub(crate) const STRIPES: usize = ultraep_plan::MAX_STRIPES as usize;

/// How an expert is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// Bytes of the packed expert.
    pub(crate) bytes: usize,
    /// Bytes of a chunk, the unit of readiness; the last may be shorter.
    pub(crate) chunk_bytes: usize,
    /// Bytes of a tile, the unit of work; the last of a chunk may be shorter.
    pub(crate) tile_bytes: usize,
}

/// Chunks and tiles start on cache lines.
const LINE: usize = 64;

impl Geometry {
    /// Cuts `bytes` (at least 1) into equal chunks of about `chunk_bytes` and at most that, and those into tiles.
    pub(crate) fn new(bytes: usize, chunk_bytes: usize, tile_bytes: usize) -> Self {
        let even = |bytes: usize, most: usize| {
            let parts = bytes.div_ceil(most.next_multiple_of(LINE).max(LINE)).max(1);
            bytes.div_ceil(parts).next_multiple_of(LINE)
        };
        let bytes = bytes.max(1);
        let chunk_bytes = even(bytes, chunk_bytes);
        Self { bytes, chunk_bytes, tile_bytes: even(chunk_bytes, tile_bytes) }
    }

    pub(crate) fn chunks(&self) -> usize {
        self.bytes.div_ceil(self.chunk_bytes)
    }

    /// Tiles of a chunk.
    pub(crate) fn tiles(&self, chunk: usize) -> usize {
        self.chunk_len(chunk).div_ceil(self.tile_bytes)
    }

    fn chunk_len(&self, chunk: usize) -> usize {
        self.chunk_bytes.min(self.bytes - chunk * self.chunk_bytes)
    }
}

/// A piece of an expert that one worker moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tile {
    /// Which of the rank's streams.
    pub(crate) stream: usize,
    /// Number of its chunk in the expert.
    pub(crate) chunk: usize,
    /// First byte, in the packed expert.
    pub(crate) start: usize,
    /// Its length.
    pub(crate) bytes: usize,
}

/// A rank's tiles, numbered.
#[derive(Clone, Debug)]
pub(crate) struct Schedule {
    geometry: Geometry,
    stripes: usize,
    /// Streams of each stripe, in order.
    streams: [Vec<u32>; STRIPES],
    count: usize,
    tiles: u64,
}

impl Schedule {
    /// No streams, with room for so many.
    pub(crate) fn with_capacity(streams: usize) -> Self {
        let geometry = Geometry { bytes: 1, chunk_bytes: 1, tile_bytes: 1 };
        let streams = core::array::from_fn(|_| Vec::with_capacity(streams));
        Self { geometry, stripes: 1, streams, count: 0, tiles: 0 }
    }

    /// Starts over: experts cut like this, into `stripes` stripes (`1..=STRIPES`).
    pub(crate) fn begin(&mut self, geometry: Geometry, stripes: usize) {
        self.streams.iter_mut().for_each(Vec::clear);
        (self.geometry, self.stripes, self.count, self.tiles) = (geometry, stripes.clamp(1, STRIPES), 0, 0);
    }

    /// Adds a stream of this stripe (below the number of stripes); streams come by hops from home.
    pub(crate) fn push(&mut self, stripe: usize) {
        self.streams[stripe % self.stripes].push(self.count as u32);
        self.count += 1;
        let last = self.geometry.chunks() - 1;
        let of_last = self.streams[last % self.stripes].len() * self.geometry.tiles(last);
        self.tiles = self.before(last) + of_last as u64;
    }

    /// Tiles of chunks before `chunk`, which is not after the last.
    fn before(&self, chunk: usize) -> u64 {
        let streams = |stripes: &[Vec<u32>]| stripes.iter().map(Vec::len).sum::<usize>();
        let (rounds, rest) = (chunk / self.stripes, chunk % self.stripes);
        let chunks = rounds * streams(&self.streams[..self.stripes]) + streams(&self.streams[..rest]);
        chunks as u64 * self.geometry.tiles(0) as u64
    }

    /// How experts are cut.
    pub(crate) fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Bytes of a stripe of an expert.
    pub(crate) fn stripe_bytes(&self, stripe: usize) -> u64 {
        let chunks = (stripe..self.geometry.chunks()).step_by(self.stripes);
        chunks.map(|chunk| self.geometry.chunk_len(chunk) as u64).sum()
    }

    /// Tiles in all.
    pub(crate) fn tiles(&self) -> u64 {
        self.tiles
    }

    /// The tile with this number.
    pub(crate) fn tile(&self, number: u64) -> Option<Tile> {
        if number >= self.tiles {
            return None;
        }
        let last = self.geometry.chunks() - 1;
        let before_last = self.before(last);
        let (chunk, place) = if number >= before_last {
            (last, (number - before_last) as usize)
        } else {
            let per_chunk = self.geometry.tiles(0);
            let of_round = self.streams[..self.stripes].iter().map(|of_stripe| of_stripe.len() * per_chunk);
            let round: usize = of_round.clone().sum();
            let (rounds, mut place) = ((number / round as u64) as usize, (number % round as u64) as usize);
            let mut stripe = 0;
            for tiles in of_round {
                if place < tiles {
                    break;
                }
                (stripe, place) = (stripe + 1, place - tiles);
            }
            (rounds * self.stripes + stripe, place)
        };
        let tiles = self.geometry.tiles(chunk);
        let stream = *self.streams[chunk % self.stripes].get(place / tiles)? as usize;
        let within = place % tiles * self.geometry.tile_bytes;
        let bytes = self.geometry.tile_bytes.min(self.geometry.chunk_len(chunk) - within);
        Some(Tile { stream, chunk, start: chunk * self.geometry.chunk_bytes + within, bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The order as the top of the file says it.
    fn naive(geometry: Geometry, stripes: usize, streams: &[usize]) -> Vec<Tile> {
        let mut tiles = Vec::new();
        for chunk in 0..geometry.chunks() {
            for (stream, _) in streams.iter().enumerate().filter(|(_, stripe)| chunk % stripes == **stripe) {
                let end = geometry.bytes.min((chunk + 1) * geometry.chunk_bytes);
                let mut start = chunk * geometry.chunk_bytes;
                while start < end {
                    let bytes = geometry.tile_bytes.min(end - start);
                    tiles.push(Tile { stream, chunk, start, bytes });
                    start += bytes;
                }
            }
        }
        tiles
    }

    #[test]
    fn numbers_lead_to_the_tiles_of_the_written_order() {
        let mut schedule = Schedule::with_capacity(4);
        for (bytes, chunk, tile) in [(1, 64, 64), (1000, 256, 64), (1000, 1000, 300), (4096, 512, 128), (130, 64, 64)] {
            let geometry = Geometry::new(bytes, chunk, tile);
            for stripes in 1..=STRIPES {
                for streams in [&[][..], &[0], &[1], &[0, 1, 2, 3], &[3, 0, 0, 1, 3]] {
                    let streams: Vec<usize> = streams.iter().map(|stripe| stripe % stripes).collect();
                    schedule.begin(geometry, stripes);
                    streams.iter().for_each(|&stripe| schedule.push(stripe));
                    let naive = naive(geometry, stripes, &streams);
                    let got: Vec<Tile> = (0..).map_while(|number| schedule.tile(number)).collect();
                    assert_eq!(got, naive, "{geometry:?}, {stripes} stripes, {streams:?}");
                    assert_eq!(schedule.tiles(), naive.len() as u64);
                }
            }
        }
    }

    #[test]
    fn chunks_and_tiles_are_even() {
        let geometry = Geometry::new(300_000, 262_144, 32_768);
        assert_eq!((geometry.chunks(), geometry.chunk_bytes, geometry.tile_bytes), (2, 150_016, 30_016));
        assert_eq!(Geometry::new(1, 0, 0), Geometry { bytes: 1, chunk_bytes: 64, tile_bytes: 64 });
    }
}
