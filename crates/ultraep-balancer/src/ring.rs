//! The ring of virtual layers: what a forward leaves for its backward.

use std::fmt;

use crate::BalancerError;

/// (layer, microbatch): the key under which a forward's plan is kept until its backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VirtualLayer {
    /// MoE layer, from 0.
    pub layer: usize,
    /// Number of the microbatch. Any number: the ring finds a free place for it.
    pub microbatch: u64,
}

impl fmt::Display for VirtualLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "layer {}, microbatch {}", self.layer, self.microbatch)
    }
}

/// `max_microbatches` places a layer, each with a `T` whose memory is reused.
#[derive(Debug)]
pub(crate) struct Ring<T> {
    places: Vec<Place<T>>,
    max_microbatches: usize,
    claims: u64,
}

#[derive(Debug)]
struct Place<T> {
    microbatch: Option<u64>,
    /// The how-manieth claim took it.
    claimed: u64,
    content: T,
}

impl<T> Ring<T> {
    /// `max_microbatches` (at least 1) places for each of `layers` layers.
    pub(crate) fn new(layers: usize, max_microbatches: usize, mut make: impl FnMut() -> T) -> Self {
        let places = (0..layers * max_microbatches.max(1))
            .map(|_| Place { microbatch: None, claimed: 0, content: make() })
            .collect();
        Self { places, max_microbatches: max_microbatches.max(1), claims: 0 }
    }

    fn layer(&self, layer: usize) -> Result<std::ops::Range<usize>, BalancerError> {
        let layers = self.places.len() / self.max_microbatches;
        if layer >= layers {
            return Err(BalancerError::Layer { layer, layers });
        }
        Ok(layer * self.max_microbatches..(layer + 1) * self.max_microbatches)
    }

    fn find(&self, at: VirtualLayer) -> Result<Option<usize>, BalancerError> {
        Ok(self.layer(at.layer)?.find(|&i| self.places[i].microbatch == Some(at.microbatch)))
    }

    /// Takes a free place for a forward. A second forward of the same virtual layer without a backward between them is
    /// an error too: it would drop the first one's plan.
    ///
    /// # Errors
    /// [`BalancerError::RingExhausted`], [`BalancerError::InFlight`], [`BalancerError::Layer`].
    pub(crate) fn claim(&mut self, at: VirtualLayer) -> Result<usize, BalancerError> {
        let exhausted = BalancerError::RingExhausted { at, max_microbatches: self.max_microbatches };
        if self.find(at)?.is_some() {
            return Err(BalancerError::InFlight { at });
        }
        let free = self.layer(at.layer)?.find(|&i| self.places[i].microbatch.is_none());
        let index = free.ok_or(exhausted)?;
        self.claims += 1;
        (self.places[index].microbatch, self.places[index].claimed) = (Some(at.microbatch), self.claims);
        Ok(index)
    }

    /// As [`Ring::claim`], but when all places are taken the one that was claimed first is taken over: a ring without explicit release.
    ///
    /// # Errors
    /// As for [`Ring::claim`], without the first.
    pub(crate) fn claim_oldest(&mut self, at: VirtualLayer) -> Result<usize, BalancerError> {
        if self.find(at)?.is_none() && self.layer(at.layer)?.all(|i| self.places[i].microbatch.is_some()) {
            let oldest = self.layer(at.layer)?.min_by_key(|&i| self.places[i].claimed);
            oldest.into_iter().for_each(|index| self.release(index));
        }
        self.claim(at)
    }

    /// The place that a forward left.
    ///
    /// # Errors
    /// [`BalancerError::NoPlan`], [`BalancerError::Layer`].
    pub(crate) fn kept(&self, at: VirtualLayer) -> Result<usize, BalancerError> {
        self.find(at)?.ok_or(BalancerError::NoPlan { at })
    }

    /// Frees a place.
    pub(crate) fn release(&mut self, index: usize) {
        self.places[index].microbatch = None;
    }

    /// Frees all places: what was in flight is forgotten.
    pub(crate) fn clear(&mut self) {
        self.places.iter_mut().for_each(|place| place.microbatch = None);
    }

    /// What is kept at a place.
    pub(crate) fn get(&self, index: usize) -> &T {
        &self.places[index].content
    }

    /// What is kept at a place, to change it.
    pub(crate) fn get_mut(&mut self, index: usize) -> &mut T {
        &mut self.places[index].content
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(layer: usize, microbatch: u64) -> VirtualLayer {
        VirtualLayer { layer, microbatch }
    }

    #[test]
    fn interleaved_and_1f1b_orders_find_their_plans() {
        let mut ring = Ring::new(2, 2, || ());
        let a = ring.claim(at(0, 10)).unwrap();
        let b = ring.claim(at(0, 11)).unwrap();
        let c = ring.claim(at(1, 10)).unwrap();
        assert_eq!(ring.kept(at(0, 11)).unwrap(), b);
        ring.release(a);
        let d = ring.claim(at(0, 12)).unwrap();
        assert_eq!(d, a);
        assert_eq!(ring.kept(at(1, 10)).unwrap(), c);
    }

    #[test]
    fn exhaustion_and_absence_name_the_layer() {
        let mut ring = Ring::new(2, 1, || ());
        ring.claim(at(1, 0)).unwrap();
        let message = ring.claim(at(1, 1)).unwrap_err().to_string();
        assert!(message.contains("layer 1") && message.contains("all 1 microbatches"), "{message}");
        assert!(matches!(ring.claim(at(1, 0)), Err(BalancerError::InFlight { .. })));
        assert!(matches!(ring.kept(at(0, 0)), Err(BalancerError::NoPlan { .. })));
        assert!(matches!(ring.claim(at(2, 0)), Err(BalancerError::Layer { layer: 2, layers: 2 })));
    }

    #[test]
    fn a_ring_without_release_forgets_the_oldest() {
        let mut ring = Ring::new(1, 2, || ());
        for microbatch in 0..5 {
            ring.claim_oldest(at(0, microbatch)).unwrap();
        }
        assert!(ring.kept(at(0, 4)).is_ok() && ring.kept(at(0, 3)).is_ok());
        assert!(matches!(ring.kept(at(0, 2)), Err(BalancerError::NoPlan { .. })));
        assert!(matches!(ring.claim_oldest(at(0, 4)), Err(BalancerError::InFlight { .. })));
    }
}
