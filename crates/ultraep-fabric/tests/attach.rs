//! Groups of ranks that find each other through a store: who is let in, who is not, and what the store does.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};
use ultraep_fabric::attach::{
    DEFAULT_PORT, Rendezvous, RendezvousError, Store, StoreError, StoreServer, TcpStore, attach,
};
use ultraep_fabric::{Fabric, FabricError, GroupSpec, JoinError, Loss, Operation, OperationKind, Region, Span};
use ultraep_plan::Rank;

/// How long a rank may take to come, however busy the machine is.
const WITHIN: Duration = Duration::from_secs(60);

fn server() -> StoreServer {
    StoreServer::bind("127.0.0.1:0").expect("a free port")
}

fn store(server: &StoreServer, prefix: &str) -> TcpStore {
    TcpStore::connect(&server.address().to_string(), prefix, WITHIN).expect("the server is there")
}

type Joined = Result<Box<dyn Fabric>, FabricError>;

/// Attaches ranks of this process to one group, each with its own specification.
fn attach_all(ranks: Vec<(usize, GroupSpec)>, within: Duration) -> Vec<Joined> {
    let server = server();
    thread::scope(|scope| {
        let one = |(rank, spec): (usize, GroupSpec)| {
            let mut store = store(&server, "test");
            scope.spawn(move || attach("group", Rank::new(rank), &spec, &mut store, within))
        };
        let threads: Vec<_> = ranks.into_iter().map(one).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    })
}

fn error_of(joined: &Joined) -> Option<&FabricError> {
    joined.as_ref().err()
}

/// Everyone's number from everyone.
fn sum(fabric: &mut Box<dyn Fabric>) -> Result<u32, FabricError> {
    let mine = Region::from_vec(vec![fabric.rank().index() as u32 + 1]);
    let all = Region::zeroed(4 * fabric.ranks());
    fabric.run(Operation::AllGather { send: Span::whole(&mine), recv: Span::whole(&all) })?;
    let sum = all.read::<u32>().expect("nobody writes").iter().sum();
    Ok(sum)
}

