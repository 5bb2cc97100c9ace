//! A running group allocates nothing: every operation, counted on each rank's thread.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use ultraep_fabric::{Fabric, FabricError, GroupSpec, Operation, Region, RemoteSpan, Span, run_threads};
use ultraep_plan::Rank;

thread_local! {
    /// Allocations of this thread.
    static COUNT: Cell<usize> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: hands every call on to the system's allocator, whose promises it keeps.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // At a thread's end the counter may be gone; nothing is counted then.
        let _ = COUNT.try_with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promises are those of the system's allocator.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        // SAFETY: allocated by `alloc` above, so by the system's allocator.
        unsafe { System.dealloc(start, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_running_group_allocates_nothing() {
    for cores in [0, 1] {
        let mut spec = GroupSpec { cores, ..GroupSpec::new(3) };
        let window = spec.add_window("window", 4096);
        let counts = run_threads(&spec, |mut fabric: Box<dyn Fabric>| -> Result<usize, FabricError> {
            let (me, ranks) = (fabric.rank(), fabric.ranks());
            let (data, all) = (Region::zeroed(1 << 20), Region::zeroed(ranks << 10));
            let sizes = vec![8; ranks];
            let to: Vec<_> = (0..ranks).map(|rank| RemoteSpan { rank: Rank::new(rank), window, offset: 64 }).collect();
            let before = COUNT.get();
            for round in 1..20 {
                let part = |bytes| Span::part(&data, 0, bytes);
                fabric.run(Operation::Barrier, round)?;
                fabric.run(Operation::AllGather { send: part(1 << 10), recv: Span::whole(&all) }, round)?;
                fabric.run(Operation::AllReduceSumF32 { data: Span::whole(&data) }, round)?;
                let send = part(8 * ranks);
                let exchange = Operation::AllToAll { send, send_bytes: &sizes, recv: window, recv_bytes: &sizes };
                fabric.run(exchange, round)?;
                fabric.run(Operation::Open { window }, round)?;
                fabric.run(Operation::Put { from: part(999), to: &to }, round)?;
                fabric.run(Operation::Get { from: to[0], to: part(999) }, round)?;
                let next = Rank::new((me.index() + 1) % ranks);
                fabric.run(Operation::Signal { rank: next, signal: 0, add: 1 }, round)?;
                fabric.run(Operation::AwaitSignal { signal: 0, at_least: round }, round)?;
                fabric.run(Operation::Close { window }, round)?;
            }
            let after = COUNT.get();
            fabric.leave()?;
            Ok(after - before)
        });
        assert_eq!(counts.expect("all ranks end well"), [0; 3], "with {cores} core permits");
        assert!(COUNT.get() > 0, "the counter counts");
    }
}
