//! One pass over a recording: every microbatch to the scenarios, and to whoever else wants to see it.

use std::sync::atomic::Ordering;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use ultraep_import::{Leftover, Microbatch, Microbatches, OpenOptions};
use ultraep_replay::{Outcomes, Scenario, replay};

use super::recordings::{RecordingArgs, SourceArgs, grouping_error};
use crate::error::{CliError, note};
use crate::timing::now_ns;

/// Microbatches between two looks at the progress bar.
const SHOW_EVERY: u64 = 64;

/// What is passed over, and how.
pub(crate) struct Pass<'a> {
    pub(crate) recording: &'a RecordingArgs,
    pub(crate) sources: &'a SourceArgs,
    /// Threads that plan.
    pub(crate) threads: usize,
    pub(crate) bar: &'a ProgressBar,
}

/// What a pass gave.
pub(crate) struct Passed {
    /// One for each scenario.
    pub(crate) outcomes: Vec<Outcomes>,
    /// What a reader should know of the recording's end.
    pub(crate) notes: Vec<String>,
}

impl Pass<'_> {
    /// Plans all scenarios for every microbatch of `ranks` sources and `experts` experts; `see` is shown each as well.
    pub(crate) fn run(
        &self,
        (ranks, experts): (usize, usize),
        scenarios: &[Scenario],
        mut see: impl FnMut(&Microbatch) -> Result<(), CliError>,
    ) -> Result<Passed, CliError> {
        let (options, before) = (OpenOptions::default(), self.bar.position());
        let mut recording = self.recording.open(&options)?;
        let grouping = self.sources.grouping(ranks, experts);
        let mut microbatches = Microbatches::new(&mut *recording, grouping).map_err(grouping_error)?;
        let show = |microbatches_read: u64| {
            self.bar.set_position(before + options.bytes_read.load(Ordering::Relaxed));
            self.bar.set_message(format!("EP{ranks}, {} plans", microbatches_read * scenarios.len() as u64));
        };
        let (mut microbatches_read, mut refused) = (0_u64, None);
        let outcomes = replay(scenarios, self.threads, now_ns, |microbatch| {
            if microbatches_read.is_multiple_of(SHOW_EVERY) {
                show(microbatches_read);
            }
            microbatches_read += 1;
            if !microbatches.next(microbatch)? {
                return Ok(false);
            }
            refused = see(microbatch).err();
            Ok(refused.is_none())
        })?;
        if let Some(error) = refused {
            return Err(error);
        }
        show(microbatches_read);
        let leftover = leftover_note(microbatches.leftover());
        Ok(Passed { outcomes, notes: leftover.into_iter().chain(recording.ending()).collect() })
    }
}

fn leftover_note(leftover: Leftover) -> Option<String> {
    let Leftover { tokens, used_tokens } = leftover;
    (tokens > 0).then(|| {
        format!("{tokens} tokens at the ends of layers fill no microbatch and are left out; {used_tokens} are used")
    })
}

/// Shown on a terminal only.
pub(crate) fn progress_bar(bytes: u64) -> ProgressBar {
    let bar = ProgressBar::new(bytes);
    match ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} {msg} {eta}") {
        Ok(style) => bar.set_style(style),
        Err(error) => note(error),
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}
