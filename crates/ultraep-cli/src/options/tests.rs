//! Every option of every command, held to the others of its name.

use std::collections::BTreeMap;

use clap::error::ErrorKind;
use clap::{Arg, Command, CommandFactory};
use ultraep_baselines::PolicyKind;

use crate::Cli;

/// What may differ between two commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Difference {
    Bounds,
    Everything,
}

/// Options that differ on purpose.
const EXCEPTIONS: [(&str, Difference, &str); 6] = [
    ("policy", Difference::Bounds, "one load may be planned by the bound; nothing can be trained or served with it"),
    ("min-quota", Difference::Bounds, "auto needs a load: training and serving plan before they know any"),
    ("seed", Difference::Bounds, "plan files of the simulator hold 32 bits"),
    ("svg", Difference::Everything, "the simulator writes a plot a metric, and so into a folder"),
    ("layers", Difference::Everything, "a recording has layers to show, a model to train is given some"),
    ("model", Difference::Everything, "advise names a model, bench asks for the model of transfers"),
];

/// An option where it stands.
struct Place {
    command: Command,
    path: String,
    arg: Arg,
}

impl Place {
    /// The first value name, of a list that of its element.
    fn value_name(&self) -> String {
        let name = self.arg.get_value_names().and_then(|names| names.first()).map(ToString::to_string);
        name.unwrap_or_default().trim_end_matches(",...").to_owned()
    }

    fn help(&self) -> String {
        self.arg.get_help().map(ToString::to_string).unwrap_or_default()
    }

    /// The help up to what is special here.
    fn stem(&self) -> String {
        let help = self.help();
        let end = [" [", " (", ";", ":", ",", ". "].iter().filter_map(|mark| help.find(mark)).min();
        help[..end.unwrap_or(help.len())].to_owned()
    }

    /// What the command says to a value: nothing, or why not.
    fn refusal(&self, value: &str) -> Option<String> {
        let option = format!("--{}={value}", self.arg.get_long().unwrap());
        let error = self.command.clone().try_get_matches_from(["x".to_owned(), option]).err()?;
        let text = match error.kind() {
            ErrorKind::ValueValidation | ErrorKind::InvalidValue => error.to_string(),
            _ => return None,
        };
        // After the name of the option, which a list writes in its own way.
        Some(text.split_once(">'").map_or(text.clone(), |(_, why)| why.to_owned()))
    }

    fn takes_values(&self) -> bool {
        self.arg.get_action().takes_values()
    }
}

fn places() -> BTreeMap<String, Vec<Place>> {
    fn walk(command: &Command, path: &str, all: &mut BTreeMap<String, Vec<Place>>) {
        for arg in command.get_arguments() {
            if let Some(long) = arg.get_long().filter(|long| !matches!(*long, "help" | "version")) {
                let place = Place { command: command.clone(), path: path.to_owned(), arg: arg.clone() };
                all.entry(long.to_owned()).or_default().push(place);
            }
        }
        for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
            walk(sub, &format!("{path} {}", sub.get_name()), all);
        }
    }
    let mut all = BTreeMap::new();
    let mut command = Cli::command();
    command.build();
    walk(&command, "ultraep", &mut all);
    all
}

fn probes() -> Vec<String> {
    let mut all: Vec<String> =
        ["", "-1", "nan", "inf", "blocks", "0.5", "0.99", "1.0", "1.01", "1.5", "100/101", "101/100"]
            .map(str::to_owned)
            .to_vec();
    let edges =
        [0, 1, 2, 64, 1000, 1024, 3600, 4096, 10_000, 16_384, 65_535, 86_400, 100_000, 1 << 20, 10_000_000, 1 << 24];
    let wide = [i32::MAX as u64, u64::from(u32::MAX), 1 << 60, i64::MAX as u64, u64::MAX];
    for edge in edges.into_iter().chain(wide) {
        all.extend([edge.saturating_sub(1), edge, edge.saturating_add(1)].map(|n| n.to_string()));
    }
    all.extend(PolicyKind::ALL.map(|kind| kind.name().to_owned()));
    all
}

