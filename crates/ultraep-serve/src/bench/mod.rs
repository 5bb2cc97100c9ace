//! The offline benchmark: prefill under load on the virtual clock, all policies over the same recorded routing.
//!
//! ```text
//! prompts of real text ──► record routing (the model, once) ──┐
//! kernels of this machine ──► costs (once, kept in the result) ┼─► simulate: arrivals, scheduler, replayed batches
//! settings, policies ─────────────────────────────────────────┘        by policy and rate ──► table, JSON, plot
//! ```

mod check;
mod costs;
mod prompts;
mod replay;
mod result;
mod routing;
mod sweep;

pub use check::{SpotCheck, spot_check};
pub use costs::{COSTS_SCHEMA, Costs, Curve};
pub use prompts::{Mix, Prompt, PromptSpec, prompts};
pub use replay::{Balance, PolicySettings, Replay, World, sample_loads};
pub use result::{BENCH_SCHEMA, Bound, PolicyResult, PoolSummary, PrefillBench, RatePoint};
pub use routing::{RecordedPrompt, record};
pub use sweep::{SweepSpec, sweep};
