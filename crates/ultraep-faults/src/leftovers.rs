//! What a group could leave behind in this process or on the machine.

use std::fs::read_dir;
use std::time::{Duration, Instant};

use rustix::process::{WaitOptions, wait};

/// Threads, descriptors and groups' memory of this process at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leftovers {
    threads: usize,
    descriptors: usize,
    /// Shared anonymous mappings: the memory of groups of threads.
    mappings: usize,
}

impl Leftovers {
    /// What there is now.
    pub fn now() -> Self {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
        // The kernel's name for them.
        let mappings = maps.lines().filter(|line| line.ends_with("/dev/zero (deleted)")).count();
        Self { threads: count("/proc/self/task"), descriptors: count("/proc/self/fd"), mappings }
    }

    /// That nothing more is there than before: no thread, no descriptor, no child, no mapping of a group of processes and no
    /// file of one.
    ///
    /// # Errors
    /// What is left.
    pub fn check(&self) -> Result<(), String> {
        // A thread that has been joined may stay in the list for a moment.
        let deadline = Instant::now() + Duration::from_secs(5);
        let mut now = Self::now();
        while now != *self && Instant::now() < deadline {
            std::thread::yield_now();
            now = Self::now();
        }
        if now != *self {
            return Err(format!("{now:?} are left, before there were {self:?}"));
        }
        if let Ok(found) = wait(WaitOptions::NOHANG) {
            return Err(format!("a child is left: {found:?}"));
        }
        let maps = std::fs::read_to_string("/proc/self/maps").map_err(|error| error.to_string())?;
        if maps.contains("memfd:ultraep") {
            return Err("a mapping is left".to_owned());
        }
        let shared = read_dir("/dev/shm").into_iter().flatten().filter_map(Result::ok);
        match shared.filter(|entry| entry.file_name().to_string_lossy().contains("ultraep")).count() {
            0 => Ok(()),
            files => Err(format!("{files} files are left in /dev/shm")),
        }
    }
}

fn count(folder: &str) -> usize {
    read_dir(folder).map_or(0, Iterator::count)
}
