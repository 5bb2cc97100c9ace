//! Rerouting: from the experts that tokens chose to the instances that process them.

use super::Balancer;
use crate::count::TokenId;
use crate::{BalancerError, VirtualLayer};

impl Balancer {
    /// The physical expert for each of this rank's choices: `ids` are `[tokens, top_k]` logical experts (-1 for none), the very ones
    /// that were counted; `physical`, of the same shape, gets `rank * physical_per_rank + physical index`, or -1.
    ///
    /// # Errors
    /// [`BalancerError::Assign`] when the ids are not those that were counted; as for [`Balancer::place`].
    pub fn reroute<I: TokenId>(
        &mut self,
        at: VirtualLayer,
        ids: &[I],
        physical: &mut [i32],
    ) -> Result<(), BalancerError> {
        self.prepare(at)?;
        let Self { table, cursor, ids: own, .. } = self;
        let ids = match I::as_i32(ids) {
            Some(ids) => ids,
            None => {
                own.clear();
                own.extend(ids.iter().map(|id| i32::try_from(id.value()).unwrap_or(i32::MAX)));
                own
            }
        };
        Ok(table.assign(cursor, ids, physical)?)
    }

    /// As [`Balancer::reroute`] for maps: `map` and `values` (probabilities, say) are `[tokens, E]`; `physical_map` and `physical_values`
    /// are `[tokens, N * physical_per_rank]`.
    ///
    /// # Errors
    /// As for [`Balancer::reroute`].
    pub fn reroute_map<T: Copy + Default>(
        &mut self,
        at: VirtualLayer,
        (map, values): (&[u8], &[T]),
        (physical_map, physical_values): (&mut [u8], &mut [T]),
    ) -> Result<(), BalancerError> {
        self.prepare(at)?;
        Ok(self.table.reroute_dense(&mut self.cursor, map, values, physical_map, physical_values)?)
    }

    /// The backward of [`Balancer::reroute_map`]: gathers the values' gradients, `[tokens, N * physical_per_rank]`, back to
    /// `[tokens, E]`.
    ///
    /// # Errors
    /// As for [`Balancer::reroute`].
    pub fn reroute_map_backward<T: Copy + Default>(
        &mut self,
        at: VirtualLayer,
        map: &[u8],
        physical_gradient: &[T],
        gradient: &mut [T],
    ) -> Result<(), BalancerError> {
        self.prepare(at)?;
        Ok(self.table.reroute_dense_backward(&mut self.cursor, map, physical_gradient, gradient)?)
    }

    /// The routes of this rank's tokens under a kept plan.
    fn prepare(&mut self, at: VirtualLayer) -> Result<(), BalancerError> {
        let kept = self.ring.get(self.place(at)?);
        let width = kept.plan.instances().len();
        let own = &kept.split[self.rank.index() * width..(self.rank.index() + 1) * width];
        self.table.prepare(&kept.plan, own)?;
        self.table.start(&mut self.cursor);
        Ok(())
    }
}
