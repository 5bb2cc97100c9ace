//! Where processes leave bytes for each other by key: a trait that is small enough for anyone's store, and our own over TCP.
//!
//! It carries addresses and digests, never data; nobody is asked who they are (nor does PyTorch's), so it belongs on a trusted network.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::HashMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// The most bytes of a key and of a value.
const KEY_BYTES_MAX: usize = 1024;
const VALUE_BYTES_MAX: usize = 64 * 1024;

/// Longest wait for the other side of a connection to take or send what it owes.
const PATIENCE: Duration = Duration::from_secs(10);

/// A pause between attempts to connect to a server that is not there yet.
const RETRY: Duration = Duration::from_millis(20);

/// Bytes by key, shared by the processes of a job. PyTorch's, MPI's and Slurm's have such a thing, too.
pub trait Store: Send {
    /// Writes a value, over an earlier one.
    ///
    /// # Errors
    /// [`StoreError`].
    fn set(&mut self, key: &str, value: &[u8]) -> Result<(), StoreError>;

    /// Reads a value, waiting for it to be written.
    ///
    /// # Errors
    /// [`StoreError::Timeout`] when nobody writes it within `timeout`.
    fn get(&mut self, key: &str, timeout: Duration) -> Result<Vec<u8>, StoreError>;
}

/// Why a store could not do it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// Nobody has written the key.
    #[error("nobody has written `{key}` within {:.3} s", waited.as_secs_f64())]
    Timeout {
        /// The key.
        key: String,
        /// How long was waited.
        waited: Duration,
    },
    /// A key or value over the store's limit.
    #[error("a {what} of {asked} bytes, at most {limit} are possible")]
    TooLong {
        /// "key" or "value".
        what: &'static str,
        /// Its bytes.
        asked: usize,
        /// The most that are possible.
        limit: usize,
    },
    /// The store cannot be reached or does not answer.
    #[error("store at {address}: {message}")]
    Unreachable {
        /// Where it is.
        address: String,
        /// What went wrong.
        message: String,
    },
}

// A request: kind, bytes of the key, bytes of the value or milliseconds to wait, then key and value. An answer: kind, bytes of the
// value, then the value.
const SET: u8 = 1;
const GET: u8 = 2;
const DONE: u8 = 3;
const NOTHING: u8 = 4;
const REQUEST_HEAD: usize = 1 + 2 + 4;
const ANSWER_HEAD: usize = 1 + 4;

/// A connection to a [`StoreServer`].
#[derive(Debug)]
pub struct TcpStore {
    stream: TcpStream,
    address: String,
    prefix: String,
}

impl TcpStore {
    /// Connects, waiting for the server to be there. Every key gets `prefix` in front: of stores with different prefixes none sees
    /// what another writes.
    ///
    /// # Errors
    /// [`StoreError::Unreachable`] after `timeout`.
    pub fn connect(address: &str, prefix: &str, timeout: Duration) -> Result<Self, StoreError> {
        let deadline = Instant::now() + timeout;
        let unreachable = |message: String| StoreError::Unreachable { address: address.to_owned(), message };
        let stream = loop {
            let places = address.to_socket_addrs().map_err(|error| unreachable(error.to_string()))?;
            let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            let mut last = None;
            let mut connect =
                |place: SocketAddr| TcpStream::connect_timeout(&place, left).map_err(|error| last = Some(error));
            let connected = places.into_iter().find_map(|place| connect(place).ok());
            match connected {
                Some(stream) => break stream,
                None if Instant::now() + RETRY < deadline => thread::sleep(RETRY),
                None => {
                    let why = last.map_or_else(|| "it has no address".to_owned(), |error| error.to_string());
                    return Err(unreachable(format!("{why} (waited {:.1} s)", timeout.as_secs_f64())));
                }
            }
        };
        // Small requests that are waited for.
        stream.set_nodelay(true).map_err(|error| unreachable(error.to_string()))?;
        Ok(Self { stream, address: address.to_owned(), prefix: prefix.to_owned() })
    }

    fn unreachable(&self, error: &io::Error) -> StoreError {
        StoreError::Unreachable { address: self.address.clone(), message: error.to_string() }
    }

