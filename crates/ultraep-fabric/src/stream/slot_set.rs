//! A rank's slots as they live: filled by a weight sync, or emptied by a grad reduce, again and again.
//!
//! ```text
//! start   (epoch += 1)  lower the flags of the own slots in the plan; give credit: peers may touch them
//! workers of a peer     wait for the credit, move tiles, raise flags
//! join                  wait for the flags: weights have come; gradients are added and zeroed
//! views                 from join until the next start
//! ```
//!
//! No collective, no barrier: a rank waits for those only whose tiles or credit it needs. Weights and gradients have the same
//! protocol, since a weight sync asks who may be written and a grad reduce who may be read, and both end with a flag.
//!
//! Every rank of the group starts the same pieces of work in the same order; that numbers them.
//!
//! # No deadlock
//! A rank gives its credit for epoch n when it starts n, for which it must have joined n - 1 and moved its tiles of n - 1. Those
//! wait for credits of epoch n - 1 and tiles of epoch n - 1 alone, so by induction on epochs (and within one by the order of
//! tiles, see `schedule.rs`) nobody waits in a circle, as long as ranks reach their starts: between them a rank may wait for
//! others in collectives that these reach before they start what comes later.
//!
//! On a fabric without direct access the same interface stands on put and get between `Open` and `Close` (`portable.rs`).

#[cfg(test)]
mod tests;

use super::engine::{EngineSpec, TileEngine};
use super::job::{self, GradReduce, Job, Moved, WeightSync};
use super::portable::Portable;
use super::reach::{Direct, Reach};
use super::slots::Slots;
use crate::backend::{Hold, Use};
use crate::sync::{AtomicU32, Ordering};
use crate::{AccessError, Fabric, FabricError, Operation, OperationKind, Pod, Region};
use core::ptr::NonNull;
use std::sync::Arc;
use ultraep_plan::{Rank, Topology};

/// One rank's slots in one window, and the engine that moves tiles to and from them. One piece of work at a time: start, something
/// else, join.
///
/// With background workers a piece of work goes on by itself, relays included, whatever the rank does meanwhile, even if it never
/// joins. Without, tiles are moved in [`SlotSet::join`] and [`SlotSet::drain`] alone.
pub struct SlotSet {
    slots: Slots,
    rank: Rank,
    engine: TileEngine,
    way: Way,
    state: State,
    /// What the work in flight brings to this rank's slots, or takes from them.
    expected: Vec<Expected>,
    /// Ranks at the other end of it.
    involved: Vec<Rank>,
    stamp: u64,
}

/// How peers get at the slots.
enum Way {
    /// By loads and stores, as credits say.
    Direct { reach: Arc<Reach>, epoch: u64, start: NonNull<u8> },
    /// By put and get, in epochs of the whole group. The own part is held between them.
    Messages { part: Region, held: Option<Hold>, portable: Portable },
}

// SAFETY: the address is that of the own part, which the reach keeps mapped, and is used as `bytes` says.
unsafe impl Send for Way {}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// No peer touches the own slots.
    Joined,
    InFlight,
}

/// A stripe of a slot whose flags will rise.
#[derive(Clone, Copy)]
struct Expected {
    slot: usize,
    stripe: usize,
    stripes: usize,
    /// Who raises them.
    from: Rank,
}

impl SlotSet {
    /// Takes the own part of the window of `slots` for good (see [`Direct::claim`]), and starts the engine's threads.
    ///
    /// # Errors
    /// [`FabricError::OutOfRange`] when there is no such window in host memory, or it has fewer bytes than
    /// [`Slots::window_bytes`]; [`FabricError::Access`] when it is in use; [`FabricError::Os`] when a thread cannot be started.
    pub fn new(fabric: &mut dyn Fabric, slots: Slots, spec: EngineSpec) -> Result<Self, FabricError> {
        let (rank, window, operation) = (fabric.rank(), slots.window(), OperationKind::Stream);
        let part = fabric.window(window);
        let (has, needed) = (part.as_ref().map_or(0, Region::bytes), slots.window_bytes().unwrap_or(usize::MAX));
        let Some(part) = part.filter(|_| needed <= has) else {
            let what = "bytes of the slots' window (allowed is what it has)";
            return Err(FabricError::OutOfRange { operation, rank, what, asked: needed, limit: has });
        };
        let way = match fabric.direct() {
            Some(direct) => {
                let reach = direct.claim(window)?;
                let start = reach.place(rank, 0, needed)?;
                let epoch = reach.credit(rank).map_or(0, super::reach::Credit::epoch);
                Way::Direct { reach: Arc::new(reach), epoch, start }
            }
            None => {
                let held =
                    Some(Hold::take(&part, Use::Write).map_err(|source| refused(rank, "window of the slots", source))?);
                Way::Messages { part, held, portable: Portable::default() }
            }
        };
        let engine = TileEngine::new(spec)?;
        let (expected, involved) = (Vec::with_capacity(spec.tasks), Vec::with_capacity(spec.tasks));
        Ok(Self { slots, rank, engine, way, state: State::Joined, expected, involved, stamp: 0 })
    }

