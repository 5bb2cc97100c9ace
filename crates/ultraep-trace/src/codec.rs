//! Records to bytes and back.
//!
//! Layout of one record (varints are LEB128, `z` is zigzag):
//!
//! ```text
//! step - step of the record before in the block (of the first: - first_step of the block)      varint
//! microbatch, layer                                                                           varint each
//! flags: 1 plan, 2 split, 4 top-k ids                                                         one byte
//! counts, row of rank 0                                                                       E varints
//! counts, row of rank r: z(count - count of rank r-1 for the same expert)                     (N-1) * E varints
//! plan:  policy length, policy, digest (8 bytes, little-endian)
//!        for each expert: number of instances; of each: rank, physical index, quota           varints
//! split: for each expert with k > 1 instances, each instance but the last: N values           varints
//! ids:   tokens of each rank (N varints), then id + 1, 0 for none                             varints
//! ```
//!
//! Neighbouring ranks draw from similar text, so differences of rows are short. The last instance's share of a split, and
//! the only instance's, follow from the counts and are not stored. Cost: O(values) both ways.

use ultraep_plan::{Instance, MAX_TOKENS, PhysicalIndex, Rank};

use crate::record::{MAX_POLICY_BYTES, NO_EXPERT, PlanRecord, Record, TopKIds};
use crate::{RecordError, TraceMeta};

/// Longest varint of a record's length: lengths stay below a block's limit of 32 MiB.
pub(crate) const LENGTH_BYTES_MAX: usize = 4;
const FLAG_PLAN: u8 = 1;
const FLAG_SPLIT: u8 = 2;
const FLAG_TOP_K: u8 = 4;

/// Why bytes are no record.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// The bytes end within a value.
    #[error("the record ends within {0}")]
    Short(&'static str),
    /// A number too large for its field.
    #[error("{0} is out of range")]
    Range(&'static str),
    /// Flags that this version does not know.
    #[error("unknown flags {0:#x}")]
    Flags(u8),
    /// A policy name that is not UTF-8.
    #[error("the policy name is not UTF-8")]
    Policy,
    /// Bytes behind the last value.
    #[error("{0} bytes too many")]
    Trailing(usize),
    /// Read, but not a record of this trace.
    #[error(transparent)]
    Record(#[from] RecordError),
}

pub(crate) fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80); // the low seven bits
        value >>= 7;
    }
    out.push(value as u8);
}

fn put_u32(out: &mut Vec<u8>, value: u32) {
    put_varint(out, u64::from(value));
}

fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)) as u64
}

fn unzigzag(value: u64) -> i64 {
    (value >> 1) as i64 ^ -((value & 1) as i64)
}

/// Appends a checked record.
pub(crate) fn encode(record: &Record, last_step: u64, meta: &TraceMeta, out: &mut Vec<u8>) {
    put_varint(out, record.step - last_step);
    put_u32(out, record.microbatch);
    put_u32(out, record.layer);
    let split = record.after.as_ref().and_then(|a| a.split.as_ref());
    let flag = |present: bool, flag: u8| if present { flag } else { 0 };
    out.push(
        flag(record.after.is_some(), FLAG_PLAN)
            | flag(split.is_some(), FLAG_SPLIT)
            | flag(record.top_k.is_some(), FLAG_TOP_K),
    );
    let (first, rest) = record.before.split_at(meta.experts);
    first.iter().for_each(|&count| put_u32(out, count));
    for (&count, &above) in rest.iter().zip(&record.before) {
        put_varint(out, zigzag(i64::from(count) - i64::from(above)));
    }
    if let Some(after) = &record.after {
        encode_plan(after, meta, out);
    }
    if let Some(top_k) = &record.top_k {
        top_k.tokens.iter().for_each(|&tokens| put_u32(out, tokens));
        top_k.ids.iter().for_each(|&id| put_u32(out, u32::from(id.wrapping_add(1)))); // NO_EXPERT becomes 0
    }
}

