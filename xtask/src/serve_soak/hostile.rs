//! Clients that mean harm, or know no better, beside the ordinary load: a thread an act, acts drawn from a seed. Each act knows
//! what the server may answer; anything else is counted as wrong.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use serde::Serialize;

use super::acts;
use super::wire::{Ground, Noise};

/// What an act does: what came of it, in a word, or what was wrong.
type Act = fn(&Ground, &mut Noise) -> Result<String, String>;

/// Acts by name, and how often each comes.
const ACTS: [(&str, usize, Act); 20] = [
    ("ordinary answer", 20, acts::ordinary),
    ("ordinary streams, one connection", 6, acts::streams),
    ("pages", 3, acts::pages),
    ("random parameters", 20, acts::parameters),
    ("around the context", 2, acts::around_the_context),
    ("malformed HTTP", 8, acts::malformed),
    ("nearly HTTP", 8, acts::nearly_http),
    ("bodies that are no request", 6, acts::no_request),
    ("huge bodies", 2, acts::huge),
    ("wrong type of body", 2, acts::wrong_type),
    ("wrong key", 4, acts::wrong_key),
    ("wrong Host", 4, acts::wrong_host),
    ("wrong path or method", 2, acts::wrong_place),
    ("slow head", 2, acts::slow_head),
    ("slow body", 2, acts::slow_body),
    ("slow reader", 3, acts::slow_reader),
    ("reader that stops", 2, acts::stopped_reader),
    ("gone in a stream", 5, acts::gone_in_a_stream),
    ("gone before the answer", 5, acts::gone_before),
    ("idle connections", 1, acts::idle),
];

/// Most acts at a time; more are left out, and counted.
const AT_ONCE_MAX: usize = 200;
/// Most wrong outcomes that are kept in words.
const WRONG_KEPT: usize = 20;

/// What came of all acts.
#[derive(Default, Serialize)]
pub(super) struct Tally {
    pub(super) acts: u64,
    /// Acts that were due and not begun: there were too many at a time.
    pub(super) left_out: u64,
    /// By act and by what came of it.
    pub(super) outcomes: BTreeMap<&'static str, BTreeMap<String, u64>>,
    pub(super) wrong: u64,
    /// The first wrong ones, in words.
    pub(super) examples: Vec<String>,
}

/// The clients.
pub(super) struct Crowd {
    ground: Arc<Ground>,
    noise: Noise,
    /// Acts a second.
    rate: f64,
    at_work: usize,
    tell: Sender<(&'static str, Result<String, String>)>,
    told: Receiver<(&'static str, Result<String, String>)>,
    tally: Tally,
}

impl Crowd {
    pub(super) fn new(ground: Ground, rate: f64, seed: u64) -> Self {
        let (tell, told) = channel();
        let (ground, noise) = (Arc::new(ground), Noise(seed));
        Self { ground, noise, rate, at_work: 0, tell, told, tally: Tally::default() }
    }

    /// Begins what is due `now`, counted from the start of the load.
    pub(super) fn go_on(&mut self, now: Duration) -> Result<(), String> {
        while let Ok((name, outcome)) = self.told.try_recv() {
            self.take(name, outcome);
        }
        let due = (now.as_secs_f64() * self.rate) as u64;
        while self.tally.acts + self.tally.left_out < due {
            if self.at_work >= AT_ONCE_MAX {
                self.tally.left_out += 1;
            } else {
                self.begin()?;
            }
        }
        Ok(())
    }

    fn begin(&mut self) -> Result<(), String> {
        let mut at = self.noise.below(ACTS.iter().map(|(_, weight, _)| weight).sum());
        let drawn = ACTS.iter().find(|(_, weight, _)| {
            let found = at < *weight;
            at = at.saturating_sub(*weight);
            found
        });
        let &(name, _, act) = drawn.unwrap_or(&ACTS[0]);
        let (ground, tell, mut noise) = (self.ground.clone(), self.tell.clone(), Noise(self.noise.next()));
        let work = move || {
            let outcome = act(&ground, &mut noise);
            // Nobody hears it after the end.
            let _ = tell.send((name, outcome));
        };
        std::thread::Builder::new().spawn(work).map_err(|error| format!("a client's thread: {error}"))?;
        self.tally.acts += 1;
        self.at_work += 1;
        Ok(())
    }

    fn take(&mut self, name: &'static str, outcome: Result<String, String>) {
        self.at_work -= 1;
        let word = outcome.as_ref().map_or("wrong", String::as_str).to_string();
        *self.tally.outcomes.entry(name).or_default().entry(word).or_default() += 1;
        if let Err(wrong) = outcome {
            self.tally.wrong += 1;
            if self.tally.examples.len() < WRONG_KEPT {
                eprintln!("{name}: {wrong}");
                self.tally.examples.push(format!("{name}: {wrong}"));
            }
        }
    }

    /// Ends all clients that only rest, and waits for the others.
    pub(super) fn finish(mut self) -> Tally {
        self.ground.stop.store(true, Ordering::Relaxed);
        while self.at_work > 0
            && let Ok((name, outcome)) = self.told.recv()
        {
            self.take(name, outcome);
        }
        self.tally
    }
}
