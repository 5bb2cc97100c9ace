//! A report: one HTML file that opens offline and shows the overview and the worst microbatch.

use std::path::Path;

use serde::Serialize;

use crate::assets;
use crate::entry::Entry;
use crate::overview::Overview;
use crate::picture::Microbatch;
use crate::{Settings, ViewError};

/// Worst cases shown in full.
const MICROBATCHES: usize = 1;

#[derive(Serialize)]
struct Data {
    overview: Overview,
    microbatches: Vec<Microbatch>,
}

/// Reads a run or recording to its end and gives the report's HTML. `progress` is told records read and records in all.
pub fn report(path: &Path, settings: &Settings, progress: &dyn Fn(u64, u64)) -> Result<String, ViewError> {
    let entry = Entry::open(path, settings)?;
    entry.read_once(&|now| progress(now.read, now.records))?;
    let places: Vec<_> = entry.state().summary.worst.iter().map(|m| (m.step, m.microbatch, m.layer)).collect();
    let microbatches = places.into_iter().take(MICROBATCHES).map(|place| entry.picture(place, None));
    let microbatches = microbatches.collect::<Result<Vec<_>, _>>()?;
    Ok(page(&Data { overview: entry.overview(), microbatches }))
}

/// The page. Sentences stand in the HTML itself, so that they are there without scripts.
fn page(data: &Data) -> String {
    let style = assets::find("style.css").map_or("", |asset| asset.text);
    let about = &data.overview.about;
    let title = escape(&about.title);
    let words: String = data.overview.words.iter().map(|sentence| format!("<p>{}</p>\n", escape(sentence))).collect();
    // Within a script only `<` could end it. Floats and integers always serialize.
    let json = serde_json::to_string(data).unwrap_or_default().replace('<', "\\u003c");
    format!(
        r#"<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'">
<title>UltraEP report: {title}</title>
<style>
{style}</style>
</head>
<body>
<header class="bar"><span class="brand">UltraEP report</span><button id="theme" type="button">Theme</button></header>
<main id="main">
<h1 class="path">{title}</h1>
<p class="faint">{kind}: {ranks} ranks, {experts} experts.</p>
<div id="words">
{words}</div>
<div id="pictures"><noscript>The pictures need scripts.</noscript></div>
<footer>Made by ultraep {version}. Imbalance is the load of the fullest rank over the mean of all ranks; 1 is perfect.</footer>
</main>
<script type="application/json" id="data">{json}</script>
<script type="module">
{script}</script>
</body>
</html>
"#,
        kind = escape(&about.format),
        ranks = about.ranks,
        experts = about.experts,
        version = env!("CARGO_PKG_VERSION"),
        script = assets::report_script(),
    )
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
