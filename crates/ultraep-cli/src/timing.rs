//! Repeated measurement of one piece of work.

use std::hint::black_box;
use std::sync::LazyLock;
use std::time::Instant;

use serde::Serialize;

/// Nanoseconds since the first call: the clock that libraries without one are lent.
pub(crate) fn now_ns() -> u64 {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    START.elapsed().as_nanos() as u64
}

/// Times of many runs, in nanoseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Times {
    pub(crate) p50_ns: u64,
    pub(crate) p99_ns: u64,
    pub(crate) max_ns: u64,
}

/// Runs `work` `iterations` times after a tenth as many that do not count.
pub(crate) fn measure<T>(iterations: usize, mut work: impl FnMut() -> T) -> Times {
    for _ in 0..iterations.div_ceil(10) {
        black_box(work());
    }
    let mut times = Vec::with_capacity(iterations);
    for _ in 0..iterations {
        let start = Instant::now();
        black_box(work());
        times.push(start.elapsed().as_nanos() as u64);
    }
    times.sort_unstable();
    let at = |percent: usize| times[(times.len() * percent / 100).min(times.len() - 1)];
    Times { p50_ns: at(50), p99_ns: at(99), max_ns: at(100) }
}

/// Nanoseconds for people: three digits and a unit.
pub(crate) fn pretty(ns: u64) -> String {
    match ns {
        0..1_000 => format!("{ns} ns"),
        1_000..1_000_000 => format!("{:.2} us", ns as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.2} ms", ns as f64 / 1e6),
        _ => format!("{:.2} s", ns as f64 / 1e9),
    }
}
