//! Several microbatches in flight: 1F1B and interleaved orders of a pipeline over the ring of plans, with recomputation, give
//! the bits of one microbatch after another; a ring that is too small says which layer.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::common::{Batch, batch, config, group, runtime};
use ultraep_fabric::{GroupError, run_threads};
use ultraep_runtime::{ExpertParallel, Pass, Recompute, Routing, RuntimeError, VirtualLayer};

const RANKS: usize = 3;
const EXPERTS: usize = 6;
const LAYERS: usize = 4;
const MICROBATCHES: u64 = 8;

/// What a stage does next with some of its layers.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    Forward(Range<usize>, u64),
    Backward(Range<usize>, u64),
}

/// One microbatch after another.
fn sequential() -> Vec<Step> {
    (0..MICROBATCHES).flat_map(|m| [Step::Forward(0..LAYERS, m), Step::Backward(0..LAYERS, m)]).collect()
}

/// Forwards until the pipeline behind this stage is full, then one forward and one backward in turn, then the backwards left.
fn in_turn(forwards: Vec<Step>, backwards: Vec<Step>, warm_up: usize) -> Vec<Step> {
    let warm_up = warm_up.min(forwards.len());
    let (first, rest) = forwards.split_at(warm_up);
    let mut steps = first.to_vec();
    let mut backwards = backwards.into_iter();
    for forward in rest {
        steps.push(forward.clone());
        steps.extend(backwards.next());
    }
    steps.extend(backwards);
    steps
}

/// 1F1B on stage `stage` of `stages`, each with all of its layers in one chunk.
fn one_forward_one_backward(stage: usize, stages: usize) -> Vec<Step> {
    let forwards = (0..MICROBATCHES).map(|m| Step::Forward(0..LAYERS, m)).collect();
    let backwards = (0..MICROBATCHES).map(|m| Step::Backward(0..LAYERS, m)).collect();
    in_turn(forwards, backwards, stages - 1 - stage)
}

/// Interleaved 1F1B: the stage has `chunks` chunks of layers, and works on `stages` microbatches in each before the next.
fn interleaved(stage: usize, stages: usize, chunks: usize) -> Vec<Step> {
    let of_chunk = LAYERS / chunks;
    let virtual_steps = || {
        (0..MICROBATCHES as usize * chunks).map(move |index| {
            let microbatch = index / (stages * chunks) * stages + index % stages;
            (index / stages % chunks, microbatch as u64)
        })
    };
    let layers = |chunk: usize| chunk * of_chunk..(chunk + 1) * of_chunk;
    let forwards = virtual_steps().map(|(chunk, m)| Step::Forward(layers(chunk), m)).collect();
    let backwards = virtual_steps().map(|(chunk, m)| Step::Backward(layers(chunks - 1 - chunk), m)).collect();
    in_turn(forwards, backwards, (stages - 1 - stage) * 2 + (chunks - 1) * stages)
}

/// The most microbatches that any layer has in flight, and a layer that has them.
fn in_flight_max(steps: &[Step]) -> (usize, usize) {
    let (mut now, mut most) = ([0usize; LAYERS], [0usize; LAYERS]);
    for step in steps {
        match step {
            Step::Forward(layers, _) => layers.clone().for_each(|layer| {
                now[layer] += 1;
                most[layer] = most[layer].max(now[layer]);
            }),
            Step::Backward(layers, _) => layers.clone().for_each(|layer| now[layer] -= 1),
        }
    }
    let largest = most.into_iter().max().expect("there are layers");
    (largest, most.iter().position(|&count| count == largest).expect("it is one of them"))
}

/// All that a rank computes: outputs and gradients of each virtual layer, and the masters' gradients of each layer.
#[derive(Debug, Default, PartialEq)]
struct Results {
    y: BTreeMap<VirtualLayer, Vec<f32>>,
    dx: BTreeMap<VirtualLayer, Vec<f32>>,
    d_gates: BTreeMap<VirtualLayer, Vec<f32>>,
    grads: Vec<Vec<f32>>,
}

/// What is recomputed in the backward of a microbatch.
fn recompute(microbatch: u64) -> (Recompute, bool) {
    match microbatch % 3 {
        0 => (Recompute::Nothing, false),
        1 => (Recompute::Experts, false),
        // The framework runs the whole forward again.
        _ => (Recompute::Experts, true),
    }
}

fn forward(moe: &mut ExpertParallel, at: VirtualLayer, pass: Pass, y: &mut Vec<f32>) -> Result<(), RuntimeError> {
    let Batch { x, gates, chosen, .. } = batch(moe.manager.rank().index(), EXPERTS, at);
    y.resize(x.len(), 0.0);
    moe.forward(at, pass, Routing { experts: &chosen, gates: &gates }, &x, y)
}

