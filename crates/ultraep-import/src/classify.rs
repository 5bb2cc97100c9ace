//! What the numbers of an array are, told by content: counts, experts of tokens, a routing map, or a placement map.
//!
//! A row of expert ids never names an expert twice, and its numbers are small; a row of counts cares for neither. Under the
//! assumption that the numbers are counts, spread evenly up to the largest `m`, a row of `C` numbers has about
//! `C (C - 1) / 2 / (m + 1)` equal pairs. The sum over all rows is what is *expected*; when none is there, the chance that the
//! numbers are counts is about `exp(-expected)`:
//!
//! | expected | rows of | taken as |
//! |---|---|---|
//! | [`SURE`] and more | up to [`MAX_TOP_K`] | ids, with a note |
//! | [`DOUBT`] and more, or more rows than columns of small numbers | up to [`DOUBT_TOP_K`] | refused: `--as` decides |
//! | less | any | counts |
//!
//! Names of arrays that say what they are go before. [`crate::Reading`] goes before everything.

use crate::array::Kind;
use crate::{Problem, Reading};

/// Equal pairs expected of counts that make their absence a proof: a chance of 2e-9.
const SURE: f64 = 20.0;
/// Equal pairs expected of counts that make their absence suspicious: a chance of 5%.
const DOUBT: f64 = 3.0;
/// Most choices of a token that are believed without a word of the user.
const MAX_TOP_K: usize = 32;
/// Most choices of a token that cast doubt on counts.
const DOUBT_TOP_K: usize = 12;
/// Experts that few models exceed.
const LIKELY_EXPERTS: i32 = 512;
/// Fewest experts of a placement map that is recognised.
const MIN_PLACED: i32 = 8;

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) reading: Reading,
    /// Whether content alone says so, which the user should know.
    pub(crate) by_content: bool,
}

/// An array to be told.
pub(crate) struct Sample<'a> {
    pub(crate) name: Option<&'a str>,
    pub(crate) shape: &'a [u64],
    pub(crate) kind: Kind,
    /// Its first numbers.
    pub(crate) values: &'a [i32],
}

/// Finds out what an array is, or refuses it with the option that decides.
pub(crate) fn find(sample: &Sample<'_>, asked: Option<Reading>) -> Result<Found, Problem> {
    let told = |reading| Ok(Found { reading, by_content: false });
    if let Some(asked) = asked {
        return told(asked);
    }
    if let Some(name) = sample.name {
        if is_placement_name(name) {
            return Err(Problem::Placement(name.to_owned()));
        }
        if let Some(reading) = of_name(name) {
            return told(reading);
        }
    }
    let shape = sample.shape;
    if shape.contains(&0) {
        return told(Reading::Counts);
    }
    let rows = Rows::of(sample);
    if sample.kind == Kind::Bools || rows.is_map {
        return Err(Problem::Ambiguous(format!(
            "{shape:?} of 0 and 1: a routing map of tokens and experts is read with --as map, counts with --as counts"
        )));
    }
    if rows.is_placement {
        return Err(Problem::Placement(format!(
            "every row holds all of 0 to {}; counts are read with --as counts",
            rows.most
        )));
    }
    let Some(per_token) = shape.last().map(|&k| usize::try_from(k).unwrap_or(usize::MAX)) else {
        return told(Reading::Counts);
    };
    let has_id_shape = matches!(shape.len(), 2 | 3);
    if has_id_shape
        && rows.no_pairs
        && (rows.expected >= SURE || rows.has_fill && rows.expected >= DOUBT)
        && per_token <= MAX_TOP_K
        && per_token > 1
    {
        return Ok(Found { reading: Reading::Ids, by_content: true });
    }
    let more_rows = shape.len() == 2 && shape[0] > shape[1] && rows.most < LIKELY_EXPERTS;
    let doubtful = rows.no_pairs && per_token <= DOUBT_TOP_K && (rows.expected >= DOUBT || more_rows);
    let one_column = per_token == 1 && shape.iter().product::<u64>() > 1;
    if doubtful || one_column {
        let sources = shape.get(shape.len().wrapping_sub(2)).copied().unwrap_or(0);
        return Err(Problem::Ambiguous(format!(
            "{shape:?} may be the experts of tokens (top-{per_token}) or the counts of {sources} ranks for {per_token} experts: \
             say which with --as ids or --as counts"
        )));
    }
    told(Reading::Counts)
}

/// Names under which frameworks save arrays.
fn of_name(name: &str) -> Option<Reading> {
    match name {
        "loads" | "counts" | "logical_count" | "expert_counts" | "tokens_per_expert" => Some(Reading::Counts),
        "routed_experts" | "topk_ids" | "topk_idx" | "topk_indices" | "top_indices" | "selected_experts" => {
            Some(Reading::Ids)
        }
        "routing_map" => Some(Reading::Map),
        _ => None,
    }
}

/// Names under which placements of experts are saved.
pub(crate) fn is_placement_name(name: &str) -> bool {
    matches!(
        name,
        "physical_to_logical_map"
            | "logical_to_physical_map"
            | "logical_to_all_physical_map"
            | "physical_to_logical"
            | "phy2log"
            | "log2phy"
            | "expert_map"
            | "initial_global_assignments"
            | "device_list"
            | "moe_layer_count"
    )
}

