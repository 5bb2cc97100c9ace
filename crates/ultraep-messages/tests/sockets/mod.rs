//! A transport over Unix sockets, one between each two ranks: in one process, or between processes that find each other by name.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};
use ultraep_messages::{Event, Transport, TransportError, Waker};
use ultraep_plan::Rank;

/// A message is its length in so many bytes, then its bytes.
const LENGTH_BYTES: usize = 8;

struct Peer {
    rank: Rank,
    /// Gone when it has closed.
    stream: Option<UnixStream>,
    outgoing: VecDeque<Vec<u8>>,
    /// Bytes of the first outgoing message that are sent.
    sent: usize,
    incoming: Vec<u8>,
}

pub(crate) struct Sockets {
    rank: Rank,
    ranks: usize,
    peers: Vec<Peer>,
    events: VecDeque<Event>,
    bell: UnixStream,
    ring: Arc<UnixStream>,
}

impl Sockets {
    /// With a stream to each other rank.
    fn new(rank: Rank, streams: Vec<(Rank, UnixStream)>) -> io::Result<Self> {
        let (bell, ring) = UnixStream::pair()?;
        bell.set_nonblocking(true)?;
        ring.set_nonblocking(true)?;
        let ranks = streams.len() + 1;
        let peer = |(rank, stream): (Rank, UnixStream)| {
            stream.set_nonblocking(true)?;
            let (outgoing, incoming) = (VecDeque::new(), Vec::new());
            Ok(Peer { rank, stream: Some(stream), outgoing, sent: 0, incoming })
        };
        let peers: io::Result<_> = streams.into_iter().map(peer).collect();
        Ok(Self { rank, ranks, peers: peers?, events: VecDeque::new(), bell, ring: Arc::new(ring) })
    }

    /// For the ranks of one process.
    pub(crate) fn mesh(ranks: usize) -> io::Result<Vec<Self>> {
        let mut streams: Vec<Vec<(Rank, UnixStream)>> = (0..ranks).map(|_| Vec::new()).collect();
        for one in 0..ranks {
            for other in one + 1..ranks {
                let (a, b) = UnixStream::pair()?;
                streams[one].push((Rank::new(other), a));
                streams[other].push((Rank::new(one), b));
            }
        }
        streams.into_iter().enumerate().map(|(rank, streams)| Self::new(Rank::new(rank), streams)).collect()
    }

