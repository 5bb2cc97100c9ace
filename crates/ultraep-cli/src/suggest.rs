//! "Did you mean": the nearest of what an error says is allowed, and the nearest file where one is not there.

use std::path::Path;

/// Similarity from which a name is offered, of 1.
const LEAST: f64 = 0.8;

/// What the user may have meant, from an error of the form `... "got" ... allowed are a, b, c` or `path: No such file ...`.
pub(crate) fn suggestion(error: &str) -> Option<String> {
    misspelt(error).or_else(|| misplaced(error))
}

fn misspelt(error: &str) -> Option<String> {
    let (before, allowed) = error.rsplit_once("allowed are ")?;
    let got = quoted(before)?;
    let last = allowed.replace(" or ", ", ").replace(" and ", ", ");
    let names: Vec<&str> = last.split(", ").map(|name| name.trim_matches(|c: char| !c.is_alphanumeric())).collect();
    nearest(got, names.into_iter().filter(|name| !name.contains(' ')))
}

/// The last word in quotes.
fn quoted(text: &str) -> Option<&str> {
    let end = text.rfind(['"', '\'', '`'])?;
    let mark = &text[end..=end];
    let start = text[..end].rfind(mark)? + 1;
    Some(&text[start..end]).filter(|got| !got.is_empty() && got.len() <= 200)
}

/// A file of a similar name in the same folder.
fn misplaced(error: &str) -> Option<String> {
    let at = error.find(": No such file or directory")?;
    let path = Path::new(error[..at].trim_matches('"'));
    let name = path.file_name()?.to_str()?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .ok()?
        .take(10_000)
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    names.sort_unstable();
    let found = nearest(name, names.iter().map(String::as_str))?;
    Some(match folder == Path::new(".") {
        true => found,
        false => folder.join(found).display().to_string(),
    })
}

/// The most similar of `names`, the first of equals.
fn nearest<'a>(got: &str, names: impl Iterator<Item = &'a str>) -> Option<String> {
    let mut best: Option<(f64, &str)> = None;
    for name in names.filter(|name| *name != got) {
        let similarity = strsim::jaro_winkler(got, name);
        if similarity >= LEAST && best.is_none_or(|(so_far, _)| similarity > so_far) {
            best = Some((similarity, name));
        }
    }
    best.map(|(_, name)| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_of_what_is_allowed() {
        let error =
            "invalid value 'ultrep' for '--policy <NAME>': no policy \"ultrep\": allowed are none, eplb, ultraep";
        assert_eq!(suggestion(error).as_deref(), Some("ultraep"));
        let error = "hardware \"h100x9\": no such file; allowed are a file or h100x8, gb200-nvl72";
        assert_eq!(suggestion(error).as_deref(), Some("h100x8"));
        assert_eq!(suggestion("no policy \"xyz\": allowed are none, eplb"), None);
        assert_eq!(suggestion("ranks 0: allowed are 1 to 1024"), None);
        assert_eq!(suggestion("something else"), None);
    }

    #[test]
    fn a_file_of_a_similar_name() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("loads.csv"), "1").unwrap();
        let wrong = folder.path().join("load.csv");
        let error = format!("{}: No such file or directory (os error 2)", wrong.display());
        assert_eq!(suggestion(&error), Some(folder.path().join("loads.csv").display().to_string()));
        let error = format!("{}: No such file or directory (os error 2)", folder.path().join("x").display());
        assert_eq!(suggestion(&error), None);
    }
}
