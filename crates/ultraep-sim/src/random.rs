//! Random numbers in integers: equal seeds give equal numbers on every machine.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// One standard deviation of [`normal`], and of the exponents of [`exp2`].
pub(crate) const ONE: i64 = 1 << 12;

/// A generator for one purpose: ChaCha8 over (seed, purpose, a, b), so that purposes never share numbers.
pub(crate) fn random(seed: u64, purpose: u32, a: u64, b: u64) -> ChaCha8Rng {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..12].copy_from_slice(&purpose.to_le_bytes());
    key[12..20].copy_from_slice(&a.to_le_bytes());
    key[20..28].copy_from_slice(&b.to_le_bytes());
    ChaCha8Rng::from_seed(key)
}

/// Nearly normal, mean 0, deviation [`ONE`], within 3.46 deviations: the sum of four uniform numbers.
pub(crate) fn normal(rng: &mut ChaCha8Rng) -> i64 {
    let bits = rng.next_u64();
    let sum: i64 = (0..4).map(|i| (bits >> (16 * i)) as i64 & 0xffff).sum();
    // Four uniform numbers over 2^16 have a deviation of 2^16 / sqrt(3).
    (sum - 2 * 0xffff) * ONE * 1732 / (1000 << 16)
}

/// Mean 0, deviation [`ONE`], with the heavy tails of expert loads: a normal number times its own size.
pub(crate) fn heavy(rng: &mut ChaCha8Rng) -> i64 {
    let z = normal(rng);
    // The deviation of z |z| is sqrt(3 less what four uniform numbers lack in kurtosis, 0.3).
    z * z.abs() / ONE * 1000 / 1643
}

/// `2^(exponent / ONE)` in 2^20ths, for exponents within 20 octaves of 0; clamped beyond. Relative error below 2e-4.
pub(crate) fn exp2(exponent: i64) -> u64 {
    let exponent = exponent.clamp(-20 * ONE, 20 * ONE);
    let (whole, part) = (exponent.div_euclid(ONE), exponent.rem_euclid(ONE));
    // Cubic fit of 2^x on [0, 1), coefficients in 2^20ths.
    let x = part << 8;
    let poly = (((((81_900 * x) >> 20) + 236_900) * x) >> 20) + 729_776;
    let mantissa = (1 << 20) + ((poly * x) >> 20);
    if whole >= 0 { (mantissa as u64) << whole } else { (mantissa as u64) >> -whole }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers_of_two_are_near() {
        for exponent in (-8 * ONE..8 * ONE).step_by(97) {
            let exact = (exponent as f64 / ONE as f64).exp2() * f64::from(1 << 20);
            let off = exp2(exponent) as f64 / exact - 1.0;
            assert!(off.abs() < 4e-4, "{exponent}: {off}");
        }
    }

    #[test]
    fn normal_numbers_have_mean_zero_and_deviation_one() {
        let mut rng = random(1, 2, 3, 4);
        let all: Vec<f64> = (0..20_000).map(|_| normal(&mut rng) as f64 / ONE as f64).collect();
        let mean = all.iter().sum::<f64>() / all.len() as f64;
        let variance = all.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / all.len() as f64;
        assert!(mean.abs() < 0.03 && (variance - 1.0).abs() < 0.03, "{mean} {variance}");
    }
}
