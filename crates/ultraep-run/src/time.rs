//! Points in time, as given by the caller: the library has no clock.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A second in UTC, between 1970 and 9999. Displayed, and in JSON, as `2026-11-24T14:39:16Z`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct UtcTime {
    unix_s: u64,
}

/// Not a time of this form.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no time like 2026-11-24T14:39:16Z")]
pub struct UtcTimeError(String);

const DAY_S: u64 = 86_400;
/// The last second of the year 9999.
const LAST_UNIX_S: u64 = 253_402_300_799;

impl UtcTime {
    /// From seconds since 1970; times past the year 9999 become its last second.
    pub fn from_unix_s(unix_s: u64) -> Self {
        Self { unix_s: unix_s.min(LAST_UNIX_S) }
    }

    /// Seconds since 1970.
    pub fn unix_s(self) -> u64 {
        self.unix_s
    }

    /// Name of the folder of a run started now: `2026-11-24T14-39-16Z`; sorts by time, valid on every file system.
    pub fn folder_name(self) -> String {
        self.to_string().replace(':', "-")
    }
}

impl fmt::Display for UtcTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (year, month, day) = date_of(self.unix_s / DAY_S);
        let s = self.unix_s % DAY_S;
        write!(f, "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", s / 3600, s / 60 % 60, s % 60)
    }
}

impl FromStr for UtcTime {
    type Err = UtcTimeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refused = || UtcTimeError(text.chars().take(40).collect());
        let bytes = text.as_bytes();
        let form = b"dddd-dd-ddTdd:dd:ddZ";
        let fits = |(&byte, &form): (&u8, &u8)| if form == b'd' { byte.is_ascii_digit() } else { byte == form };
        if bytes.len() != form.len() || !bytes.iter().zip(form).all(fits) {
            return Err(refused());
        }
        let number = |from: usize, to: usize| bytes[from..to].iter().fold(0, |n, b| 10 * n + u64::from(b - b'0'));
        let (hours, minutes, seconds) = (number(11, 13), number(14, 16), number(17, 19));
        let days = days_of(number(0, 4), number(5, 7), number(8, 10)).ok_or_else(refused)?;
        if hours > 23 || minutes > 59 || seconds > 59 {
            return Err(refused());
        }
        Ok(Self { unix_s: days * DAY_S + hours * 3600 + minutes * 60 + seconds })
    }
}

impl TryFrom<String> for UtcTime {
    type Error = UtcTimeError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<UtcTime> for String {
    fn from(time: UtcTime) -> Self {
        time.to_string()
    }
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

fn month_days(year: u64, month: u64) -> u64 {
    match month {
        2 => 28 + u64::from(is_leap(year)),
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Days from 1970-01-01 to the first of January of `year`.
fn days_before(year: u64) -> u64 {
    let leap_days = |year: u64| year / 4 - year / 100 + year / 400; // of the years up to `year`, from year 1
    (year - 1970) * 365 + leap_days(year - 1) - leap_days(1969)
}

/// Year, month and day of a day since 1970. At most 12 months and one year are stepped over.
fn date_of(days: u64) -> (u64, u64, u64) {
    let mut year = 1970 + days / 366; // never too late
    while days_before(year + 1) <= days {
        year += 1;
    }
    let mut left = days - days_before(year);
    let mut month = 1;
    while left >= month_days(year, month) {
        left -= month_days(year, month);
        month += 1;
    }
    (year, month, left + 1)
}

/// Days since 1970 of a date, `None` where there is no such date.
fn days_of(year: u64, month: u64, day: u64) -> Option<u64> {
    if year < 1970 || !(1..=12).contains(&month) || !(1..=month_days(year, month)).contains(&day) {
        return None;
    }
    Some(days_before(year) + (1..month).map(|m| month_days(year, m)).sum::<u64>() + day - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_times() {
        for (unix_s, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_251_199, "2024-02-29T23:59:59Z"),
            (1_795_531_156, "2026-11-24T14:39:16Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
            (LAST_UNIX_S, "9999-12-31T23:59:59Z"),
        ] {
            assert_eq!(UtcTime::from_unix_s(unix_s).to_string(), text);
            assert_eq!(text.parse(), Ok(UtcTime { unix_s }));
        }
        assert_eq!(UtcTime::from_unix_s(u64::MAX).unix_s(), LAST_UNIX_S);
        assert_eq!(UtcTime::from_unix_s(1_795_531_156).folder_name(), "2026-11-24T14-39-16Z");
    }

    #[test]
    fn every_day_of_four_centuries_follows_the_day_before() {
        let mut last = (1969, 12, 31);
        for day in 0..4 * 36_525 {
            let (year, month, of_month) = date_of(day);
            let expected = match last {
                (y, 12, 31) => (y + 1, 1, 1),
                (y, m, d) if d == month_days(y, m) => (y, m + 1, 1),
                (y, m, d) => (y, m, d + 1),
            };
            assert_eq!((year, month, of_month), expected);
            assert_eq!(days_of(year, month, of_month), Some(day));
            last = expected;
        }
    }

    #[test]
    fn what_is_no_time_is_refused() {
        for text in ["", "2026-11-24", "2026-11-24T14:39:16", "2026-02-29T00:00:00Z", "2026-13-01T00:00:00Z"] {
            assert!(text.parse::<UtcTime>().is_err(), "{text}");
        }
        for text in ["1969-12-31T00:00:00Z", "2026-01-01T24:00:00Z", "2026-01-01T00:60:00Z", "2026-00-01T00:00:00Z"] {
            assert!(text.parse::<UtcTime>().is_err(), "{text}");
        }
    }
}
