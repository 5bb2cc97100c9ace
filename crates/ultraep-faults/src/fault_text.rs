//! Faults as text: `RANK:WHEN:NUMBER:WHAT`, as commands take and print them.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use ultraep_fabric::simulated::{Fault, FaultKind, Moment};
use ultraep_plan::{MAX_RANKS, Rank};

/// A [`Fault`] that is read and written as text: `1:before:12:killed`, `0:in-flight:3:hangs`, `2:turn:40:stalls=30s`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultText(pub Fault);

/// Text that is no fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not RANK:before|in-flight|turn:NUMBER:fails|panics|killed|hangs|stalls=SECONDSs")]
pub struct BadFault(pub String);

impl fmt::Display for FaultText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Fault { rank, moment, kind } = self.0;
        let (when, number) = match moment {
            Moment::Before(number) => ("before", number),
            Moment::InFlight(number) => ("in-flight", number),
            Moment::Turn(number) => ("turn", number),
            _ => ("other", 0),
        };
        write!(f, "{rank}:{when}:{number}:")?;
        match kind {
            FaultKind::Fails => f.write_str("fails"),
            FaultKind::Panics => f.write_str("panics"),
            FaultKind::Killed => f.write_str("killed"),
            FaultKind::Hangs => f.write_str("hangs"),
            FaultKind::Stalls(time) => write!(f, "stalls={}s", time.as_secs()),
            _ => f.write_str("other"),
        }
    }
}

impl FromStr for FaultText {
    type Err = BadFault;

    fn from_str(text: &str) -> Result<Self, BadFault> {
        parse(text).ok_or_else(|| BadFault(text.to_owned()))
    }
}

fn parse(text: &str) -> Option<FaultText> {
    let mut parts = text.split(':');
    let mut next = || parts.next();
    let (rank, when, number, what) = (next()?, next()?, next()?, next()?);
    if next().is_some() {
        return None;
    }
    let rank = rank.parse().ok().filter(|&rank: &usize| rank < MAX_RANKS)?;
    let number = number.parse().ok()?;
    let moment = match when {
        "before" => Moment::Before(number),
        "in-flight" => Moment::InFlight(number),
        "turn" => Moment::Turn(number),
        _ => return None,
    };
    let kind = match what {
        "fails" => FaultKind::Fails,
        "panics" => FaultKind::Panics,
        "killed" => FaultKind::Killed,
        "hangs" => FaultKind::Hangs,
        stalls => {
            let seconds = stalls.strip_prefix("stalls=")?.strip_suffix('s')?;
            FaultKind::Stalls(Duration::from_secs(seconds.parse().ok()?))
        }
    };
    Some(FaultText(Fault { rank: Rank::new(rank), moment, kind }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_read_back() {
        for text in
            ["1:before:12:killed", "0:in-flight:3:hangs", "2:turn:40:stalls=30s", "3:before:0:fails", "1:turn:9:panics"]
        {
            assert_eq!(text.parse::<FaultText>().map(|fault| fault.to_string()), Ok(text.to_owned()));
        }
        for text in
            ["", "1:before:12", "1:after:1:killed", "x:before:1:killed", "99999:turn:1:hangs", "1:turn:1:hangs:2"]
        {
            assert_eq!(text.parse::<FaultText>(), Err(BadFault(text.to_owned())));
        }
    }
}
