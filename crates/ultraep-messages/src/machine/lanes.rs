//! What goes to one peer, in order, as fast as it takes it.

use super::Machine;
use crate::frame::{Frame, HEAD_BYTES, Kind};
use std::collections::VecDeque;
use std::sync::Arc;
use ultraep_fabric::backend::Hold;
use ultraep_plan::Rank;

/// The most bytes of data in one message.
pub const CHUNK_BYTES: usize = 128 * 1024;

/// The most bytes of data on their way to one peer that it has not acknowledged.
pub const WINDOW_BYTES: usize = 8 * CHUNK_BYTES;

/// Data that goes out chunk by chunk from where it is.
pub(super) struct Stream {
    pub(super) kind: Kind,
    /// The first word of each message; the second is `at` plus the bytes before the chunk.
    pub(super) word: u64,
    pub(super) at: u64,
    pub(super) source: Arc<Hold>,
    /// In the source.
    pub(super) from: usize,
    pub(super) bytes: usize,
    /// Bytes that have left.
    pub(super) left: usize,
    /// Whom it belongs to.
    pub(super) owner: Owner,
}

/// Who is told when a stream has left its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    /// The operation with this number.
    Operation(u64),
    /// The collective in flight.
    Collective,
}

pub(super) enum Item {
    Stream(Stream),
    /// A message, and whether it will be acknowledged.
    Message(Vec<u8>, bool),
}

/// Items to one peer. They are *settled*, in order, when all their messages have been acknowledged.
#[derive(Default)]
pub(super) struct Lane {
    items: VecDeque<Item>,
    pushed: u64,
    settled: u64,
    /// For each item that has gone out and is not settled: messages sent up to its end.
    ends: VecDeque<u64>,
    /// Messages sent that are acknowledged, and how many of them have been.
    sent: u64,
    acknowledged: u64,
    unacknowledged_bytes: usize,
}

impl Lane {
    pub(super) fn push(&mut self, item: Item) {
        self.items.push_back(item);
        self.pushed += 1;
    }

    /// Items so far.
    pub(super) fn mark(&self) -> u64 {
        self.pushed
    }

    /// Whether the items up to a mark are with the peer.
    pub(super) fn is_settled(&self, mark: u64) -> bool {
        self.settled >= mark
    }

    pub(super) fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// The peer has taken messages with so many bytes of data.
    pub(super) fn acknowledge(&mut self, bytes: u64, messages: u64) {
        self.unacknowledged_bytes = self.unacknowledged_bytes.saturating_sub(bytes as usize);
        self.acknowledged = self.acknowledged.saturating_add(messages);
        self.settle();
    }

    fn settle(&mut self) {
        while self.ends.front().is_some_and(|&end| end <= self.acknowledged) {
            self.ends.pop_front();
            self.settled += 1;
        }
    }

    /// The item at the front has gone out.
    fn end_item(&mut self) {
        self.items.pop_front();
        self.ends.push_back(self.sent);
        self.settle();
    }

    /// The next message that may go out, and the owner of a stream that ends with it.
    fn next(&mut self) -> Option<(Vec<u8>, Option<Owner>)> {
        match self.items.front_mut()? {
            Item::Message(message, counted) => {
                let (message, counted) = (core::mem::take(message), *counted);
                self.sent += u64::from(counted);
                self.end_item();
                Some((message, None))
            }
            Item::Stream(stream) => {
                let bytes = CHUNK_BYTES.min(stream.bytes - stream.left);
                if self.unacknowledged_bytes + bytes > WINDOW_BYTES {
                    return None;
                }
                let words = [stream.word, stream.at + stream.left as u64, 0, 0];
                let mut message = Frame::with_payload(stream.kind, words, bytes);
                // The span was checked when the operation was submitted, and is the host's.
                let read = stream.source.read_bytes(stream.from + stream.left, &mut message[HEAD_BYTES..]);
                debug_assert!(read.is_ok(), "{read:?}");
                stream.left += bytes;
                let ended = (stream.left == stream.bytes).then_some(stream.owner);
                self.sent += 1;
                self.unacknowledged_bytes += bytes;
                if ended.is_some() {
                    self.end_item();
                }
                Some((message, ended))
            }
        }
    }

    /// The peer is gone: what it was to get is dropped. The owners of the streams.
    fn abandon(&mut self) -> Vec<Owner> {
        self.settled = self.pushed;
        self.ends.clear();
        let owner = |item| match item {
            Item::Stream(stream) => Some(stream.owner),
            Item::Message(..) => None,
        };
        self.items.drain(..).filter_map(owner).collect()
    }
}

impl Machine {
    /// Sends what may be sent to each peer.
    pub(super) fn flow(&mut self) {
        for peer in self.peers() {
            if self.gone[peer.index()].is_some() {
                for owner in self.lanes[peer.index()].abandon() {
                    self.stream_left(owner);
                }
                continue;
            }
            while let Some((message, ended)) = self.lanes[peer.index()].next() {
                self.post(peer, message);
                if let Some(owner) = ended {
                    self.stream_left(owner);
                }
            }
        }
    }

    fn stream_left(&mut self, owner: Owner) {
        match owner {
            Owner::Collective => {
                if let Some(flight) = &mut self.flight {
                    flight.streams -= 1;
                }
            }
            Owner::Operation(number) => {
                if let Some(streams) = self.putting.get_mut(&number) {
                    *streams -= 1;
                    if *streams == 0 {
                        self.putting.remove(&number);
                        self.changed = true;
                    }
                }
            }
        }
    }

    /// Gives credit back for one message.
    pub(super) fn acknowledge(&mut self, to: Rank, bytes: usize) {
        let ack = Frame::bytes(Kind::Ack, [bytes as u64, 1, 0, 0]);
        self.post(to, ack);
    }
}
