//! Fits a load process to published mean imbalances: how skewed, and how much of it history can see.

use ultraep_plan::{Topology, TransferModel};

use crate::SimError;
use crate::balancer::{Balancer, LayerLoad, System};
use crate::process::{LoadProcess, ProcessParams, expert_loads};

/// What a process is fitted to. Imbalances are means over layers and microbatches, in thousandths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FitTarget {
    /// As routed.
    pub none_permille: u64,
    /// Under a historical policy; without it `drift_permille` says how much is new.
    pub historical_permille: Option<u64>,
    /// Share of the experts' variance that is new in every microbatch, in thousandths, where it is not fitted.
    pub drift_permille: u32,
    /// Layers looked at.
    pub layers: u32,
    /// Microbatches of each layer.
    pub microbatches: u32,
}

/// What came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fit {
    /// The process.
    pub params: ProcessParams,
    /// Its imbalance as routed.
    pub none_permille: u64,
    /// Its imbalance under the historical policy.
    pub historical_permille: Option<u64>,
}

/// Bisections.
const ROUNDS: u32 = 12;

/// Fits skew and drift; everything else is as in `base`.
///
/// Experts' total deviation decides the imbalance as routed, the part of it that is new in every microbatch what a historical
/// policy misses: one is bisected after the other, `historical` is the policy for the second.
pub fn fit_process(
    base: ProcessParams,
    target: &FitTarget,
    historical: Option<(&System, &Topology, TransferModel)>,
) -> Result<Fit, SimError> {
    let parts = |deviation: u32, drift_permille: u32| {
        // skew^2 + drift^2 = deviation^2
        let of = |permille: u32| (u64::from(deviation).pow(2) * u64::from(permille) / 1000).isqrt() as u32;
        ProcessParams { skew_milli: of(1000 - drift_permille), drift_milli: of(drift_permille), ..base }
    };
    let range = (0, crate::process::MAX_DEVIATION as u32);
    let as_routed = |deviation, drift| none_permille(parts(deviation, drift), target);
    let (Some(wanted), Some((system, topology, model))) = (target.historical_permille, historical) else {
        let drift = target.drift_permille.min(1000);
        let deviation = bisect(range, target.none_permille, |deviation| as_routed(deviation, drift))?;
        let params = parts(deviation, drift);
        return Ok(Fit { params, none_permille: none_permille(params, target)?, historical_permille: None });
    };
    let mut drift = 500;
    let mut deviation = bisect(range, target.none_permille, |deviation| as_routed(deviation, drift))?;
    // One shifts the other a little.
    for _ in 0..2 {
        let under = |drift| historical_permille(parts(deviation, drift), target, system, topology, model);
        drift = bisect((0, 1000), wanted, under)?;
        deviation = bisect(range, target.none_permille, |deviation| as_routed(deviation, drift))?;
    }
    let params = parts(deviation, drift);
    let historical = historical_permille(params, target, system, topology, model)?;
    Ok(Fit { params, none_permille: none_permille(params, target)?, historical_permille: Some(historical) })
}

/// The argument in `range` whose value is nearest to `wanted`, for a value that grows with it.
fn bisect(range: (u32, u32), wanted: u64, value: impl Fn(u32) -> Result<u64, SimError>) -> Result<u32, SimError> {
    let (mut low, mut high) = range;
    let (least, most) = (value(low)?, value(high)?);
    // Up to 5% beyond an end, the end is as near as it gets; the fit says what it has.
    if wanted * 100 < least * 95 || wanted * 100 > most * 105 {
        return Err(SimError::Fit { target_permille: wanted, least_permille: least, most_permille: most });
    }
    let (mut at_low, mut at_high) = (least, most);
    for _ in 0..ROUNDS {
        let middle = low.midpoint(high);
        let got = value(middle)?;
        if got <= wanted {
            (low, at_low) = (middle, got)
        } else {
            (high, at_high) = (middle, got)
        }
        if high - low <= 1 {
            break;
        }
    }
    Ok(if wanted.abs_diff(at_low) <= wanted.abs_diff(at_high) { low } else { high })
}