    /// For a process: listens under a name of its own and connects to all lower ranks; waits for the higher ones.
    pub(crate) fn connect(group: &str, rank: usize, ranks: usize, limit: Duration) -> io::Result<Self> {
        let name = |rank: usize| SocketAddr::from_abstract_name(format!("{group}/{rank}"));
        let listener = UnixListener::bind_addr(&name(rank)?)?;
        let deadline = Instant::now() + limit;
        let mut streams = Vec::new();
        for lower in 0..rank {
            let mut stream = loop {
                match UnixStream::connect_addr(&name(lower)?) {
                    Ok(stream) => break stream,
                    Err(error) if Instant::now() > deadline => return Err(error),
                    Err(_) => std::thread::sleep(Duration::from_millis(2)),
                }
            };
            stream.write_all(&(rank as u64).to_le_bytes())?;
            streams.push((Rank::new(lower), stream));
        }
        listener.set_nonblocking(true)?;
        while streams.len() + 1 < ranks {
            match listener.accept() {
                Ok((mut stream, _)) => {
                    stream.set_nonblocking(false)?;
                    let mut higher = [0; 8];
                    stream.read_exact(&mut higher)?;
                    streams.push((Rank::new(u64::from_le_bytes(higher) as usize), stream));
                }
                Err(error) if error.kind() != ErrorKind::WouldBlock || Instant::now() > deadline => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
        Self::new(Rank::new(rank), streams)
    }

    /// Moves bytes both ways on every stream, as far as they go.
    fn exchange(&mut self) {
        for peer in &mut self.peers {
            if peer.stream.is_some() && peer.write().and_then(|()| peer.read(&mut self.events)).is_err() {
                peer.stream = None;
                peer.outgoing.clear();
                self.events.push_back(Event::Closed { peer: peer.rank });
            }
        }
    }

    /// Sleeps until a stream can move or the bell rings.
    fn sleep(&self, wait: Duration) -> Result<(), TransportError> {
        let mut handles = vec![PollFd::new(&self.bell, PollFlags::IN)];
        for peer in &self.peers {
            let Some(stream) = &peer.stream else { continue };
            let out = if peer.outgoing.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
            handles.push(PollFd::new(stream, PollFlags::IN | out));
        }
        let limit = Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: wait.subsec_nanos().into() };
        match poll(&mut handles, Some(&limit)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(TransportError { call: "poll", message: error.to_string() }),
        }
    }
}

fn would_block(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

impl Peer {
    fn write(&mut self) -> io::Result<()> {
        let Some(stream) = &mut self.stream else { return Ok(()) };
        while let Some(message) = self.outgoing.front() {
            match stream.write(&message[self.sent..]) {
                Ok(bytes) => self.sent += bytes,
                Err(error) if would_block(&error) => return Ok(()),
                // What it has sent is still to be read; it takes nothing any more.
                Err(_) => {
                    self.outgoing.clear();
                    self.sent = 0;
                    return Ok(());
                }
            }
            if self.sent == message.len() {
                self.outgoing.pop_front();
                self.sent = 0;
            }
        }
        Ok(())
    }

    fn read(&mut self, events: &mut VecDeque<Event>) -> io::Result<()> {
        let Some(stream) = &mut self.stream else { return Ok(()) };
        let mut bytes = vec![0; 256 * 1024];
        let closed = loop {
            match stream.read(&mut bytes) {
                Ok(0) => break true,
                Ok(count) => self.incoming.extend_from_slice(&bytes[..count]),
                Err(error) if would_block(&error) => break false,
                Err(_) => break true,
            }
        };
        let mut start = 0;
        while let Some(length) = self.incoming[start..].first_chunk::<LENGTH_BYTES>() {
            let length = u64::from_le_bytes(*length) as usize;
            let Some(message) = self.incoming.get(start + LENGTH_BYTES..start + LENGTH_BYTES + length) else { break };
            events.push_back(Event::Message { from: self.rank, bytes: message.to_vec() });
            start += LENGTH_BYTES + length;
        }
        self.incoming.drain(..start);
        if closed { Err(ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    }
}

impl Transport for Sockets {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.ranks
    }

    fn send(&mut self, to: Rank, message: Vec<u8>) -> Result<(), TransportError> {
        if let Some(peer) = self.peers.iter_mut().find(|peer| peer.rank == to && peer.stream.is_some()) {
            peer.outgoing.push_back((message.len() as u64).to_le_bytes().to_vec());
            peer.outgoing.push_back(message);
        }
        Ok(())
    }

    fn poll(&mut self, wait: Duration) -> Result<Option<Event>, TransportError> {
        if self.events.is_empty() {
            self.exchange();
        }
        if self.events.is_empty() {
            self.sleep(wait)?;
            let mut rings = [0; 64];
            while self.bell.read(&mut rings).is_ok_and(|count| count == rings.len()) {}
            self.exchange();
        }
        Ok(self.events.pop_front())
    }

    fn waker(&self) -> Waker {
        let ring = Arc::clone(&self.ring);
        // A full pipe has rung already.
        Arc::new(move || drop((&*ring).write(&[1])))
    }

    fn close(&mut self, limit: Duration) {
        let deadline = Instant::now() + limit;
        while self.peers.iter().any(|peer| peer.stream.is_some() && !peer.outgoing.is_empty()) {
            self.exchange();
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.sleep(left.min(Duration::from_millis(50))).is_err() {
                break;
            }
        }
        self.peers.iter_mut().for_each(|peer| peer.stream = None);
    }
}