fn step(moe: &mut ExpertParallel, step: &Step, results: &mut Results) -> Result<(), RuntimeError> {
    match step {
        Step::Forward(layers, microbatch) => {
            for layer in layers.clone() {
                let at = VirtualLayer { layer, microbatch: *microbatch };
                let y = results.y.entry(at).or_default();
                forward(moe, at, Pass::Train(recompute(*microbatch).0), y)?;
            }
        }
        Step::Backward(layers, microbatch) => {
            for layer in layers.clone().rev() {
                let at = VirtualLayer { layer, microbatch: *microbatch };
                let (kept, again) = recompute(*microbatch);
                if again {
                    let mut y = Vec::new();
                    forward(moe, at, Pass::Replay(kept), &mut y)?;
                    assert!(y == results.y[&at], "{at}: the replay differs");
                }
                let Batch { x, gates, dy, .. } = batch(moe.manager.rank().index(), EXPERTS, at);
                let (mut dx, mut d_gates) = (vec![0.0; x.len()], vec![0.0; gates.len()]);
                moe.backward(at, &gates, &x, &dy, &mut dx, &mut d_gates)?;
                results.dx.insert(at, dx);
                results.d_gates.insert(at, d_gates);
            }
        }
    }
    Ok(())
}

fn run(steps: &[Step], max_microbatches: usize) -> Result<Vec<Results>, GroupError<RuntimeError>> {
    let config = config(RANKS, EXPERTS, LAYERS, max_microbatches);
    run_threads(&group(&config), |fabric| {
        let mut moe = runtime(config.clone(), fabric)?;
        moe.record();
        let mut results = Results::default();
        for next in steps {
            step(&mut moe, next, &mut results)?;
        }
        moe.finish_backward().expect("a backward that ends");
        assert!(moe.take_records().iter().any(|record| record.replicas() > 0), "the case must make replicas");
        for layer in 0..LAYERS {
            results.grads.push(moe.manager.masters(layer).grads.read::<f32>()?.to_vec());
        }
        moe.into_endpoint().leave()?;
        Ok(results)
    })
}

fn orders() -> Vec<(String, Vec<Step>)> {
    let mut orders = Vec::new();
    for stages in [2, 4] {
        for stage in 0..stages {
            orders.push((format!("1F1B, stage {stage} of {stages}"), one_forward_one_backward(stage, stages)));
            for chunks in [2, 4] {
                let name = format!("interleaved, {chunks} chunks, stage {stage} of {stages}");
                orders.push((name, interleaved(stage, stages, chunks)));
            }
        }
    }
    orders
}

#[test]
fn each_order_is_a_pipeline() {
    for (name, steps) in orders() {
        let all = |wanted: fn(&Step) -> bool| steps.iter().filter(|step| wanted(step)).count();
        assert_eq!(all(|s| matches!(s, Step::Forward(..))), all(|s| matches!(s, Step::Backward(..))), "{name}");
        // Each backward after its forward, or the count of what is in flight would underflow.
        assert!(in_flight_max(&steps).0 <= MICROBATCHES as usize, "{name}");
    }
    assert_eq!(in_flight_max(&one_forward_one_backward(0, 4)).0, 4);
    assert_eq!(in_flight_max(&one_forward_one_backward(3, 4)).0, 1);
    assert_eq!(in_flight_max(&interleaved(1, 2, 2)).0, 3);
}

#[test]
fn pipelines_give_the_bits_of_one_microbatch_after_another() {
    let expected = run(&sequential(), 1).unwrap_or_else(|error| panic!("{error}"));
    for (name, steps) in orders() {
        let (needed, _) = in_flight_max(&steps);
        let got = run(&steps, needed).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(got == expected, "{name}: a bit differs");
    }
}

#[test]
fn a_ring_that_is_too_small_names_the_layer() {
    for (name, steps) in orders() {
        let (needed, _) = in_flight_max(&steps);
        if needed == 1 {
            continue;
        }
        let failure = run(&steps, needed - 1).expect_err("the ring must be exhausted");
        let GroupError::Failed { error: RuntimeError::RingExhausted { at, max_microbatches }, .. } = &failure else {
            panic!("{name}: {failure}");
        };
        assert_eq!(*max_microbatches, needed - 1, "{name}");
        assert!(failure.to_string().contains(&format!("layer {}", at.layer)), "{name}: {failure}");
        // It is the first that a ring of this size cannot keep.
        let before = steps.iter().take_while(|step| **step != Step::Forward(layers_of(&steps, at), at.microbatch));
        let (most, _) = in_flight_max(&before.cloned().collect::<Vec<_>>());
        assert!(most < needed, "{name}: {at} is not the first");
    }
}

/// The layers that are stepped together with `at`.
fn layers_of(steps: &[Step], at: &VirtualLayer) -> Range<usize> {
    let range = steps.iter().find_map(|step| match step {
        Step::Forward(layers, microbatch) if *microbatch == at.microbatch && layers.contains(&at.layer) => Some(layers),
        _ => None,
    });
    range.expect("it is one of the steps").clone()
}
