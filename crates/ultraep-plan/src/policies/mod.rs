//! The policies of this crate. Others live in `ultraep-baselines`; all go through [`crate::Policy`].

mod greedy;
mod none;
mod probe;
mod ultraep;
mod ultraep_v1;

pub use greedy::{Greedy, GreedyParams};
pub use none::Unbalanced;
pub use ultraep::{Ultraep, UltraepParams};
pub use ultraep_v1::{UltraepV1, UltraepV1Params, V1Path};
