//! One reader a format.

pub(crate) mod expert_counts;
pub(crate) mod matrices;
pub(crate) mod moe_beyond;
pub(crate) mod uet;
pub(crate) mod vllm;
