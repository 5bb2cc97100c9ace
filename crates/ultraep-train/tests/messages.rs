//! Ranks that share no memory train the same weights, bit for bit.

mod common;
#[path = "../../ultraep-messages/tests/sockets/mod.rs"]
#[allow(dead_code, reason = "the transport of the message fabric's own tests, which start processes as well")]
mod sockets;

use common::{job, run, small, tensor_files};
use sockets::Sockets;
use std::thread;
use std::time::Duration;
use tempfile::TempDir;
use ultraep_messages::MessageFabric;
use ultraep_train::{Silent, TrainConfig, run_rank};

#[test]
fn two_steps_over_messages_are_those_over_threads_bit_for_bit() {
    let config = TrainConfig { steps: 2, ..small() };
    let folders = [TempDir::new().unwrap(), TempDir::new().unwrap()];
    let (outcome, heard) = run(&job(config.clone(), Some(folders[0].path())));
    assert!(heard.imbalance.iter().any(|(before, after)| after < before), "something must be balanced");
    let threads = tensor_files(&outcome.checkpoint.unwrap());

    let (spec, over_messages) = (config.group().unwrap(), job(config, Some(folders[1].path())));
    let mesh = Sockets::mesh(spec.ranks).unwrap();
    let outcomes: Vec<_> = thread::scope(|scope| {
        let one = |sockets: Sockets| {
            let fabric = MessageFabric::start(&spec, sockets, Duration::from_secs(60)).unwrap();
            run_rank(fabric, &over_messages, &mut Silent).unwrap()
        };
        let ranks: Vec<_> = mesh.into_iter().map(|sockets| scope.spawn(move || one(sockets))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    let messages = tensor_files(outcomes[0].checkpoint.as_ref().unwrap());
    assert!(!threads.is_empty() && threads == messages, "a bit of the weights or moments differs");
}