    /// How the window is divided.
    #[must_use]
    pub fn slots(&self) -> &Slots {
        &self.slots
    }

    /// Starts a weight sync, with at most `workers` background workers, and says what this rank moves: masters of other ranks
    /// come into its slots, its own go to theirs, and it relays what the plan says. What is in flight is joined first, and this
    /// rank's reads of its slots are over: peers may write them from now on. `stamp` is a logical time, see [`SlotSet::join`].
    ///
    /// # Errors
    /// [`FabricError::OutOfRange`] when the plan does not fit the slots, [`FabricError::Access`] when masters are in use (nothing is
    /// moved then, and this rank is out of step with the others); the group's failure; as for [`SlotSet::join`].
    pub fn sync(
        &mut self,
        fabric: &mut dyn Fabric,
        sync: &WeightSync<'_>,
        workers: usize,
        stamp: u64,
    ) -> Result<Moved, FabricError> {
        self.settle(fabric)?;
        self.expected.clear();
        self.involved.clear();
        for task in sync.plan.received_by(self.rank) {
            let slot = job::slot_of(&self.slots, sync.topology, self.rank, task.transfer.physical)?;
            let (stripe, stripes) = (task.stripe.index as usize, sync.plan.stripes().max(1) as usize);
            self.expect(Expected { slot, stripe, stripes, from: task.transfer.from });
        }
        let tasks = sync.plan.streams(self.rank).flatten();
        self.involved.extend(tasks.map(|task| task.transfer.to));
        let streaming_from = self.engine.spec().streaming_from_bytes;
        self.start(
            fabric,
            (workers, stamp),
            |job, slots, reach, epoch| job.sync(slots, sync, reach, epoch, streaming_from),
            |fabric, slots, portable| portable.sync(fabric, slots, sync),
        )
    }

    /// Starts a grad reduce, with at most `workers` background workers, and says what this rank moves: replicas' gradients are added
    /// to their masters', master first and then replica by replica in the plan's order, and the slots are zeroed. What is in
    /// flight is joined first, and this rank's writes to its slots are over. `stamp` is a logical time, see [`SlotSet::join`].
    ///
    /// # Errors
    /// As for [`SlotSet::sync`]; [`FabricError::Access`] when gradients are not all `f32`.
    pub fn reduce(
        &mut self,
        fabric: &mut dyn Fabric,
        reduce: &GradReduce<'_>,
        workers: usize,
        stamp: u64,
    ) -> Result<Moved, FabricError> {
        let ragged = AccessError::Ragged { bytes: self.slots.layout().bytes(), size: size_of::<f32>() };
        let not_f32 = |_| refused(self.rank, "gradients that are not all f32", ragged);
        self.slots.layout().check_gradients().map_err(not_f32)?;
        self.settle(fabric)?;
        self.expected.clear();
        self.involved.clear();
        for transfer in reduce.transfers.received_by(self.rank) {
            let slot = job::slot_of(&self.slots, reduce.topology, self.rank, transfer.physical)?;
            self.expect(Expected { slot, stripe: 0, stripes: 1, from: transfer.from });
        }
        let replicas = reduce.transfers.all().iter().filter(|transfer| transfer.from == self.rank);
        self.involved.extend(replicas.map(|transfer| transfer.to));
        self.start(
            fabric,
            (workers, stamp),
            |job, slots, reach, epoch| job.reduce(slots, reduce, reach, epoch),
            |fabric, slots, portable| portable.reduce(fabric, slots, reduce),
        )
    }

