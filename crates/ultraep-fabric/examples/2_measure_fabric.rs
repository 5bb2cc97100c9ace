//! What operations cost on this machine, on threads and on processes, beside the machine's own copy speed.
//!
//!     cargo run --release -p ultraep-fabric --example 2_measure_fabric -- [ROUNDS] [RANKS] [CORES]

use std::error::Error;
use std::process::Command;
use std::time::{Duration, Instant};
use ultraep_fabric::processes::{self, JoinInfo};
use ultraep_fabric::{
    Completion, Fabric, FabricKind, GroupSpec, Operation, Region, RemoteSpan, Span, WindowId, run_threads,
};
use ultraep_plan::Rank;

type AnyError = Box<dyn Error + Send + Sync>;

const WINDOW: WindowId = WindowId::new(0);
const WINDOW_BYTES: usize = 8 << 20;
const DENSE_BYTES: usize = 1 << 20;

#[derive(Clone, Copy)]
struct Setting {
    rounds: usize,
    ranks: usize,
    cores: usize,
}

fn main() -> Result<(), AnyError> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [flag, info, rest @ ..] = &arguments[..]
        && flag == "--as-rank"
    {
        let setting = setting(rest)?;
        return measure(processes::join(&spec(setting), info.parse()?)?, setting, FabricKind::Processes);
    }
    run(setting(&arguments)?)
}

fn setting(arguments: &[String]) -> Result<Setting, AnyError> {
    let number = |index: usize, default: usize| arguments.get(index).map_or(Ok(default), |text| text.parse());
    let cores = std::thread::available_parallelism()?.get();
    Ok(Setting { rounds: number(0, 200)?, ranks: number(1, 16)?, cores: number(2, cores)? })
}

fn spec(setting: Setting) -> GroupSpec {
    let mut spec = GroupSpec { cores: setting.cores, ..GroupSpec::new(setting.ranks) };
    spec.add_window("parts", WINDOW_BYTES);
    spec
}

fn run(setting: Setting) -> Result<(), AnyError> {
    let Setting { rounds, ranks, cores } = setting;
    println!("{ranks} ranks, {cores} core permits, {rounds} rounds; times as rank 0 sees them");
    println!("{:<10} {:<34} {:>10} {:>10} {:>10}", "fabric", "operation", "p50 us", "p99 us", "GB/s p50");
    run_threads(&spec(setting), |fabric| measure(fabric, setting, FabricKind::Threads)).map_err(|e| e.to_string())?;
    let myself = std::env::current_exe()?;
    let start = |_, info: JoinInfo| {
        let mut command = Command::new(&myself);
        command.args(["--as-rank", &info.to_string()]).args([rounds, ranks, cores].map(|number| number.to_string()));
        command
    };
    processes::launch(&spec(setting), start)?.wait()?;
    Ok(())
}

/// Runs one operation `rounds` times and prints what it took.
fn time(
    fabric: &mut Box<dyn Fabric>,
    (setting, kind): (Setting, FabricKind),
    name: &str,
    mut one: impl FnMut(&mut Box<dyn Fabric>) -> Result<Completion, AnyError>,
) -> Result<(), AnyError> {
    let mut took = Vec::with_capacity(setting.rounds);
    let mut bytes = 0;
    for _ in 0..setting.rounds {
        let start = Instant::now();
        let completion = one(fabric)?;
        took.push(start.elapsed());
        bytes = completion.bytes_sent.max(completion.bytes_received);
    }
    took.sort_unstable();
    if fabric.rank() == Rank::new(0) {
        let at = |percent: usize| took[(took.len() - 1) * percent / 100];
        row(&kind.to_string(), name, at(50), at(99), bytes);
    }
    Ok(())
}

fn row(fabric: &str, name: &str, p50: Duration, p99: Duration, bytes: u64) {
    let rate = if bytes == 0 { "-".to_owned() } else { format!("{:.2}", bytes as f64 / p50.as_secs_f64() / 1e9) };
    let (p50, p99) = (p50.as_secs_f64() * 1e6, p99.as_secs_f64() * 1e6);
    println!("{fabric:<10} {name:<34} {p50:>10.1} {p99:>10.1} {rate:>10}");
}

fn measure(mut fabric: Box<dyn Fabric>, setting: Setting, kind: FabricKind) -> Result<(), AnyError> {
    let (me, ranks) = (fabric.rank(), fabric.ranks());
    let how = (setting, kind);
    time(&mut fabric, how, "barrier", |fabric| Ok(fabric.run(Operation::Barrier)?))?;

    let (counts, table) = (Region::zeroed(1024), Region::zeroed(1024 * ranks));
    time(&mut fabric, how, "all-gather, 1 KiB a rank", |fabric| {
        Ok(fabric.run(Operation::AllGather { send: Span::whole(&counts), recv: Span::whole(&table) })?)
    })?;

    let block = (WINDOW_BYTES / 2 / ranks).min(64 << 10);
    let (rows, sizes) = (Region::zeroed(block * ranks), vec![block; ranks]);
    time(&mut fabric, how, &format!("all-to-all, {} KiB blocks", block >> 10), |fabric| {
        let send = Span::whole(&rows);
        Ok(fabric.run(Operation::AllToAll { send, send_bytes: &sizes, recv: WINDOW, recv_bytes: &sizes })?)
    })?;

    let dense = Region::zeroed(DENSE_BYTES);
    time(&mut fabric, how, "all-reduce, 1 MiB", |fabric| {
        Ok(fabric.run(Operation::AllReduceSumF32 { data: Span::whole(&dense) })?)
    })?;

    // Rank 0 alone, while the others wait in `Close`.
    let source = Region::from_vec(vec![1u8; WINDOW_BYTES]);
    fabric.run(Operation::Open { window: WINDOW })?;
    if me == Rank::new(0) {
        let last = [RemoteSpan { rank: Rank::new(ranks - 1), window: WINDOW, offset: 0 }];
        time(&mut fabric, how, "put, 8 MiB", |fabric| {
            Ok(fabric.run(Operation::Put { from: Span::whole(&source), to: &last })?)
        })?;
        let mut target = vec![0u8; WINDOW_BYTES];
        let from = source.read::<u8>()?;
        time(&mut fabric, how, "(plain copy, 8 MiB)", |_| {
            target.copy_from_slice(&from);
            std::hint::black_box(&target);
            Ok(Completion { stamp: 0, bytes_sent: WINDOW_BYTES as u64, bytes_received: 0 })
        })?;
    }
    fabric.run(Operation::Close { window: WINDOW })?;
    let window = fabric.window(WINDOW).ok_or("no window")?;
    if me == Rank::new(ranks - 1) {
        assert!(window.read::<u8>()?.iter().all(|&byte| byte == 1), "the put arrived");
    }
    fabric.leave()?;
    Ok(())
}

#[test]
fn runs_on_threads() {
    let setting = Setting { rounds: 3, ranks: 3, cores: 2 };
    let ended = run_threads(&spec(setting), |fabric| measure(fabric, setting, FabricKind::Threads));
    assert!(ended.is_ok(), "{ended:?}");
}
