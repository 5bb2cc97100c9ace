//! One piece of work, ready for workers: streams with addresses, flags, and the rights that make touching them sound.

use super::kernel::{self, Stores, Vectors};
use super::layout::{MasterTensor, Masters, PackedShard};
use super::reach::Reach;
use super::schedule::{Geometry, Schedule, Tile};
use super::slots::Slots;
use super::worker::Hands;
use crate::backend::{Hold, Use};
use crate::sync::{AtomicU32, Ordering};
use crate::{AccessError, FabricError, OperationKind, Region};
use core::ops::Range;
use core::ptr::NonNull;
use std::sync::Arc;
use ultraep_plan::{Rank, Topology, Transfer, TransferPlan, Transfers};

/// Bytes of a sum that are added to from all replicas before the next: they stay in the first-level cache.
const SUM_BYTES: usize = 4096;

/// Weight sync of one plan, on one rank.
#[derive(Clone, Copy, Debug)]
pub struct WeightSync<'a> {
    /// The group.
    pub topology: &'a Topology,
    /// Who sends what to whom, the same on every rank.
    pub plan: &'a TransferPlan,
    /// This rank's weights.
    pub masters: &'a Masters,
}

/// Grad reduce of one plan, on one rank: `master += replica`, replica by replica in the plan's order, then the replica is 0.
#[derive(Clone, Copy, Debug)]
pub struct GradReduce<'a> {
    /// The group.
    pub topology: &'a Topology,
    /// Which replicas there are, the same on every rank.
    pub transfers: &'a Transfers,
    /// This rank's gradients: all shards `f32`.
    pub masters: &'a Masters,
}

/// What a piece of work moves on this rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// Bytes read, each once.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
}

#[derive(Clone, Copy)]
enum Source {
    /// A master of this rank: where its shards begin among the job's.
    Master(usize),
    /// A packed expert.
    Packed(NonNull<u8>),
}

struct Stream {
    source: Source,
    targets: Range<usize>,
    /// Flags of the chunks to wait for, and who sends them.
    waits: Option<(NonNull<AtomicU32>, Rank)>,
    /// Not 0 once all targets' credits were seen.
    admitted: AtomicU32,
}

#[derive(Clone, Copy)]
struct Target {
    place: NonNull<u8>,
    /// Flags to raise.
    flags: NonNull<AtomicU32>,
    rank: Rank,
}

/// A shard of a master as workers see it.
#[derive(Clone, Copy)]
struct ShardView {
    base: NonNull<u8>,
    row_stride: usize,
    row_bytes: usize,
    /// Its place in the packed form.
    start: usize,
    end: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Copy(Stores),
    Reduce,
}

/// The work in hand; its memory is kept from one to the next.
pub(crate) struct Job {
    pub(crate) schedule: Schedule,
    streams: Vec<Stream>,
    targets: Vec<Target>,
    /// Shards of the masters in use, one master after another.
    shards: Vec<ShardView>,
    /// Which master has its shards where.
    masters: Vec<(usize, usize)>,
    shards_per_master: usize,
    kind: Kind,
    vectors: Vectors,
    holds: Vec<Hold>,
    reach: Option<Arc<Reach>>,
    /// Which piece of work in the window this is: what credits must cover.
    epoch: u64,
    /// A bug on purpose, which tests must find: credits are not waited for.
    #[cfg(test)]
    pub(super) ignores_credits: bool,
}

// SAFETY: the addresses are those of window parts that `reach` allows to touch, and of regions that `holds` hold; workers use
// them only through the copies of `kernel.rs` and atomics, which may race.
unsafe impl Send for Job {}
// SAFETY: as above.
unsafe impl Sync for Job {}

