//! Where rows go: from a source's batch to its experts and back, derived from a plan and its split.
//!
//! A source sends its rows ordered by target rank, then by physical expert there, then by token. A receiver gets the
//! blocks of all sources in rank order and groups them by physical expert. Both sides know every block's size from the
//! split, so no sizes are exchanged.

use ultraep_device::Group;
use ultraep_plan::measure::Measure;
use ultraep_plan::{Plan, Rank};

/// Rows that lie together both in the order of arrival and in the grouped buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) arrived_row: usize,
    pub(crate) grouped_row: usize,
    pub(crate) rows: usize,
}

/// An expert instance on this rank and its rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct LocalExpert {
    /// Physical index on this rank.
    pub(crate) physical: usize,
    /// Its rows in the grouped buffers.
    pub(crate) group: Group,
}

/// One rank's view of the exchange of one virtual layer. Memory is reused.
#[derive(Debug, Default)]
pub(crate) struct Exchange {
    /// Bytes this rank sends to each rank, `[N]`.
    pub(crate) send_bytes: Vec<usize>,
    /// Bytes this rank receives from each rank, `[N]`.
    pub(crate) recv_bytes: Vec<usize>,
    /// First row of each physical expert (`rank * capacity + physical`) in this rank's send order.
    pub(crate) first_row: Vec<u32>,
    /// How arrived rows are grouped.
    pub(crate) runs: Vec<Run>,
    /// Instances on this rank, by physical index.
    pub(crate) local: Vec<LocalExpert>,
    /// Rows of the grouped buffers, padding included.
    pub(crate) grouped_rows: usize,
    /// Rows that arrive.
    pub(crate) arrived_rows: usize,
    /// Rows on the busiest link, sent to or received from other ranks.
    pub(crate) busiest_rows: u64,
    groups: Vec<Group>,
    order: Vec<(usize, usize)>,
    measure: Measure,
}

impl Exchange {
    /// Lays the exchange out for `rank` of `ranks`, with `physical_per_rank` places for physical ids and rows of
    /// `row_bytes`. `split` is `[ranks, instances]`.
    pub(crate) fn lay_out(&mut self, plan: &Plan, split: &[u32], rank: Rank, sizes: Sizes) {
        let Sizes { ranks, physical_per_rank, row_bytes } = sizes;
        let instances = plan.instances();
        let width = instances.len();
        // Sending.
        let own = &split[rank.index() * width..(rank.index() + 1) * width];
        self.first_row.clear();
        self.first_row.resize(ranks * physical_per_rank + 1, 0);
        self.send_bytes.clear();
        self.send_bytes.resize(ranks, 0);
        for (instance, &rows) in instances.iter().zip(own) {
            self.first_row[instance.rank.index() * physical_per_rank + instance.physical.index() + 1] = rows;
            self.send_bytes[instance.rank.index()] += rows as usize * row_bytes;
        }
        let mut sum = 0;
        for first in &mut self.first_row {
            sum += *first;
            *first = sum;
        }
        // Receiving.
        self.order.clear();
        let here = instances.iter().enumerate().filter(|(_, i)| i.rank == rank);
        self.order.extend(here.map(|(index, i)| (i.physical.index(), index)));
        self.order.sort_unstable();
        let rows_of = |index: usize| (0..ranks).map(|s| split[s * width + index] as usize).sum::<usize>();
        self.grouped_rows = Group::lay_out(self.order.iter().map(|&(_, index)| rows_of(index)), &mut self.groups);
        self.local.clear();
        let local = self.order.iter().zip(&self.groups);
        self.local.extend(local.map(|(&(physical, _), &group)| LocalExpert { physical, group }));
        self.lay_out_runs(split, width, ranks, row_bytes);
        // Only the clock needs it.
        self.measure.take_split(ranks, instances, split);
        self.busiest_rows = self.measure.busiest_link();
    }

