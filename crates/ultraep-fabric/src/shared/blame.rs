//! Who is to blame when a wait has lasted too long: from what ranks have published about themselves.

use super::endpoint::{Awaited, Endpoint};
use super::segment::Segment;
use crate::FabricError;
use crate::failure::Failure;
use crate::operation::OperationKind;
use crate::sync::Ordering;
use core::time::Duration;
use ultraep_plan::Rank;

impl Endpoint {
    /// That someone is left who could still send a signal that is awaited, unless it has come.
    pub(super) fn check_signallers(&mut self, signal: usize, at_least: u64) -> Result<(), FabricError> {
        if self.segment.ranks().all(|rank| rank == self.rank || self.has_departed(rank))
            && let Some((rank, loss)) = self.segment.departed()
            && self.signal_value(signal) < at_least
        {
            return Err(self.fail(OperationKind::AwaitSignal, &Failure::Lost { rank, loss }));
        }
        Ok(())
    }

    /// That a rank whose tiles or credit are awaited has not gone without giving them; `ready` is what is waited for.
    pub(crate) fn check_sender(&mut self, peer: Rank, ready: &dyn Fn() -> bool) -> Result<(), FabricError> {
        let gone = (peer != self.rank).then(|| self.segment.control(peer).status.gone()).flatten();
        match gone {
            // What it did before it went is there by now.
            Some(gone) if !ready() => {
                Err(self.fail(OperationKind::Stream, &Failure::Lost { rank: peer, loss: gone.loss() }))
            }
            _ => Ok(()),
        }
    }

    fn has_departed(&self, rank: Rank) -> bool {
        !self.segment.control(rank).status.is_in_group()
    }

    fn activity(&self, rank: Rank) -> u32 {
        self.segment.control(rank).activity.load(Ordering::Relaxed)
    }

    /// Phases that a rank has entered.
    fn entered_by(&self, rank: Rank) -> u64 {
        self.segment.control(rank).entered.load(Ordering::Relaxed)
    }

    /// Who is missing after the timeout of a wait for a phase or a signal.
    pub(super) fn timed_out(&self, awaited: Awaited, waited: Duration) -> Failure {
        let others: Vec<Rank> = self.segment.ranks().filter(|&rank| rank != self.rank).collect();
        let blocked = |rank: &Rank| self.activity(*rank) != OperationKind::Compute as u32 || self.has_departed(*rank);
        let queueing = |rank: &Rank| self.activity(*rank) == OperationKind::CorePermit as u32;
        let mut missing = others.clone();
        if let Awaited::Phase(_) = awaited {
            missing.retain(|&rank| self.entered_by(rank) < self.entered);
            // Whoever is blocked for tiles of another one that is missing is late because of that one. Tiles flow one way.
            let late = missing.clone();
            missing.retain(|&rank| self.segment.awaited(rank).is_none_or(|peer| peer == rank || !late.contains(&peer)));
            // Whoever queues for a core is not the one who hangs, if there is anyone else.
            if !missing.iter().all(queueing) {
                missing.retain(|rank| !queueing(rank));
            }
        }
        if missing.is_empty() || matches!(awaited, Awaited::Signal { .. }) {
            // Anyone could send the signal (or, of those who have entered, be the one who ends the phase): whoever is not
            // blocked itself, if there is such a rank.
            missing = others;
            // Who waits in a phase that this rank has yet to enter does nothing before that.
            let waits_for_me = |rank: &Rank| blocked(rank) && self.entered_by(*rank) > self.entered;
            for excused in [&waits_for_me as &dyn Fn(&Rank) -> bool, &blocked] {
                if !missing.iter().all(excused) {
                    missing.retain(|rank| !excused(rank));
                }
            }
        }
        if missing.is_empty() {
            missing.push(self.rank);
        }
        self.segment.late(missing, awaited.kind(), waited)
    }

    /// Who is missing after the timeout of a wait for tiles of `peer`: that rank, or whose tiles it waits for itself, and so on.
    /// A rank that has entered more phases than this one has sent all its tiles: nobody is late because of it.
    pub(super) fn tiles_timed_out(&self, peer: Rank, waited: Duration) -> Failure {
        let mut missing = peer;
        for _ in self.segment.ranks() {
            match self.segment.awaited(missing) {
                Some(next) if next != missing && self.entered_by(next) <= self.entered => missing = next,
                _ => break,
            }
        }
        self.segment.late(vec![missing], OperationKind::Stream, waited)
    }
}

impl Segment {
    /// What a wait that has lasted too long ends with: ranks whose processes are suspended are to blame for it, whoever is missing
    /// besides.
    pub(crate) fn late(&self, missing: Vec<Rank>, operation: OperationKind, waited: Duration) -> Failure {
        let suspended = |rank: &Rank| is_stopped(self.control(*rank).process.load(Ordering::Relaxed));
        let stopped: Vec<Rank> = self.ranks().filter(suspended).collect();
        match stopped.is_empty() {
            true => Failure::Timeout { missing, operation, waited },
            false => Failure::Suspended { ranks: stopped, operation, waited },
        }
    }
}

/// Whether the process of this number was stopped by a signal: state T (or t, by a debugger) in `/proc/PID/stat`, which comes
/// after the name in brackets (proc_pid_stat(5)). 0 is none.
fn is_stopped(process: u32) -> bool {
    let stat = if process == 0 { None } else { std::fs::read(format!("/proc/{process}/stat")).ok() };
    let state = stat.and_then(|stat| {
        let end = stat.iter().rposition(|&byte| byte == b')')?;
        stat.get(end + 2).copied()
    });
    matches!(state, Some(b'T' | b't'))
}