impl Job {
    /// No work, with room for so many streams and as many targets.
    pub(crate) fn with_capacity(tasks: usize) -> Self {
        Self {
            schedule: Schedule::with_capacity(tasks),
            streams: Vec::with_capacity(tasks),
            targets: Vec::with_capacity(tasks),
            shards: Vec::with_capacity(8),
            masters: Vec::with_capacity(8),
            shards_per_master: 0,
            kind: Kind::Reduce,
            vectors: Vectors::detect(),
            holds: Vec::with_capacity(8),
            reach: None,
            epoch: 0,
            #[cfg(test)]
            ignores_credits: false,
        }
    }

    /// Gives back every right. The caller has made sure that no worker is at it.
    pub(crate) fn clear(&mut self) {
        self.schedule.begin(Geometry::new(1, 1, 1), 1);
        self.streams.clear();
        self.targets.clear();
        self.shards.clear();
        self.masters.clear();
        self.holds.clear();
        self.reach = None;
    }

    /// Whether it is a grad reduce.
    pub(crate) fn adds_to_masters(&self) -> bool {
        self.kind == Kind::Reduce
    }

    pub(crate) fn reach(&self) -> Option<&Reach> {
        self.reach.as_deref()
    }

    /// Whom a blocked tile waits for: who sends its chunk, or who has not yet let this rank in.
    pub(crate) fn awaited(&self, tile: &Tile) -> Option<Rank> {
        let stream = &self.streams[tile.stream];
        let feeder = stream.waits.filter(|&(flags, _)| !self.has_come(flags, tile.chunk));
        let closed = || self.targets[stream.targets.clone()].iter().find(|target| !self.lets_in(target));
        feeder.map(|(_, rank)| rank).or_else(|| closed().map(|target| target.rank))
    }

    fn lets_in(&self, target: &Target) -> bool {
        #[cfg(test)]
        if self.ignores_credits {
            return true;
        }
        let credit = self.reach.as_ref().and_then(|reach| reach.credit(target.rank));
        credit.is_some_and(|credit| credit.covers(self.epoch))
    }

    fn has_come(&self, flags: NonNull<AtomicU32>, chunk: usize) -> bool {
        // SYNC POINT tile: acquires the bytes that the sender's workers released in `publish`, each with one count.
        flag(flags, chunk).load(Ordering::Acquire) as usize >= self.schedule.geometry().tiles(chunk)
    }

    /// Makes the job this weight sync; on an error the job must be cleared.
    pub(crate) fn sync(
        &mut self,
        slots: &Slots,
        sync: &WeightSync<'_>,
        reach: &Arc<Reach>,
        epoch: u64,
        streaming_from: u64,
    ) -> Result<Moved, FabricError> {
        let WeightSync { topology, plan, masters } = *sync;
        let (rank, stripes) = (reach.rank(), plan.stripes().max(1));
        let units = plan.tasks().len() as u64 / u64::from(stripes);
        let moved = 2 * units * slots.layout().bytes() as u64;
        let stores = if moved >= streaming_from { Stores::Streaming } else { Stores::Cached };
        self.begin(Kind::Copy(stores), slots, stripes as usize);
        let mut task = plan.tasks().partition_point(|task| task.transfer.from < rank);
        let mut result = Moved::default();
        for stream in plan.streams(rank) {
            let first = &stream[0];
            let (source, waits) = match first.waits_for {
                None => (self.master(&first.transfer, slots, topology, masters, rank)?, None),
                Some(physical) => {
                    let slot = slot_of(slots, topology, rank, physical)?;
                    let place = reach.place(rank, slots.range(slot).start, slots.layout().bytes())?;
                    let feeder = plan.feeder(task).map_or(rank, |feeder| plan.tasks()[feeder].transfer.from);
                    (Source::Packed(place), Some((flags_of(reach, slots, rank, slot)?, feeder)))
                }
            };
            let start = self.targets.len();
            for each in stream {
                self.target(reach, slots, topology, &each.transfer)?;
                task += 1;
            }
            self.schedule.push(first.stripe.index as usize);
            let bytes = self.schedule.stripe_bytes(first.stripe.index as usize);
            result.read_bytes += bytes;
            result.written_bytes += bytes * stream.len() as u64;
            self.push(source, start, waits);
        }
        (self.reach, self.epoch) = (Some(Arc::clone(reach)), epoch);
        Ok(result)
    }

