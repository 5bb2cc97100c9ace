//! Tables as people and spreadsheets get them: fitted to the terminal, as CSV, as Markdown.

use std::process::Output;

use assert_cmd::Command;

/// Runs `ultraep` in a terminal of `columns`.
fn ultraep(columns: Option<&str>, args: &[&str]) -> Output {
    let mut command = Command::cargo_bin("ultraep").unwrap();
    command.env_remove("COLUMNS").args(args);
    columns.map(|columns| command.env("COLUMNS", columns));
    let output = command.output().unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

fn stdout(columns: Option<&str>, args: &[&str]) -> String {
    String::from_utf8(ultraep(columns, args).stdout).unwrap()
}

/// A folder with a load of 8 ranks and 32 experts.
fn load() -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("load.csv").display().to_string();
    ultraep(None, &["load", &path, "--ranks", "8", "--experts", "32", "--ratio", "3"]);
    (folder, path)
}

#[test]
fn csv_is_tables_alone_with_plain_numbers() {
    let (_folder, path) = load();
    let output = ultraep(None, &["compare", &path, "--slots", "2", "--format", "csv"]);
    let mut csv = csv::Reader::from_reader(&output.stdout[..]);
    let header = csv.headers().unwrap().clone();
    let column = |name: &str| header.iter().position(|h| h == name).unwrap_or_else(|| panic!("{name}: {header:?}"));
    let (policy, predicted) = (column("policy"), column("predicted (ns)"));
    let rows: Vec<csv::StringRecord> = csv.records().collect::<Result<_, _>>().expect("one table of equal rows");
    let ours = rows.iter().find(|row| &row[policy] == "ultraep").unwrap();
    assert!(ours[predicted].parse::<u64>().unwrap() > 0);
    assert!(ours[column("remote")].parse::<f64>().unwrap() < 1.0);
    assert!(String::from_utf8_lossy(&output.stderr).contains("8 ranks"), "prose goes to standard error");
}

#[test]
fn several_tables_are_apart_by_an_empty_line() {
    let (_folder, path) = load();
    let text = stdout(None, &["plan", &path, "--slots", "2", "--format", "csv", "--min-quota", "1"]);
    let tables: Vec<&str> = text.split("\n\n").collect();
    assert_eq!(tables.len(), 2, "{text}");
    assert!(tables[0].starts_with("what,before,after\n") && tables[1].starts_with("expert,load,"), "{text}");
}

#[test]
fn markdown_has_the_columns_explained() {
    let (_folder, path) = load();
    let text = stdout(None, &["compare", &path, "--slots", "2", "--format", "md"]);
    assert!(text.contains("| policy | imbalance |") && text.contains("| --- | ---: |"), "{text}");
    assert!(text.contains("* imbalance: largest over mean rank load"), "{text}");
}

#[test]
fn tables_fit_the_columns_of_the_terminal_and_explain_theirs() {
    let (_folder, path) = load();
    let commands: [&[&str]; 4] = [
        &["compare", &path, "--slots", "2"],
        &["plan", &path, "--slots", "2"],
        &["replay", &path, "--slots", "1,2", "--min-quota", "1,64"],
        &["bench", "weight-sync", "--model", "--ranks", "8", "--experts", "32", "--ratio", "2", "--iterations", "1"],
    ];
    for args in commands {
        for columns in [60, 80, 100, 200] {
            let text = stdout(Some(&columns.to_string()), args);
            let is_table = |line: &&str| line.starts_with(['│', '┌', '├', '╞', '└', ' ']);
            for line in text.lines().filter(is_table) {
                assert!(line.chars().count() <= columns, "{columns}: {line}\n{text}");
            }
        }
        let narrow = stdout(Some("80"), args);
        let wide = stdout(Some("200"), args);
        assert!(!wide.contains("left out to fit"), "{wide}");
        let words = narrow.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(!words.contains("left out") || words.contains("(--format csv or md has all)"), "{narrow}");
    }
    let text = stdout(Some("80"), commands[2]);
    assert!(text.contains("left out to fit 80 columns") && text.contains("  imbalance "), "{text}");
    assert!(text.contains("largest over mean rank load"), "{text}");
}
