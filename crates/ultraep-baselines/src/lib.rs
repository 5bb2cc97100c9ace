//! The policies that UltraEP is compared with, and the factory over every policy of the project.
//!
//! What it is for: fair comparison. All policies see the same problem, return the same kind of plan, are checked by the
//! same checker and reported by the same code; what a baseline does differently (masters that move, two copies on one
//! rank, placement from history, no slot limit) shows in its [`PlanRules`](ultraep_plan::PlanRules) and in its plan.
//!
//! What it must never do: let two ranks disagree. Every choice that shapes a plan is made on integers with a written
//! order; the one float solver (`lplb`'s linear program) runs the same operations in the same order on every rank.

#![forbid(unsafe_code)]

mod draft;
mod eplb;
mod eplb_exact;
mod heuristic;
mod history;
pub mod ideal;
mod kind;
mod llep;
mod lplb;
mod masters;
mod moonep;
mod placer;

pub use eplb::{Eplb, EplbParams};
pub use eplb_exact::EplbExact;
pub use heuristic::{LOAD_UNIT, load_a_copy};
pub use history::{History, HistoryParams};
pub use kind::{BuildError, ParsePolicyError, PolicyKind, PolicyParams, Recipe, build, physical_per_rank, plan_for};
pub use llep::{Llep, LlepParams};
pub use lplb::{Lplb, LplbLinks, LplbParams};
pub use masters::MastersOnly;
pub use moonep::MoonEp;
pub use placer::{EplbPlacer, ExpertGroups, Region};