    /// Starts what `direct` makes a job of, or, without direct access, what `messages` does at once.
    fn start(
        &mut self,
        fabric: &mut dyn Fabric,
        (workers, stamp): (usize, u64),
        direct: impl FnOnce(&mut Job, &Slots, &Arc<Reach>, u64) -> Result<Moved, FabricError>,
        messages: impl FnOnce(&mut dyn Fabric, &Slots, &mut Portable) -> Result<Moved, FabricError>,
    ) -> Result<Moved, FabricError> {
        let slots = &self.slots;
        match &mut self.way {
            Way::Direct { reach, epoch, .. } => {
                direct_access(fabric, self.rank)?.check()?;
                let next = *epoch + 1;
                let moved = self.engine.prepare(self.rank, |job| direct(job, slots, reach, next))?;
                *epoch = next;
                self.let_peers_in(stamp)?;
                self.engine.go(workers);
                Ok(moved)
            }
            Way::Messages { held, portable, .. } => {
                *held = None;
                self.state = State::InFlight;
                self.stamp = fabric.run_stamped(Operation::Open { window: slots.window() }, stamp)?.stamp;
                messages(fabric, slots, portable)
            }
        }
    }

    fn expect(&mut self, expected: Expected) {
        self.expected.push(expected);
        self.involved.push(expected.from);
    }

    /// Lowers the flags that will rise, gives credit, and wakes those who may wait for it.
    fn let_peers_in(&mut self, stamp: u64) -> Result<(), FabricError> {
        let Way::Direct { reach, epoch, .. } = &self.way else { return Ok(()) };
        for &Expected { slot, .. } in &self.expected {
            let flags = job::flags_of(reach, &self.slots, self.rank, slot)?;
            // Relaxed: released with the credit.
            (0..self.slots.geometry().chunks()).for_each(|chunk| job::flag(flags, chunk).store(0, Ordering::Relaxed));
        }
        self.state = State::InFlight;
        self.stamp = stamp;
        if let Some(credit) = reach.credit(self.rank) {
            credit.give(*epoch, stamp);
        }
        self.expected.iter().for_each(|expected| reach.ring(expected.from));
        Ok(())
    }

    /// Waits until nothing that other ranks do can touch this rank's slots any more: after a weight sync all that it receives has
    /// come; after a grad reduce its slots are zeroed, and its masters are summed. Gives the largest of the stamps that this rank
    /// and those at the other end of its transfers have passed. Does nothing when nothing is in flight.
    ///
    /// What this rank sends may still be on its way if there are background workers: see [`SlotSet::drain`].
    ///
    /// # Errors
    /// The group's failure; [`FabricError::Timeout`], which names the rank that was waited for.
    pub fn join(&mut self, fabric: &mut dyn Fabric) -> Result<u64, FabricError> {
        if self.state == State::Joined {
            return Ok(self.stamp);
        }
        let Self { slots, rank, engine, way, expected, involved, .. } = self;
        match way {
            Way::Direct { reach, epoch, .. } => {
                direct_access(fabric, *rank)?.check()?;
                let summing = engine.adds_to_masters();
                engine.help(fabric, &|| !summing && expected.iter().all(|one| has_come(reach, slots, *rank, one)))?;
                if summing {
                    engine.drain(fabric)?;
                }
                for one in &*expected {
                    let come = || has_come(reach, slots, *rank, one);
                    direct_access(fabric, *rank)?.wait_until(one.from, &come)?;
                }
                engine.end_if_done();
                let credits = involved.iter().filter_map(|&rank| reach.credit(rank));
                let stamps = credits.filter(|credit| credit.covers(*epoch)).map(|credit| credit.stamp(*epoch));
                self.stamp = stamps.fold(self.stamp, u64::max);
            }
            Way::Messages { part, held, .. } => {
                fabric.run(Operation::Close { window: slots.window() })?;
                *held =
                    Some(Hold::take(part, Use::Write).map_err(|source| refused(*rank, "window of the slots", source))?);
            }
        }
        self.state = State::Joined;
        Ok(self.stamp)
    }

