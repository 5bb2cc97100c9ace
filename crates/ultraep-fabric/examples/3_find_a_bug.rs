//! A protocol with a bug that threads hardly ever show, found by the simulated fabric; then a rank that is killed.
//!
//!     cargo run -p ultraep-fabric --example 3_find_a_bug

use std::error::Error;
use ultraep_fabric::simulated::{Fault, FaultKind, Moment, Simulation, run_simulated};
use ultraep_fabric::{Fabric, FabricError, GroupSpec, Operation, Region, RemoteSpan, Span, run_threads};
use ultraep_plan::Rank;

/// Rank 0 sends a letter to rank 1, which passes it on to rank 2. With the bug, rank 1 is told before the letter is sent.
fn pass_on(mut fabric: Box<dyn Fabric>, spec: &GroupSpec, bug: bool) -> Result<u64, FabricError> {
    let window = ultraep_fabric::WindowId::new(spec.windows.len() - 1);
    let me = fabric.rank().index();
    let letter = Region::from_vec(vec![41u64]);
    fabric.run(Operation::Open { window })?;
    if me > 0 {
        fabric.run(Operation::AwaitSignal { signal: 0, at_least: 1 })?;
        let from = RemoteSpan { rank: fabric.rank(), window, offset: 0 };
        fabric.run(Operation::Get { from, to: Span::whole(&letter) })?;
    }
    if me + 1 < fabric.ranks() {
        let next = Rank::new(me + 1);
        let to = [RemoteSpan { rank: next, window, offset: 0 }];
        let put = Operation::Put { from: Span::whole(&letter), to: &to };
        let signal = Operation::Signal { rank: next, signal: 0, add: 1 };
        let (first, second) = if bug { (signal, put) } else { (put, signal) };
        fabric.run(first)?;
        fabric.run(second)?;
    }
    fabric.run(Operation::Close { window })?;
    fabric.leave()?;
    Ok(letter.read::<u64>().expect("nobody writes it")[0])
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut spec = GroupSpec::new(3);
    spec.add_window("letterbox", 8);

    // As it should be, every schedule delivers the letter.
    for seed in 0..200 {
        let run = run_simulated(&spec, &Simulation::new(seed), |fabric| pass_on(fabric, &spec, false))?;
        assert_eq!(run.result, Ok(vec![41; 3]), "seed {seed}");
    }
    assert_eq!(run_threads(&spec, |fabric| pass_on(fabric, &spec, false)), Ok(vec![41; 3]));

    // With the bug, some schedule does not. The seed is all that it takes to see it again.
    let simulate = |seed| run_simulated(&spec, &Simulation::new(seed), |fabric| pass_on(fabric, &spec, true));
    let lost = |seed: &u64| simulate(*seed).is_ok_and(|run| run.result != Ok(vec![41; 3]));
    let seed = (0..200).find(lost).ok_or("no seed shows the bug")?;
    let (run, again) = (simulate(seed)?, simulate(seed)?);
    println!("seed {seed}: {:?} arrived, in {} turns", run.result, run.schedule.turns);
    assert_eq!((run.result, run.schedule), (again.result, again.schedule));

    // A rank is killed as it submits its second operation: the others name it. Hours of virtual time cost nothing.
    let fault = Fault { rank: Rank::new(1), moment: Moment::Before(1), kind: FaultKind::Killed };
    let run = run_simulated(&spec, &Simulation::with_fault(seed, fault), |fabric| pass_on(fabric, &spec, false))?;
    let error = run.result.expect_err("rank 1 was killed");
    println!("rank 1 is killed: {error}");
    assert_eq!(error.rank(), Some(Rank::new(1)));
    Ok(())
}

#[test]
fn runs() -> Result<(), Box<dyn Error>> {
    main()
}
