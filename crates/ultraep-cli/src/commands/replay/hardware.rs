//! Hardware files: what a machine can do, with public sources, and the model of a layer's time made from it.
//!
//! ```text
//! row_ps       = 6 hidden width / (flops * efficiency)     three matrices, two operations a weight
//! expert_bytes = 3 hidden width * 2                        bf16
//! token_bytes  = 2 hidden * 2                              dispatch and combine, bf16
//! ```

use std::path::Path;

use serde::Deserialize;
use ultraep_plan::HardwareModel;

use crate::error::CliError;

/// The files that come with the program, by name.
pub(crate) const BUILT_IN: [(&str, &str); 4] = [
    ("h100x8", include_str!("../../../../../hardware/h100x8.toml")),
    ("gb200-nvl72", include_str!("../../../../../hardware/gb200-nvl72.toml")),
    ("mi450-helios", include_str!("../../../../../hardware/mi450-helios.toml")),
    ("tpu-ironwood", include_str!("../../../../../hardware/tpu-ironwood.toml")),
];

/// Largest hardware file.
const MAX_BYTES: u64 = 64 << 10;

/// A hardware file.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Hardware {
    /// For people.
    pub(crate) name: String,
    /// Ranks joined by the scale-up fabric.
    pub(crate) domain_ranks: u32,
    /// What one rank's scale-up link carries in one direction.
    link_bytes_per_s: u64,
    /// Dense bf16 matrix operations of one accelerator.
    bf16_flops_per_s: u64,
    /// Share of them that grouped GEMMs reach.
    gemm_efficiency_percent: u32,
    /// Fixed time of an instance with tokens.
    gemm_ns: u64,
    /// Rows of a GEMM tile.
    tile_rows: u32,
    /// Fixed time of one copy.
    replica_ns: u64,
    /// Time to plan.
    plan_ns: u64,
    /// Time to reroute.
    reroute_ns: u64,
    /// Where the numbers are from, in words.
    pub(crate) sources: Vec<String>,
}

/// Shape of an expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ExpertShape {
    pub(crate) hidden: u32,
    pub(crate) width: u32,
}

impl Hardware {
    /// A built-in name, or a file.
    pub(crate) fn find(name: &str) -> Result<Self, CliError> {
        if let Some((_, text)) = BUILT_IN.iter().find(|(built_in, _)| *built_in == name) {
            return Self::parse(name, text);
        }
        let path = Path::new(name);
        let known = BUILT_IN.map(|(name, _)| name).join(", ");
        let size = std::fs::metadata(path)
            .map_err(|error| CliError::Input(format!("hardware {name:?}: {error}; allowed are a file or {known}")))?;
        if size.len() > MAX_BYTES {
            return Err(CliError::Input(format!("{name}: {} bytes: allowed are up to {MAX_BYTES}", size.len())));
        }
        let text = std::fs::read_to_string(path).map_err(|error| CliError::Input(format!("{name}: {error}")))?;
        Self::parse(name, &text)
    }

    fn parse(name: &str, text: &str) -> Result<Self, CliError> {
        let one_line = |error: toml::de::Error| {
            let line = error.span().map_or(0, |span| text[..span.start].matches('\n').count() + 1);
            CliError::Input(format!("{name}: line {line}: {}", error.message().replace('\n', " ")))
        };
        let hardware: Self = toml::from_str(text).map_err(one_line)?;
        let fields = [
            ("domain_ranks", u64::from(hardware.domain_ranks), 1024),
            ("link_bytes_per_s", hardware.link_bytes_per_s, 1_000_000_000_000_000),
            ("bf16_flops_per_s", hardware.bf16_flops_per_s, 1_000_000_000_000_000_000),
            ("gemm_efficiency_percent", u64::from(hardware.gemm_efficiency_percent), 100),
            ("tile_rows", u64::from(hardware.tile_rows), 1 << 16),
        ];
        for (field, got, max) in fields {
            if !(1..=max).contains(&got) {
                return Err(CliError::Input(format!("{name}: {field} {got}: allowed are 1 to {max}")));
            }
        }
        const MAX_NS: u64 = 1_000_000_000;
        let times = [hardware.gemm_ns, hardware.replica_ns, hardware.plan_ns, hardware.reroute_ns];
        if let Some(got) = times.into_iter().find(|&ns| ns > MAX_NS) {
            return Err(CliError::Input(format!("{name}: a fixed time of {got} ns: allowed are up to {MAX_NS}")));
        }
        if hardware.sources.is_empty() {
            return Err(CliError::Input(format!("{name}: sources is empty: say where the numbers are from")));
        }
        Ok(hardware)
    }

    /// The model of a layer with experts of this shape.
    pub(crate) fn model(&self, shape: ExpertShape) -> HardwareModel {
        let weights = 3 * u128::from(shape.hidden) * u128::from(shape.width);
        let reached = u128::from(self.bf16_flops_per_s) * u128::from(self.gemm_efficiency_percent);
        let row_ps = (2 * weights * 1_000_000_000_000 * 100).div_ceil(reached.max(1));
        HardwareModel {
            expert_bytes: u64::try_from(2 * weights).unwrap_or(u64::MAX),
            token_bytes: 4 * u64::from(shape.hidden),
            link_bytes_per_s: self.link_bytes_per_s,
            row_ps: u64::try_from(row_ps).unwrap_or(u64::MAX),
            gemm_ps: self.gemm_ns * 1000,
            tile_rows: self.tile_rows,
            replica_ps: self.replica_ns * 1000,
            plan_ps: self.plan_ns * 1000,
            reroute_ps: self.reroute_ns * 1000,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_built_in_file_is_valid_and_says_its_sources() {
        for (name, _) in BUILT_IN {
            let hardware = Hardware::find(name).unwrap();
            let model = hardware.model(ExpertShape { hidden: 4096, width: 1536 });
            assert_eq!((model.expert_bytes, model.token_bytes), (37_748_736, 16_384), "{name}");
            assert!((1_000..200_000).contains(&model.row_ps), "{name}: {}", model.row_ps);
        }
    }

    #[test]
    fn fields_are_validated() {
        let (_, good) = BUILT_IN[0];
        for (from, to, word) in [
            ("tile_rows = 128", "tile_rows = 0", "tile_rows"),
            ("domain_ranks = 8", "domain_ranks = -8", "line"),
            ("name =", "nam =", "nam"),
            ("gemm_ns = 3_000", "gemm_ns = 9_000_000_000", "fixed time"),
        ] {
            assert!(good.contains(from), "{from}");
            let error = Hardware::parse("test", &good.replace(from, to)).unwrap_err().to_string();
            assert!(error.contains(word) && !error.contains('\n'), "{error}");
        }
    }
}
