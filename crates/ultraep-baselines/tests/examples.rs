//! The examples run to their asserts.

#[path = "../examples/01_frontier.rs"]
mod frontier;

#[test]
fn frontier_runs() {
    frontier::main();
}
