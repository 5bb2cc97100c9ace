//! Kinds of text by file name: they become the domains.

use std::path::Path;

/// A kind of text. Declared in the order in which domains appear in a corpus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Rust,
    Code,
    Prose,
    Markup,
    Data,
    /// A name that says nothing; its bytes decide whether it is text at all.
    Unknown,
}

impl Kind {
    pub(crate) const ALL: [Self; 6] = [Self::Rust, Self::Code, Self::Prose, Self::Markup, Self::Data, Self::Unknown];

    /// Name of the domain.
    pub(crate) const fn domain(self) -> &'static str {
        match self {
            Self::Rust => "rust",
            Self::Code => "code",
            Self::Prose => "prose",
            Self::Markup => "markup",
            Self::Data => "data",
            Self::Unknown => "text",
        }
    }

    /// By extension, or by the customary names of files that have none.
    pub(crate) fn of(path: &Path) -> Self {
        let Some(name) = path.file_name().and_then(|n| n.to_str()) else { return Self::Unknown };
        let name = name.to_ascii_lowercase();
        let extension = name.rsplit_once('.').map(|(_, extension)| extension);
        match extension {
            Some("rs") => Self::Rust,
            Some(
                "c" | "h" | "cc" | "cpp" | "cxx" | "hpp" | "hh" | "cu" | "cuh" | "py" | "js" | "mjs" | "ts" | "tsx"
                | "go" | "java" | "kt" | "swift" | "cs" | "rb" | "pl" | "lua" | "zig" | "hs" | "ml" | "scala" | "sh"
                | "bash" | "s" | "asm" | "cmake" | "sql" | "css" | "el" | "jl" | "r" | "proto",
            ) => Self::Code,
            Some("md" | "markdown" | "txt" | "rst" | "adoc" | "tex") => Self::Prose,
            Some("html" | "htm" | "xhtml" | "xml" | "svg") => Self::Markup,
            Some("toml" | "json" | "jsonl" | "yaml" | "yml" | "csv" | "tsv" | "lock" | "ini") => Self::Data,
            _ if is_customary_prose(&name) => Self::Prose,
            _ => Self::Unknown,
        }
    }
}

fn is_customary_prose(lower_name: &str) -> bool {
    ["license", "licence", "copying", "copyright", "readme", "notice", "authors", "changelog", "changes", "news"]
        .iter()
        .any(|prefix| lower_name.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_decide_the_domain() {
        let cases = [
            ("src/lib.rs", Kind::Rust),
            ("a.C", Kind::Code),
            ("tool.py", Kind::Code),
            ("README.md", Kind::Prose),
            ("LICENSE-APACHE", Kind::Prose),
            ("COPYING", Kind::Prose),
            ("index.HTML", Kind::Markup),
            ("Cargo.toml", Kind::Data),
            ("shakespeare", Kind::Unknown),
            ("photo.png", Kind::Unknown),
            ("archive.tar.gz", Kind::Unknown),
        ];
        for (name, expected) in cases {
            assert_eq!(Kind::of(Path::new(name)), expected, "{name}");
        }
    }
}
