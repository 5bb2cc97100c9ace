//! Reading text: domains, limits, what is skipped, and every error.

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use ultraep_text::{Corpus, Discovery, Limits, TextError};

fn write(root: &Path, relative: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
    let path = root.join(relative);
    fs::create_dir_all(path.parent().expect("has a parent")).expect("folder");
    fs::write(&path, bytes).expect("file");
    path
}

fn names(corpus: &Corpus) -> Vec<&str> {
    corpus.domains.iter().map(|d| d.name.as_str()).collect()
}

fn domain<'a>(corpus: &'a Corpus, name: &str) -> &'a str {
    let domain = corpus.domains.iter().find(|d| d.name == name).expect("domain");
    std::str::from_utf8(&domain.bytes).expect("UTF-8")
}

#[test]
fn a_folder_is_split_into_domains_and_the_rest_counted() {
    let folder = TempDir::new().expect("folder");
    let root = folder.path();
    write(root, "src/lib.rs", "fn main() {}");
    write(root, "src/tool.py", "print(1)\n");
    write(root, "README.md", "# Words\n");
    write(root, "LICENSE-MIT", "You may.\n");
    write(root, "copy/LICENSE-MIT", "You may.\n");
    write(root, "page.html", "<p>é</p>\n");
    write(root, "conf.toml", "a = 1\n");
    write(root, "notes", "plain words\n");
    write(root, "image.png", b"\x89PNG\0\xff");
    write(root, "latin1.txt", b"caf\xe9 au lait\n");
    write(root, "empty.md", "");
    write(root, ".hidden/secret.md", "no\n");
    write(root, ".env.md", "no\n");
    write(root, "target/debug/build.rs", "no\n");
    #[cfg(unix)]
    std::os::unix::fs::symlink(root, root.join("loop")).expect("link");

    let corpus = Corpus::from_paths(&[root.to_path_buf()], &Limits::GIVEN).expect("corpus");
    assert_eq!(names(&corpus), ["rust", "code", "prose", "markup", "data", "text"]);
    assert_eq!(domain(&corpus, "rust"), "fn main() {}\n", "a line end is added");
    assert_eq!(domain(&corpus, "markup"), "<p>é</p>\n");
    assert_eq!(domain(&corpus, "text"), "plain words\n");
    let mut prose: Vec<&str> = domain(&corpus, "prose").lines().collect();
    prose.sort_unstable();
    assert_eq!(prose, ["# Words", "You may."]);
    assert_eq!(corpus.domains[2].files, 2);
    let skipped = corpus.skipped;
    assert_eq!((skipped.binary, skipped.empty, skipped.duplicates), (2, 1, 1));
    assert_eq!(skipped.links, usize::from(cfg!(unix)));
    assert!(!corpus.domains.iter().any(|d| d.bytes.windows(2).any(|w| w == b"no")));
    let summary = corpus.summary().join("\n");
    assert!(summary.contains("2 binary") && summary.contains("1 file "), "{summary}");
}

#[test]
fn the_digest_knows_names_and_bytes_and_not_the_place() {
    let (a, b) = (TempDir::new().expect("folder"), TempDir::new().expect("folder"));
    for root in [a.path(), b.path()] {
        for i in 0..20 {
            write(root, &format!("d{}/f{i}.txt", i % 3), format!("text number {i}\n"));
        }
    }
    let read = |root: &Path| Corpus::from_paths(&[root.to_path_buf()], &Limits::GIVEN).expect("corpus");
    let digest = read(a.path()).digest();
    assert_eq!(digest, read(b.path()).digest());
    write(b.path(), "d0/f0.txt", "text number 0!\n");
    assert_ne!(digest, read(b.path()).digest());
    let mut renamed = read(a.path());
    renamed.domains[0].name = "rust".into();
    assert_ne!(digest, renamed.digest());
}

#[test]
fn a_capped_domain_is_an_even_sample() {
    let folder = TempDir::new().expect("folder");
    for i in 0..100 {
        write(folder.path(), &format!("a/f{i:03}.txt"), format!("{i:03} {}\n", "x".repeat(95)));
    }
    write(folder.path(), "b/small.txt", "small\n");
    let paths = [folder.path().join("a"), folder.path().join("b")];
    let limits = Limits { domain_bytes_max: 3_006, ..Limits::GIVEN };
    let corpus = Corpus::from_paths(&paths, &limits).expect("corpus");
    let text = domain(&corpus, "prose");
    assert!(text.len() <= 3_006 && text.contains("small"));
    let numbers: Vec<usize> = text.lines().filter_map(|l| l.split(' ').next()?.parse().ok()).collect();
    assert_eq!(numbers.len(), 30);
    for third in [0..34_usize, 34..67, 67..100] {
        let taken = numbers.iter().filter(|n| third.contains(*n)).count();
        assert!((4..=18).contains(&taken), "{taken} of {third:?}: {numbers:?}");
    }
    assert_eq!((corpus.skipped.unused, corpus.skipped.cut), (70, 0));
    assert!(!numbers.is_sorted(), "the held-out end must not be the alphabet's end");
}