fn excepted(option: &str, difference: Difference) -> bool {
    EXCEPTIONS.iter().any(|(name, what, _)| *name == option && (*what == difference || *what == Difference::Everything))
}

#[test]
fn options_of_one_name_are_the_same_option_everywhere() {
    let mut wrong = Vec::new();
    for (option, places) in places() {
        let first = &places[0];
        for other in &places[1..] {
            let mut expect = |what: &str, a: String, b: String| {
                if a != b {
                    wrong.push(format!("--{option}: {what}: {}: {a:?}, {}: {b:?}", first.path, other.path));
                }
            };
            if !excepted(&option, Difference::Everything) {
                expect("value name", first.value_name(), other.value_name());
                expect("help", first.stem(), other.stem());
            }
            if excepted(&option, Difference::Bounds) || !first.takes_values() {
                continue;
            }
            if let Some(probe) = probes().into_iter().find(|probe| first.refusal(probe) != other.refusal(probe)) {
                expect(
                    &format!("value {probe:?}"),
                    format!("{:?}", first.refusal(&probe)),
                    format!("{:?}", other.refusal(&probe)),
                );
            }
        }
    }
    assert!(wrong.is_empty(), "{} differences\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn exceptions_are_differences_that_exist() {
    let all = places();
    for (option, what, why) in EXCEPTIONS {
        let places = all.get(option).unwrap_or_else(|| panic!("--{option} is in no command ({why})"));
        assert!(places.len() > 1, "--{option} is in one command only");
        let differ = |a: &Place, b: &Place| match what {
            Difference::Bounds => probes().iter().any(|probe| a.refusal(probe) != b.refusal(probe)),
            Difference::Everything => a.value_name() != b.value_name() || a.stem() != b.stem(),
        };
        assert!(places[1..].iter().any(|other| differ(&places[0], other)), "--{option} is the same everywhere by now");
    }
}

#[test]
fn lists_with_commas_are_shown_as_such() {
    for (option, places) in places() {
        for place in places {
            let names = place.arg.get_value_names().unwrap_or_default();
            let shown = names.first().is_some_and(|name| name.ends_with(",..."));
            let is_list = place.arg.get_value_delimiter() == Some(',');
            assert_eq!(shown, is_list, "{} --{option} <{}>", place.path, names.first().map_or("", |name| name));
        }
    }
}

#[test]
fn every_option_says_what_it_is() {
    for (option, places) in places() {
        for place in places {
            assert!(!place.help().is_empty(), "{} --{option}", place.path);
        }
    }
}

#[test]
fn bounds_are_those_of_the_planner() {
    let all = places();
    let refused = |option: &str, value: &str| all[option].iter().all(|place| place.refusal(value).is_some());
    let taken = |option: &str, value: &str| all[option].iter().all(|place| place.refusal(value).is_none());
    for (option, allowed, not) in [
        ("beta", ["1", "1.01", "3/2"], ["0.5", "0", "99/100"]),
        ("min-quota", ["1", "16", "1024"], ["0", "-1", "many"]),
        ("slots", ["0", "2", "64"], ["65", "-1", "2.5"]),
        ("ranks", ["1", "8", "1024"], ["0", "1025", "all"]),
    ] {
        assert!(allowed.iter().all(|value| taken(option, value)), "--{option}");
        assert!(not.iter().all(|value| refused(option, value)), "--{option}");
    }
}

#[test]
fn the_bound_is_no_policy_to_train_or_serve_with() {
    let all = places();
    let runs = |place: &&Place| ["ultraep train", "ultraep serve"].contains(&place.path.as_str());
    let places: Vec<_> = all["policy"].iter().chain(&all["decode-policy"]).filter(runs).collect();
    assert_eq!(places.len(), 3);
    for place in places {
        let why = place.refusal("ideal").unwrap();
        assert!(why.contains("bound") && why.contains("none, eplb, ") && why.contains("ultraep-cost"), "{why}");
        assert_eq!(place.refusal("ultraep"), None);
    }
}