    /// Makes the job this grad reduce; on an error the job must be cleared.
    pub(crate) fn reduce(
        &mut self,
        slots: &Slots,
        reduce: &GradReduce<'_>,
        reach: &Arc<Reach>,
        epoch: u64,
    ) -> Result<Moved, FabricError> {
        let GradReduce { topology, transfers, masters } = *reduce;
        let rank = reach.rank();
        self.begin(Kind::Reduce, slots, 1);
        let mut result = Moved::default();
        for of_expert in transfers.all().chunk_by(|a, b| a.expert == b.expert) {
            if of_expert[0].from != rank {
                continue;
            }
            let source = self.master(&of_expert[0], slots, topology, masters, rank)?;
            let start = self.targets.len();
            of_expert.iter().try_for_each(|transfer| self.target(reach, slots, topology, transfer))?;
            self.schedule.push(0);
            let bytes = slots.layout().bytes() as u64 * (1 + of_expert.len() as u64);
            result.read_bytes += bytes;
            result.written_bytes += bytes;
            self.push(source, start, None);
        }
        (self.reach, self.epoch) = (Some(Arc::clone(reach)), epoch);
        Ok(result)
    }

    /// A stream to the targets from the `first` on.
    fn push(&mut self, source: Source, first: usize, waits: Option<(NonNull<AtomicU32>, Rank)>) {
        let targets = first..self.targets.len();
        self.streams.push(Stream { source, targets, waits, admitted: AtomicU32::new(0) });
    }

    fn begin(&mut self, kind: Kind, slots: &Slots, stripes: usize) {
        self.clear();
        self.kind = kind;
        self.shards_per_master = slots.layout().shards();
        self.schedule.begin(slots.geometry(), stripes);
    }

    /// The source of a stream from a master of this rank, whose memory is held from now on.
    fn master(
        &mut self,
        transfer: &Transfer,
        slots: &Slots,
        topology: &Topology,
        masters: &Masters,
        rank: Rank,
    ) -> Result<Source, FabricError> {
        let own = topology.masters(rank);
        let expert = transfer.expert.index();
        let index = expert.checked_sub(own.start).filter(|&index| expert < own.end && index < masters.experts());
        let Some(index) = index else {
            let (what, limit) = ("expert of a master", own.end.saturating_sub(1));
            return Err(FabricError::OutOfRange { operation: OperationKind::Stream, rank, what, asked: expert, limit });
        };
        if let Some(&(_, first)) = self.masters.iter().rev().find(|&&(master, _)| master == index) {
            return Ok(Source::Master(first));
        }
        let first = self.shards.len();
        for (packed, tensor) in slots.layout().packed().iter().zip(masters.of(index)) {
            let view = self.view(packed, tensor).map_err(|source| {
                let (operation, subject) = (OperationKind::Stream, "masters");
                FabricError::Access { operation, rank, subject, source }
            })?;
            self.shards.push(view);
        }
        if self.shards.len() - first != self.shards_per_master {
            let (what, asked, limit) = ("shards of a master", self.shards.len() - first, self.shards_per_master);
            return Err(FabricError::OutOfRange { operation: OperationKind::Stream, rank, what, asked, limit });
        }
        self.masters.push((index, first));
        Ok(Source::Master(first))
    }