    /// Waits until this rank has moved all tiles of what it has started: after this its masters are its own again. Does nothing when
    /// nothing is left to move.
    ///
    /// # Errors
    /// As for [`SlotSet::join`].
    pub fn drain(&mut self, fabric: &mut dyn Fabric) -> Result<(), FabricError> {
        self.engine.help(fabric, &|| false)?;
        self.engine.drain(fabric)?;
        self.engine.end_if_done();
        Ok(())
    }

    fn settle(&mut self, fabric: &mut dyn Fabric) -> Result<(), FabricError> {
        self.join(fabric)?;
        self.drain(fabric)
    }

    /// The slots as a slice of `T`, one after another, [`ExpertLayout::slot_bytes`](super::ExpertLayout::slot_bytes) bytes each.
    ///
    /// # Errors
    /// [`AccessError::Open`] while a piece of work is in flight, and when `T` does not fit.
    pub fn read<T: Pod>(&self) -> Result<&[T], AccessError> {
        let (start, count) = self.typed::<T>()?;
        // SAFETY: as for `write`, and `&self` allows no write.
        Ok(unsafe { core::slice::from_raw_parts(start.as_ptr(), count) })
    }

    /// The slots as a slice of `T`, to write to.
    ///
    /// # Errors
    /// As for [`SlotSet::read`].
    pub fn write<T: Pod>(&mut self) -> Result<&mut [T], AccessError> {
        let (start, count) = self.typed::<T>()?;
        // SAFETY: within the own part, aligned (`typed`); `Pod` allows any bytes. No one else touches it meanwhile: nothing is in
        // flight on this rank, so that all flags of the last piece of work are up (peers' workers are done with the slots, and
        // `join` has acquired what they did) and the next needs `&mut self`; the fabric refuses guards, puts and gets, as the part
        // is claimed or held; and this set is the only one with a claim on it.
        Ok(unsafe { core::slice::from_raw_parts_mut(start.as_ptr(), count) })
    }

    fn typed<T: Pod>(&self) -> Result<(NonNull<T>, usize), AccessError> {
        if self.state == State::InFlight {
            return Err(AccessError::Open);
        }
        let start = match &self.way {
            Way::Direct { start, .. } => *start,
            Way::Messages { held, .. } => held.as_ref().ok_or(AccessError::Open)?.start()?,
        };
        let (bytes, size) = (self.slots.slots() * self.slots.layout().slot_bytes(), size_of::<T>());
        if size == 0 || !bytes.is_multiple_of(size) {
            return Err(AccessError::Ragged { bytes, size });
        }
        let start = start.cast::<T>();
        if !start.is_aligned() {
            return Err(AccessError::Misaligned { align: align_of::<T>() });
        }
        Ok((start, bytes / size))
    }

    /// The slot of a physical expert of this rank, as [`Slots::slot`].
    #[must_use]
    pub fn slot(&self, topology: &Topology, physical: ultraep_plan::PhysicalIndex) -> Option<usize> {
        self.slots.slot(topology, self.rank, physical)
    }
}

/// Whether the flags of a stripe of an own slot are up.
fn has_come(reach: &Reach, slots: &Slots, rank: Rank, one: &Expected) -> bool {
    let geometry = slots.geometry();
    // The flags' place was checked when they were lowered.
    let Ok(flags) = job::flags_of(reach, slots, rank, one.slot) else { return false };
    let up = |flag: &AtomicU32, chunk: usize| {
        // SYNC POINT tile: acquires what peers' workers did to the slot and released in `publish`.
        flag.load(Ordering::Acquire) as usize >= geometry.tiles(chunk)
    };
    (one.stripe..geometry.chunks()).step_by(one.stripes).all(|chunk| up(job::flag(flags, chunk), chunk))
}

fn direct_access(fabric: &mut dyn Fabric, rank: Rank) -> Result<&mut dyn Direct, FabricError> {
    fabric.direct().ok_or(FabricError::NoDirectAccess { rank })
}

fn refused(rank: Rank, subject: &'static str, source: AccessError) -> FabricError {
    FabricError::Access { operation: OperationKind::Stream, rank, subject, source }
}