#[test]
fn groups_of_parts_of_a_job_live_beside_each_other() {
    const WORLD: usize = 5;
    let server = server();
    let server = &server;
    let sums: Vec<(u32, Option<u32>)> = thread::scope(|scope| {
        let main = |process: usize| {
            let mut store = store(server, "0");
            let spec = GroupSpec::new(WORLD);
            let mut all = attach("all", Rank::new(process), &spec, &mut store, WITHIN).expect("all come");
            // Processes 1, 2 and 4 have a group with other windows and other numbers beside it.
            let place = [1, 2, 4].iter().position(|&member| member == process);
            let part = place.map(|rank| {
                let mut spec = GroupSpec::new(3);
                spec.add_window("inbox", 100);
                attach("part", Rank::new(rank), &spec, &mut store, WITHIN).expect("three come")
            });
            let of_all = sum(&mut all).expect("all are there");
            let of_part = part.map(|mut part| {
                let of_part = sum(&mut part).expect("all are there");
                part.leave().expect("nothing is in flight");
                of_part
            });
            all.leave().expect("nothing is in flight");
            (of_all, of_part)
        };
        let threads: Vec<_> = (0..WORLD).map(|process| scope.spawn(move || main(process))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    assert_eq!(sums, [(15, None), (15, Some(6)), (15, Some(6)), (15, None), (15, Some(6))]);
}

#[test]
fn who_differs_is_refused_and_named() {
    let spec = GroupSpec { config_digest: 7, ..GroupSpec::new(3) };
    let other = GroupSpec { config_digest: 8, ..spec.clone() };
    let joined = attach_all(vec![(0, spec.clone()), (1, spec.clone()), (2, other)], WITHIN);
    let reason = JoinError::ConfigDigest { expected: 7, got: 8 };
    assert_eq!(error_of(&joined[2]), Some(&FabricError::Join { rank: Rank::new(2), reason }));
    let lost = |operation| FabricError::PeerLost { rank: Rank::new(2), operation, reason: Loss::Refused };
    assert_eq!(error_of(&joined[0]), Some(&lost(OperationKind::Join)));
    // Whether it was let in before that or comes after it: the other rank hears of it.
    let second = joined.into_iter().nth(1).expect("three ranks").and_then(|mut fabric| fabric.run(Operation::Barrier));
    let error = second.expect_err("the group has failed");
    assert!([lost(OperationKind::Barrier), lost(OperationKind::Join)].contains(&error), "{error}");
}

#[test]
fn a_rank_is_taken_once_and_must_exist() {
    let spec = GroupSpec::new(2);
    let joined = attach_all(vec![(0, spec.clone()), (1, spec.clone()), (1, spec.clone())], Duration::from_secs(5));
    assert!(joined[0].is_ok(), "the group is there");
    let refused = joined[1..].iter().filter_map(error_of).next().expect("one of the two");
    // Rank 0 no longer listens once all have come: the late one finds nobody.
    let taken = FabricError::Join { rank: Rank::new(1), reason: JoinError::Taken };
    assert!(*refused == taken || matches!(refused, FabricError::Os { .. } | FabricError::PeerLost { .. }), "{refused}");
    let joined = attach_all(vec![(2, spec)], Duration::from_secs(5));
    let reason = JoinError::NoSuchRank { ranks: 2 };
    assert_eq!(error_of(&joined[0]), Some(&FabricError::Join { rank: Rank::new(2), reason }));
}

#[test]
fn who_does_not_come_is_named() {
    let spec = GroupSpec::new(4);
    let start = Instant::now();
    let joined = attach_all(vec![(0, spec.clone()), (2, spec.clone())], Duration::from_millis(300));
    let missing = match error_of(&joined[0]) {
        Some(FabricError::Timeout { missing, operation: OperationKind::Join, .. }) => missing.clone(),
        other => panic!("{other:?}"),
    };
    assert!(missing.contains(&Rank::new(1)) && missing.contains(&Rank::new(3)), "{missing:?}");
    // Without rank 0 nobody can say who else is missing.
    let joined = attach_all(vec![(1, spec)], Duration::from_millis(300));
    let named = |error: &FabricError| error.culprit() == Some(Rank::new(0));
    assert!(error_of(&joined[0]).is_some_and(named), "{:?}", error_of(&joined[0]));
    assert!(start.elapsed() < Duration::from_secs(30));
}

/// A rank whose endpoint goes without leaving has dropped it; one whose process goes is seen by the suite's attached processes.
#[test]
fn a_rank_that_drops_its_endpoint_is_named() {
    let spec = GroupSpec { timeout: WITHIN, ..GroupSpec::new(3) };
    let mut joined: Vec<_> = attach_all(vec![(0, spec.clone()), (1, spec.clone()), (2, spec)], WITHIN)
        .into_iter()
        .map(Result::unwrap)
        .collect();
    let culprit = joined.remove(1);
    drop(culprit);
    for fabric in &mut joined {
        let error = fabric.run(Operation::Barrier).expect_err("rank 1 is gone");
        assert_eq!(error.culprit(), Some(Rank::new(1)), "{error}");
    }
}

#[test]
fn a_store_keeps_waits_and_separates() {
    let server = server();
    let (mut one, mut two, mut other) = (store(&server, "0"), store(&server, "0"), store(&server, "1"));
    one.set("key", b"first").expect("a small value");
    one.set("key", b"second").expect("a small value");
    assert_eq!(two.get("key", WITHIN).as_deref(), Ok(&b"second"[..]));
    let nothing = other.get("key", Duration::from_millis(30));
    assert_eq!(nothing, Err(StoreError::Timeout { key: "key".to_owned(), waited: Duration::from_millis(30) }));
    // A get waits for its key, however late that is written.
    let waits = thread::spawn(move || two.get("late", WITHIN));
    thread::sleep(Duration::from_millis(50));
    one.set("late", &[7; 65_536]).expect("the largest value");
    assert_eq!(waits.join().expect("no panic").expect("it was written"), [7; 65_536]);
    let too_long = one.set("late", &[7; 65_537]);
    assert_eq!(too_long, Err(StoreError::TooLong { what: "value", asked: 65_537, limit: 65_536 }));
    assert!(one.get(&"k".repeat(2000), WITHIN).is_err());
    assert_eq!(one.get("key", WITHIN).as_deref(), Ok(&b"second"[..]), "still in step");
}

#[test]
fn a_store_survives_strangers_and_says_when_it_is_gone() {
    let server = server();
    let address = server.address();
    let mut stranger = TcpStream::connect(address).expect("the server is there");
    stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").expect("it takes bytes");
    // It is closed, not answered.
    assert!(matches!(stranger.read(&mut [0; 16]), Ok(0) | Err(_)));
    let mut store = store(&server, "0");
    store.set("key", b"value").expect("the server lives");
    drop(server);
    assert!(matches!(store.get("key", WITHIN), Err(StoreError::Unreachable { .. })));
    let gone = TcpStore::connect(&address.to_string(), "0", Duration::from_millis(50));
    assert!(matches!(gone, Err(StoreError::Unreachable { .. })));
    assert!(matches!(StoreServer::bind("no such host:1"), Err(StoreError::Unreachable { .. })));
}

#[test]
fn a_rendezvous_comes_from_the_usual_variables() {
    let from = |variables: &[(&str, &str)]| {
        let find = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        Rendezvous::from_env(find)
    };
    let place = from(&[("RANK", "3"), ("WORLD_SIZE", "8")]).expect("enough");
    let host = "127.0.0.1".to_owned();
    let expected = Rendezvous { rank: Rank::new(3), size: 8, local_rank: None, host, port: DEFAULT_PORT, restart: 0 };
    assert_eq!(place, expected);
    let place = from(&[
        ("RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("LOCAL_RANK", "0"),
        ("MASTER_ADDR", "node7"),
        ("MASTER_PORT", "29500"),
        ("ULTRAEP_PORT", "4000"),
        ("TORCHELASTIC_RESTART_COUNT", "2"),
    ]);
    let host = "node7".to_owned();
    let expected = Rendezvous { rank: Rank::new(0), size: 1, local_rank: Some(0), host, port: 4000, restart: 2 };
    assert_eq!(place, Ok(expected));
    assert_eq!(from(&[("RANK", "0")]), Err(RendezvousError::Missing { variable: "WORLD_SIZE" }));
    for wrong in [
        [("RANK", "8"), ("WORLD_SIZE", "8")],
        [("RANK", "-1"), ("WORLD_SIZE", "8")],
        [("RANK", "0"), ("WORLD_SIZE", "0")],
    ] {
        assert!(matches!(from(&wrong), Err(RendezvousError::Invalid { .. })), "{wrong:?}");
    }
    let error = from(&[("RANK", "8"), ("WORLD_SIZE", "8")]).expect_err("out of range").to_string();
    assert_eq!(error, "RANK is `8`: a whole number from 0 to 7 is needed");
}
