//! Constant memory: a generated trace of any size is read by the commands that read whole traces, and none may take more than
//! [`PEAK_MIB_MAX`], whatever the size.

use std::fs::File;
use std::io::BufWriter;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ultraep_plan::{Topology, TopologySpec};
use ultraep_trace::{Record, TraceMeta, TraceWriter};

use crate::root;

/// Most memory that a command may take.
const PEAK_MIB_MAX: u64 = 64;
const RANKS: usize = 64;
const EXPERTS: usize = 256;
const LAYERS: u32 = 16;

/// Writes a trace of at least `megabytes`, and runs the commands on it, built in release.
pub(crate) fn check(megabytes: u64) -> Result<(), String> {
    let folder = root().join("target/memory");
    std::fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let (trace, report) = (folder.join("trace.uet"), folder.join("report.html"));
    let result = generate(&trace, megabytes << 20).and_then(|records| {
        eprintln!("{}: {records} records of {RANKS} ranks and {EXPERTS} experts", trace.display());
        crate::cargo(["build", "--quiet", "--release", "--locked", "-p", "ultraep-cli"])?;
        let (path, output) = (trace.display().to_string(), report.display().to_string());
        for arguments in [
            &["trace", "info", &path, "--json"][..],
            &["replay", &path, "--slots", "2", "--policies", "none,eplb,ultraep", "--json"],
            &["report", &path, "-o", &output],
        ] {
            std::fs::remove_file(&report).or_else(absent).map_err(|error| format!("{output}: {error}"))?;
            run(arguments)?;
        }
        Ok(())
    });
    for path in [&trace, &report] {
        std::fs::remove_file(path).or_else(absent).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    result
}

/// What is not there needs no removing.
pub(crate) fn absent(error: std::io::Error) -> std::io::Result<()> {
    if error.kind() == std::io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}

/// Counts that do not compress well: a hot rank that moves, and noise.
fn generate(path: &Path, bytes: u64) -> Result<u64, String> {
    let refuse = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let spec = TopologySpec { ranks: RANKS, experts: EXPERTS, domain_ranks: RANKS, slots_per_rank: 2 };
    let topology = Topology::new(spec).map_err(|error| refuse(&error))?;
    let file = File::create(path).map_err(|error| refuse(&error))?;
    let meta = TraceMeta::of_topology(&topology, LAYERS as usize);
    let mut writer = TraceWriter::new(BufWriter::new(file), meta).map_err(|error| refuse(&error))?;
    let (mut noise, mut record) = (0x9e37_79b9_7f4a_7c15_u64, Record::default());
    for step in 0.. {
        for layer in 0..LAYERS {
            let hot = (step as usize * 5 + layer as usize * 11) % RANKS;
            (record.step, record.layer) = (step, layer);
            record.before.clear();
            for count in 0..RANKS * EXPERTS {
                noise ^= noise << 13;
                noise ^= noise >> 7;
                noise ^= noise << 17;
                let is_hot = count % EXPERTS / (EXPERTS / RANKS) == hot;
                record.before.push((noise % 120) as u32 + if is_hot { 200 } else { 0 });
            }
            writer.append(&record).map_err(|error| refuse(&error))?;
        }
        if path.metadata().map_err(|error| refuse(&error))?.len() >= bytes {
            break;
        }
    }
    let records = writer.records();
    writer.finish().map_err(|error| refuse(&error))?;
    Ok(records)
}

/// Runs the program and watches its peak.
fn run(arguments: &[&str]) -> Result<(), String> {
    let words: Vec<&str> = arguments.iter().copied().take_while(|argument| !argument.contains('/')).collect();
    let shown = format!("ultraep {}", words.join(" "));
    let start = Instant::now();
    let mut command = Command::new(root().join("target/release/ultraep"));
    let mut child =
        command.args(arguments).stdout(Stdio::null()).spawn().map_err(|error| format!("{shown}: {error}"))?;
    let mut peak_kib = 0;
    let status = loop {
        // The peak never falls, so that looking often enough is enough.
        peak_kib = status_kib(child.id(), "VmHWM:").unwrap_or(peak_kib).max(peak_kib);
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) => std::thread::sleep(Duration::from_millis(5)),
            Err(error) => return Err(format!("{shown}: {error}")),
        }
    };
    let peak_mib = peak_kib / 1024;
    eprintln!("{shown}: peak {peak_mib} MiB, {:.1} s", start.elapsed().as_secs_f64());
    if !status.success() {
        return Err(format!("{shown}: {status}"));
    }
    if peak_kib == 0 {
        return Err(format!("{shown}: its peak could not be read from /proc"));
    }
    if peak_mib > PEAK_MIB_MAX {
        return Err(format!("{shown}: peak of {peak_mib} MiB: allowed are {PEAK_MIB_MAX}"));
    }
    Ok(())
}

/// A line of a process's status, KiB: `VmRSS:` is its resident memory, `VmHWM:` the peak of that.
pub(crate) fn status_kib(id: u32, name: &str) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{id}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with(name))?;
    line.split_whitespace().nth(1)?.parse().ok()
}
