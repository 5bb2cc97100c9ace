//! How an expert's weights lie in memory: which tensors, of which elements, and where a framework has them.
//!
//! An expert is a list of shards (tensors): fc1 and fc2, and with FP8 weights their scales, which travel along. A master
//! stays where the framework registered it: each shard in a region of its own or in a shared one, rows at a stride. A replica
//! is *packed*: its shards lie one after another in the slot, rows without gaps, each shard on a 64-byte line. Byte ranges
//! of the packed form are what tiles and chunks are cut from, so a relay forwards what it has without knowing its master.

use crate::Region;
use core::fmt;
use core::str::FromStr;

/// Shards of a packed expert start at multiples of it, and slots have multiples of it.
pub const SHARD_ALIGN: usize = 64;

/// What a tensor is made of. The engine moves bits and never looks at values, except that it adds `f32` gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// bfloat16.
    Bf16,
    /// IEEE binary16.
    F16,
    /// IEEE binary32.
    F32,
    /// FP8 with 4 bits of exponent and 3 of mantissa (OCP OFP8).
    E4m3,
    /// A power of two as 8 bits of exponent, the scale of OCP microscaling (MX) formats.
    E8m0,
}

impl Element {
    /// Bytes of one element.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::E4m3 | Self::E8m0 => 1,
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }
}

/// One tensor of an expert: `[rows, columns]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// Its elements.
    pub element: Element,
    /// Rows.
    pub rows: usize,
    /// Elements of a row.
    pub columns: usize,
}

impl Shard {
    /// A tensor of `rows` rows.
    #[must_use]
    pub const fn new(element: Element, rows: usize, columns: usize) -> Self {
        Self { element, rows, columns }
    }

    fn row_bytes(&self) -> Option<usize> {
        self.columns.checked_mul(self.element.bytes())
    }
}

/// The tensors of an expert, the same for all experts of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertLayout {
    shards: Vec<PackedShard>,
    bytes: usize,
}

/// A shard and its place in the packed form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PackedShard {
    pub(crate) element: Element,
    pub(crate) start: usize,
    pub(crate) rows: usize,
    pub(crate) row_bytes: usize,
}

impl PackedShard {
    pub(crate) fn bytes(&self) -> usize {
        self.rows * self.row_bytes
    }
}

/// Why a layout or masters were refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// No bytes, or more than there are addresses.
    #[error("an expert of {shards} shards: it must have at least one byte, and fewer than the address space")]
    Size {
        /// Shards of the expert.
        shards: usize,
    },
    /// Another number of shards.
    #[error("masters have {got} shards, the layout has {expected}")]
    Shards {
        /// What was given.
        got: usize,
        /// What the layout has.
        expected: usize,
    },
    /// Rows that overlap.
    #[error("shard {shard}: rows of {row_bytes} bytes at a stride of {row_stride}")]
    Stride {
        /// Which shard.
        shard: usize,
        /// Bytes of a row.
        row_bytes: usize,
        /// Bytes from row to row.
        row_stride: usize,
    },
    /// A master that does not lie within its region.
    #[error("shard {shard} of master {expert} ends at byte {end}, its region has {bytes}")]
    Region {
        /// Which shard.
        shard: usize,
        /// Which of the rank's masters.
        expert: usize,
        /// Where it ends.
        end: usize,
        /// What the region has.
        bytes: usize,
    },
    /// Gradients that are not `f32`.
    #[error("shard {shard}: gradients are added as f32, this shard has {element:?}")]
    Gradient {
        /// Which shard.
        shard: usize,
        /// Its elements.
        element: Element,
    },
}

impl ExpertLayout {
    /// Of these shards, in this order.
    ///
    /// # Errors
    /// [`LayoutError::Size`].
    pub fn new(shards: &[Shard]) -> Result<Self, LayoutError> {
        let refused = || LayoutError::Size { shards: shards.len() };
        let mut layout = Self { shards: Vec::with_capacity(shards.len()), bytes: 0 };
        for shard in shards {
            let row_bytes = shard.row_bytes().ok_or_else(refused)?;
            let start = layout.bytes.checked_next_multiple_of(SHARD_ALIGN).ok_or_else(refused)?;
            let bytes = row_bytes.checked_mul(shard.rows).ok_or_else(refused)?;
            layout.bytes = start.checked_add(bytes).filter(|&end| isize::try_from(end).is_ok()).ok_or_else(refused)?;
            layout.shards.push(PackedShard { element: shard.element, start, rows: shard.rows, row_bytes });
        }
        if layout.bytes == 0 { Err(refused()) } else { Ok(layout) }
    }

    /// Bytes of the packed form.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Bytes from slot to slot.
    #[must_use]
    pub fn slot_bytes(&self) -> usize {
        self.bytes.next_multiple_of(SHARD_ALIGN)
    }

    /// Number of shards.
    #[must_use]
    pub fn shards(&self) -> usize {
        self.shards.len()
    }

