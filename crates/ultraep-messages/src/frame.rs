//! Messages as bytes: a kind, four words, and a payload.

use ultraep_fabric::OperationKind;
use ultraep_fabric::backend::{FAILURE_WORDS, Failure, Identity};

const HEAD_WORDS: usize = 5;
pub(crate) const HEAD_BYTES: usize = HEAD_WORDS * 8;

macro_rules! kinds {
    ($($(#[doc = $doc:literal])* $name:ident = $code:literal,)*) => {
        /// Kinds of message; what the words are.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u64)]
        pub(crate) enum Kind {
            $($(#[doc = $doc])* $name = $code,)*
        }

        impl Kind {
            fn from_code(code: u64) -> Option<Self> {
                match code {
                    $($code => Some(Self::$name),)*
                    _ => None,
                }
            }
        }
    };
}

kinds! {
    /// To rank 0: the sender is there. Payload: its identity.
    Hello = 1,
    /// From rank 0: everyone is there, or this rank is refused. Payload: the group's identity.
    Welcome = 2,
    /// To rank 0: sequence, kind, detail, stamp of the collective that the sender has entered. Payload: sizes of an all-to-all.
    Enter = 3,
    /// From rank 0: sequence, largest stamp. All have entered, and agree.
    Go = 4,
    /// Sequence, offset in the sender's piece or block. Payload: a chunk of it.
    Data = 5,
    /// Sequence, offset in the receiver's share. Payload: the sender's values.
    Part = 6,
    /// Sequence, offset in the whole. Payload: sums.
    Sums = 7,
    /// Window, offset. Payload: bytes for it.
    Put = 8,
    /// Window, offset, bytes, number of the get.
    Get = 9,
    /// Number of the get, offset. Payload: a chunk of what was asked for.
    Got = 10,
    /// Signal word, what to add.
    Signal = 11,
    /// Payload bytes and messages that were taken: the receiver of this has them back as credit.
    Ack = 12,
    /// To rank 0. Payload: a failure.
    Report = 13,
    /// Payload: the group's failure.
    Failed = 14,
    /// Number of the question: what is the receiver doing?
    Query = 15,
    /// Number of the question, kind of operation that the sender is blocked in, collectives that it has entered.
    Status = 16,
    /// Key, number of the receive, bytes: a receive is posted, and the receiver of this may send.
    Credit = 18,
    /// Number of the receive, offset. Payload: a chunk of the message.
    Tile = 19,
    /// Whether the sender was in the middle of something. Payload: its loss. Nothing else of the sender follows.
    Goodbye = 17,
}

/// A message.
#[derive(Clone, Debug)]
pub(crate) struct Frame {
    pub(crate) kind: Kind,
    pub(crate) words: [u64; 4],
    bytes: Vec<u8>,
}

impl Frame {
    /// With room for a payload of so many bytes, zeroed.
    pub(crate) fn with_payload(kind: Kind, words: [u64; 4], bytes: usize) -> Vec<u8> {
        let mut frame = Self::bytes(kind, words);
        frame.resize(HEAD_BYTES + bytes, 0);
        frame
    }

    /// Without a payload.
    pub(crate) fn bytes(kind: Kind, words: [u64; 4]) -> Vec<u8> {
        [kind as u64].into_iter().chain(words).flat_map(u64::to_le_bytes).collect()
    }

    /// With a payload of words.
    pub(crate) fn of_words(kind: Kind, words: [u64; 4], payload: impl IntoIterator<Item = u64>) -> Vec<u8> {
        let mut frame = Self::bytes(kind, words);
        frame.extend(payload.into_iter().flat_map(u64::to_le_bytes));
        frame
    }

    /// From the bytes of a message; `None` when they are none of ours.
    pub(crate) fn parse(bytes: Vec<u8>) -> Option<Self> {
        let word = |index: usize| {
            let bytes = bytes.get(index * 8..)?.first_chunk::<8>()?;
            Some(u64::from_le_bytes(*bytes))
        };
        let kind = Kind::from_code(word(0)?)?;
        let words = [word(1)?, word(2)?, word(3)?, word(4)?];
        Some(Self { kind, words, bytes })
    }

    pub(crate) fn payload(&self) -> &[u8] {
        &self.bytes[HEAD_BYTES..]
    }

    /// A word that must be an offset or a size of this machine.
    pub(crate) fn size(&self, index: usize) -> Option<usize> {
        usize::try_from(self.words[index]).ok()
    }

    /// The payload as words.
    pub(crate) fn payload_words(&self) -> impl Iterator<Item = u64> {
        let (words, _) = self.payload().as_chunks::<8>();
        words.iter().map(|word| u64::from_le_bytes(*word))
    }

    pub(crate) fn identity(&self) -> Option<Identity> {
        let words: Vec<u64> = self.payload_words().collect();
        Some(Identity::from_words(words.try_into().ok()?))
    }

    pub(crate) fn failure(&self) -> Option<Failure> {
        let words: Vec<u64> = self.payload_words().collect();
        let words: [u64; FAILURE_WORDS] = words.try_into().ok()?;
        Failure::from_words(&words)
    }

    /// The kind of operation in a word.
    pub(crate) fn operation(&self, index: usize) -> OperationKind {
        OperationKind::from_code(self.words[index])
    }
}
