//! The engine's instructions without the engine: what a plain loop over two slices takes. For measuring how near the engine
//! comes to what the machine's memory can do.

use super::kernel::{self, Stores, Vectors};

/// How a plain loop copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlainCopy {
    /// The standard library's copy of slices.
    Memcpy,
    /// The engine's cached stores.
    Cached,
    /// The engine's streaming stores.
    Streaming,
}

impl PlainCopy {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Memcpy, Self::Cached, Self::Streaming];

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Memcpy => "memcpy",
            Self::Cached => "cached",
            Self::Streaming => "streaming",
        }
    }

    /// Copies `from` to each of `to` (all of one length), `tile` bytes of all at a time.
    ///
    /// # Panics
    /// When lengths differ: a bug of the caller.
    pub fn fan_out_words(self, from: &[f32], to: &mut [&mut [f32]], tile: usize) {
        let mut to: Vec<&mut [u8]> = to.iter_mut().map(|to| bytemuck::cast_slice_mut(to)).collect();
        self.fan_out(bytemuck::cast_slice(from), &mut to, tile);
    }

    fn fan_out(self, from: &[u8], to: &mut [&mut [u8]], tile: usize) {
        assert!(to.iter().all(|to| to.len() == from.len()), "slices of one length");
        let vectors = Vectors::detect();
        let mut done = 0;
        while done < from.len() {
            let end = from.len().min(done + tile.max(1));
            for to in to.iter_mut() {
                let (from, to) = (&from[done..end], &mut to[done..end]);
                let stores = match self {
                    Self::Memcpy => {
                        to.copy_from_slice(from);
                        continue;
                    }
                    Self::Cached => Stores::Cached,
                    Self::Streaming => Stores::Streaming,
                };
                // SAFETY: two slices of one length that do not overlap, as one is borrowed alone.
                unsafe { vectors.copy(from.as_ptr(), to.as_mut_ptr(), to.len(), stores) };
            }
            done = end;
        }
        if self == Self::Streaming {
            kernel::fence(Stores::Streaming);
        }
    }
}

/// Adds each of `parts` to `sum` in order and zeroes it (all of one length), `tile` values of all at a time, with the engine's
/// instructions.
///
/// # Panics
/// When lengths differ: a bug of the caller.
pub fn plain_add_and_zero(sum: &mut [f32], parts: &mut [&mut [f32]], tile: usize) {
    assert!(parts.iter().all(|part| part.len() == sum.len()), "slices of one length");
    let vectors = Vectors::detect();
    let mut done = 0;
    while done < sum.len() {
        let end = sum.len().min(done + tile.max(1));
        for part in parts.iter_mut() {
            let (sum, part) = (&mut sum[done..end], &mut part[done..end]);
            // SAFETY: two slices of one length, both borrowed alone.
            unsafe { vectors.add_and_zero(sum.as_mut_ptr(), part.as_mut_ptr(), sum.len()) };
        }
        done = end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_loops_do_what_they_say() {
        let from: Vec<f32> = (0..1000).map(|i| i as f32).collect();
        for how in PlainCopy::ALL {
            let (mut a, mut b) = (vec![0.0; 1000], vec![1.0; 1000]);
            how.fan_out_words(&from, &mut [&mut a, &mut b], 300);
            assert!(a == from && b == from, "{}", how.name());
        }
        let (mut sum, mut a, mut b) = (vec![1.0; 100], vec![2.0; 100], vec![3.0; 100]);
        plain_add_and_zero(&mut sum, &mut [&mut a, &mut b], 33);
        assert!(sum.iter().all(|&v| v == 6.0) && a.iter().chain(&b).all(|&v| v == 0.0));
    }
}
