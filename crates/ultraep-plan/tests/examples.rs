//! The examples run, and their asserts hold.

#[path = "../examples/01_plan.rs"]
mod plan;

#[path = "../examples/02_break_even.rs"]
mod break_even;

#[test]
fn examples_hold() {
    plan::main();
    break_even::main();
}
