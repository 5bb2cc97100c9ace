//! The same results on a fabric whose windows cannot be touched directly: by put and get, from home to each replica, when the
//! work is started. No relays, no overlap.

use super::job::{GradReduce, Moved, WeightSync};
use super::layout::{MasterTensor, Masters};
use super::slots::Slots;
use crate::{Fabric, FabricError, Operation, OperationKind, Region, RemoteSpan, Span};
use core::ops::Range;
use ultraep_plan::{Rank, Topology, Transfer};

/// Memory for it, taken when it is first needed.
#[derive(Default)]
pub(crate) struct Portable {
    arrived: Option<Region>,
    zeros: Option<Region>,
}

/// A piece of a master that lies together: where it is in its region, and where in the packed form.
struct Piece<'a> {
    master: &'a MasterTensor,
    offset: usize,
    packed: Range<usize>,
}

/// The pieces of the n-th master.
fn pieces<'a>(slots: &'a Slots, masters: &'a Masters, n: usize) -> impl Iterator<Item = Piece<'a>> {
    slots.layout().packed().iter().zip(masters.of(n)).flat_map(move |(packed, master)| {
        let together = packed.rows <= 1 || master.row_stride == packed.row_bytes;
        let (rows, bytes) = if together { (1, packed.bytes()) } else { (packed.rows, packed.row_bytes) };
        (0..rows).map(move |row| Piece {
            master,
            offset: master.offset + row * master.row_stride,
            packed: packed.start + row * bytes..packed.start + (row + 1) * bytes,
        })
    })
}

/// The replica's slot, and which of the own masters it belongs to, if to any.
fn ends(
    slots: &Slots,
    topology: &Topology,
    masters: &Masters,
    rank: Rank,
    transfer: &Transfer,
) -> Result<Option<(usize, usize)>, FabricError> {
    let own = topology.masters(rank);
    if !own.contains(&transfer.expert.index()) {
        return Ok(None);
    }
    let operation = OperationKind::Stream;
    let refuse = |rank, what, asked, limit| FabricError::OutOfRange { operation, rank, what, asked, limit };
    let index = transfer.expert.index() - own.start;
    if index >= masters.experts() {
        return Err(refuse(rank, "masters (index)", index, masters.experts().saturating_sub(1)));
    }
    let slot = slots.slot(topology, transfer.to, transfer.physical);
    let what = "physical index of a replica (number of slots)";
    let slot = slot.ok_or_else(|| refuse(transfer.to, what, transfer.physical.index(), slots.slots()))?;
    Ok(Some((slots.range(slot).start, index)))
}

impl Portable {
    pub(crate) fn sync(
        &self,
        fabric: &mut dyn Fabric,
        slots: &Slots,
        sync: &WeightSync<'_>,
    ) -> Result<Moved, FabricError> {
        let WeightSync { topology, plan, masters } = *sync;
        let (rank, mut moved) = (fabric.rank(), Moved::default());
        for task in plan.tasks().iter().filter(|task| task.stripe.index == 0) {
            let transfer = &task.transfer;
            let Some((slot, master)) = ends(slots, topology, masters, rank, transfer)? else { continue };
            for Piece { master, offset, packed } in pieces(slots, masters, master) {
                let from = Span::part(&master.region, offset, packed.len());
                let to = RemoteSpan { rank: transfer.to, window: slots.window(), offset: slot + packed.start };
                fabric.run(Operation::Put { from, to: &[to] })?;
                moved.read_bytes += packed.len() as u64;
                moved.written_bytes += packed.len() as u64;
            }
        }
        Ok(moved)
    }

    pub(crate) fn reduce(
        &mut self,
        fabric: &mut dyn Fabric,
        slots: &Slots,
        reduce: &GradReduce<'_>,
    ) -> Result<Moved, FabricError> {
        let GradReduce { topology, transfers, masters } = *reduce;
        let (rank, bytes, mut moved) = (fabric.rank(), slots.layout().bytes(), Moved::default());
        let arrived = &*self.arrived.get_or_insert_with(|| Region::zeroed(bytes));
        let zeros = &*self.zeros.get_or_insert_with(|| Region::zeroed(bytes));
        let refused = |source| FabricError::Access {
            operation: OperationKind::Stream,
            rank,
            subject: "gradients of masters",
            source,
        };
        for transfer in transfers.all() {
            let Some((slot, master)) = ends(slots, topology, masters, rank, transfer)? else { continue };
            let replica = RemoteSpan { rank: transfer.to, window: slots.window(), offset: slot };
            fabric.run(Operation::Get { from: replica, to: Span::part(arrived, 0, bytes) })?;
            fabric.run(Operation::Put { from: Span::part(zeros, 0, bytes), to: &[replica] })?;
            let arrived = arrived.read::<f32>().map_err(refused)?;
            for Piece { master, offset, packed } in pieces(slots, masters, master) {
                let mut sums = master.region.write::<f32>().map_err(refused)?;
                let (first, values) = (offset / size_of::<f32>(), packed.len() / size_of::<f32>());
                let parts = &arrived[packed.start / size_of::<f32>()..][..values];
                sums[first..first + values].iter_mut().zip(parts).for_each(|(sum, part)| *sum += part);
            }
            moved.read_bytes += 2 * bytes as u64;
            moved.written_bytes += 2 * bytes as u64;
        }
        Ok(moved)
    }
}
