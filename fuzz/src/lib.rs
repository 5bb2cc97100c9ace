//! What the fuzz targets share: problems made from arbitrary bytes, by way of the public constructors.

#![forbid(unsafe_code)]

use arbitrary::{Arbitrary, Result, Unstructured};
use ultraep_plan::{MAX_TOKENS, Topology, TopologySpec};

/// A group and counts that its constructors accept.
#[derive(Debug)]
pub struct Case {
    /// The group: up to 16 ranks and 48 experts, domains, slots and speeds of all kinds.
    pub topology: Topology,
    /// `[N, E]`, from no token at all to as many as a problem may hold.
    pub counts: Vec<u32>,
}

impl<'a> Arbitrary<'a> for Case {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let domain_ranks = u.int_in_range(1..=8_usize)?;
        let ranks = domain_ranks * u.int_in_range(1..=16 / domain_ranks)?;
        let experts = u.int_in_range(ranks..=48)?;
        let spec = TopologySpec { ranks, experts, domain_ranks, slots_per_rank: u.int_in_range(0..=4)? };
        let mut topology = Topology::new(spec).map_err(|_| arbitrary::Error::IncorrectFormat)?;
        if u.ratio(1, 4)? {
            let slots = list(u, ranks, 4)?;
            topology = topology.with_slots(&slots).map_err(|_| arbitrary::Error::IncorrectFormat)?;
        }
        if u.ratio(1, 4)? {
            let speeds: Vec<u32> = list(u, ranks, 4)?.into_iter().map(|s| s as u32 * 256).collect();
            topology = topology.with_speeds(&speeds).map_err(|_| arbitrary::Error::IncorrectFormat)?;
        }
        let largest = 1_u32 << u.int_in_range(0..=30)?;
        let mut left = MAX_TOKENS;
        let mut counts = Vec::with_capacity(ranks * experts);
        for _ in 0..ranks * experts {
            // Most counts small, some as large as allowed.
            let count = match u.arbitrary::<u8>()? {
                0..=63 => 0,
                64..=223 => u.int_in_range(0..=largest.min(4096))?,
                _ => u.int_in_range(0..=largest)?,
            };
            let count = count.min(left);
            left -= count;
            counts.push(count);
        }
        Ok(Self { topology, counts })
    }
}

fn list(u: &mut Unstructured<'_>, length: usize, most: usize) -> Result<Vec<usize>> {
    (0..length).map(|_| u.int_in_range(0..=most)).collect()
}

/// Writes `bytes` to a file of that name, opens it as a recording and makes microbatches of it to its end; they must be
/// within the planner's limits.
pub fn read_recording(name: &std::path::Path, bytes: &[u8]) {
    read_recording_with(name, bytes, &ultraep_import::OpenOptions::default());
}

/// As [`read_recording`], with options.
pub fn read_recording_with(name: &std::path::Path, bytes: &[u8], options: &ultraep_import::OpenOptions) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).expect("written");
    let Ok(mut recording) = ultraep_import::open_with(&[path], options) else { return };
    let experts = recording.info().experts.unwrap_or(64);
    let grouping = ultraep_import::Grouping {
        ranks: 8,
        experts,
        microbatch_tokens: 16,
        rule: ultraep_import::SourceRule::Blocks,
        scale: 1,
    };
    let Ok(mut microbatches) = ultraep_import::Microbatches::new(&mut *recording, grouping) else { return };
    let mut microbatch = ultraep_import::Microbatch::default();
    while let Ok(true) = microbatches.next(&mut microbatch) {
        assert_eq!(microbatch.counts.len(), 8 * experts);
        let total: u64 = microbatch.counts.iter().map(|&count| u64::from(count)).sum();
        assert!(total <= u64::from(MAX_TOKENS));
    }
}
