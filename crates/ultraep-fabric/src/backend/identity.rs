//! What must be equal on all ranks of a group, compared when a rank joins.

use crate::{GroupSpec, JoinError, PROTOCOL_VERSION};
use core::fmt;

/// The widest vector instructions that kernels choose from on this processor. Ranks that differ would round differently, so that
/// results were no longer equal bit for bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum VectorFamily {
    /// None that kernels choose.
    Portable,
    /// AVX2 with fused multiply-add (x86-64-v3).
    Avx2,
    /// AVX-512 (x86-64-v4).
    Avx512,
    /// NEON.
    Neon,
    /// One that this version does not know.
    Unknown(u64),
}

impl VectorFamily {
    /// Asks the processor.
    #[must_use]
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma");
            if avx2 && std::is_x86_feature_detected!("avx512f") {
                return Self::Avx512;
            }
            if avx2 {
                return Self::Avx2;
            }
        }
        if cfg!(target_arch = "aarch64") { Self::Neon } else { Self::Portable }
    }

    /// The code under which it crosses processes.
    #[must_use]
    pub fn code(self) -> u64 {
        match self {
            Self::Portable => 0,
            Self::Avx2 => 1,
            Self::Avx512 => 2,
            Self::Neon => 3,
            Self::Unknown(code) => code,
        }
    }

    /// From its code.
    #[must_use]
    pub fn from_code(code: u64) -> Self {
        match code {
            0 => Self::Portable,
            1 => Self::Avx2,
            2 => Self::Avx512,
            3 => Self::Neon,
            code => Self::Unknown(code),
        }
    }
}

impl fmt::Display for VectorFamily {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Portable => f.write_str("portable"),
            Self::Avx2 => f.write_str("AVX2"),
            Self::Avx512 => f.write_str("AVX-512"),
            Self::Neon => f.write_str("NEON"),
            Self::Unknown(code) => write!(f, "unknown ({code})"),
        }
    }
}

/// What must be equal on all ranks of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Version of the backend's protocol.
    pub version: u32,
    /// Ranks of the group.
    pub ranks: u64,
    /// [`GroupSpec::config_digest`].
    pub config_digest: u64,
    /// Digest of the backend's layout of memory; for one that has none, [`GroupSpec::windows_digest`].
    pub layout_digest: u64,
    /// Vector instructions of the rank's processor.
    pub vectors: VectorFamily,
}

impl Identity {
    /// Of this process, for a group with this specification.
    #[must_use]
    pub fn new(spec: &GroupSpec, layout_digest: u64) -> Self {
        Self {
            version: PROTOCOL_VERSION,
            ranks: spec.ranks as u64,
            config_digest: spec.config_digest,
            layout_digest,
            vectors: VectorFamily::detect(),
        }
    }

    /// As words, to send to another process.
    #[must_use]
    pub fn to_words(&self) -> [u64; 5] {
        [self.version.into(), self.ranks, self.config_digest, self.layout_digest, self.vectors.code()]
    }

    /// From the words of another process.
    #[must_use]
    pub fn from_words([version, ranks, config_digest, layout_digest, vectors]: [u64; 5]) -> Self {
        let version = u32::try_from(version).unwrap_or(u32::MAX);
        Self { version, ranks, config_digest, layout_digest, vectors: VectorFamily::from_code(vectors) }
    }

    /// That a rank with the identity `rank` may join the group with this one.
    ///
    /// # Errors
    /// [`JoinError`]: the first difference.
    pub fn admit(&self, rank: &Self) -> Result<(), JoinError> {
        if self.version != rank.version {
            return Err(JoinError::Version { expected: self.version, got: rank.version });
        }
        if self.ranks != rank.ranks {
            return Err(JoinError::Ranks { expected: self.ranks, got: rank.ranks });
        }
        if self.config_digest != rank.config_digest {
            return Err(JoinError::ConfigDigest { expected: self.config_digest, got: rank.config_digest });
        }
        if self.layout_digest != rank.layout_digest {
            return Err(JoinError::Layout { expected: self.layout_digest, got: rank.layout_digest });
        }
        if self.vectors != rank.vectors {
            return Err(JoinError::Vectors { expected: self.vectors, got: rank.vectors });
        }
        Ok(())
    }
}
