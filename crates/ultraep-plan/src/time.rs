//! Times as integers, in picoseconds: an amount at a rate, work at a speed, rows in whole tiles. Rounded up once, saturating.

use crate::FULL_SPEED;

const PS_PER_S: u128 = 1_000_000_000_000;

/// Time of `amount` units at `per_s` units a second (at least 1).
pub fn at_rate_ps(amount: impl Into<u128>, per_s: u64) -> u64 {
    let time = amount.into().saturating_mul(PS_PER_S).div_ceil(u128::from(per_s.max(1)));
    u64::try_from(time).unwrap_or(u64::MAX)
}

/// `full_ps` of work at full speed on a rank with speed weight `speed` (weight 0 counts as full speed).
pub fn at_speed_ps(full_ps: u64, speed: u32) -> u64 {
    match speed {
        0 | FULL_SPEED => full_ps,
        _ => {
            let slowed = (u128::from(full_ps) * u128::from(FULL_SPEED)).div_ceil(u128::from(speed));
            u64::try_from(slowed).unwrap_or(u64::MAX)
        }
    }
}

/// What an accelerator takes for one instance's grouped GEMMs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GemmTime {
    /// Start and tail.
    pub start_ps: u64,
    /// One row.
    pub row_ps: u64,
    /// Rows of a tile: rows are rounded up to whole ones; at least 1.
    pub tile_rows: u32,
}

impl GemmTime {
    /// Time of an instance with `rows` rows at full speed; none without rows.
    #[inline]
    pub fn of(self, rows: u64) -> u64 {
        if rows == 0 {
            return 0;
        }
        let tile = u64::from(self.tile_rows.max(1));
        self.start_ps.saturating_add(rows.div_ceil(tile).saturating_mul(tile).saturating_mul(self.row_ps))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_round_up_and_saturate() {
        assert_eq!(
            (at_rate_ps(1_u64, 3), at_rate_ps(0_u64, 0), at_rate_ps(u64::MAX, 1)),
            (333_333_333_334, 0, u64::MAX)
        );
        assert_eq!((at_speed_ps(10, 0), at_speed_ps(10, FULL_SPEED), at_speed_ps(10, 1000)), (10, 10, 11));
        let gemm = GemmTime { start_ps: 5, row_ps: 2, tile_rows: 64 };
        assert_eq!([0, 1, 64, 65].map(|rows| gemm.of(rows)), [0, 133, 133, 261]);
        assert_eq!(gemm.of(u64::MAX), u64::MAX);
    }
}