    /// Sends a request and returns the answer: `None` when the server has nothing.
    fn ask(
        &mut self,
        kind: u8,
        key: &str,
        word: u32,
        value: &[u8],
        wait: Duration,
    ) -> Result<Option<Vec<u8>>, StoreError> {
        let key = format!("{}/{key}", self.prefix);
        let checked = |what, asked: usize, limit: usize| {
            if asked <= limit { Ok(()) } else { Err(StoreError::TooLong { what, asked, limit }) }
        };
        checked("key", key.len(), KEY_BYTES_MAX)?;
        checked("value", value.len(), VALUE_BYTES_MAX)?;
        let mut request = vec![kind];
        request.extend((key.len() as u16).to_le_bytes());
        request.extend(word.to_le_bytes());
        request.extend(key.as_bytes());
        request.extend(value);
        let answer = self.exchange(&request, wait);
        if answer.is_err() {
            // A late answer must not be taken for that to another request.
            let _ = self.stream.shutdown(Shutdown::Both);
        }
        answer.map_err(|error| self.unreachable(&error))
    }

    fn exchange(&mut self, request: &[u8], wait: Duration) -> io::Result<Option<Vec<u8>>> {
        self.stream.set_write_timeout(Some(PATIENCE))?;
        self.stream.set_read_timeout(Some(wait.saturating_add(PATIENCE)))?;
        self.stream.write_all(request)?;
        let mut head = [0; ANSWER_HEAD];
        self.stream.read_exact(&mut head)?;
        let bytes = u32::from_le_bytes([head[1], head[2], head[3], head[4]]) as usize;
        if bytes > VALUE_BYTES_MAX || ![DONE, NOTHING].contains(&head[0]) {
            return Err(io::Error::new(ErrorKind::InvalidData, "not the answer of a store"));
        }
        let mut value = vec![0; bytes];
        self.stream.read_exact(&mut value)?;
        Ok((head[0] == DONE).then_some(value))
    }
}

impl Store for TcpStore {
    fn set(&mut self, key: &str, value: &[u8]) -> Result<(), StoreError> {
        self.ask(SET, key, value.len() as u32, value, Duration::ZERO).map(drop)
    }

    fn get(&mut self, key: &str, timeout: Duration) -> Result<Vec<u8>, StoreError> {
        let wait_ms = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
        let value = self.ask(GET, key, wait_ms, &[], timeout)?;
        value.ok_or_else(|| StoreError::Timeout { key: key.to_owned(), waited: timeout })
    }
}

