//! The map and what can be wrong with it.

use ultraep_plan::{MAX_EXPERTS, MAX_RANKS};

/// What stands in a slot that holds nothing.
pub const EMPTY: i32 = -1;
/// Most layers of a map.
pub const MAX_LAYERS: usize = 4096;
/// Most physical experts of a layer, over all ranks.
pub const MAX_PHYSICAL: usize = 1 << 16;

/// Size of a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapShape {
    /// Layers.
    pub layers: usize,
    /// `N`, ranks.
    pub ranks: usize,
    /// Physical experts of each rank: what its masters and slots are together. The fullest rank's, where ranks differ.
    pub slots_per_rank: usize,
    /// `E`, logical experts.
    pub experts: usize,
}

impl MapShape {
    /// Physical experts of a layer, `P`.
    pub fn physical(&self) -> usize {
        self.ranks * self.slots_per_rank
    }
}

/// Why there is no map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// A number outside its limits.
    #[error("{what} {got}: allowed are 1 to {max}")]
    Range {
        /// Which.
        what: &'static str,
        /// As given.
        got: usize,
        /// Most.
        max: usize,
    },
    /// Not as many entries as the shape has.
    #[error("{got} entries: {layers} layers of {physical} physical experts have {expected}")]
    Length {
        /// Entries given.
        got: usize,
        /// Layers.
        layers: usize,
        /// Physical experts of a layer.
        physical: usize,
        /// Their product.
        expected: usize,
    },
    /// A number that is no expert.
    #[error("layer {layer}, rank {rank}, slot {slot}: expert {got}: allowed are 0 to {}, and -1 for an empty slot", experts - 1)]
    Expert {
        /// Row of the map.
        layer: usize,
        /// Rank.
        rank: usize,
        /// Slot on the rank.
        slot: usize,
        /// As given.
        got: i64,
        /// `E`.
        experts: usize,
    },
    /// Layer numbers that do not ascend, or not one for each row.
    #[error("layer numbers: one for each of {rows} rows, ascending")]
    LayerNumbers {
        /// Rows of the map.
        rows: usize,
    },
}

/// Which logical expert lies in which slot of which rank, layer by layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlacementMap {
    shape: MapShape,
    /// `[layers, N * slots_per_rank]`, [`EMPTY`] for an empty slot.
    physical_to_logical: Vec<i32>,
    /// The model's number of every row's layer, where it is known.
    layer_numbers: Option<Vec<u32>>,
}

/// What a map holds that an engine or a user should hear of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// (row, expert): experts that no rank holds. A map with one of them is invalid: tokens would have nowhere to go.
    pub missing: Vec<(usize, usize)>,
    /// (row, rank, expert): two and more copies of one expert on one rank, which share what one could do alone.
    pub twice: Vec<(usize, usize, usize)>,
    /// Slots that hold nothing, over all layers.
    pub empty_slots: usize,
    /// Rows in which ranks hold different numbers of experts.
    pub unequal_rows: usize,
}

impl Findings {
    /// Whether every expert of every layer is somewhere.
    pub fn is_valid(&self) -> bool {
        self.missing.is_empty()
    }
}

impl PlacementMap {
    /// A map of `physical_to_logical`, `[layers, N * slots_per_rank]` row-major, a rank's slots side by side, [`EMPTY`] where
    /// a slot holds nothing. Numbers are checked; whether every expert is there, [`PlacementMap::findings`] says.
    pub fn new(shape: MapShape, physical_to_logical: Vec<i32>) -> Result<Self, MapError> {
        let range = |what, got, max| match (1..=max).contains(&got) {
            true => Ok(()),
            false => Err(MapError::Range { what, got, max }),
        };
        range("layers", shape.layers, MAX_LAYERS)?;
        range("ranks", shape.ranks, MAX_RANKS)?;
        range("experts", shape.experts, MAX_EXPERTS)?;
        range("physical experts of a rank", shape.slots_per_rank, MAX_PHYSICAL / shape.ranks)?;
        let (got, physical) = (physical_to_logical.len(), shape.physical());
        let expected = shape.layers * physical;
        if got != expected {
            return Err(MapError::Length { got, layers: shape.layers, physical, expected });
        }
        let is_entry = |entry: i32| entry == EMPTY || usize::try_from(entry).is_ok_and(|expert| expert < shape.experts);
        if let Some(at) = physical_to_logical.iter().position(|&entry| !is_entry(entry)) {
            let (layer, physical_index) = (at / physical, at % physical);
            let (rank, slot) = (physical_index / shape.slots_per_rank, physical_index % shape.slots_per_rank);
            let got = physical_to_logical[at].into();
            return Err(MapError::Expert { layer, rank, slot, got, experts: shape.experts });
        }
        Ok(Self { shape, physical_to_logical, layer_numbers: None })
    }

