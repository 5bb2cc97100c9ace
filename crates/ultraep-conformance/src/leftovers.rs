//! What a group could leave behind in this process or on the machine.

use crate::case::{ensure, text};

/// A count of what there is, to compare with later.
pub struct Leftovers {
    descriptors: usize,
}

impl Leftovers {
    /// What there is now.
    #[must_use]
    pub fn now() -> Self {
        Self { descriptors: count("/proc/self/fd") }
    }

    /// That no child, descriptor, mapping or file is left.
    ///
    /// # Errors
    /// What is left.
    pub fn compare(&self) -> Result<(), String> {
        let children = rustix::process::wait(rustix::process::WaitOptions::NOHANG);
        ensure(matches!(children, Err(rustix::io::Errno::CHILD)), || format!("children are left: {children:?}"))?;
        let descriptors = count("/proc/self/fd");
        ensure(descriptors == self.descriptors, || {
            format!("{} descriptors, before {}", descriptors, self.descriptors)
        })?;
        let maps = std::fs::read_to_string("/proc/self/maps").map_err(text)?;
        ensure(!maps.contains("ultraep-fabric:") && !maps.contains("memfd:ultraep"), || {
            "a mapping is left".to_owned()
        })?;
        let shared = std::fs::read_dir("/dev/shm").map_err(text)?.filter_map(Result::ok);
        let named = shared.filter(|entry| entry.file_name().to_string_lossy().contains("ultraep")).count();
        ensure(named == 0, || "a file is left in /dev/shm".to_owned())
    }
}

fn count(folder: &str) -> usize {
    std::fs::read_dir(folder).map_or(0, Iterator::count)
}
