//! Plans: made, adopted, kept, replayed.

use ultraep_plan::Problem;

use super::{Balancer, expect_size};
use crate::adopt::{self, Quotas};
use crate::core::{Core, Planned, Targets};
use crate::{BalancerConfig, BalancerError, Plane, VirtualLayer};

impl Balancer {
    /// Gathers all ranks' counts, plans, splits, and plans the transfers. Nothing else is exchanged: every rank gets the same plan
    /// from the same counts.
    ///
    /// # Errors
    /// [`BalancerError::Counts`], [`BalancerError::Solve`], [`BalancerError::Split`]; in checked mode [`BalancerError::Plan`] and
    /// [`BalancerError::DigestMismatch`]; the fabric's.
    pub fn plan(&mut self, plane: &mut dyn Plane, at: VirtualLayer) -> Result<(), BalancerError> {
        let place = self.make(plane, at, |core, problem, _, targets| core.plan(at, problem, targets))?;
        if self.config.checked {
            let kept = self.ring.get(place);
            self.core.check(at, &self.problem(at, place)?, kept)?;
            self.compare_digests(plane, at, place)?;
        }
        Ok(())
    }

    /// Puts a placement that someone else made in force: `placement` is `[N, physical_per_rank]`
    /// ([`BalancerConfig::physical_per_rank`]), the expert at each physical id, -1 for none. Masters stay where they are; tokens
    /// are shared among the instances as `quotas` says. Counts are gathered as for [`Balancer::plan`], and ranks compare what they have.
    ///
    /// # Errors
    /// [`BalancerError::Placement`] says what is wrong; [`BalancerError::DigestMismatch`] when ranks were given different placements.
    pub fn adopt(
        &mut self,
        plane: &mut dyn Plane,
        at: VirtualLayer,
        placement: &[i32],
        quotas: Quotas,
    ) -> Result<(), BalancerError> {
        let refused = |reason| BalancerError::Placement { at, reason };
        let place = self.make(plane, at, |core, problem, config, targets| {
            adopt::plan_of(problem, placement, config.physical_per_rank(), quotas, targets.plan).map_err(refused)?;
            core.derive(at, problem, targets)
        })?;
        self.compare_digests(plane, at, place)
    }

    /// Gathers the counts, and lets `make` turn them into a plan and what follows from it. Gives the place in the ring.
    fn make(
        &mut self,
        plane: &mut dyn Plane,
        at: VirtualLayer,
        make: impl FnOnce(&mut Core, &Problem<'_>, &BalancerConfig, Targets<'_>) -> Result<(), BalancerError>,
    ) -> Result<usize, BalancerError> {
        let place = self.ring.kept(at)?;
        self.gather(plane, place)?;
        let Self { core, ring, config, counts_recv, .. } = self;
        {
            let (counts, targets) = ring.get_mut(place).parts();
            let gathered = counts_recv.read::<u32>()?;
            let problem = checked_problem(config, at, counts, &gathered)?;
            make(core, &problem, config, targets)?;
        }
        plane.planned();
        self.note(at, place)?;
        Ok(place)
    }

    /// All-gathers the counts into the place's table.
    fn gather(&mut self, plane: &mut dyn Plane, place: usize) -> Result<(), BalancerError> {
        let kept = self.ring.get_mut(place);
        let experts = kept.own.len();
        {
            // The last element is the row's sum, so that a damaged table is refused before anything is planned.
            let mut send = self.counts_send.write::<u32>()?;
            send[..experts].copy_from_slice(&kept.own);
            send[experts] = kept.own.iter().sum();
        }
        plane.gather_counts(&self.counts_send, &self.counts_recv)?;
        let gathered = self.counts_recv.read::<u32>()?;
        kept.counts.clear();
        gathered.chunks_exact(experts + 1).for_each(|row| kept.counts.extend_from_slice(&row[..experts]));
        Ok(())
    }

    fn note(&mut self, at: VirtualLayer, place: usize) -> Result<(), BalancerError> {
        let Self { core, ring, config, .. } = self;
        let kept = ring.get_mut(place);
        kept.is_planned = true;
        let (counts, notes) = kept.notes();
        let problem = Problem::new(&config.topology, counts);
        core.note(at, &problem.map_err(|source| BalancerError::Counts { at, source })?, notes);
        Ok(())
    }