    fn lay_out_runs(&mut self, split: &[u32], width: usize, ranks: usize, row_bytes: usize) {
        self.runs.clear();
        self.recv_bytes.clear();
        let mut arrived_row = 0;
        for source in 0..ranks {
            let before = arrived_row;
            for (&(_, index), group) in self.order.iter().zip(&mut self.groups) {
                let rows = split[source * width + index] as usize;
                if rows > 0 {
                    self.runs.push(Run { arrived_row, grouped_row: group.first_row, rows });
                }
                arrived_row += rows;
                group.first_row += rows;
            }
            self.recv_bytes.push((arrived_row - before) * row_bytes);
        }
        self.arrived_rows = arrived_row;
    }

    /// Copies arrived rows into the grouped buffer, zeroing padding.
    pub(crate) fn group(&self, arrived: &[f32], grouped: &mut Vec<f32>, width: usize) {
        grouped.resize(self.grouped_rows * width, 0.0);
        for run in &self.runs {
            let (from, to, len) = (run.arrived_row * width, run.grouped_row * width, run.rows * width);
            grouped[to..to + len].copy_from_slice(&arrived[from..from + len]);
        }
        for LocalExpert { group, .. } in &self.local {
            let padding = (group.first_row + group.rows) * width..(group.first_row + group.padded_rows()) * width;
            grouped[padding].fill(0.0);
        }
    }

    /// Copies grouped rows back into the order of arrival.
    pub(crate) fn ungroup(&self, grouped: &[f32], arrived: &mut [f32], width: usize) {
        for run in &self.runs {
            let (to, from, len) = (run.arrived_row * width, run.grouped_row * width, run.rows * width);
            arrived[to..to + len].copy_from_slice(&grouped[from..from + len]);
        }
    }
}

/// Sizes of an exchange.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) ranks: usize,
    pub(crate) physical_per_rank: usize,
    pub(crate) row_bytes: usize,
}

#[cfg(test)]
mod tests {
    use super::*;
    use ultraep_plan::{Instance, PhysicalIndex, SplitRule};

    /// Two ranks, two experts, expert 0 replicated on rank 1.
    fn plan() -> Plan {
        let mut plan = Plan::default();
        plan.begin(SplitRule::LocalFirstExact);
        let instance =
            |rank, physical, quota| Instance { rank: Rank::new(rank), physical: PhysicalIndex::new(physical), quota };
        plan.push_instance(instance(0, 0, 5));
        plan.push_instance(instance(1, 1, 3));
        plan.end_expert();
        plan.push_instance(instance(1, 0, 2));
        plan.end_expert();
        plan
    }

    #[test]
    fn both_sides_agree_on_every_row() {
        let plan = plan();
        let split = [4, 1, 2, 1, 2, 0]; // source 0: 4 + 1 of expert 0, 2 of expert 1; source 1: 1 + 2, 0
        let sizes = Sizes { ranks: 2, physical_per_rank: 2, row_bytes: 4 };
        let mut views = [Exchange::default(), Exchange::default()];
        for (rank, view) in views.iter_mut().enumerate() {
            view.lay_out(&plan, &split, Rank::new(rank), sizes);
        }
        for a in 0..2 {
            for b in 0..2 {
                assert_eq!(views[a].send_bytes[b], views[b].recv_bytes[a], "{a} to {b}");
            }
        }
        assert_eq!(views[0].first_row, [0, 4, 4, 6, 7]);
        // Rank 1 hosts expert 1 (physical 0, 2 rows) and the replica of expert 0 (physical 1, 3 rows).
        let rank1 = &views[1];
        assert_eq!(rank1.local.iter().map(|l| (l.physical, l.group.rows)).collect::<Vec<_>>(), [(0, 2), (1, 3)]);
        assert_eq!(rank1.arrived_rows, 5);
        assert_eq!(rank1.busiest_rows, 3);
        let arrived = [10.0, 11.0, 20.0, 21.0, 22.0]; // source 0: two of expert 1, one of expert 0; source 1: two of expert 0
        let mut grouped = vec![9.0; 3];
        rank1.group(&arrived, &mut grouped, 1);
        assert_eq!(grouped[..3], [10.0, 11.0, 0.0]);
        assert_eq!(grouped[8..12], [20.0, 21.0, 22.0, 0.0]);
        let mut back = [0.0; 5];
        rank1.ungroup(&grouped, &mut back, 1);
        assert_eq!(back, arrived);
    }
}
