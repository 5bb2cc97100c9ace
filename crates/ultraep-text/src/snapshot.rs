//! A corpus as one stream of bytes: how a launcher hands the text it found to rank processes, so that all have the same
//! text though files may change meanwhile, and only one of them searches for it.
//!
//! ```text
//! "UETEXT2\n", domain_count u32, then for each domain: name, origin, files u64, bytes;
//! source_count u32, then for each source: domain u32, path, bytes u64, digest u64; at the end the digest of the text u64
//! ```
//!
//! Numbers are little-endian; strings and bytes come behind their length as u64. A path that is not UTF-8 is written with
//! replacement characters. A run keeps its text in this form, too.

use std::io::{Read, Write};

use crate::{Corpus, TextDomain, TextError, TextSource};

const MAGIC: [u8; 8] = *b"UETEXT2\n";
const DOMAINS_MAX: u32 = 1024;
const WORDS_BYTES_MAX: u64 = 64 << 10;
const SOURCES_MAX: u32 = 1 << 24;
/// Most bytes of all domains together.
const TEXT_BYTES_MAX: u64 = 4 << 30;

impl Corpus {
    /// Writes the domains and the digest; [`Corpus::skipped`] stays behind.
    pub fn write_snapshot(&self, output: &mut impl Write) -> Result<(), TextError> {
        let domains = u32::try_from(self.domains.len()).ok().filter(|&count| count <= DOMAINS_MAX);
        let domains = domains.ok_or(TextError::Snapshot { reason: "too many domains" })?;
        output.write_all(&MAGIC)?;
        output.write_all(&domains.to_le_bytes())?;
        for domain in &self.domains {
            put(output, domain.name.as_bytes())?;
            put(output, domain.origin.as_bytes())?;
            output.write_all(&(domain.files as u64).to_le_bytes())?;
            put(output, &domain.bytes)?;
        }
        let sources = u32::try_from(self.sources.len()).ok().filter(|&count| count <= SOURCES_MAX);
        output.write_all(&sources.ok_or(TextError::Snapshot { reason: "too many files" })?.to_le_bytes())?;
        for source in &self.sources {
            output.write_all(&(source.domain as u32).to_le_bytes())?;
            put(output, source.path.to_string_lossy().as_bytes())?;
            output.write_all(&source.bytes.to_le_bytes())?;
            output.write_all(&source.digest.to_le_bytes())?;
        }
        output.write_all(&self.digest().to_le_bytes())?;
        Ok(output.flush()?)
    }

    /// Reads what [`Corpus::write_snapshot`] wrote and checks its digest. Memory grows as bytes arrive, whatever lengths
    /// the stream states.
    pub fn read_snapshot(input: &mut impl Read) -> Result<Self, TextError> {
        if number::<8>(input)? != MAGIC {
            return Err(TextError::Snapshot { reason: "it does not begin as one" });
        }
        let domains = u32::from_le_bytes(number(input)?);
        if domains > DOMAINS_MAX {
            return Err(TextError::Snapshot { reason: "too many domains" });
        }
        let mut corpus = Self::default();
        let mut room = TEXT_BYTES_MAX;
        for _ in 0..domains {
            let (name, origin) = (words(input)?, words(input)?);
            let files = u64::from_le_bytes(number(input)?) as usize;
            let bytes = take(input, room)?;
            room -= bytes.len() as u64;
            corpus.domains.push(TextDomain { name, bytes, files, origin });
        }
        let sources = u32::from_le_bytes(number(input)?);
        if sources > SOURCES_MAX {
            return Err(TextError::Snapshot { reason: "too many files" });
        }
        for _ in 0..sources {
            let domain = u32::from_le_bytes(number(input)?) as usize;
            if domain >= corpus.domains.len() {
                return Err(TextError::Snapshot { reason: "a file of a domain that is not there" });
            }
            let path = words(input)?.into();
            let (bytes, digest) = (u64::from_le_bytes(number(input)?), u64::from_le_bytes(number(input)?));
            corpus.sources.push(TextSource { domain, path, bytes, digest });
        }
        if u64::from_le_bytes(number(input)?) != corpus.digest() {
            return Err(TextError::Snapshot { reason: "its digest is wrong" });
        }
        Ok(corpus)
    }
}

fn put(output: &mut impl Write, bytes: &[u8]) -> Result<(), TextError> {
    output.write_all(&(bytes.len() as u64).to_le_bytes())?;
    Ok(output.write_all(bytes)?)
}

fn number<const BYTES: usize>(input: &mut impl Read) -> Result<[u8; BYTES], TextError> {
    let mut bytes = [0; BYTES];
    input.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn take(input: &mut impl Read, bytes_max: u64) -> Result<Vec<u8>, TextError> {
    let length = u64::from_le_bytes(number(input)?);
    if length > bytes_max {
        return Err(TextError::Snapshot { reason: "a length over its limit" });
    }
    let mut bytes = Vec::new();
    input.take(length).read_to_end(&mut bytes)?;
    if (bytes.len() as u64) < length {
        return Err(TextError::Snapshot { reason: "it ends early" });
    }
    Ok(bytes)
}

fn words(input: &mut impl Read) -> Result<String, TextError> {
    String::from_utf8(take(input, WORDS_BYTES_MAX)?)
        .map_err(|_| TextError::Snapshot { reason: "a name that is not UTF-8" })
}