/// Names that say what an array is, best first.
pub(crate) fn known_names() -> [&'static str; 5] {
    ["loads", "routed_experts", "topk_ids", "routing_map", "logical_count"]
}

/// What rows of numbers look like.
struct Rows {
    most: i32,
    /// No row has a number twice, and all could be experts.
    no_pairs: bool,
    has_fill: bool,
    expected: f64,
    is_map: bool,
    is_placement: bool,
}

impl Rows {
    fn of(sample: &Sample<'_>) -> Self {
        let columns = sample.shape.last().map_or(1, |&c| usize::try_from(c).unwrap_or(usize::MAX)).max(1);
        let most = sample.values.iter().copied().max().unwrap_or(0);
        let mut rows = Self { most, no_pairs: true, has_fill: false, expected: 0.0, is_map: true, is_placement: true };
        rows.no_pairs = (0..ultraep_plan::MAX_EXPERTS as i32).contains(&most);
        rows.is_placement = most >= MIN_PLACED - 1 && columns > most as usize && columns <= 8 * (most as usize + 1);
        let (mut first_sum, mut count, mut seen) = (None, 0_u64, Vec::new());
        for row in sample.values.chunks_exact(columns) {
            count += 1;
            let sum: i64 = row.iter().map(|&v| i64::from(v)).sum();
            rows.is_map &= row.iter().all(|v| (0..=1).contains(v)) && *first_sum.get_or_insert(sum) == sum;
            seen.clear();
            seen.extend(row.iter().copied().filter(|&v| v >= 0));
            rows.has_fill |= seen.len() < row.len();
            seen.sort_unstable();
            if rows.is_placement {
                let different = 1 + seen.windows(2).filter(|pair| pair[0] != pair[1]).count();
                rows.is_placement = different == most as usize + 1;
            }
            // A row of one number only is fill.
            if seen.first() != seen.last() || columns == 1 {
                rows.no_pairs &= seen.windows(2).all(|pair| pair[0] != pair[1]);
                let pairs = (seen.len() * seen.len().saturating_sub(1) / 2) as f64;
                rows.expected += pairs / (f64::from(most.max(0)) + 1.0);
            }
        }
        rows.is_map &= count > 1 && first_sum.is_some_and(|sum| sum > 0 && sum < columns as i64);
        rows.is_placement &= count > 0;
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(shape: &[u64], values: &[i32]) -> Result<Reading, Problem> {
        find(&Sample { name: None, shape, kind: Kind::Integers, values }, None).map(|found| found.reading)
    }

    /// Numbers that look random and are the same every time.
    fn random(count: usize, below: u64) -> Vec<i32> {
        let mut state = 7_u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) % below
        };
        (0..count).map(|_| next() as i32).collect()
    }

    fn ids(tokens: usize, top_k: usize, experts: u64) -> Vec<i32> {
        let stream = random(tokens * top_k * 8, experts);
        let mut rows = Vec::new();
        let mut at = stream.iter();
        for _ in 0..tokens {
            let mut row: Vec<i32> = Vec::new();
            while row.len() < top_k {
                let Some(&id) = at.next() else { panic!("too few numbers") };
                if !row.contains(&id) {
                    row.push(id);
                }
            }
            rows.extend(row);
        }
        rows
    }

    #[test]
    fn ids_and_counts_are_told_apart() {
        assert_eq!(of(&[256, 4], &ids(256, 4, 16)), Ok(Reading::Ids));
        assert_eq!(of(&[511, 4, 8], &ids(511 * 4, 8, 64)), Ok(Reading::Ids));
        assert_eq!(of(&[8, 64], &random(512, 4000)), Ok(Reading::Counts));
        assert_eq!(of(&[4, 16], &random(64, 5000)), Ok(Reading::Counts));
        assert_eq!(of(&[24, 8, 64], &random(24 * 512, 900)), Ok(Reading::Counts));
        let counting: Vec<i32> = (0..8 * 32).collect();
        assert_eq!(of(&[8, 32], &counting), Ok(Reading::Counts));
        assert_eq!(of(&[8, 8], &[512; 64]), Ok(Reading::Counts));
        assert!(matches!(of(&[20, 8], &ids(20, 8, 256)), Err(Problem::Ambiguous(_))));
        assert!(matches!(of(&[6, 2], &ids(6, 2, 64)), Err(Problem::Ambiguous(_))));
        assert!(matches!(of(&[9, 1], &random(9, 64)), Err(Problem::Ambiguous(_))));
    }

    #[test]
    fn maps_are_recognised() {
        let routing: Vec<i32> = (0..32).flat_map(|t| (0..8).map(move |e| i32::from((e + t) % 4 == 0))).collect();
        assert!(matches!(of(&[32, 8], &routing), Err(Problem::Ambiguous(_))));
        let placement: Vec<i32> = (0..3).flat_map(|l| (0..20).map(move |p| (p * 3 + l) % 16)).collect();
        assert!(matches!(of(&[3, 20], &placement), Err(Problem::Placement(_))));
        let one_hot: Vec<i32> = (0..8).flat_map(|_| (0..64).map(|e| if e == 0 { 4096 } else { 0 })).collect();
        assert_eq!(of(&[8, 64], &one_hot), Ok(Reading::Counts));
    }
}
