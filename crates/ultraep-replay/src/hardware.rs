//! Hardware files: what a machine can do, with public sources, and the model of a layer's time made from it.
//!
//! ```text
//! row_ps       = 6 hidden width / (flops * efficiency)     three matrices, two operations a weight
//! expert_bytes = 3 hidden width * 2                        bf16
//! token_bytes  = 2 hidden * 2                              dispatch and combine, bf16
//! ```

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use ultraep_plan::HardwareModel;

/// The files that come with the program, by name.
const BUILT_IN: [(&str, &str); 4] = [
    ("h100x8", include_str!("../../../hardware/h100x8.toml")),
    ("gb200-nvl72", include_str!("../../../hardware/gb200-nvl72.toml")),
    ("mi450-helios", include_str!("../../../hardware/mi450-helios.toml")),
    ("tpu-ironwood", include_str!("../../../hardware/tpu-ironwood.toml")),
];

/// Largest hardware file.
const MAX_BYTES: u64 = 64 << 10;

/// A hardware file.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hardware {
    /// For people.
    pub name: String,
    /// Ranks joined by the scale-up fabric.
    pub domain_ranks: u32,
    /// What one rank's scale-up link carries in one direction.
    pub link_bytes_per_s: u64,
    /// Dense bf16 matrix operations of one accelerator.
    pub bf16_flops_per_s: u64,
    /// Share of them that grouped GEMMs reach.
    pub gemm_efficiency_percent: u32,
    /// Fixed time of an instance with tokens.
    pub gemm_ns: u64,
    /// Rows of a GEMM tile.
    pub tile_rows: u32,
    /// Fixed time of one copy.
    pub replica_ns: u64,
    /// Time to plan; without it what this project's planner takes on a host core, by the size of the group.
    pub plan_ns: Option<u64>,
    /// Time to reroute.
    pub reroute_ns: u64,
    /// Where the numbers are from, in words.
    pub sources: Vec<String>,
}

/// Shape of an expert: three matrices `[hidden, width]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertShape {
    /// Hidden size of the model.
    pub hidden: u32,
    /// Width of the expert, its intermediate size.
    pub width: u32,
}