    fn problem(&self, at: VirtualLayer, place: usize) -> Result<Problem<'_>, BalancerError> {
        let problem = Problem::new(&self.config.topology, &self.ring.get(place).counts);
        problem.map_err(|source| BalancerError::Counts { at, source })
    }

    fn compare_digests(&mut self, plane: &mut dyn Plane, at: VirtualLayer, place: usize) -> Result<(), BalancerError> {
        let ours = self.ring.get(place).digest(&self.problem(at, place)?);
        self.digest_send.write::<u64>()?[0] = ours;
        plane.gather_digests(&self.digest_send, &self.digest_recv)?;
        let all = self.digest_recv.read::<u64>()?;
        match all.iter().position(|&theirs| theirs != ours) {
            Some(rank) => Err(BalancerError::DigestMismatch { at, rank, ours, theirs: all[rank] }),
            None => Ok(()),
        }
    }

    /// That a kept plan is the one for a batch with these counts of this rank (`[E]`), which is run again: nothing is planned.
    ///
    /// # Errors
    /// [`BalancerError::ReplayDiffers`]; [`BalancerError::NoPlan`].
    pub fn replay(&self, at: VirtualLayer, own: &[u32]) -> Result<(), BalancerError> {
        let planned = &self.ring.get(self.place(at)?).own;
        expect_size("counts", own.len(), planned.len())?;
        match planned.iter().zip(own).position(|(planned, own)| planned != own) {
            Some(expert) => {
                let (planned, got) = (planned[expert], own[expert]);
                Err(BalancerError::ReplayDiffers { at, expert, planned, got })
            }
            None => Ok(()),
        }
    }

    /// Which of the ring's places a planned virtual layer has, `0..layers * in_flight`: for what a caller keeps beside the plan.
    ///
    /// # Errors
    /// [`BalancerError::NoPlan`], [`BalancerError::NotPlanned`], [`BalancerError::Layer`].
    pub fn place(&self, at: VirtualLayer) -> Result<usize, BalancerError> {
        let place = self.ring.kept(at)?;
        if self.ring.get(place).is_planned { Ok(place) } else { Err(BalancerError::NotPlanned { at }) }
    }

    /// The plan in force for a virtual layer, and what follows from it.
    ///
    /// # Errors
    /// As for [`Balancer::place`].
    pub fn planned(&self, at: VirtualLayer) -> Result<&Planned, BalancerError> {
        Ok(self.ring.get(self.place(at)?))
    }

    /// From the start of a virtual layer's weight sync until the last replica is complete, under the stated link, in nanoseconds.
    ///
    /// # Errors
    /// As for [`Balancer::place`].
    pub fn predict_sync_ns(&mut self, at: VirtualLayer) -> Result<u64, BalancerError> {
        let place = self.place(at)?;
        Ok(self.core.transfers.measure(&mut self.ring.get_mut(place).transfers))
    }

    /// Tokens of every expert of a layer over the recorded microbatches since the last call, `[E]`.
    pub fn take_loads(&mut self, layer: usize) -> Vec<u64> {
        self.core.take_loads(layer)
    }

    /// Expert loads of the microbatches that historical policies were shown last, `[microbatches, E]`: as many as
    /// [`Balancer::show`] needs to bring them where they are. Empty without historical policies.
    #[must_use]
    pub fn observed(&self, layer: usize) -> &[u32] {
        self.core.observed(layer)
    }

    /// Shows historical policies what [`Balancer::observed`] gave in the run that goes on here; before the first forward.
    ///
    /// # Errors
    /// [`BalancerError::Size`] when the loads are no whole number of microbatches; [`BalancerError::Counts`].
    pub fn show(&mut self, layer: usize, loads: &[u32]) -> Result<(), BalancerError> {
        let (ranks, experts) = (self.config.topology.ranks(), self.config.topology.experts());
        expect_size("loads seen by historical policies", loads.len(), loads.len() / experts * experts)?;
        let mut counts = vec![0; ranks * experts];
        for microbatch in loads.chunks_exact(experts) {
            // Historical policies look at sums over sources only.
            counts[..experts].copy_from_slice(microbatch);
            let at = VirtualLayer { layer, microbatch: 0 };
            let problem = Problem::new(&self.config.topology, &counts);
            let problem = problem.map_err(|source| BalancerError::Counts { at, source })?;
            self.core.show_again(layer, &problem, microbatch);
        }
        Ok(())
    }
}

fn checked_problem<'a>(
    config: &'a BalancerConfig,
    at: VirtualLayer,
    counts: &'a [u32],
    gathered: &[u32],
) -> Result<Problem<'a>, BalancerError> {
    let experts = config.topology.experts();
    let row_sums = gathered.chunks_exact(experts + 1).map(|row| u64::from(row[experts]));
    let problem = Problem::with_row_sums(&config.topology, counts, row_sums);
    problem.map_err(|source| BalancerError::Counts { at, source })
}
