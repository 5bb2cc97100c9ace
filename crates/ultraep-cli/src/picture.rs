//! A small bar picture of rank loads.

/// Columns that a picture may take.
const MAX_COLUMNS: usize = 64;
/// Lines of a picture.
const LINES: usize = 4;
const EIGHTHS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// Bars of `loads` on a scale that ends at `full`, top line first. With many ranks a column stands for several and shows
/// the fullest of them.
pub(crate) fn bars(loads: &[u32], full: u32) -> Vec<String> {
    let eighths = |load: u32| (u64::from(load) * (LINES * 8) as u64).div_ceil(u64::from(full.max(1))) as usize;
    let heights: Vec<usize> = loads.chunks(ranks_per_column(loads.len())).map(column(eighths)).collect();
    let line = |below: usize| heights.iter().map(|h| EIGHTHS[h.saturating_sub(below * 8).min(8)]).collect();
    (0..LINES).rev().map(line).collect()
}

/// Ranks that one column stands for.
pub(crate) fn ranks_per_column(ranks: usize) -> usize {
    ranks.div_ceil(MAX_COLUMNS).max(1)
}

fn column(eighths: impl Fn(u32) -> usize) -> impl Fn(&[u32]) -> usize {
    move |loads| eighths(loads.iter().copied().max().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_and_empty_and_half() {
        let lines = bars(&[32, 0, 16, 1], 32);
        assert_eq!(lines, ["█   ", "█   ", "█ █ ", "█ █▁"]);
    }

    #[test]
    fn many_ranks_share_columns_and_the_fullest_shows() {
        let mut loads = [0; 1024];
        loads[17] = 8;
        let lines = bars(&loads, 8);
        assert_eq!(ranks_per_column(1024), 16);
        assert_eq!(lines[0].chars().count(), 64);
        assert_eq!(lines[0].chars().position(|c| c == '█'), Some(1));
    }

    #[test]
    fn no_tokens_no_bars() {
        assert_eq!(bars(&[0, 0], 0), ["  "; LINES]);
    }
}