fn encode_plan(after: &PlanRecord, meta: &TraceMeta, out: &mut Vec<u8>) {
    put_varint(out, after.policy.len() as u64);
    out.extend_from_slice(after.policy.as_bytes());
    out.extend_from_slice(&after.digest.to_le_bytes());
    for expert in 0..meta.experts {
        let instances = &after.instances[after.range(expert)];
        put_varint(out, instances.len() as u64);
        for instance in instances {
            put_varint(out, instance.rank.index() as u64);
            put_varint(out, instance.physical.index() as u64);
            put_u32(out, instance.quota);
        }
    }
    if let Some(split) = &after.split {
        for expert in 0..meta.experts {
            let range = after.range(expert);
            for instance in range.start..range.end.saturating_sub(1).max(range.start) {
                split[instance..].iter().step_by(after.instances.len()).for_each(|&share| put_u32(out, share));
            }
        }
    }
}

/// Reads values from a record's bytes.
struct Cursor<'a> {
    bytes: &'a [u8],
}

impl<'a> Cursor<'a> {
    #[inline]
    fn varint(&mut self, what: &'static str) -> Result<u64, DecodeError> {
        match self.bytes.split_first() {
            Some((&byte, rest)) if byte < 0x80 => {
                self.bytes = rest;
                Ok(u64::from(byte))
            }
            _ => self.long_varint(what),
        }
    }

    fn long_varint(&mut self, what: &'static str) -> Result<u64, DecodeError> {
        let mut value = 0_u64;
        for (index, &byte) in self.bytes.iter().enumerate() {
            let bits = u64::from(byte & 0x7f);
            if index == 10 || (index == 9 && bits > 1) {
                return Err(DecodeError::Range(what));
            }
            value |= bits << (7 * index);
            if byte < 0x80 {
                self.bytes = &self.bytes[index + 1..];
                return Ok(value);
            }
        }
        Err(DecodeError::Short(what))
    }

    #[inline]
    fn u32(&mut self, what: &'static str) -> Result<u32, DecodeError> {
        u32::try_from(self.varint(what)?).map_err(|_| DecodeError::Range(what))
    }

    fn index(&mut self, what: &'static str) -> Result<usize, DecodeError> {
        u16::try_from(self.varint(what)?).map(usize::from).map_err(|_| DecodeError::Range(what))
    }