    /// A shard of a master, held.
    fn view(&mut self, packed: &PackedShard, tensor: &MasterTensor) -> Result<ShardView, AccessError> {
        let held = self.holds.iter().position(|hold| hold.region().same(&tensor.region));
        let held = match held {
            Some(index) => index,
            None => {
                self.holds.push(hold(&tensor.region, self.kind)?);
                self.holds.len() - 1
            }
        };
        let (start, align) = (self.holds[held].start()?, align_of::<f32>());
        // SAFETY: `Masters::tensors` has shown that the tensor lies within its region. (With no rows nothing is ever read at this
        // address, which wrapping keeps harmless.)
        let base = unsafe { NonNull::new_unchecked(start.as_ptr().wrapping_add(tensor.offset)) };
        let aligned = [base.as_ptr() as usize, tensor.row_stride].iter().all(|step| step.is_multiple_of(align));
        if self.kind == Kind::Reduce && !aligned {
            return Err(AccessError::Misaligned { align });
        }
        Ok(ShardView {
            base,
            row_stride: if packed.rows <= 1 { packed.row_bytes } else { tensor.row_stride },
            row_bytes: packed.row_bytes,
            start: packed.start,
            end: packed.start + packed.bytes(),
        })
    }

    fn target(
        &mut self,
        reach: &Reach,
        slots: &Slots,
        topology: &Topology,
        transfer: &Transfer,
    ) -> Result<(), FabricError> {
        let rank = transfer.to;
        let slot = slot_of(slots, topology, rank, transfer.physical)?;
        let place = reach.place(rank, slots.range(slot).start, slots.layout().bytes())?;
        let flags = flags_of(reach, slots, rank, slot)?;
        self.targets.push(Target { place, flags, rank });
        Ok(())
    }

    /// Calls `with(address, place in the packed form, bytes)` for the pieces of a tile of a master that lie together; `first` is
    /// where the master's shards begin.
    fn pieces(&self, first: usize, tile: &Tile, mut with: impl FnMut(*mut u8, usize, usize)) {
        for shard in &self.shards[first..first + self.shards_per_master] {
            let (mut at, end) = (tile.start.max(shard.start), (tile.start + tile.bytes).min(shard.end));
            while at < end {
                let within = at - shard.start;
                let (offset, bytes) = if shard.row_stride == shard.row_bytes {
                    (within, end - at)
                } else {
                    let (row, column) = (within / shard.row_bytes, within % shard.row_bytes);
                    (row * shard.row_stride + column, (end - at).min(shard.row_bytes - column))
                };
                with(shard.base.as_ptr().wrapping_add(offset), at, bytes);
                at += bytes;
            }
        }
    }

    fn copy(&self, stream: &Stream, tile: &Tile, stores: Stores) {
        let targets = &self.targets[stream.targets.clone()];
        let copy = |from: *mut u8, at: usize, bytes: usize| {
            for target in targets {
                // SAFETY: the source is a piece of a held master, or of an expert in a slot of this rank; the target is the same
                // piece of an expert in a slot; both lie within places that were checked. No reference to either is
                // alive, by the hold and the reach.
                unsafe { self.vectors.copy(from, target.place.as_ptr().add(at), bytes, stores) };
            }
        };
        match stream.source {
            Source::Master(master) => self.pieces(master, tile, copy),
            // SAFETY: a tile lies within the packed expert.
            Source::Packed(place) => copy(unsafe { place.as_ptr().add(tile.start) }, tile.start, tile.bytes),
        }
    }

    fn add_and_zero(&self, stream: &Stream, tile: &Tile) {
        let Source::Master(master) = stream.source else { return };
        let targets = &self.targets[stream.targets.clone()];
        self.pieces(master, tile, |sum, at, bytes| {
            let mut done = 0;
            while done < bytes {
                let part = SUM_BYTES.min(bytes - done);
                for target in targets {
                    // SAFETY: pieces of a master held for writing and of a slot, both checked to lie within, aligned (checked in
                    // `reduce`; slots, shards and tiles start on lines), and whole `f32` as rows are; a window is no region of
                    // masters, so they do not overlap. No reference to either is alive.
                    unsafe {
                        let (sum, replica) = (sum.add(done).cast(), target.place.as_ptr().add(at + done).cast());
                        self.vectors.add_and_zero(sum, replica, part / size_of::<f32>());
                    }
                }
                done += part;
            }
        });
    }