#[test]
fn the_beginning_of_a_long_file_is_cut_at_a_character() {
    let folder = TempDir::new().expect("folder");
    let path = write(folder.path(), "long.txt", "é".repeat(100));
    let limits = Limits { file_bytes_max: 51, ..Limits::GIVEN };
    let corpus = Corpus::from_paths(&[path], &limits).expect("corpus");
    assert_eq!(domain(&corpus, "prose"), format!("{}\n", "é".repeat(25)));
    assert_eq!(corpus.skipped.cut, 1);
    assert_eq!(corpus.summary().last().map(String::as_str), Some("left out: files 1 in part"));
}

#[test]
fn every_wrong_path_has_its_own_clear_error() {
    let folder = TempDir::new().expect("folder");
    let root = folder.path();
    let read = |path: PathBuf| Corpus::from_paths(&[path], &Limits::GIVEN);
    let line = |error: &TextError| {
        let line = error.to_string();
        assert!(!line.contains('\n'), "{line}");
        line
    };

    let missing = read(root.join("missing.txt")).expect_err("missing");
    assert!(matches!(missing, TextError::NotFound { .. }), "{missing:?}");
    assert!(line(&missing).ends_with("missing.txt: no such file or folder"));

    let empty = read(write(root, "empty.txt", "")).expect_err("empty");
    assert!(matches!(empty, TextError::Empty { .. }), "{empty:?}");

    let binary = read(write(root, "data.bin", b"abc\0def")).expect_err("binary");
    assert!(matches!(binary, TextError::NotText { offset: 3, .. }), "{binary:?}");
    assert!(line(&binary).ends_with("data.bin: not text: a zero byte at byte 3"));

    let inside_a_file = read(root.join("data.bin/x")).expect_err("not a folder");
    assert!(matches!(inside_a_file, TextError::Unreadable { .. }), "{inside_a_file:?}");

    let nothing = read({
        write(root, "bare/a.bin", b"\0");
        root.join("bare")
    })
    .expect_err("nothing");
    assert!(matches!(nothing, TextError::NoText { .. }), "{nothing:?}");
    assert!(line(&nothing).ends_with("bare (left out: files 1 binary)"), "{nothing}");

    let none = Corpus::from_paths(&[], &Limits::GIVEN).expect_err("no path");
    assert_eq!(line(&none), "no text found in no path at all");

    write(root, "many/a.txt", "a");
    write(root, "many/b.txt", "b");
    let many = Corpus::from_paths(&[root.join("many")], &Limits { files_max: 1, ..Limits::GIVEN });
    assert!(matches!(many, Err(TextError::TooManyFiles { files_max: 1, .. })));
}

/// A machine's places, made up: two locked crates, one that is not, documentation, and a project with a run folder.
fn machine(root: &Path) -> Discovery {
    write(root, "cargo/registry/src/index-1/alpha-1.0.0/src/lib.rs", "// alpha\n".repeat(200));
    write(root, "cargo/registry/src/index-1/alpha-1.0.0/README.md", "alpha words\n");
    write(root, "cargo/registry/src/index-1/beta-0.2.0/src/lib.rs", "// beta\n".repeat(20_000));
    write(root, "cargo/registry/src/index-1/other-9.0.0/src/lib.rs", "// other\n");
    write(root, "sys/share/doc/rust/html/book/ch01.html", "<p>book</p>\n");
    write(root, "sys/share/doc/rust/html/book/search.js", "var no;\n");
    write(root, "sys/share/doc/rust/README.md", "documentation words\n");
    write(root, "project/Cargo.lock", LOCK);
    write(root, "project/src/main.rs", "// project\n");
    write(root, "project/runs/one/table.md", "| no |\n");
    write(root, "project/picture", "unnamed\n");
    Discovery {
        cargo_home: Some(root.join("cargo")),
        sysroot: Some(root.join("sys")),
        project: Some(root.join("project")),
        skip: vec![root.join("project/runs")],
    }
}

const LOCK: &str = "version = 4\n\n[[package]]\nname = \"alpha\"\nversion = \"1.0.0\"\n\n[[package]]\nname = \"beta\"\nversion \
                    = \"0.2.0\"\ndependencies = [\n \"alpha\",\n]\n";