    fn take(&mut self, length: usize, what: &'static str) -> Result<&'a [u8], DecodeError> {
        let (taken, rest) = self.bytes.split_at_checked(length).ok_or(DecodeError::Short(what))?;
        self.bytes = rest;
        Ok(taken)
    }

    /// Refuses a count of values, each of `bytes_min` bytes at least, that the bytes left cannot hold: what bounds every
    /// allocation.
    fn expect(&self, count: usize, bytes_min: usize, what: &'static str) -> Result<(), DecodeError> {
        if count.checked_mul(bytes_min).is_some_and(|bytes| bytes <= self.bytes.len()) {
            Ok(())
        } else {
            Err(DecodeError::Short(what))
        }
    }
}

/// Reads a record into memory that is reused, and checks it. After an error its content is unspecified.
pub(crate) fn decode(bytes: &[u8], last_step: u64, meta: &TraceMeta, record: &mut Record) -> Result<(), DecodeError> {
    let mut cursor = Cursor { bytes };
    record.step = decode_step(bytes, last_step)?;
    cursor.varint("step")?;
    record.microbatch = cursor.u32("microbatch")?;
    record.layer = cursor.u32("layer")?;
    let flags = cursor.take(1, "flags")?[0];
    if flags > FLAG_PLAN + FLAG_SPLIT + FLAG_TOP_K || flags & (FLAG_PLAN | FLAG_SPLIT) == FLAG_SPLIT {
        return Err(DecodeError::Flags(flags));
    }
    decode_counts(&mut cursor, meta, &mut record.before)?;
    if flags & FLAG_PLAN == 0 {
        record.after = None;
    } else {
        let after = record.after.get_or_insert_default();
        decode_plan(&mut cursor, meta, after)?;
        if flags & FLAG_SPLIT == 0 {
            after.split = None;
        } else {
            decode_split(&mut cursor, meta, &record.before, after)?;
        }
    }
    if flags & FLAG_TOP_K == 0 {
        record.top_k = None;
    } else {
        decode_top_k(&mut cursor, meta, record.top_k.get_or_insert_default())?;
    }
    match cursor.bytes.len() {
        0 => Ok(record.check(meta)?),
        left => Err(DecodeError::Trailing(left)),
    }
}

/// Reads only the step of a record.
pub(crate) fn decode_step(bytes: &[u8], last_step: u64) -> Result<u64, DecodeError> {
    last_step.checked_add(Cursor { bytes }.varint("step")?).ok_or(DecodeError::Range("step"))
}

fn decode_counts(cursor: &mut Cursor<'_>, meta: &TraceMeta, counts: &mut Vec<u32>) -> Result<(), DecodeError> {
    cursor.expect(meta.counts(), 1, "counts")?;
    counts.clear();
    counts.reserve(meta.counts());
    for _ in 0..meta.experts {
        counts.push(cursor.u32("counts")?);
    }
    for index in 0..meta.counts() - meta.experts {
        let above = i64::from(counts[index]);
        let count = above.checked_add(unzigzag(cursor.varint("counts")?)).and_then(|c| u32::try_from(c).ok());
        counts.push(count.ok_or(DecodeError::Range("counts"))?);
    }
    Ok(())
}

fn decode_plan(cursor: &mut Cursor<'_>, meta: &TraceMeta, after: &mut PlanRecord) -> Result<(), DecodeError> {
    let name_bytes = cursor.varint("policy")?;
    if name_bytes > MAX_POLICY_BYTES as u64 {
        return Err(DecodeError::Range("policy"));
    }
    let name = cursor.take(name_bytes as usize, "policy")?;
    after.policy.clear();
    after.policy.push_str(std::str::from_utf8(name).map_err(|_| DecodeError::Policy)?);
    let digest = cursor.take(8, "digest")?;
    after.digest = digest.iter().rev().fold(0, |digest, &byte| digest << 8 | u64::from(byte));
    after.offsets.clear();
    after.offsets.push(0);
    after.instances.clear();
    for _ in 0..meta.experts {
        let count = cursor.varint("instances")?;
        if count > meta.ranks as u64 {
            return Err(DecodeError::Range("instances"));
        }
        cursor.expect(count as usize, 3, "instances")?;
        for _ in 0..count {
            let rank = Rank::new(cursor.index("rank of an instance")?);
            let physical = PhysicalIndex::new(cursor.index("physical index of an instance")?);
            let quota = cursor.u32("quota")?;
            after.instances.push(Instance { rank, physical, quota });
        }
        after.offsets.push(after.instances.len() as u32);
    }
    Ok(())
}

fn decode_split(
    cursor: &mut Cursor<'_>,
    meta: &TraceMeta,
    before: &[u32],
    after: &mut PlanRecord,
) -> Result<(), DecodeError> {
    let instances = after.instances.len();
    let stored: usize = (0..meta.experts).map(|e| after.range(e).len().saturating_sub(1)).sum();
    cursor.expect(stored * meta.ranks, 1, "split")?;
    let mut split = after.split.take().unwrap_or_default();
    split.clear();
    split.resize(meta.ranks * instances, 0);
    for expert in 0..meta.experts {
        let range = after.range(expert);
        let Some(last) = range.clone().next_back() else { continue };
        for source in 0..meta.ranks {
            split[source * instances + last] = before[source * meta.experts + expert];
        }
        for instance in range.start..last {
            for source in 0..meta.ranks {
                let share = cursor.u32("split")?;
                split[source * instances + instance] = share;
                let left = &mut split[source * instances + last];
                *left = left.checked_sub(share).ok_or(DecodeError::Range("split"))?;
            }
        }
    }
    after.split = Some(split);
    Ok(())
}

fn decode_top_k(cursor: &mut Cursor<'_>, meta: &TraceMeta, top_k: &mut TopKIds) -> Result<(), DecodeError> {
    let choices = meta.top_k.ok_or(RecordError::NoTopK)?;
    top_k.tokens.clear();
    let mut tokens = 0_u64;
    for _ in 0..meta.ranks {
        let of_rank = cursor.u32("tokens of sources")?;
        tokens += u64::from(of_rank);
        top_k.tokens.push(of_rank);
    }
    if tokens > u64::from(MAX_TOKENS) {
        return Err(RecordError::TooManyTokens(tokens).into());
    }
    let ids = (tokens as usize).checked_mul(choices).ok_or(DecodeError::Range("top-k ids"))?;
    cursor.expect(ids, 1, "top-k ids")?;
    top_k.ids.clear();
    top_k.ids.reserve(ids);
    for _ in 0..ids {
        let id = cursor.varint("top-k ids")?;
        let id = u16::try_from(id).map_err(|_| DecodeError::Range("top-k ids"))?;
        top_k.ids.push(if id == 0 { NO_EXPERT } else { id - 1 });
    }
    Ok(())
}