    /// Makes the worker's stores visible to whoever is told next.
    pub(crate) fn fence(&self) {
        if let Kind::Copy(stores) = self.kind {
            kernel::fence(stores);
        }
    }

    /// Whether the chunk of a tile is there and its targets let this rank in.
    pub(crate) fn is_ready(&self, tile: &Tile) -> bool {
        let stream = &self.streams[tile.stream];
        if stream.waits.is_some_and(|(flags, _)| !self.has_come(flags, tile.chunk)) {
            return false;
        }
        // SYNC POINT admitted: acquires what the targets' credits released, as seen by the worker that stored this.
        if stream.admitted.load(Ordering::Acquire) != 0 {
            return true;
        }
        let all = self.targets[stream.targets.clone()].iter().all(|target| self.lets_in(target));
        if all {
            // SYNC POINT admitted: releases the credits that this worker acquired in `covers`.
            stream.admitted.store(1, Ordering::Release);
        }
        all
    }
}

/// The flag of a chunk.
pub(crate) fn flag<'a>(flags: NonNull<AtomicU32>, chunk: usize) -> &'a AtomicU32 {
    // SAFETY: `flags_of` has checked the flags of all chunks; aligned, as they start on a line of the window's part; atomics
    // take any bytes, and the caller's reach keeps them mapped.
    unsafe { flags.add(chunk).as_ref() }
}

fn hold(region: &Region, kind: Kind) -> Result<Hold, AccessError> {
    match kind {
        Kind::Copy(_) => Hold::take(region, Use::Read),
        Kind::Reduce => Hold::take(region, Use::Write),
    }
}

pub(crate) fn slot_of(
    slots: &Slots,
    topology: &Topology,
    rank: Rank,
    physical: ultraep_plan::PhysicalIndex,
) -> Result<usize, FabricError> {
    let asked = physical.index();
    let limit = slots.slots();
    let (operation, what) = (OperationKind::Stream, "physical index of a replica (number of slots)");
    let out_of_range = FabricError::OutOfRange { operation, rank, what, asked, limit };
    slots.slot(topology, rank, physical).ok_or(out_of_range)
}

pub(crate) fn flags_of(
    reach: &Reach,
    slots: &Slots,
    rank: Rank,
    slot: usize,
) -> Result<NonNull<AtomicU32>, FabricError> {
    let bytes = slots.geometry().chunks() * size_of::<AtomicU32>();
    Ok(reach.place(rank, slots.flags(slot), bytes)?.cast())
}

impl Hands for &Job {
    fn ready(&mut self, tile: &Tile) -> bool {
        self.is_ready(tile)
    }

    fn look_ahead(&mut self, tile: &Tile) {
        match self.streams[tile.stream].source {
            Source::Packed(place) => kernel::prefetch(place.as_ptr().wrapping_add(tile.start), tile.bytes),
            Source::Master(master) => {
                let mut first = true;
                self.pieces(master, tile, |from, _, bytes| {
                    if core::mem::take(&mut first) {
                        kernel::prefetch(from, bytes);
                    }
                });
            }
        }
    }

    fn move_tile(&mut self, tile: &Tile) {
        let stream = &self.streams[tile.stream];
        match self.kind {
            Kind::Copy(stores) => self.copy(stream, tile, stores),
            Kind::Reduce => self.add_and_zero(stream, tile),
        }
    }

    fn publish(&mut self, tile: &Tile) {
        let targets = &self.targets[self.streams[tile.stream].targets.clone()];
        self.fence();
        let tiles = self.schedule.geometry().tiles(tile.chunk);
        for target in targets {
            // SYNC POINT tile: releases the tile's bytes to the slot's rank, whose relay acquires them in `has_come` and whose owner
            // in `SlotSet::join`. Counts of several workers are one release sequence.
            let before = flag(target.flags, tile.chunk).fetch_add(1, Ordering::Release);
            if before as usize + 1 == tiles
                && let Some(reach) = &self.reach
            {
                reach.ring(target.rank);
            }
        }
    }
}
