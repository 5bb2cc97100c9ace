//! Replays: what a policy would have made of a recorded load, over a whole recording or for one microbatch.
//!
//! What it is for: [`replay`] runs [`Scenario`]s over every microbatch of a recording and sums them up as [`Outcomes`];
//! [`replan`] plans one microbatch with other settings and keeps everything that a picture of it needs; [`Hardware`] reads
//! what a machine can do, from which times are predicted. The commands `replay`, `plan` and `compare`, the viewer and the
//! report use it.
//!
//! What it must never do: print, read the environment or a clock. Time comes in as a function ([`NowNs`]), [`untimed`] where
//! nobody asks for it, and no result but solve times depends on it. The only files it opens are hardware files that the user
//! names. Every plan is checked before anything is said about it.
#![forbid(unsafe_code)]

mod anatomy;
mod break_even;
mod engine;
mod evaluate;
mod hardware;
mod outcome;
mod quota;
mod replan;

pub use anatomy::{Anatomy, AnatomyError, Planned, imbalance, plan_of_record};
pub use break_even::break_even;
pub use engine::{ReplayError, Scenario, replay};
pub use evaluate::{EvaluateError, Evaluated, Evaluator, Finer, NowNs, quotient, untimed};
pub use hardware::{ExpertShape, Hardware, HardwareError};
pub use outcome::{Distribution, Outcomes, Series, Worst};
pub use quota::{LeastQuota, ParseLeastQuotaError};
pub use replan::{Replan, ReplanError, replan};
