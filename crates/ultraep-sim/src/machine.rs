//! The machine: what is known of it, and what was calibrated.

use serde::{Deserialize, Serialize};
use ultraep_plan::TransferModel;

use crate::model::{ModelSpec, bounded};

const MAX_RATE: u64 = 1_000_000_000_000_000_000;

/// A rack and what joins racks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Machine {
    /// For people.
    pub name: String,
    /// Ranks joined by the scale-up fabric.
    pub domain_ranks: u32,
    /// What a rank's scale-up link carries in one direction for weight sync, bytes a second.
    pub link_bytes_per_s: u64,
    /// What a rank's scale-out link carries in one direction, bytes a second.
    pub scale_out_bytes_per_s: u64,
    /// What a rank's memory carries, bytes a second.
    pub memory_bytes_per_s: u64,
    /// Memory of a rank.
    pub memory_bytes: u64,
    /// Latency of a hop in the fabric.
    pub hop_ns: u64,
    /// Rows of a GEMM tile.
    pub tile_rows: u32,
    /// Start of an instance's grouped GEMMs.
    pub gemm_ns: u64,
    /// Bytes of a chunk of weights, the unit that a relay forwards.
    pub chunk_bytes: u64,
    /// Tokens of a chunk of the all-to-all at the event level.
    pub chunk_tokens: u32,
    /// All-gather of the counts.
    pub count_ns: u64,
    /// Reroute; weight sync runs beside it.
    pub reroute_ns: u64,
    /// Start of a weight sync: work list, first look-up, last flag.
    pub sync_start_ns: u64,
    /// What `ultraep sim calibrate` fitted.
    pub calibrated: Calibrated,
    /// Where the numbers are from, in words.
    pub sources: Vec<String>,
}

/// Constants fitted to one model's published breakdown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibrated {
    /// Operations a second of grouped GEMMs, forward.
    #[serde(deserialize_with = "bounded::<1, MAX_RATE, _, _>")]
    pub forward_flops_per_s: u64,
    /// The same, backward.
    #[serde(deserialize_with = "bounded::<1, MAX_RATE, _, _>")]
    pub backward_flops_per_s: u64,
    /// Time of the experts' backward that every rank has, whatever its load: over that of the rows that its own tokens make, in
    /// thousandths.
    #[serde(deserialize_with = "bounded::<0, 100000, _, _>")]
    pub backward_fixed_permille: u32,
    /// All-to-all rate of a rank's link when routing is forced to be even, forward.
    #[serde(deserialize_with = "bounded::<1, MAX_RATE, _, _>")]
    pub forward_a2a_bytes_per_s: u64,
    /// The same, backward.
    #[serde(deserialize_with = "bounded::<1, MAX_RATE, _, _>")]
    pub backward_a2a_bytes_per_s: u64,
    /// What a byte above a pair's even share costs more, in thousandths (incast), forward.
    #[serde(deserialize_with = "bounded::<0, 100000, _, _>")]
    pub forward_incast_permille: u32,
    /// The same, backward.
    #[serde(deserialize_with = "bounded::<0, 100000, _, _>")]
    pub backward_incast_permille: u32,
    /// Time for one token and one unit of width in norms, router, permutation and other memory-bound work, forward,
    /// femtoseconds.
    #[serde(deserialize_with = "bounded::<0, 1000000000, _, _>")]
    pub forward_element_fs: u64,
    /// The same, backward.
    #[serde(deserialize_with = "bounded::<0, 1000000000, _, _>")]
    pub backward_element_fs: u64,
    /// Time of a training step outside the layers' breakdown and what is recomputed, over the time of the layers' rest, in
    /// thousandths.
    #[serde(deserialize_with = "bounded::<0, 100000, _, _>")]
    pub outside_permille: u32,
}

impl Machine {
    /// The fabric as the transfer planner sees it, for experts of `model`.
    pub fn transfer_model(&self, model: &ModelSpec) -> TransferModel {
        TransferModel::of_link(model.expert_bytes(), self.chunk_bytes, self.link_bytes_per_s, self.hop_ns)
    }

    /// The same machine with its links scaled by `percent` of their rate.
    pub fn with_bandwidth_percent(&self, percent: u32) -> Self {
        let scaled = |rate: u64| (u128::from(rate) * u128::from(percent) / 100).clamp(1, u128::from(MAX_RATE)) as u64;
        let calibrated = Calibrated {
            forward_a2a_bytes_per_s: scaled(self.calibrated.forward_a2a_bytes_per_s),
            backward_a2a_bytes_per_s: scaled(self.calibrated.backward_a2a_bytes_per_s),
            ..self.calibrated
        };
        Self { link_bytes_per_s: scaled(self.link_bytes_per_s), calibrated, ..self.clone() }
    }
}
