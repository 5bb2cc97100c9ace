//! Runs the numbered examples: they end in assertions.

#[path = "../examples/01_moe_layer.rs"]
#[allow(dead_code, unused_imports, reason = "an example is a program; here only its `main` is called")]
mod moe_layer;

#[test]
fn a_moe_layer_in_a_model_of_your_own() {
    moe_layer::main();
}
