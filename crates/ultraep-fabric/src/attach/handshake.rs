//! What ranks say to the leader, and what it answers: a few words each, and the memory file's descriptor.

use crate::backend::Identity;
use rustix::cmsg_space;
use rustix::fd::{BorrowedFd, OwnedFd};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::unix::net::UnixStream;
use std::time::Duration;
use ultraep_plan::Rank;

/// "ultraep" and 'a' for attach.
const MAGIC: u64 = u64::from_le_bytes(*b"ultraepa");
const HELLO_WORDS: usize = 7;
const ANSWER_WORDS: usize = 6;

/// Longest wait for the words of one who has connected: they are sent at once.
const WORDS_WITHIN: Duration = Duration::from_secs(5);

/// Who a rank is.
pub(super) struct Hello {
    pub(super) rank: Rank,
    pub(super) identity: Identity,
}

fn to_bytes<const WORDS: usize>(words: [u64; WORDS]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn from_bytes<const WORDS: usize>(bytes: &[u8]) -> [u64; WORDS] {
    let mut words = [0; WORDS];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = bytes.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte));
    }
    words
}

fn wrong(what: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, what.to_owned())
}

impl Hello {
    pub(super) fn send(&self, mut to: &UnixStream) -> io::Result<()> {
        let [a, b, c, d, e] = self.identity.to_words();
        to.write_all(&to_bytes([MAGIC, self.rank.index() as u64, a, b, c, d, e]))
    }

    pub(super) fn receive(mut from: &UnixStream, limit: Duration) -> io::Result<Self> {
        // A limit of zero would mean none.
        from.set_read_timeout(Some(limit.clamp(Duration::from_millis(1), WORDS_WITHIN)))?;
        let mut bytes = [0; HELLO_WORDS * 8];
        from.read_exact(&mut bytes)?;
        let [magic, rank, identity @ ..] = from_bytes::<HELLO_WORDS>(&bytes);
        match u16::try_from(rank) {
            Ok(rank) if magic == MAGIC => {
                Ok(Self { rank: Rank::new(usize::from(rank)), identity: Identity::from_words(identity) })
            }
            _ => Err(wrong("not a rank's greeting")),
        }
    }
}

/// What the leader makes of a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// The memory file comes with it.
    Welcome = 0,
    /// Its identity differs.
    Differs = 1,
    /// Someone else has joined as this rank.
    Taken = 2,
    /// The group has no such rank to join.
    NoSuchRank = 3,
}

impl Answer {
    /// Sends the answer with the group's identity, and with the file if it is a welcome.
    pub(super) fn send(self, to: &UnixStream, identity: &Identity, file: BorrowedFd<'_>) -> io::Result<()> {
        let [a, b, c, d, e] = identity.to_words();
        let bytes = to_bytes([self as u64, a, b, c, d, e]);
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let files = [file];
        if self == Self::Welcome && !control.push(SendAncillaryMessage::ScmRights(&files)) {
            return Err(wrong("no room for a descriptor"));
        }
        let sent = sendmsg(to, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL)?;
        if sent == bytes.len() { Ok(()) } else { Err(wrong("an answer that was sent in part")) }
    }

    /// The answer, the group's identity, and the file if there is one.
    pub(super) fn receive(from: &UnixStream, limit: Duration) -> io::Result<(Self, Identity, Option<OwnedFd>)> {
        from.set_read_timeout(Some(limit.max(Duration::from_millis(1))))?;
        let mut bytes = [0; ANSWER_WORDS * 8];
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::WAITALL;
        let got = recvmsg(from, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags)?;
        let file = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut files) => files.next(),
            _ => None,
        });
        let [answer, identity @ ..] = from_bytes::<ANSWER_WORDS>(&bytes);
        let answer = match answer {
            _ if got.bytes != bytes.len() => return Err(ErrorKind::UnexpectedEof.into()),
            0 => Self::Welcome,
            1 => Self::Differs,
            2 => Self::Taken,
            3 => Self::NoSuchRank,
            _ => return Err(wrong("not a leader's answer")),
        };
        Ok((answer, Identity::from_words(identity), file))
    }
}
