//! Four ranks as threads: a barrier, an all-gather, and a put into a neighbour's window.
//!
//!     cargo run -p ultraep-fabric --example 1_hello_ranks

use std::error::Error;
use ultraep_fabric::{Fabric, FabricError, GroupSpec, Operation, Region, RemoteSpan, Span, run_threads};
use ultraep_plan::Rank;

type AnyError = Box<dyn Error + Send + Sync>;

fn main() -> Result<(), AnyError> {
    let mut spec = GroupSpec::new(4);
    let inbox = spec.add_window("inbox", 8);

    let sums = run_threads(&spec, |mut fabric: Box<dyn Fabric>| -> Result<u32, AnyError> {
        let (me, ranks) = (fabric.rank(), fabric.ranks());

        // Collectives complete with the largest stamp of all ranks.
        let barrier = fabric.run_stamped(Operation::Barrier, 100 + me.index() as u64)?;
        assert_eq!(barrier.stamp, 103);

        // Everyone's number, in rank order.
        let (mine, all) = (Region::from_vec(vec![me.index() as u32 + 1]), Region::from_vec(vec![0u32; ranks]));
        fabric.run(Operation::AllGather { send: Span::whole(&mine), recv: Span::whole(&all) })?;
        let sum = all.read::<u32>()?.iter().sum();

        // One-sided, between `Open` and `Close`: my greeting goes to the rank on my right.
        let right = Rank::new((me.index() + 1) % ranks);
        let greeting = Region::from_vec(vec![me.index() as u64]);
        fabric.run(Operation::Open { window: inbox })?;
        let place = [RemoteSpan { rank: right, window: inbox, offset: 0 }];
        fabric.run(Operation::Put { from: Span::whole(&greeting), to: &place })?;
        fabric.run(Operation::Close { window: inbox })?;
        let window = fabric.window(inbox).ok_or("no such window")?;
        assert_eq!(window.read::<u64>()?[0], ((me.index() + ranks - 1) % ranks) as u64);

        println!("rank {me} of {ranks}: sum {sum}");
        fabric.leave()?;
        Ok(sum)
    })
    .map_err(|error| error.to_string())?;
    assert_eq!(sums, [10; 4]);

    // A rank that fails is named by the others, and by the group.
    let lost = run_threads(&spec, |mut fabric: Box<dyn Fabric>| {
        if fabric.rank() == Rank::new(2) {
            return Err(None);
        }
        fabric.run(Operation::Barrier).map_err(Some)
    });
    let error = lost.expect_err("rank 2 gave up");
    assert_eq!(error.rank(), Some(Rank::new(2)));
    assert!(matches!(error, ultraep_fabric::GroupError::Failed::<Option<FabricError>> { error: None, .. }));
    println!("and then: rank 2 gave up, as it should");
    Ok(())
}

#[test]
fn runs() -> Result<(), AnyError> {
    main()
}