fn none_permille(params: ProcessParams, target: &FitTarget) -> Result<u64, SimError> {
    // Sources do not matter for loads of ranks beyond their sum.
    let mut process = LoadProcess::new(params)?;
    let (mut counts, mut loads) = (Vec::new(), Vec::new());
    let (ranks, experts) = (params.ranks as usize, params.experts as usize);
    let mut sum = 0;
    for (layer, microbatch) in moments(target) {
        process.counts(layer, HISTORY_STEPS, microbatch, &mut counts);
        expert_loads(&counts, experts, &mut loads);
        let home = |expert: usize| home_of(expert, experts, ranks);
        let mut by_rank = vec![0u64; ranks];
        loads.iter().enumerate().for_each(|(expert, &load)| by_rank[home(expert)] += load);
        let (most, total) = (by_rank.iter().copied().max().unwrap_or(0), loads.iter().sum::<u64>().max(1));
        sum += 1000 * most * ranks as u64 / total;
    }
    Ok(sum / u64::from((target.layers * target.microbatches).max(1)))
}

/// As a topology places masters: consecutive, the first ranks with one more where they do not divide.
fn home_of(expert: usize, experts: usize, ranks: usize) -> usize {
    let (each, extra) = (experts / ranks, experts % ranks);
    let larger = extra * (each + 1);
    if expert < larger { expert / (each + 1) } else { extra + (expert - larger) / each.max(1) }
}

/// Steps that historical policies have seen before the one that is judged.
pub(crate) const HISTORY_STEPS: u32 = 3;

fn moments(target: &FitTarget) -> impl Iterator<Item = (u32, u32)> + use<> {
    let (layers, microbatches) = (target.layers, target.microbatches);
    (0..layers).flat_map(move |layer| (0..microbatches).map(move |microbatch| (layer, microbatch)))
}

fn historical_permille(
    params: ProcessParams,
    target: &FitTarget,
    system: &System,
    topology: &Topology,
    model: TransferModel,
) -> Result<u64, SimError> {
    let mut process = LoadProcess::new(params)?;
    let (mut counts, mut load) = (Vec::new(), LayerLoad::default());
    let mut sum = 0;
    for layer in 0..target.layers {
        let mut balancer = Balancer::new(system, topology, model)?;
        warm_up(&mut balancer, &mut process, layer, target.microbatches, &mut counts)?;
        for microbatch in 0..target.microbatches {
            process.counts(layer, HISTORY_STEPS, microbatch, &mut counts);
            balancer.microbatch(&counts, &mut load)?;
            sum += 1000 * load.largest() * load.ranks() as u64 / load.total.max(1);
        }
    }
    Ok(sum / u64::from((target.layers * target.microbatches).max(1)))
}

/// Shows a historical policy the steps before the one that is judged.
pub(crate) fn warm_up(
    balancer: &mut Balancer,
    process: &mut LoadProcess,
    layer: u32,
    microbatches: u32,
    counts: &mut Vec<u32>,
) -> Result<(), SimError> {
    if !balancer.system().policy.is_historical() {
        return Ok(());
    }
    for step in 0..HISTORY_STEPS {
        for microbatch in 0..microbatches {
            process.counts(layer, step, microbatch, counts);
            balancer.observe(counts)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn homes_are_those_of_a_topology() {
        for (experts, ranks) in [(128, 64), (10, 4), (7, 7), (9, 4)] {
            let spec = ultraep_plan::TopologySpec { ranks, experts, domain_ranks: ranks, slots_per_rank: 0 };
            let topology = Topology::new(spec).unwrap();
            for expert in 0..experts {
                assert_eq!(home_of(expert, experts, ranks), topology.homes()[expert].index(), "{expert}");
            }
        }
    }

    #[test]
    fn bisection_finds_and_refuses() {
        let square = |x: u32| Ok(u64::from(x * x));
        assert_eq!(bisect((0, 100), 2500, square), Ok(50));
        assert_eq!(bisect((0, 100), 2549, square), Ok(50));
        assert_eq!(bisect((0, 10), 104, square), Ok(10));
        assert!(matches!(bisect((0, 10), 200, square), Err(SimError::Fit { most_permille: 100, .. })));
    }
}
