//! Text that a machine with a Rust toolchain has.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::gather::{self, Group, Origin};
use crate::kind::Kind;
use crate::walk::{OnUnreadable, Walk, WalkError};
use crate::{Corpus, Limits, Skipped, TextError};

/// Longest lock file looked at.
const LOCK_BYTES_MAX: u64 = 16 << 20;

/// Where to look. The library reads no environment: whoever calls it does, and passes what is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Discovery {
    /// Cargo's home, whose `registry/src/*/*` holds unpacked crates.
    pub cargo_home: Option<PathBuf>,
    /// The toolchain's root, whose `share/doc` may hold its documentation.
    pub sysroot: Option<PathBuf>,
    /// The project's folder. Where it has a `Cargo.lock`, only crates listed there are used: what cargo unpacked for
    /// this build, the same on every machine.
    pub project: Option<PathBuf>,
    /// Folders of the project not to read, such as the one that runs are written to.
    pub skip: Vec<PathBuf>,
}

impl Corpus {
    /// Real text found without being told where: sources and Markdown of unpacked crates, toolchain documentation (if it
    /// is installed), licences and READMEs, the project's own files. Missing or unreadable places are no error; having
    /// found nothing at all is. The choice depends on names and sizes only, and is spread evenly over crates and books.
    pub fn discover(sources: &Discovery, limits: &Limits) -> Result<Self, TextError> {
        let mut finder = Finder { limits, groups: Vec::new(), skipped: Skipped::default() };
        if let Some(cargo_home) = &sources.cargo_home {
            let locked = sources.project.as_deref().and_then(locked_crates);
            finder.add_crates(&cargo_home.join("registry/src"), locked.as_ref());
        }
        if let Some(sysroot) = &sources.sysroot {
            finder.add_documentation(&sysroot.join("share/doc"));
        }
        if let Some(project) = &sources.project {
            let skip = sources.skip.iter().chain(&sources.cargo_home).chain(&sources.sysroot);
            let skip: Vec<PathBuf> = skip.filter_map(|folder| folder.canonicalize().ok()).collect();
            finder.add(project, Origin::Project, "project", &skip);
        }
        let Finder { groups, mut skipped, .. } = finder;
        let (domains, sources) = gather::gather(groups, limits, OnUnreadable::Count, &mut skipped)?;
        Self { domains, sources, skipped }.or_no_text(
            "cargo's registry, the toolchain's documentation and the project; name some with --text".to_string(),
        )
    }
}

struct Finder<'a> {
    limits: &'a Limits,
    groups: Vec<Group>,
    skipped: Skipped,
}

impl Finder<'_> {
    /// One group for each crate in the registry (of those in `locked`, if known).
    fn add_crates(&mut self, registry: &Path, locked: Option<&BTreeSet<String>>) {
        let mut seen = BTreeSet::new();
        for unpacked in Walk::folders(registry).iter().flat_map(|index| Walk::folders(index)) {
            let Some(name) = unpacked.file_name().and_then(|n| n.to_str()).map(str::to_owned) else { continue };
            if locked.is_some_and(|locked| !locked.contains(&name)) || !seen.insert(name.clone()) {
                continue;
            }
            let origin = if locked.is_some() { Origin::LockedCrate } else { Origin::AnyCrate };
            self.add(&unpacked, origin, &name, &[]);
        }
    }

    /// One group for each folder directly below `share/doc` and below its `rust/html` (books and crates of the library).
    fn add_documentation(&mut self, root: &Path) {
        let Ok(root) = root.canonicalize() else { return };
        let books = Walk::folders(&root.join("rust/html"));
        for folder in Walk::folders(&root).iter().chain(&books) {
            let Ok(below) = folder.strip_prefix(&root) else { continue };
            let name = format!("doc/{}", below.to_string_lossy().replace('\\', "/"));
            self.add(folder, Origin::Documentation, &name, &books);
        }
    }

    /// The group of files below `root` whose names say what they are, `skip` (canonical paths) left out.
    fn add(&mut self, root: &Path, origin: Origin, name: &str, skip: &[PathBuf]) {
        let walk = Walk { skip, files_max: self.limits.files_max, on_unreadable: OnUnreadable::Count };
        let mut files = Vec::new();
        match walk.files(root, &mut files, &mut self.skipped) {
            Ok(()) => {}
            Err(WalkError::TooManyFiles) => self.skipped.cut_roots += 1,
            Err(WalkError::Unreadable(..)) => self.skipped.unreadable += 1,
        }
        files.retain(|file| match origin {
            // Scripts and search indices of the pages are no text that anyone wrote.
            Origin::Documentation => matches!(file.kind, Kind::Prose | Kind::Markup),
            _ => file.kind != Kind::Unknown,
        });
        self.groups.push(Group { name: name.to_string(), origin, files });
    }
}

/// `name-version` of every package in the project's lock file; `None` where there is no lock file.
fn locked_crates(project: &Path) -> Option<BTreeSet<String>> {
    let bytes = gather::read_beginning(&project.join("Cargo.lock"), LOCK_BYTES_MAX).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let quoted = |line: &str, key: &str| {
        line.strip_prefix(key)?
            .trim_start()
            .strip_prefix('=')?
            .trim()
            .strip_prefix('"')?
            .strip_suffix('"')
            .map(str::to_owned)
    };
    let mut crates = BTreeSet::new();
    let mut name = None;
    for line in text.lines() {
        if line.trim() == "[[package]]" {
            name = None;
        } else if let Some(value) = quoted(line, "name") {
            name = Some(value);
        } else if let (Some(version), Some(name)) = (quoted(line, "version"), &name) {
            crates.insert(format!("{name}-{version}"));
        }
    }
    Some(crates)
}
