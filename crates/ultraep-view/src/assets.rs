//! Pages, styles and scripts, part of the program.

/// One file of the page.
pub(crate) struct Asset {
    pub(crate) path: &'static str,
    pub(crate) media_type: &'static str,
    pub(crate) text: &'static str,
}

macro_rules! assets {
    ($($path:literal: $media_type:literal),* $(,)?) => {
        [$(Asset { path: $path, media_type: $media_type, text: include_str!(concat!("../assets/", $path)) }),*]
    };
}

/// Scripts in the order in which each uses only those before it: so the report can put them into one.
pub(crate) const ASSETS: [Asset; 15] = assets! {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "dom.js": "text/javascript; charset=utf-8",
    "scale.js": "text/javascript; charset=utf-8",
    "heatmap.js": "text/javascript; charset=utf-8",
    "lines.js": "text/javascript; charset=utf-8",
    "bars.js": "text/javascript; charset=utf-8",
    "trees.js": "text/javascript; charset=utf-8",
    "overview.js": "text/javascript; charset=utf-8",
    "layer.js": "text/javascript; charset=utf-8",
    "microbatch.js": "text/javascript; charset=utf-8",
    "whatif.js": "text/javascript; charset=utf-8",
    "live.js": "text/javascript; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "report.js": "text/javascript; charset=utf-8",
};

/// Scripts that only the page in the browser needs.
const PAGE_ONLY: [&str; 4] = ["layer.js", "whatif.js", "live.js", "app.js"];

pub(crate) fn find(path: &str) -> Option<&'static Asset> {
    ASSETS.iter().find(|asset| asset.path == path)
}

/// The scripts of the report as one: within a file modules cannot import each other, so each becomes a function that takes
/// what it imports from a shared object and adds what it exports. Imports and exports stand on one line each.
pub(crate) fn report_script() -> String {
    let is_wanted = |asset: &&Asset| asset.path.ends_with(".js") && !PAGE_ONLY.contains(&asset.path);
    let mut script = "const shared = {};\n".to_owned();
    for asset in ASSETS.iter().filter(is_wanted) {
        let mut exported = Vec::new();
        script.push_str("(() => {\n");
        for line in asset.text.lines() {
            if let Some((names, _)) = line.strip_prefix("import ").and_then(|line| line.split_once(" from ")) {
                script.push_str(&format!("const {names} = shared;\n"));
                continue;
            }
            let declared = line.strip_prefix("export function ");
            exported.extend(declared.and_then(|rest| rest.split_once('(')).map(|(name, _)| name));
            script.push_str(line.strip_prefix("export ").unwrap_or(line));
            script.push('\n');
        }
        script.push_str(&format!("Object.assign(shared, {{ {} }});\n}})();\n", exported.join(", ")));
    }
    script
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scripts_import_only_what_stands_before_them_and_on_one_line() {
        for (index, asset) in ASSETS.iter().enumerate().filter(|(_, asset)| asset.path.ends_with(".js")) {
            for line in asset.text.lines().filter(|line| line.starts_with("import ")) {
                let from = line.split("\"./").nth(1).and_then(|rest| rest.strip_suffix("\";"));
                let from = from.unwrap_or_else(|| panic!("{}: {line}", asset.path));
                let place = ASSETS.iter().position(|other| other.path == from);
                assert!(place.is_some_and(|place| place < index), "{}: {line}", asset.path);
                assert!(!PAGE_ONLY.contains(&from) || PAGE_ONLY.contains(&asset.path), "{}: {line}", asset.path);
            }
        }
        let script = report_script();
        assert!(!script.lines().any(|line| line.starts_with("import ") || line.starts_with("export ")));
    }

    #[test]
    fn nothing_is_loaded_from_elsewhere() {
        for asset in &ASSETS {
            for word in ["http://", "https://", "//cdn", "eval(", "innerHTML", "style=\""] {
                let of_svg = asset.text.replace("http://www.w3.org/2000/svg", "");
                assert!(!of_svg.contains(word), "{}: {word}", asset.path);
            }
        }
    }
}
