//! The segment that all ranks of a group map, and typed access to its sections.

use super::cause::Cause;
use super::doorbell::Doorbell;
use super::layout::{Layout, Section};
use super::permits::Permits;
use super::status::Status;
use super::turnstile::Turnstile;
use crate::backend::{FAILURE_WORDS, Identity};
use crate::stream::Credit;
use crate::sync::{AtomicU32, AtomicU64, Ordering};
use crate::{FabricError, GroupSpec, SIGNALS, WindowId, pages};
use core::mem::size_of;
use core::ptr::NonNull;
use rustix::fd::BorrowedFd;
use rustix::fs::{SealFlags, fcntl_get_seals, fstat};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use ultraep_plan::Rank;

/// "ultraep" and a zero byte.
pub(crate) const MAGIC: u64 = u64::from_le_bytes(*b"ultraep\0");

/// Words of a failure record: all but the first of a failure's.
pub(crate) const RECORD_WORDS: usize = FAILURE_WORDS - 1;

/// At offset 0. All zero is a valid initial state, and what a fresh mapping holds.
///
/// The first line is the same in every version of the protocol, so that versions can refuse each other.
#[repr(C)]
pub(crate) struct Header {
    pub(crate) magic: AtomicU64,
    pub(crate) version: AtomicU64,
    pub(crate) config_digest: AtomicU64,
    pub(crate) ranks: AtomicU64,
    pub(crate) layout_digest: AtomicU64,
    pub(crate) vectors: AtomicU64,
    pub(crate) failure: Line<Cause>,
    pub(crate) turnstile: Line<Turnstile>,
    pub(crate) permits: Line<Permits>,
}

/// A cache line (two, for the prefetcher) of its own.
#[repr(C, align(128))]
pub(crate) struct Line<T>(pub(crate) T);

/// What a rank says about itself, and its doorbell.
#[repr(C, align(128))]
pub(crate) struct Control {
    /// Phases entered. With the next four, written before the turnstile and read after it.
    pub(crate) entered: AtomicU64,
    pub(crate) stamp: AtomicU64,
    pub(crate) sequence: AtomicU64,
    pub(crate) kind: AtomicU64,
    pub(crate) detail: AtomicU64,
    /// Rung after each signal to the rank.
    pub(crate) doorbell: Doorbell,
    /// Where the rank is in its life.
    pub(crate) status: Status,
    /// Kind of the operation that the rank is blocked in; 0 while it computes. A hint for messages.
    pub(crate) activity: AtomicU32,
    /// The rank whose tiles the rank is blocked for, plus 1; 0 for none. A hint for messages.
    pub(crate) awaits: AtomicU32,
    /// Whether the rank holds a core permit. A hint for messages.
    pub(crate) computing: AtomicU32,
    /// Number of the rank's process; 0 when it is a thread of its launcher's. A hint for messages.
    pub(crate) process: AtomicU32,
}

/// Seals on the file of a segment: its size never changes, so that mapped pages stay backed.
pub(crate) const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// A mapping of the shared segment.
pub(crate) struct Segment {
    start: NonNull<u8>,
    /// Always `layout.total_bytes`, as mapped.
    bytes: usize,
    pub(crate) layout: Layout,
}

// SAFETY: the mapping is process-wide memory. Its control sections are atomics; its byte sections are reached through raw
// pointers by the protocol of `endpoint.rs`.
unsafe impl Send for Segment {}
// SAFETY: as above.
unsafe impl Sync for Segment {}

impl Drop for Segment {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `anonymous` or `map`, with its length; regions that point into it hold this segment
        // alive. It fails only for bad arguments.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

impl Segment {
    /// A fresh segment for ranks that are threads of this process.
    pub(crate) fn anonymous(spec: &GroupSpec) -> Result<Self, FabricError> {
        let layout = Layout::new(spec)?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // Private to this process, as its threads are: unlike shared memory it may lie on huge pages everywhere.
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let start = unsafe {
            mmap_anonymous(core::ptr::null_mut(), layout.total_bytes, access, MapFlags::PRIVATE | MapFlags::NORESERVE)
        };
        let segment = Self::mapped(start, layout)?;
        segment.initialise(spec);
        Ok(segment)
    }

    /// Maps the segment behind `fd`, which is at least as long as the layout says.
    pub(crate) fn map(fd: BorrowedFd<'_>, layout: Layout) -> Result<Self, FabricError> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory; the file's size is sealed,
        // so the pages stay backed.
        let start = unsafe { mmap(core::ptr::null_mut(), layout.total_bytes, access, MapFlags::SHARED, fd, 0) };
        Self::mapped(start, layout)
    }

    fn mapped(start: rustix::io::Result<*mut core::ffi::c_void>, layout: Layout) -> Result<Self, FabricError> {
        let start = start.map_err(|error| FabricError::os("mmap", error))?;
        let start = NonNull::new(start.cast::<u8>()).ok_or_else(|| FabricError::os("mmap", "mapped at address 0"))?;
        let segment = Self { start, bytes: layout.total_bytes, layout };
        for window in &segment.layout.windows {
            // Parts of one window lie together, so that huge pages cost at most one more a rank than it touches.
            if window.bytes >= pages::HUGE_BYTES {
                pages::advise_huge(segment.at(window, Rank::new(0)), window.stride * segment.layout.ranks);
            }
        }
        Ok(segment)
    }

