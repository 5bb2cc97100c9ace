//! `run.json`: what the run is and how it stands.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{ProfileSummary, UtcTime};

/// Name and version of the run folder, `schema` of `run.json`.
pub const RUN_SCHEMA: &str = "ultraep.run/1";

/// What `run.json` holds. Within version 1 fields may be added; readers ignore what they do not know.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunInfo {
    /// [`RUN_SCHEMA`].
    pub schema: String,
    /// How the run stands.
    pub status: RunStatus,
    /// When it was started.
    pub started: UtcTime,
    /// When it ended, in whatever way.
    #[serde(default)]
    pub ended: Option<UtcTime>,
    /// Steps from which it was taken up again, in order; empty for a run in one piece.
    #[serde(default)]
    pub resumed_from_steps: Vec<u64>,
    /// How it was taken up, in order: one entry for each of `resumed_from_steps`, or for the other run that it goes on from.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub continued: Vec<Continuation>,
    /// The command line that began it, program first.
    pub command: Vec<String>,
    /// Every setting of the run with its value, defaults included; the program that wrote it knows the fields. Of a run that
    /// was taken up, as it was the last time.
    pub config: serde_json::Map<String, serde_json::Value>,
    /// Versions: the program, the compiler, the format of the trace.
    pub versions: BTreeMap<String, String>,
    /// What text was used, where any was.
    #[serde(default)]
    pub corpus: Option<CorpusSummary>,
    /// What was recorded into `loads.uet` and what was dropped, at the end of the run (of its last part, where it was resumed).
    #[serde(default)]
    pub profile: Option<ProfileSummary>,
}

impl RunInfo {
    /// A run that starts now, with nothing filled in but that.
    pub fn starting(started: UtcTime) -> Self {
        Self {
            schema: RUN_SCHEMA.to_string(),
            status: RunStatus::Running,
            started,
            ended: None,
            resumed_from_steps: Vec::new(),
            continued: Vec::new(),
            command: Vec::new(),
            config: serde_json::Map::new(),
            versions: BTreeMap::new(),
            corpus: None,
            profile: None,
        }
    }
}

/// A run goes on from a checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Continuation {
    /// Steps that were trained by then.
    pub step: u64,
    /// The checkpoint, where it is one of another run; none where the run went on in its own folder.
    #[serde(default)]
    pub from: Option<String>,
    /// The command line, program first.
    pub command: Vec<String>,
    /// Settings that are not what they were before.
    #[serde(default)]
    pub changed: Vec<SettingChange>,
}

/// A setting that changed when a run was taken up.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SettingChange {
    /// Its field in [`RunInfo::config`].
    pub name: String,
    /// Its value in the checkpoint.
    pub before: serde_json::Value,
    /// Its value from then on.
    pub after: serde_json::Value,
}

/// `ranks 8 -> 16`; texts without quotation marks.
impl fmt::Display for SettingChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = |value: &serde_json::Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        write!(f, "{} {} -> {}", self.name, words(&self.before), words(&self.after))
    }
}

/// How a run stands: `{"state": "failed", "reason": "..."}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
#[non_exhaustive]
pub enum RunStatus {
    /// At work, or gone without a word (killed, power cut): [`crate::RunReader::is_being_written`] tells which.
    Running,
    /// Came to its end.
    Finished,
    /// Ended early because it was asked to; a checkpoint was saved if one is there.
    Interrupted {
        /// By what.
        reason: String,
    },
    /// Ended with an error.
    Failed {
        /// The error, as shown.
        reason: String,
    },
}

/// Text of a run, in figures.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CorpusSummary {
    /// Digest of the text: a run that resumes must find the same.
    pub digest: Digest,
    /// The domains, in order.
    pub domains: Vec<DomainSummary>,
}

/// One domain of the text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainSummary {
    /// Its name.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// Files it was taken from.
    pub file_count: u64,
    /// Where it came from, in words.
    pub origin: String,
}

/// A 64-bit digest; in JSON 16 hexadecimal digits, because JSON numbers are not exact at that size everywhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(pub u64);

/// Not 16 hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a digest has 16 hexadecimal digits")]
pub struct DigestError;

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let is_hex = text.len() == 16 && text.bytes().all(|b| b.is_ascii_hexdigit());
        u64::from_str_radix(text, 16).ok().filter(|_| is_hex).map(Self).ok_or(DigestError)
    }
}

impl TryFrom<String> for Digest {
    type Error = DigestError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}
