//! One domain as the planner sees it, what a threshold allows on each rank, and the proven lower bound.

use alloc::vec;
use alloc::vec::Vec;

use crate::{Domain, FULL_SPEED, MAX_SLOTS, Rank, Ratio, Topology};

/// One domain's loads and room. Ranks and experts are counted from the domain's first.
#[derive(Clone, Debug)]
pub(crate) struct Field {
    domain: Option<Domain>,
    /// First rank of the domain in the group.
    pub(crate) first_rank: usize,
    /// First expert of the domain in the group.
    pub(crate) first_expert: usize,
    /// Rank loads before balancing, `[G]`.
    pub(crate) load: Vec<u32>,
    /// Slots that may be filled, `[G]`.
    pub(crate) slots: Vec<u16>,
    /// Speed at which a rank's load counts, `[G]`; weight 0 counts at full speed (such a rank keeps its masters' load).
    pub(crate) speed: Vec<u32>,
    /// Masters of rank `r` are experts `masters[r]..masters[r + 1]`.
    pub(crate) masters: Vec<u16>,
    /// Home rank of each expert of the domain.
    pub(crate) homes: Vec<u16>,
    /// Load of each expert of the domain.
    pub(crate) experts: Vec<u32>,
    /// Least quota of a replica.
    pub(crate) min_quota: u32,
    /// Load of the domain.
    pub(crate) total: u32,
    uniform: bool,
}

impl Field {
    pub(crate) fn new(topology: &Topology, min_quota: u32) -> Self {
        let ranks = topology.domain_ranks();
        Self {
            domain: None,
            first_rank: 0,
            first_expert: 0,
            load: vec![0; ranks],
            slots: vec![0; ranks],
            speed: vec![FULL_SPEED; ranks],
            masters: vec![0; ranks + 1],
            homes: Vec::with_capacity(topology.experts()),
            experts: Vec::with_capacity(topology.experts()),
            min_quota,
            total: 0,
            uniform: topology.speeds().iter().all(|&s| s == FULL_SPEED || s == 0),
        }
    }

    /// Takes the loads (`[E]`, whole group) of a domain.
    pub(crate) fn enter(&mut self, topology: &Topology, domain: Domain, loads: &[u32]) {
        if self.domain != Some(domain) {
            self.settle_in(topology, domain);
        }
        self.experts.clear();
        self.experts.extend_from_slice(&loads[topology.domain_experts(domain)]);
        let mut start = 0;
        for (load, &end) in self.load.iter_mut().zip(&self.masters[1..]) {
            *load = self.experts[start..end as usize].iter().sum();
            start = end as usize;
        }
        self.total = self.experts.iter().sum();
    }

    /// Takes what a domain has at all times.
    fn settle_in(&mut self, topology: &Topology, domain: Domain) {
        self.domain = Some(domain);
        self.first_rank = topology.domain_range(domain).start;
        self.first_expert = topology.domain_experts(domain).start;
        for (r, rank) in topology.domain_range(domain).map(Rank::new).enumerate() {
            self.slots[r] = topology.replica_slots(rank) as u16;
            self.speed[r] = if topology.speed(rank) == 0 { FULL_SPEED } else { topology.speed(rank) };
            self.masters[r + 1] = (topology.masters(rank).end - self.first_expert) as u16;
        }
        let homes = &topology.homes()[topology.domain_experts(domain)];
        self.homes.clear();
        self.homes.extend(homes.iter().map(|home| (home.index() - self.first_rank) as u16));
    }

    pub(crate) fn ranks(&self) -> usize {
        self.load.len()
    }

    /// Experts whose master is on rank `r`.
    pub(crate) fn experts_of(&self, r: usize) -> core::ops::Range<usize> {
        self.masters[r] as usize..self.masters[r + 1] as usize
    }

    /// Most tokens on rank `r` at threshold `tau`.
    pub(crate) fn capacity(&self, r: usize, tau: u32) -> u32 {
        if self.uniform { tau } else { (u64::from(tau) * u64::from(self.speed[r]) / u64::from(FULL_SPEED)) as u32 }
    }

    /// Load `tokens` of rank `r` in units of the threshold: `ceil(tokens * FULL_SPEED / speed)`, at most `u32::MAX`.
    pub(crate) fn weigh(&self, r: usize, tokens: u32) -> u32 {
        if self.uniform {
            return tokens;
        }
        let weighed = (u64::from(tokens) * u64::from(FULL_SPEED)).div_ceil(u64::from(self.speed[r]));
        u32::try_from(weighed).unwrap_or(u32::MAX)
    }

    /// Largest weighed rank load before balancing.
    pub(crate) fn largest(&self) -> u32 {
        (0..self.ranks()).map(|r| self.weigh(r, self.load[r])).max().unwrap_or(0)
    }

    /// The largest threshold within `beta` times the mean: `total * FULL_SPEED * beta / speeds`, rounded down.
    pub(crate) fn target(&self, beta: Ratio) -> u32 {
        beta.of_mean_floor(u64::from(self.total) * u64::from(FULL_SPEED), self.speeds())
    }