/// The store's server: one thread, ended when this is dropped.
#[derive(Debug)]
pub struct StoreServer {
    address: SocketAddr,
    /// Closing it ends the thread.
    stop: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

impl StoreServer {
    /// Listens at `address` (host and port; port 0 for any).
    ///
    /// # Errors
    /// [`StoreError::Unreachable`] when it cannot: the port is in use, the host is another one.
    pub fn bind(address: &str) -> Result<Self, StoreError> {
        let unreachable =
            |error: io::Error| StoreError::Unreachable { address: address.to_owned(), message: error.to_string() };
        let listener = TcpListener::bind(address).map_err(unreachable)?;
        listener.set_nonblocking(true).map_err(unreachable)?;
        let bound = listener.local_addr().map_err(unreachable)?;
        let (stop, stopped) = UnixStream::pair().map_err(unreachable)?;
        let server = Server { listener, stopped, clients: Vec::new(), values: HashMap::new() };
        let thread = thread::Builder::new().name("store".to_owned()).spawn(move || server.serve());
        Ok(Self { address: bound, stop: Some(stop), thread: Some(thread.map_err(unreachable)?) })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for StoreServer {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It does not panic; if it did, it has said so.
            let _ = thread.join();
        }
    }
}

struct Server {
    listener: TcpListener,
    stopped: UnixStream,
    clients: Vec<Client>,
    values: HashMap<Vec<u8>, Vec<u8>>,
}

struct Client {
    stream: TcpStream,
    /// Bytes of requests that have come.
    incoming: Vec<u8>,
    /// A key that is waited for, and until when.
    waits: Option<(Vec<u8>, Instant)>,
    gone: bool,
}

impl Server {
    fn serve(mut self) {
        loop {
            let now = Instant::now();
            let due = self.clients.iter().filter_map(|client| client.waits.as_ref()).map(|(_, until)| *until).min();
            let wait = due.map(|due| due.saturating_duration_since(now) + Duration::from_millis(1));
            let wait = wait.map(|wait| Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: wait.subsec_nanos().into() });
            let mut handles =
                vec![PollFd::new(&self.stopped, PollFlags::IN), PollFd::new(&self.listener, PollFlags::IN)];
            handles.extend(self.clients.iter().map(|client| PollFd::new(&client.stream, PollFlags::IN)));
            match poll(&mut handles, wait.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(_) => return,
            }
            let ready: Vec<bool> = handles.iter().map(|handle| !handle.revents().is_empty()).collect();
            drop(handles);
            if ready[0] {
                return;
            }
            for (client, _) in self.clients.iter_mut().zip(&ready[2..]).filter(|(_, ready)| **ready) {
                client.receive();
            }
            if ready[1] {
                self.accept();
            }
            // A value that one has set may be what another waits for: until nothing changes.
            while self.answer() {}
            self.clients.retain(|client| !client.gone);
        }
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            let ready = stream.set_nonblocking(true).and_then(|()| stream.set_nodelay(true));
            if ready.is_ok() {
                self.clients.push(Client { stream, incoming: Vec::new(), waits: None, gone: false });
            }
        }
    }

    /// Answers what can be answered; whether a value was set.
    fn answer(&mut self) -> bool {
        let mut set = false;
        for client in &mut self.clients {
            loop {
                if let Some((key, until)) = &client.waits {
                    match self.values.get(key) {
                        Some(value) => client.reply(DONE, value),
                        None if Instant::now() >= *until => client.reply(NOTHING, &[]),
                        None => break,
                    }
                    client.waits = None;
                }
                match client.request() {
                    Some(Request::Set(key, value)) => {
                        self.values.insert(key, value);
                        client.reply(DONE, &[]);
                        set = true;
                    }
                    Some(Request::Get(key, wait)) => client.waits = Some((key, Instant::now() + wait)),
                    None => break,
                }
            }
        }
        set
    }
}

enum Request {
    Set(Vec<u8>, Vec<u8>),
    Get(Vec<u8>, Duration),
}

impl Client {
    fn receive(&mut self) {
        let mut bytes = [0; 4096];
        loop {
            match self.stream.read(&mut bytes) {
                Ok(0) => break self.gone = true,
                Ok(count) => self.incoming.extend_from_slice(&bytes[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => break self.gone = true,
            }
            if self.incoming.len() > REQUEST_HEAD + KEY_BYTES_MAX + VALUE_BYTES_MAX {
                // It sends without waiting for answers: none of ours.
                break self.gone = true;
            }
        }
    }

    /// The next whole request.
    fn request(&mut self) -> Option<Request> {
        let head = self.incoming.first_chunk::<REQUEST_HEAD>()?;
        let [kind, k0, k1, word @ ..] = *head;
        let (key_bytes, word) = (usize::from(u16::from_le_bytes([k0, k1])), u32::from_le_bytes(word));
        let value_bytes = if kind == SET { word as usize } else { 0 };
        if ![SET, GET].contains(&kind) || key_bytes > KEY_BYTES_MAX || value_bytes > VALUE_BYTES_MAX {
            self.gone = true;
            self.incoming.clear();
            return None;
        }
        let end = REQUEST_HEAD + key_bytes + value_bytes;
        if self.incoming.len() < end {
            return None;
        }
        let request: Vec<u8> = self.incoming.drain(..end).collect();
        let (key, value) = request[REQUEST_HEAD..].split_at(key_bytes);
        Some(match kind {
            SET => Request::Set(key.to_vec(), value.to_vec()),
            _ => Request::Get(key.to_vec(), Duration::from_millis(word.into())),
        })
    }

    /// Answers. Whoever does not take an answer is given up: the server waits for no one.
    fn reply(&mut self, kind: u8, value: &[u8]) {
        let mut answer = vec![kind];
        answer.extend((value.len() as u32).to_le_bytes());
        answer.extend(value);
        // An answer fits the socket's buffer, which is empty: whoever asks waits for it.
        if self.stream.write_all(&answer).is_err() {
            self.gone = true;
        }
    }
}