    /// Says which layers of the model the rows are, ascending.
    pub fn with_layer_numbers(self, numbers: Vec<u32>) -> Result<Self, MapError> {
        if numbers.len() != self.shape.layers || numbers.windows(2).any(|pair| pair[0] >= pair[1]) {
            return Err(MapError::LayerNumbers { rows: self.shape.layers });
        }
        Ok(Self { layer_numbers: Some(numbers), ..self })
    }

    /// Its size.
    pub fn shape(&self) -> MapShape {
        self.shape
    }

    /// Layers, `N`, `E` and slots are in [`PlacementMap::shape`]; this is all entries, `[layers, P]` row-major.
    pub fn physical_to_logical(&self) -> &[i32] {
        &self.physical_to_logical
    }

    /// The model's number of every row's layer, where the map knows.
    pub fn layer_numbers(&self) -> Option<&[u32]> {
        self.layer_numbers.as_deref()
    }

    /// The entries of one row, `[P]`, a rank's slots side by side.
    pub fn row(&self, row: usize) -> &[i32] {
        &self.physical_to_logical[row * self.shape.physical()..(row + 1) * self.shape.physical()]
    }

    /// The entries of one rank in one row.
    pub fn on(&self, row: usize, rank: usize) -> &[i32] {
        &self.row(row)[rank * self.shape.slots_per_rank..(rank + 1) * self.shape.slots_per_rank]
    }

    /// Copies of every expert in a row, `[E]`.
    pub fn copies(&self, row: usize) -> Vec<u32> {
        let mut copies = vec![0; self.shape.experts];
        held(self.row(row)).for_each(|expert| copies[expert] += 1);
        copies
    }

    /// Physical indices of every expert, `[layers, E, X]` row-major and ascending, `X` the most copies of any expert;
    /// [`EMPTY`] behind an expert's last copy. With it `X`.
    pub fn logical_to_physical(&self) -> (Vec<i32>, usize) {
        let most = |row| self.copies(row).into_iter().max().unwrap_or(0) as usize;
        let width = (0..self.shape.layers).map(most).max().unwrap_or(0).max(1);
        let mut all = vec![EMPTY; self.shape.layers * self.shape.experts * width];
        let mut filled = vec![0; self.shape.experts];
        for (row, of_layer) in all.chunks_mut(self.shape.experts * width).enumerate() {
            filled.fill(0);
            for (physical, &entry) in self.row(row).iter().enumerate() {
                let Ok(expert) = usize::try_from(entry) else { continue };
                of_layer[expert * width + filled[expert]] = physical as i32;
                filled[expert] += 1;
            }
        }
        (all, width)
    }

    /// What is missing, wasted or empty.
    pub fn findings(&self) -> Findings {
        let mut findings = Findings::default();
        for row in 0..self.shape.layers {
            let copies = self.copies(row);
            let missing = copies.iter().enumerate().filter(|&(_, &copies)| copies == 0);
            findings.missing.extend(missing.map(|(expert, _)| (row, expert)));
            let mut fullest = (usize::MAX, 0);
            for rank in 0..self.shape.ranks {
                let mut here: Vec<usize> = held(self.on(row, rank)).collect();
                fullest = (fullest.0.min(here.len()), fullest.1.max(here.len()));
                findings.empty_slots += self.shape.slots_per_rank - here.len();
                here.sort_unstable();
                let twice = here.chunk_by(|a, b| a == b).filter(|same| same.len() > 1);
                findings.twice.extend(twice.map(|same| (row, rank, same[0])));
            }
            findings.unequal_rows += usize::from(fullest.0 != fullest.1);
        }
        findings
    }
}

/// The experts in some slots.
pub(crate) fn held(slots: &[i32]) -> impl Iterator<Item = usize> {
    slots.iter().filter_map(|&entry| usize::try_from(entry).ok())
}