#[test]
fn discovery_takes_locked_crates_documentation_and_the_project() {
    let folder = TempDir::new().expect("folder");
    let sources = machine(folder.path());
    let limits = Limits { domain_bytes_max: 10_000, domain_bytes_min: 0, ..Limits::DISCOVERED };
    let corpus = Corpus::discover(&sources, &limits).expect("corpus");
    assert_eq!(names(&corpus), ["rust", "prose", "markup", "data"]);
    let rust = domain(&corpus, "rust");
    assert!(rust.contains("// alpha") && rust.contains("// beta") && rust.contains("// project"));
    assert!(!rust.contains("// other"), "not in the lock file");
    assert_eq!(rust.matches("// alpha").count(), 200, "the small crate is whole, the large one capped");
    assert_eq!(domain(&corpus, "markup"), "<p>book</p>\n");
    assert!(!domain(&corpus, "prose").contains("| no |"), "the run folder is skipped");
    assert!(domain(&corpus, "prose").contains("documentation words"));
    assert_eq!(corpus.domains[0].origin, "2 crates unpacked by cargo for this build, the project's own files");
    let place = folder.path().to_string_lossy().into_owned();
    assert!(!corpus.summary().join("\n").contains(&place), "no path of the machine on the screen");

    let elsewhere = TempDir::new().expect("folder");
    let again = Corpus::discover(&machine(elsewhere.path()), &limits).expect("corpus");
    assert_eq!(corpus.digest(), again.digest(), "the place of the roots does not matter");
}

#[test]
fn discovery_does_with_what_there_is() {
    let folder = TempDir::new().expect("folder");
    let all = machine(folder.path());
    let limits = Limits { domain_bytes_min: 0, ..Limits::DISCOVERED };
    let only_cargo = Discovery { cargo_home: all.cargo_home.clone(), ..Discovery::default() };
    let corpus = Corpus::discover(&only_cargo, &limits).expect("corpus");
    assert!(domain(&corpus, "rust").contains("// other"), "without a lock file every crate counts");
    let missing = Discovery { sysroot: Some(folder.path().join("missing")), ..Discovery::default() };
    let error = Corpus::discover(&missing, &limits).expect_err("nothing");
    assert!(matches!(error, TextError::NoText { .. }) && error.to_string().contains("--text"), "{error}");

    let small = Limits { domain_bytes_min: 1_000, ..limits };
    let corpus = Corpus::discover(&all, &small).expect("corpus");
    assert_eq!(names(&corpus), ["rust"], "domains too small to train on are left out");
    assert_eq!(corpus.skipped.in_small_domains, 4);
    let tiny = Discovery { sysroot: all.sysroot, ..Discovery::default() };
    assert_eq!(names(&Corpus::discover(&tiny, &small).expect("corpus")), ["prose", "markup"], "unless all are");
}

#[test]
fn a_snapshot_carries_the_corpus_to_other_processes() {
    let folder = TempDir::new().expect("folder");
    let limits = Limits { domain_bytes_min: 0, ..Limits::DISCOVERED };
    let corpus = Corpus::discover(&machine(folder.path()), &limits).expect("corpus");
    let mut bytes = Vec::new();
    corpus.write_snapshot(&mut bytes).expect("write");
    let read = Corpus::read_snapshot(&mut bytes.as_slice()).expect("read");
    assert_eq!(read.domains, corpus.domains);
    assert_eq!(read.digest(), corpus.digest());

    for length in (0..bytes.len()).step_by(4_001).chain(0..100).chain(bytes.len() - 10..bytes.len()) {
        assert!(Corpus::read_snapshot(&mut &bytes[..length]).is_err(), "cut at {length}");
    }
    for at in (0..bytes.len()).step_by(4_001).chain(0..100).chain(bytes.len() - 10..bytes.len()) {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x40;
        match Corpus::read_snapshot(&mut damaged.as_slice()) {
            // Origins and numbers of files are only for the screen, and not in the digest.
            Ok(read) => assert_eq!(read.digest(), corpus.digest(), "byte {at}"),
            Err(error) => assert!(matches!(error, TextError::Snapshot { .. } | TextError::SnapshotIo(_)), "{error}"),
        }
    }
    let mut lying = bytes[..12].to_vec();
    lying.extend_from_slice(&u64::MAX.to_le_bytes());
    let error = Corpus::read_snapshot(&mut lying.as_slice()).expect_err("a name of 16 EiB");
    assert_eq!(error.to_string(), "snapshot of a corpus: a length over its limit");
}
