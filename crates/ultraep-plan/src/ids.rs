//! Index newtypes. One number means one thing; conversions are spelled out.

macro_rules! index_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $name(u16);

        impl $name {
            /// The index `value`; the limits of the crate keep every index within 16 bits.
            ///
            /// # Panics
            /// When `value` exceeds 65,535: a bug of the caller, not bad input (input is checked where it is parsed).
            #[inline]
            pub const fn new(value: usize) -> Self {
                assert!(value <= u16::MAX as usize, "index over 65,535");
                Self(value as u16)
            }

            /// As a `usize`, to index an array.
            #[inline]
            pub const fn index(self) -> usize {
                self.0 as usize
            }
        }

        impl core::fmt::Display for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                core::fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

index_type! {
    /// One member of the EP group, `0..N`.
    Rank
}
index_type! {
    /// A logical expert of the model, `0..E`.
    Expert
}
index_type! {
    /// Ranks joined by one scale-up fabric, `0..N/G`.
    Domain
}
index_type! {
    /// Index of a physical expert on its rank: masters first, then slots.
    PhysicalIndex
}