    /// Reads the identity of the group whose segment is behind `fd`, and the file's bytes: `None` when that cannot be one.
    pub(crate) fn identity(fd: BorrowedFd<'_>) -> Option<(Identity, usize)> {
        let seals = fcntl_get_seals(fd).ok()?;
        let bytes = usize::try_from(fstat(fd).ok()?.st_size).ok()?;
        if !seals.contains(SEALS) || bytes < size_of::<Header>() {
            return None;
        }
        // SAFETY: a new read-only mapping at an address of the kernel's choice; the file's size is sealed and no smaller.
        let start =
            unsafe { mmap(core::ptr::null_mut(), size_of::<Header>(), ProtFlags::READ, MapFlags::SHARED, fd, 0).ok()? };
        let identity = {
            // SAFETY: page-aligned, mapped for `Header`'s size; only atomics, of which only loads follow.
            let header = unsafe { &*start.cast::<Header>() };
            let load = |word: &AtomicU64| word.load(Ordering::Relaxed);
            let words = [&header.version, &header.ranks, &header.config_digest, &header.layout_digest, &header.vectors];
            (load(&header.magic) == MAGIC).then(|| Identity::from_words(words.map(load)))
        };
        // SAFETY: the mapping made above, no longer referred to.
        let _ = unsafe { munmap(start, size_of::<Header>()) };
        identity.map(|identity| (identity, bytes))
    }

    /// Writes the identity of the group into a fresh (zero) segment, before any rank starts.
    pub(crate) fn initialise(&self, spec: &GroupSpec) {
        let header = self.header();
        header.magic.store(MAGIC, Ordering::Relaxed);
        let fields = [&header.version, &header.ranks, &header.config_digest, &header.layout_digest, &header.vectors];
        for (field, word) in fields.into_iter().zip(Identity::new(spec, self.layout.digest).to_words()) {
            field.store(word, Ordering::Relaxed);
        }
        header.permits.0.initialise(spec.permits().unwrap_or(0));
        // Starting a thread or process orders these stores before anything the rank does.
    }

    fn at(&self, section: &Section, rank: Rank) -> NonNull<u8> {
        assert!(rank.index() < self.layout.ranks, "rank checked by the caller");
        // SAFETY: the table gives each of the `ranks` entries a place within `total_bytes` of the mapping.
        unsafe { self.start.add(section.offset + rank.index() * section.stride) }
    }

    pub(crate) fn header(&self) -> &Header {
        // SAFETY: at offset 0 of a page-aligned mapping, large enough by the table; all fields are atomics, for which any
        // bytes are valid.
        unsafe { self.at(&self.layout.header, Rank::new(0)).cast::<Header>().as_ref() }
    }

    pub(crate) fn control(&self, rank: Rank) -> &Control {
        // SAFETY: aligned and large enough by the table; all fields are atomics.
        unsafe { self.at(&self.layout.control, rank).cast::<Control>().as_ref() }
    }

    fn words(&self, section: &Section, rank: Rank, count: usize) -> &[AtomicU64] {
        debug_assert!(count * 8 <= section.bytes);
        // SAFETY: aligned and large enough by the table; atomics take any bytes.
        unsafe { core::slice::from_raw_parts(self.at(section, rank).cast::<AtomicU64>().as_ptr(), count) }
    }

    /// `[SIGNALS]`: the signal words of `rank`.
    pub(crate) fn signals(&self, rank: Rank) -> &[AtomicU64] {
        self.words(&self.layout.signals, rank, SIGNALS)
    }

    /// `[3N]`: bytes that `rank` sends to each rank, bytes that it expects from each, and where in its window those land.
    pub(crate) fn sizes(&self, rank: Rank) -> &[AtomicU64] {
        self.words(&self.layout.sizes, rank, 3 * self.layout.ranks)
    }

    /// `[RECORD_WORDS]`: the failure record of `rank`.
    pub(crate) fn record(&self, rank: Rank) -> &[AtomicU64] {
        self.words(&self.layout.records, rank, RECORD_WORDS)
    }

    /// The staging chunk of `rank` for phases of this parity.
    pub(crate) fn staging(&self, rank: Rank, parity: usize) -> NonNull<u8> {
        self.at(&self.layout.staging[parity], rank)
    }

    /// The reduced share of `rank` for phases of this parity.
    pub(crate) fn reduced(&self, rank: Rank, parity: usize) -> NonNull<u8> {
        self.at(&self.layout.reduced[parity], rank)
    }

    /// The credit of `rank` for a window that exists.
    pub(crate) fn credit(&self, window: WindowId, rank: Rank) -> Option<&Credit> {
        let section = self.layout.credits.get(window.index())?;
        // SAFETY: aligned and large enough by the table; all fields are atomics.
        Some(unsafe { self.at(section, rank).cast::<Credit>().as_ref() })
    }

    /// The part of `rank` of a window that exists, and its bytes.
    pub(crate) fn window(&self, window: WindowId, rank: Rank) -> Option<(NonNull<u8>, usize)> {
        let section = self.layout.windows.get(window.index())?;
        Some((self.at(section, rank), section.bytes))
    }

    /// The ranks of the group, ascending.
    pub(crate) fn ranks(&self) -> impl Iterator<Item = Rank> + use<> {
        (0..self.layout.ranks).map(Rank::new)
    }
}