    /// Where a shard lies in the packed form, in bytes.
    #[must_use]
    pub fn range(&self, shard: usize) -> core::ops::Range<usize> {
        let shard = &self.shards[shard];
        shard.start..shard.start + shard.bytes()
    }

    pub(crate) fn packed(&self) -> &[PackedShard] {
        &self.shards
    }

    /// That gradients of this layout can be added.
    pub(crate) fn check_gradients(&self) -> Result<(), LayoutError> {
        match self.shards.iter().enumerate().find(|(_, shard)| shard.element != Element::F32) {
            Some((shard, found)) => Err(LayoutError::Gradient { shard, element: found.element }),
            None => Ok(()),
        }
    }
}

/// Formats of weights that users pick from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum WeightFormat {
    /// bfloat16.
    #[default]
    Bf16,
    /// IEEE binary16.
    F16,
    /// IEEE binary32.
    F32,
    /// FP8 e4m3 with an `f32` scale for each block of 128 x 128 weights.
    Fp8F32Scales,
    /// FP8 e4m3 with an e8m0 scale for each 32 weights of a row (OCP MXFP8).
    Fp8E8m0Scales,
}

impl WeightFormat {
    /// Every format, in the order in which help texts list them.
    pub const ALL: [Self; 5] = [Self::Bf16, Self::F16, Self::F32, Self::Fp8F32Scales, Self::Fp8E8m0Scales];

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::F32 => "f32",
            Self::Fp8F32Scales => "fp8-f32",
            Self::Fp8E8m0Scales => "fp8-e8m0",
        }
    }

    /// The shards of a SwiGLU expert: fc1 `[2 intermediate, hidden]`, fc2 `[hidden, intermediate]`, each followed by its
    /// scales where the format has them.
    #[must_use]
    pub fn shards(self, hidden: usize, intermediate: usize) -> Vec<Shard> {
        let weights = match self {
            Self::Bf16 => Element::Bf16,
            Self::F16 => Element::F16,
            Self::F32 => Element::F32,
            Self::Fp8F32Scales | Self::Fp8E8m0Scales => Element::E4m3,
        };
        let with_scales = |rows: usize, columns: usize| {
            let scales = match self {
                Self::Fp8F32Scales => Some(Shard::new(Element::F32, rows.div_ceil(128), columns.div_ceil(128))),
                Self::Fp8E8m0Scales => Some(Shard::new(Element::E8m0, rows, columns.div_ceil(32))),
                Self::Bf16 | Self::F16 | Self::F32 => None,
            };
            [Some(Shard::new(weights, rows, columns)), scales].into_iter().flatten()
        };
        with_scales(2 * intermediate, hidden).chain(with_scales(hidden, intermediate)).collect()
    }
}

impl fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that is no format.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no format is called `{0}`: allowed are bf16, f16, f32, fp8-f32 and fp8-e8m0")]
pub struct UnknownFormat(pub String);

impl FromStr for WeightFormat {
    type Err = UnknownFormat;

    fn from_str(name: &str) -> Result<Self, UnknownFormat> {
        Self::ALL.into_iter().find(|format| format.name() == name).ok_or_else(|| UnknownFormat(name.to_owned()))
    }
}

/// Where one shard of a rank's masters is, when they lie at one stride in one region.
#[derive(Clone, Debug)]
pub struct MasterShard {
    /// The framework's memory.
    pub region: Region,
    /// First byte of the first master.
    pub offset: usize,
    /// Bytes from master to master.
    pub expert_stride: usize,
    /// Bytes from row to row.
    pub row_stride: usize,
}

/// Where one tensor of one master is.
#[derive(Clone, Debug)]
pub struct MasterTensor {
    /// The framework's memory.
    pub region: Region,
    /// Its first byte.
    pub offset: usize,
    /// Bytes from row to row.
    pub row_stride: usize,
}

/// A rank's masters of one layer, as registered: weights, or gradients. They stay where the framework has them: one tensor each,
/// packed, at strides, in one region or in many.
#[derive(Clone, Debug)]
pub struct Masters {
    /// `[experts][shards]`.
    experts: Vec<Vec<MasterTensor>>,
}

impl Masters {
    /// One tensor for each shard of each master, `[experts][shards]`.
    ///
    /// # Errors
    /// [`LayoutError`] when a tensor does not lie within its region, rows overlap, or shards are missing.
    pub fn tensors(layout: &ExpertLayout, experts: Vec<Vec<MasterTensor>>) -> Result<Self, LayoutError> {
        for (expert, tensors) in experts.iter().enumerate() {
            if tensors.len() != layout.shards() {
                return Err(LayoutError::Shards { got: tensors.len(), expected: layout.shards() });
            }
            for (shard, (packed, tensor)) in layout.packed().iter().zip(tensors).enumerate() {
                let PackedShard { rows, row_bytes, .. } = *packed;
                if rows > 1 && tensor.row_stride < row_bytes {
                    return Err(LayoutError::Stride { shard, row_bytes, row_stride: tensor.row_stride });
                }
                let last_row = rows.saturating_sub(1).checked_mul(tensor.row_stride);
                let end = last_row.and_then(|last| last.checked_add(row_bytes)?.checked_add(tensor.offset));
                let (end, bytes) = (end.unwrap_or(usize::MAX), tensor.region.bytes());
                if rows > 0 && end > bytes {
                    return Err(LayoutError::Region { shard, expert, end, bytes });
                }
            }
        }
        Ok(Self { experts })
    }

