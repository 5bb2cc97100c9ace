//! The page in a real browser: it loads, leads from the overview to a microbatch, plans again, follows a run, obeys keys,
//! themes and narrow windows. `ULTRAEP_SCREENSHOTS=FOLDER` keeps pictures; `ULTRAEP_REQUIRE_BROWSER=1` makes a missing
//! Chromium a failure.

mod chromium;
#[path = "../common/mod.rs"]
mod common;
mod served;

use chromium::Page;
use common::Run;
use served::Served;
use tempfile::TempDir;

/// A page, or a word that there is no browser.
fn page() -> Option<Page> {
    match chromium::find() {
        Some(path) => Some(Page::open(&path)),
        None if std::env::var_os("ULTRAEP_REQUIRE_BROWSER").is_some() => panic!("no Chromium in PATH"),
        None => {
            println!("SKIP: no Chromium in PATH");
            None
        }
    }
}

/// No console errors, nothing wider than the window.
fn assert_clean(page: &mut Page) {
    let errors = std::mem::take(&mut page.errors);
    assert!(errors.is_empty(), "{errors:?}");
    let wide = page.value("document.documentElement.scrollWidth - document.documentElement.clientWidth");
    assert_eq!(wide, 0, "wider than the window");
}

#[test]
fn from_the_overview_to_a_microbatch_and_what_if() {
    let Some(mut page) = page() else { return };
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("run");
    let mut run = Run::begin(&path);
    (0..12).for_each(|step| run.step(step));
    let Run { writer, trace, .. } = run;
    trace.finish().unwrap();
    writer.end(ultraep_run::RunStatus::Finished, ultraep_run::UtcTime::from_unix_s(1_795_000_100)).unwrap();
    let served = Served::start(&[path]);

    page.go(&served.address);
    page.wait("document.querySelector('#main').dataset.view === 'Overview' && document.querySelectorAll('canvas').length === 2");
    page.wait("document.querySelector('#status').textContent === 'finished'");
    assert!(page.text("#words").contains("48 microbatches of 4 layers"), "{}", page.text("#words"));
    assert!(page.text("main").contains("Policies side by side"));
    page.picture("overview-light");
    assert_clean(&mut page);

    // A row of the heat map is a layer.
    page.click("canvas", (0.5, 0.1));
    page.wait("document.querySelector('h1').textContent === 'Layer 0'");
    page.wait("document.querySelectorAll('svg[role=button]').length === 1");
    page.picture("layer-light");
    // A point of the curve is a microbatch.
    page.click("svg[role=button]", (0.5, 0.4));
    page.wait("document.querySelector('#main').dataset.view === 'Microbatch' && document.querySelectorAll('canvas').length === 3");
    assert!(page.text("main").contains("The plan is the recorded one."));
    page.picture("microbatch-light");
    // The split of one expert in place of the flow of all.
    let choose =
        "const s = document.querySelector('#split-expert'); s.selectedIndex = 1; s.dispatchEvent(new Event('change'));";
    page.value(&format!("(() => {{ {choose} }})()"));
    page.wait("document.querySelector('canvas[aria-label^=\"Split of expert\"]')");
    assert_clean(&mut page);

    // No slots, no replicas: the numbers change, and the address says so.
    page.value("document.querySelector('#what-if-slots').value = '0'");
    page.click("#plan-again", (0.5, 0.5));
    page.wait("document.querySelector('#difference')");
    let address = page.value("location.hash");
    assert!(address.as_str().unwrap().contains("slots=0"), "{address}");
    let row = "[...document.querySelectorAll('#difference tbody tr')][2].innerText.split(/\\s+/).join(' ')";
    let replicas = page.value(row);
    assert!(
        replicas.as_str().unwrap().starts_with("replicas ") && replicas.as_str().unwrap().contains(" 0 "),
        "{replicas}"
    );
    page.picture("what-if-light");
    // An address alone leads to the same view.
    page.value("window.isOld = true; location.reload()");
    page.wait("!window.isOld && document.querySelector('#difference')");
    // A setting that cannot be is told in words, and the page stays.
    page.value("document.querySelector('#what-if-beta').value = 'much'");
    page.click("#plan-again", (0.5, 0.5));
    page.wait("document.querySelector('.error')?.textContent.includes('allowed are ratios')");
    page.errors.retain(|error| !error.contains("400 (Bad Request)"));
    assert_clean(&mut page);
}

