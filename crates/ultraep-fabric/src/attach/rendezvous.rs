//! Where the processes of a job find each other, from the variables that launchers set.

use super::store::{StoreError, StoreServer, TcpStore};
use core::time::Duration;
use ultraep_plan::{MAX_RANKS, Rank};

/// Port of the store when `ULTRAEP_PORT` says nothing. `MASTER_PORT` is PyTorch's: its own store listens there.
pub const DEFAULT_PORT: u16 = 29_471;

/// A process's place in its job, and where the job's store is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendezvous {
    /// This process's number in the job (`RANK`).
    pub rank: Rank,
    /// Processes of the job (`WORLD_SIZE`).
    pub size: usize,
    /// This process's number on its host (`LOCAL_RANK`), if that is known.
    pub local_rank: Option<usize>,
    /// Host of the store, that of rank 0 (`MASTER_ADDR`; this host when it is not set).
    pub host: String,
    /// Port of the store (`ULTRAEP_PORT`, or [`DEFAULT_PORT`]).
    pub port: u16,
    /// How often the job was started again (`TORCHELASTIC_RESTART_COUNT`): part of every key, so that ranks never find what an
    /// earlier start left.
    pub restart: u64,
}

/// Why the variables make no rendezvous.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RendezvousError {
    /// A variable that must be set is not.
    #[error(
        "{variable} is not set: the launcher of the processes sets it (torchrun, mpirun through its -x, or by hand)"
    )]
    Missing {
        /// Its name.
        variable: &'static str,
    },
    /// A variable that is no number of its range.
    #[error("{variable} is `{value}`: a whole number from {least} to {most} is needed")]
    Invalid {
        /// Its name.
        variable: &'static str,
        /// What it is.
        value: String,
        /// The smallest allowed value.
        least: u64,
        /// The largest allowed value.
        most: u64,
    },
    /// The store cannot be had.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Rendezvous {
    /// From variables as `lookup` gives them: for a program `|name| std::env::var(name).ok()`. Libraries read no environment.
    ///
    /// # Errors
    /// [`RendezvousError`]: which variable is missing or wrong, and what is allowed.
    pub fn from_env(lookup: impl Fn(&str) -> Option<String>) -> Result<Self, RendezvousError> {
        let number = |variable: &'static str, least: u64, most: u64| {
            let Some(value) = lookup(variable) else { return Ok(None) };
            match value.trim().parse().ok().filter(|number| (least..=most).contains(number)) {
                Some(number) => Ok(Some(number)),
                None => Err(RendezvousError::Invalid { variable, value, least, most }),
            }
        };
        let needed =
            |variable, least, most| number(variable, least, most)?.ok_or(RendezvousError::Missing { variable });
        let size = needed("WORLD_SIZE", 1, MAX_RANKS as u64)?;
        let rank = needed("RANK", 0, size - 1)?;
        let local_rank = number("LOCAL_RANK", 0, size - 1)?;
        let port = number("ULTRAEP_PORT", 1, u16::MAX.into())?.unwrap_or(DEFAULT_PORT.into());
        Ok(Self {
            rank: Rank::new(rank as usize),
            size: size as usize,
            local_rank: local_rank.map(|rank| rank as usize),
            host: lookup("MASTER_ADDR").filter(|host| !host.is_empty()).unwrap_or_else(|| "127.0.0.1".to_owned()),
            port: port as u16,
            restart: number("TORCHELASTIC_RESTART_COUNT", 0, u64::MAX)?.unwrap_or(0),
        })
    }

    /// The store: rank 0 serves it, all connect. The server must live until all groups are attached: keep it beside them.
    ///
    /// # Errors
    /// [`RendezvousError::Store`].
    pub fn store(&self, timeout: Duration) -> Result<(Option<StoreServer>, TcpStore), RendezvousError> {
        let address = format!("{}:{}", self.host, self.port);
        let server = if self.rank.index() == 0 { Some(StoreServer::bind(&address)?) } else { None };
        Ok((server, TcpStore::connect(&address, &self.restart.to_string(), timeout)?))
    }
}