/// Why a hardware file was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HardwareError {
    /// Neither a built-in name nor a file that can be read.
    #[error("hardware {name:?}: {source}; allowed are a file or {}", Hardware::built_in_names().join(", "))]
    Read {
        /// As given.
        name: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file too large to be one.
    #[error("{name}: {got} bytes: allowed are up to {MAX_BYTES}")]
    TooLarge {
        /// Which file.
        name: String,
        /// Its size, at least.
        got: u64,
    },
    /// Not the TOML that is expected.
    #[error("{name}: line {line}: {reason}")]
    Syntax {
        /// Which file.
        name: String,
        /// Where, from 1; 0 where it is not known.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// A number outside its limits.
    #[error("{name}: {field} {got}: allowed are {min} to {max}")]
    Range {
        /// Which file.
        name: String,
        /// Which field.
        field: &'static str,
        /// Its value.
        got: u64,
        /// Least.
        min: u64,
        /// Most.
        max: u64,
    },
    /// Numbers without a source.
    #[error("{name}: sources is empty: say where the numbers are from")]
    NoSources {
        /// Which file.
        name: String,
    },
}

impl Hardware {
    /// Names of the files that come with the program.
    pub fn built_in_names() -> [&'static str; BUILT_IN.len()] {
        BUILT_IN.map(|(name, _)| name)
    }

    /// A built-in name, or a file.
    pub fn find(name: &str) -> Result<Self, HardwareError> {
        match BUILT_IN.iter().find(|(built_in, _)| *built_in == name) {
            Some((_, text)) => Self::parse(name, text),
            None => Self::read(Path::new(name)),
        }
    }

    /// Reads a file.
    pub fn read(path: &Path) -> Result<Self, HardwareError> {
        let refuse = |source| HardwareError::Read { name: path.to_owned(), source };
        let mut text = String::new();
        let mut file = File::open(path).map_err(refuse)?.take(MAX_BYTES + 1);
        let got = file.read_to_string(&mut text).map_err(refuse)? as u64;
        let name = path.display().to_string();
        if got > MAX_BYTES {
            return Err(HardwareError::TooLarge { name, got });
        }
        Self::parse(&name, &text)
    }

    /// Parses and validates the text of a file; `name` is for errors.
    pub fn parse(name: &str, text: &str) -> Result<Self, HardwareError> {
        let syntax = |error: toml::de::Error| {
            let line = error.span().map_or(0, |span| text[..span.start].matches('\n').count() + 1);
            HardwareError::Syntax { name: name.to_owned(), line, reason: error.message().replace('\n', " ") }
        };
        let hardware: Self = toml::from_str(text).map_err(syntax)?;
        const MAX_NS: u64 = 1_000_000_000;
        let fields = [
            ("domain_ranks", u64::from(hardware.domain_ranks), 1, 1024),
            ("link_bytes_per_s", hardware.link_bytes_per_s, 1, 1_000_000_000_000_000),
            ("bf16_flops_per_s", hardware.bf16_flops_per_s, 1, 1_000_000_000_000_000_000),
            ("gemm_efficiency_percent", u64::from(hardware.gemm_efficiency_percent), 1, 100),
            ("tile_rows", u64::from(hardware.tile_rows), 1, 1 << 16),
            ("gemm_ns", hardware.gemm_ns, 0, MAX_NS),
            ("replica_ns", hardware.replica_ns, 0, MAX_NS),
            ("plan_ns", hardware.plan_ns.unwrap_or(0), 0, MAX_NS),
            ("reroute_ns", hardware.reroute_ns, 0, MAX_NS),
        ];
        for (field, got, min, max) in fields {
            if !(min..=max).contains(&got) {
                return Err(HardwareError::Range { name: name.to_owned(), field, got, min, max });
            }
        }
        if hardware.sources.is_empty() {
            return Err(HardwareError::NoSources { name: name.to_owned() });
        }
        Ok(hardware)
    }

    /// The model of a layer with experts of this shape.
    pub fn model(&self, shape: ExpertShape) -> HardwareModel {
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
            plan_ps: self.plan_ns.map(|ns| ns * 1000),
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

    /// The model of an instance (a start, then whole tiles) against the times of a real H100: median and upper quartile of the
    /// difference. A tenth of the times are of a GPU that had only just begun.
    #[test]
    fn the_h100_file_predicts_what_was_measured_on_one() {
        let hardware = Hardware::find("h100x8").unwrap();
        let measured = include_str!("../../../hardware/measured/h100-grouped-gemm.csv");
        let mut differences: Vec<f64> = Vec::new();
        for line in measured.lines().skip(1) {
            let fields: Vec<&str> = line.split(',').collect();
            let shape = ExpertShape { hidden: fields[0].parse().unwrap(), width: fields[1].parse().unwrap() };
            let model = hardware.model(shape);
            let instance = |rows: &str| model.instance_ps(rows.parse().unwrap());
            let predicted_us = fields[2].split(' ').map(instance).sum::<u64>() as f64 / 1e6;
            differences.push((predicted_us / fields[3].parse::<f64>().unwrap()).ln().abs());
        }
        differences.sort_by(f64::total_cmp);
        assert_eq!(differences.len(), 114);
        let quartile = |n: usize| differences[differences.len() * n / 4];
        assert!(quartile(2) < 0.08 && quartile(3) < 0.15, "{} {}", quartile(2), quartile(3));
    }

    #[test]
    fn fields_are_validated() {
        let (_, good) = BUILT_IN[0];
        for (from, to, word) in [
            ("tile_rows = 256", "tile_rows = 0", "tile_rows"),
            ("domain_ranks = 8", "domain_ranks = -8", "line"),
            ("name =", "nam =", "nam"),
            ("gemm_ns = 10_000", "gemm_ns = 9_000_000_000", "gemm_ns"),
        ] {
            assert!(good.contains(from), "{from}");
            let error = Hardware::parse("test", &good.replace(from, to)).unwrap_err().to_string();
            assert!(error.contains(word) && !error.contains('\n'), "{error}");
        }
    }
}