#[test]
fn keys_themes_and_narrow_windows() {
    let Some(mut page) = page() else { return };
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("run");
    let mut run = Run::begin(&path);
    (0..6).for_each(|step| run.step(step));
    let served = Served::start(&[path.clone(), path]);

    page.prefer("dark");
    page.go(&served.address);
    page.wait("document.querySelectorAll('canvas').length === 2");
    let background = "getComputedStyle(document.body).backgroundColor";
    let dark = page.value(background);
    page.picture("overview-dark");
    page.press("t");
    assert_ne!(page.value(background), dark);
    page.prefer("light");
    page.press("t");
    assert_eq!(page.value(background), dark, "the choice holds against the system");
    page.press("t");

    page.press("?");
    page.wait("document.querySelector('#keys').open");
    page.picture("keys");
    page.press("Escape");
    page.wait("!document.querySelector('#keys').open");
    page.press("j");
    page.wait("document.querySelector('h1').textContent === 'Layer 0'");
    page.press("j");
    page.wait("document.querySelector('h1').textContent === 'Layer 1'");
    page.press("k");
    page.wait("document.querySelector('h1').textContent === 'Layer 0'");
    page.press("u");
    page.wait("document.querySelector('#main').dataset.view === 'Overview' && document.querySelectorAll('canvas').length === 2");
    // Into the heat map, two cells on, and Enter opens the layer.
    page.value("document.querySelector('canvas').focus()");
    for key in ["ArrowRight", "ArrowDown"] {
        page.press(key);
    }
    page.wait("document.querySelector('.readout').textContent.startsWith('layer 1, from step')");
    page.press("Enter");
    page.wait("document.querySelector('h1').textContent === 'Layer 1'");
    page.value("location.hash = '#/0/microbatch/3/0/1'");
    page.wait("document.querySelector('h1').textContent === 'Step 3, microbatch 0, layer 1'");
    page.press("j");
    page.wait("document.querySelector('h1').textContent === 'Step 4, microbatch 0, layer 1'");
    page.press("J");
    page.wait("document.querySelector('h1').textContent === 'Step 4, microbatch 0, layer 2'");
    page.press("w");
    assert_eq!(page.value("document.activeElement.id"), "what-if-policy");

    page.size(360, 740);
    for (hash, name) in [("#/1", "overview"), ("#/1/layers/2", "layer"), ("#/1/microbatch/4/0/2?slots=1", "microbatch")]
    {
        page.value(&format!("location.hash = '{hash}'"));
        let view = name[..1].to_uppercase() + &name[1..];
        page.wait(&format!("document.querySelector('#main').dataset.view.startsWith('{view}')"));
        page.wait("document.querySelectorAll('canvas').length > 0");
        page.picture(&format!("{name}-narrow"));
        assert_clean(&mut page);
    }
    page.press("t");
    page.size(1280, 900);
    page.value("location.hash = '#/0/microbatch/4/0/2?slots=1'");
    page.wait("document.querySelector('#difference') && document.querySelectorAll('canvas').length === 4");
    page.picture("what-if-dark");
    assert_clean(&mut page);
}

#[test]
fn live_mode_follows_a_run() {
    let Some(mut page) = page() else { return };
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("run");
    let mut run = Run::begin(&path);
    run.step(0);
    let served = Served::start(&[path]);
    page.go(&served.address);
    page.wait("document.querySelector('#status').textContent === 'live'");
    page.wait("document.querySelector('#words').textContent.includes('over 4 microbatches')");
    run.step(1);
    run.step(2);
    page.wait("document.querySelector('#words').textContent.includes('over 12 microbatches')");
    page.picture("live");
    let Run { writer, trace, .. } = run;
    trace.finish().unwrap();
    writer.end(ultraep_run::RunStatus::Finished, ultraep_run::UtcTime::from_unix_s(1_795_000_100)).unwrap();
    page.wait("document.querySelector('#status').textContent === 'finished'");
    assert_clean(&mut page);
}

#[test]
fn a_report_opens_offline() {
    let Some(mut page) = page() else { return };
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("run");
    let mut run = Run::begin(&path);
    (0..8).for_each(|step| run.step(step));
    let html = ultraep_view::report(&path, &ultraep_view::Settings::default(), &|_, _| {}).unwrap();
    let file = folder.path().join("report.html");
    std::fs::write(&file, html).unwrap();
    page.call("Network.enable", serde_json::json!({}));
    let offline = serde_json::json!({ "offline": true, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0 });
    page.call("Network.emulateNetworkConditions", offline);
    page.go(&format!("file://{}", file.display()));
    page.wait("document.querySelectorAll('canvas').length === 5");
    assert!(page.text("#words").contains("32 microbatches of 4 layers"));
    page.picture("report-light");
    page.size(360, 740);
    page.wait("[...document.querySelectorAll('canvas')].every((canvas) => canvas.clientWidth < 360)");
    page.click("#theme", (0.5, 0.5));
    page.picture("report-narrow-dark");
    assert_clean(&mut page);
}