    /// Sum of speeds: the mean threshold is `total * FULL_SPEED / speeds`.
    pub(crate) fn speeds(&self) -> u64 {
        self.speed.iter().map(|&s| u64::from(s)).sum()
    }

    /// A threshold below which no plan exists.
    ///
    /// Whatever the plan, rank `r` ends with at most `load[r] + T[r]`, where `T[r]` is the sum of the loads of the `slots[r]`
    /// largest experts (of those that `u_min` lets travel at all), and with at least what cannot leave it: the experts
    /// below `u_min`, and all but as many of its largest experts as there are slots elsewhere. Hence, for a plan at `tau`,
    ///
    /// ```text
    /// for all r:  stays[r] <= capacity[r](tau)          total <= sum over r of min(capacity[r](tau), load[r] + T[r])
    /// ```
    ///
    /// Both are monotone in `tau`; the bound is the least `tau` that fulfils them.
    pub(crate) fn lower_bound(&self) -> u32 {
        let mean = (u64::from(self.total) * u64::from(FULL_SPEED)).div_ceil(self.speeds());
        let mean = u32::try_from(mean).unwrap_or(u32::MAX);
        if self.mean_is_plain(mean) {
            return mean;
        }
        let mut top = Top::default();
        let room: usize = self.slots.iter().map(|&s| usize::from(s)).sum();
        let most_slots = self.slots.iter().copied().max().unwrap_or(0) as usize;
        self.experts.iter().filter(|&&l| l >= self.min_quota).for_each(|&l| top.add(l, most_slots));
        let holds = |r: usize| u64::from(self.load[r]) + top.sum(self.slots[r] as usize);
        let stays = (0..self.ranks()).map(|r| self.weigh(r, self.stays(r, room - self.slots[r] as usize)));
        let mut low = stays.max().unwrap_or(0);
        low = low.max(mean);
        let reached = |tau: u32| {
            let most: u64 = (0..self.ranks()).map(|r| u64::from(self.capacity(r, tau)).min(holds(r))).sum();
            most >= u64::from(self.total)
        };
        let mut high = self.largest().max(low);
        if reached(low) {
            return low;
        }
        while low < high {
            let middle = low + (high - low) / 2;
            if reached(middle) { high = middle } else { low = middle + 1 }
        }
        high
    }

    /// Whether both conditions hold at the mean for a plain reason: every expert but the smallest can travel, and every
    /// rank with room has a slot for the largest expert, which fills it.
    fn mean_is_plain(&self, mean: u32) -> bool {
        let room: usize = self.slots.iter().map(|&s| usize::from(s)).sum();
        let largest = self.experts.iter().copied().max().unwrap_or(0);
        let least = (0..self.ranks()).map(|r| self.capacity(r, mean)).min().unwrap_or(0);
        let masters = self.masters.windows(2).map(|m| m[1] - m[0]).max().unwrap_or(0);
        let most_slots = self.slots.iter().copied().max().unwrap_or(0);
        room >= usize::from(masters + most_slots)
            && u64::from(masters) * u64::from(self.min_quota - 1) <= u64::from(least)
            && largest >= self.min_quota
            && (0..self.ranks()).all(|r| {
                let (capacity, load) = (self.capacity(r, mean), self.load[r]);
                load >= capacity || (self.slots[r] > 0 && largest >= capacity - load)
            })
    }

    /// Tokens that cannot leave rank `r` when others have `room` slots.
    fn stays(&self, r: usize, room: usize) -> u32 {
        let experts = &self.experts[self.experts_of(r)];
        if room >= experts.len() {
            // Every expert can travel, if `u_min` lets it.
            return experts.iter().filter(|&&l| l < self.min_quota).sum();
        }
        let mut top = Top::default();
        experts.iter().filter(|&&l| l >= self.min_quota).for_each(|&l| top.add(l, room.min(MAX_SLOTS)));
        match room <= MAX_SLOTS {
            true => self.load[r] - top.sum(room) as u32,
            false => experts.iter().filter(|&&l| l < self.min_quota).sum(),
        }
    }
}

/// The largest numbers seen, largest first.
#[derive(Clone, Debug)]
struct Top {
    values: [u32; MAX_SLOTS],
    used: usize,
}

impl Default for Top {
    fn default() -> Self {
        Self { values: [0; MAX_SLOTS], used: 0 }
    }
}

impl Top {
    /// Keeps `value` if it is among the `most` largest.
    fn add(&mut self, value: u32, most: usize) {
        if self.used == most {
            if most == 0 || value <= self.values[most - 1] {
                return;
            }
            self.used -= 1;
        }
        let at = self.values[..self.used].partition_point(|&v| v >= value);
        self.values.copy_within(at..self.used, at + 1);
        self.values[at] = value;
        self.used += 1;
    }

    /// Sum of the `count` largest.
    fn sum(&self, count: usize) -> u64 {
        self.values[..count.min(self.used)].iter().map(|&v| u64::from(v)).sum()
    }
}
