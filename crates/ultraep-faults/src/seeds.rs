//! Schedules and faults drawn from seeds.

use std::time::Duration;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use ultraep_fabric::simulated::{Fault, FaultKind, Moment};
use ultraep_plan::Rank;

use crate::{Ending, FaultText, Ground, Profile, RankEnd, Scenario, run};

/// How the group of a seed ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeedEnd {
    /// What struck.
    pub faults: Vec<Fault>,
    /// What came of it.
    pub ending: Ending,
}

/// A rank's turns at most, for each of its operations: where faults are drawn from.
const TURNS_PER_OPERATION: u64 = 6;

/// The faults of a seed: none for half of the seeds, else one or two, anywhere.
pub fn draw_faults(seed: u64, scenario: &Scenario, profile: &Profile) -> Vec<Fault> {
    // Another stream than the scheduler's.
    let mut random = ChaCha8Rng::seed_from_u64(seed ^ 0x5EED_FA17);
    let mut below = |limit: u64| random.next_u64() % limit;
    let count = [0, 0, 0, 0, 1, 1, 1, 2][below(8) as usize];
    let mut fault = |_| {
        let rank = below(scenario.ranks as u64) as usize;
        let turns = profile.operations[rank].len() as u64 * TURNS_PER_OPERATION;
        let kind = match below(6) {
            0 => FaultKind::Fails,
            1 => FaultKind::Panics,
            2 => FaultKind::Killed,
            3 => FaultKind::Hangs,
            4 => FaultKind::Stalls(scenario.timeout / 2),
            _ => FaultKind::Stalls(scenario.timeout * 3),
        };
        Fault { rank: Rank::new(rank), moment: Moment::Turn(below(turns)), kind }
    };
    (0..count).map(&mut fault).collect()
}

/// Runs a seed and checks that every rank has the results of `profile`, or an error that names a rank that was struck.
///
/// # Errors
/// What is not so, with the command that repeats it.
pub fn check_seed(seed: u64, scenario: &Scenario, profile: &Profile) -> Result<SeedEnd, String> {
    let faults = draw_faults(seed, scenario, profile);
    let again = |why: String| {
        let Scenario { ranks, layers, microbatches, .. } = scenario;
        let struck: Vec<String> = faults.iter().map(|&fault| FaultText(fault).to_string()).collect();
        let sizes = format!("--ranks {ranks} --layers {layers} --microbatches {microbatches}");
        format!(
            "seed {seed} [{}]: {why}\n  again: cargo xtask simulate --from {seed} --seeds 1 {sizes}",
            struck.join(" ")
        )
    };
    let ending = run(scenario, Ground::Simulated(seed), &faults).map_err(|error| again(error.to_string()))?;
    judge(&faults, scenario, profile, &ending).map_err(again)?;
    Ok(SeedEnd { faults, ending })
}

fn judge(faults: &[Fault], scenario: &Scenario, profile: &Profile, ending: &Ending) -> Result<(), String> {
    let harmless = |fault: &&Fault| matches!(fault.kind, FaultKind::Stalls(time) if time < scenario.timeout);
    let harmful: Vec<&Fault> = faults.iter().filter(|fault| !harmless(fault)).collect();
    let stall: Duration = faults.iter().filter(harmless).map(|_| scenario.timeout / 2).sum();
    if harmful.is_empty() && stall < scenario.timeout {
        return ending.check_healthy(profile);
    }
    let struck = |rank: Rank| faults.iter().any(|fault| fault.rank == rank);
    if let Some((blamed, message)) = &ending.failure
        && !blamed.is_some_and(struck)
    {
        return Err(format!("the group names a rank that nothing struck: {message}"));
    }
    for (rank, end) in ending.ends.iter().enumerate() {
        match end {
            RankEnd::Finished(digest) if *digest == profile.digests[rank] => {}
            RankEnd::Named { culprit, .. } if struck(*culprit) => {}
            RankEnd::Failed(_) | RankEnd::Lost if struck(Rank::new(rank)) => {}
            other => return Err(format!("rank {rank}: {other}")),
        }
    }
    let all_finished = ending.ends.iter().all(|end| matches!(end, RankEnd::Finished(_)));
    match &ending.failure {
        None if !all_finished => Err("a rank ended badly and the group well".to_owned()),
        _ => Ok(()),
    }
}
