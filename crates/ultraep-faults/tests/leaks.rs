//! A rank is lost at every operation, one after another; every other rank names it, and nothing is left of the group. Alone
//! in its process, as it counts threads and descriptors.

use ultraep_fabric::simulated::FaultKind;
use ultraep_faults::enumerate::{KINDS, fault_points};
use ultraep_faults::leftovers::Leftovers;
use ultraep_faults::{Ground, Scenario, run};

#[test]
fn whoever_is_lost_wherever_all_others_name_it_and_nothing_is_left() {
    let scenario = Scenario::small(3);
    let profile = scenario.profile().expect("a healthy group");
    let before = Leftovers::now();
    // Simulated, every point: a hang costs no time.
    let points: Vec<_> = fault_points(&profile, &KINDS).collect();
    assert!(points.len() > 1000, "only {} points", points.len());
    for (number, fault) in points.iter().enumerate() {
        // Odd seeds: the operations are those of threads.
        let seed = 2 * number as u64 + 1;
        let ending = run(&scenario, Ground::Simulated(seed), &[*fault]).expect("the group starts");
        ending.check(&profile, fault).unwrap_or_else(|why| panic!("schedule {seed}: {why}"));
    }
    before.check().expect("nothing is left of simulated groups");
    // On threads, a sample of those that cost no time.
    let kinds = [FaultKind::Fails, FaultKind::Panics];
    for fault in fault_points(&profile, &kinds).step_by(7) {
        let ending = run(&scenario, Ground::Threads, &[fault]).expect("the group starts");
        ending.check(&profile, &fault).unwrap_or_else(|why| panic!("on threads: {why}"));
    }
    before.check().expect("nothing is left of groups of threads");
}
