//! One reader a format.

pub(crate) mod arrays;
pub(crate) mod calls;
pub(crate) mod counters;
pub(crate) mod expert_counts;
pub(crate) mod flame;
pub(crate) mod harmoeny;
pub(crate) mod ids;
pub(crate) mod matrices;
pub(crate) mod mcore_dump;
pub(crate) mod megatron;
pub(crate) mod moe_beyond;
pub(crate) mod passes;
pub(crate) mod sglang;
pub(crate) mod table;
pub(crate) mod tensorrt;
pub(crate) mod uet;
pub(crate) mod uet_parquet;
pub(crate) mod ultraep_v1;
pub(crate) mod vllm;