    /// `experts` masters at a stride; one entry for each shard of the layout.
    ///
    /// # Errors
    /// As for [`Masters::tensors`].
    pub fn new(layout: &ExpertLayout, experts: usize, shards: Vec<MasterShard>) -> Result<Self, LayoutError> {
        if shards.len() != layout.shards() {
            return Err(LayoutError::Shards { got: shards.len(), expected: layout.shards() });
        }
        let tensor = |shard: &MasterShard, expert: usize| {
            let offset = expert.checked_mul(shard.expert_stride).and_then(|step| step.checked_add(shard.offset));
            // An offset that no address has is refused as one beyond the region.
            let offset = offset.unwrap_or(usize::MAX);
            MasterTensor { region: shard.region.clone(), offset, row_stride: shard.row_stride }
        };
        let of = |expert: usize| shards.iter().map(|shard| tensor(shard, expert)).collect();
        Self::tensors(layout, (0..experts).map(of).collect())
    }

    /// `experts` masters packed one after another in one region, `stride` bytes from one to the next.
    ///
    /// # Errors
    /// As for [`Masters::tensors`].
    pub fn packed(layout: &ExpertLayout, experts: usize, region: &Region, stride: usize) -> Result<Self, LayoutError> {
        let of = |shard: &PackedShard| MasterShard {
            region: region.clone(),
            offset: shard.start,
            expert_stride: stride,
            row_stride: shard.row_bytes,
        };
        Self::new(layout, experts, layout.packed().iter().map(of).collect())
    }

    /// Number of masters.
    #[must_use]
    pub fn experts(&self) -> usize {
        self.experts.len()
    }

    /// Where the tensors of the n-th master are, `[shards]`; none for a master that there is not.
    #[must_use]
    pub fn of(&self, expert: usize) -> &[MasterTensor] {
        self.experts.get(expert).map_or(&[], Vec::as_slice)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_lie_on_lines_of_their_own_and_scales_travel_along() {
        let layout = ExpertLayout::new(&WeightFormat::Fp8E8m0Scales.shards(48, 10)).expect("it fits");
        // fc1 [20, 48], its scales [20, 2], fc2 [48, 10], its scales [48, 1].
        let ranges: Vec<_> = (0..layout.shards()).map(|shard| layout.range(shard)).collect();
        assert_eq!(ranges, [0..960, 960..1000, 1024..1504, 1536..1584]);
        assert_eq!((layout.bytes(), layout.slot_bytes()), (1584, 1600));
        let blocks = ExpertLayout::new(&WeightFormat::Fp8F32Scales.shards(256, 128)).expect("it fits");
        assert_eq!(blocks.range(1).len(), 2 * 2 * 4);
        for format in WeightFormat::ALL {
            assert_eq!(format.name().parse(), Ok(format));
        }
        assert_eq!("fp8".parse::<WeightFormat>(), Err(UnknownFormat("fp8".to_owned())));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        assert_eq!(ExpertLayout::new(&[]), Err(LayoutError::Size { shards: 0 }));
        let huge = Shard::new(Element::F32, usize::MAX / 2, 2);
        assert_eq!(ExpertLayout::new(&[huge]), Err(LayoutError::Size { shards: 1 }));
        let layout = ExpertLayout::new(&[Shard::new(Element::Bf16, 4, 8)]).expect("it fits");
        let region = Region::zeroed(200);
        let of = |offset, expert_stride, row_stride| {
            let shard = MasterShard { region: region.clone(), offset, expert_stride, row_stride };
            Masters::new(&layout, 2, vec![shard]).map(|masters| masters.experts())
        };
        assert_eq!(of(0, 100, 20), Ok(2));
        assert_eq!(of(24, 100, 20), Ok(2));
        assert_eq!(of(25, 100, 20), Err(LayoutError::Region { shard: 0, expert: 1, end: 201, bytes: 200 }));
        assert!(matches!(of(0, usize::MAX, 20), Err(LayoutError::Region { .. })));
        assert_eq!(of(0, 100, 15), Err(LayoutError::Stride { shard: 0, row_bytes: 16, row_stride: 15 }));
        assert!(matches!(Masters::new(&layout, 1, vec![]), Err(LayoutError::Shards { got: 0, expected: 1 })));
        assert!(matches!(layout.check_gradients(), Err(LayoutError::Gradient { element: Element::Bf16, .. })));
    }
}
