//! Memory that the fabric knows, and the guards through which safe code reads and writes it.

use crate::borrow::{Borrow, OPEN, RECEIVING, WRITER};
use crate::{AccessError, copy, pages};
use bytemuck::Pod;
use core::any::Any;
use core::fmt;
use core::marker::PhantomData;
use core::mem::{ManuallyDrop, align_of, size_of};
use core::ops::{Deref, DerefMut};
use core::ptr::NonNull;
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::sync::Arc;

/// Alignment of every region that the fabric allocates, in bytes.
pub const REGION_ALIGN: usize = 64;

/// Memory known to the fabric: private, or the own part of a symmetric window. A cheap handle; clones are the same memory.
///
/// # Why safe code cannot race on it
/// One atomic word holds who may touch the memory: so many readers, or one writer, or `OPEN` (peers may put and get), or
/// `RECEIVING` (a collective in flight writes it). Guards and operations take their right from that word when they begin
/// and are refused with [`AccessError`] when they cannot have it. A window goes to `OPEN` when its owner submits `Open`
/// (so no guard is alive from then on) and peers start only after `Open` has completed, which needs every owner's
/// submission. It comes back when `Close` has completed, which needs every rank's submission, after which that rank is
/// refused any put or get; and its earlier ones were complete. So a rank may be past `Open` while another is still inside:
/// the other has no guard. And one may be past `Close` and hold a guard while another is still inside: the other cannot put.
/// Operations between `Open` and `Close` use copies that may race without being undefined (see `copy.rs`).
#[derive(Clone)]
pub struct Region {
    inner: Arc<Inner>,
}

struct Inner {
    memory: Memory,
    bytes: usize,
    borrow: Borrow,
}

enum Memory {
    /// Allocated here, `REGION_ALIGN` aligned.
    Heap(NonNull<u8>),
    /// The parts of an adopted `Vec`, and how to give them back.
    Adopted { start: NonNull<u8>, count: usize, capacity: usize, release: unsafe fn(NonNull<u8>, usize, usize) },
    /// Part of something larger, kept alive by the handle.
    Part { start: NonNull<u8>, _keeper: Arc<dyn Any + Send + Sync> },
    /// Memory of a device: known to a backend only.
    Foreign(Arc<dyn Any + Send + Sync>),
}

// SAFETY: the memory is owned by `Inner` (or kept alive by it), is plain bytes, and is reached only through guards and
// holds, which the atomic state word makes exclusive or shared as a `RwLock` would.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

impl Drop for Inner {
    fn drop(&mut self) {
        match self.memory {
            // SAFETY: allocated in `Region::zeroed` with this very layout; no guard is alive, as guards borrow a Region.
            Memory::Heap(start) => unsafe { dealloc(start.as_ptr(), heap_layout(self.bytes)) },
            // SAFETY: the parts of the `Vec` taken apart in `Region::from_vec`, given back once.
            Memory::Adopted { start, count, capacity, release } => unsafe { release(start, count, capacity) },
            Memory::Part { .. } | Memory::Foreign(_) => {}
        }
    }
}

fn heap_layout(bytes: usize) -> Layout {
    match Layout::from_size_align(bytes.max(1), REGION_ALIGN) {
        Ok(layout) => layout,
        Err(_) => panic!("a region of {bytes} bytes exceeds the address space"),
    }
}

impl Region {
    /// Zeroed private memory, 64-byte aligned.
    ///
    /// # Panics
    /// When `bytes` exceeds the address space; aborts, like `Vec`, when memory is exhausted.
    #[must_use]
    pub fn zeroed(bytes: usize) -> Self {
        let layout = heap_layout(bytes);
        // SAFETY: the layout has a non-zero size.
        let Some(start) = NonNull::new(unsafe { alloc_zeroed(layout) }) else { handle_alloc_error(layout) };
        pages::advise_huge(start, bytes);
        Self::new(Memory::Heap(start), bytes)
    }

    /// Adopts a framework's host memory where it is, without a copy. Freed with the last handle.
    #[must_use]
    pub fn from_vec<T: Pod>(values: Vec<T>) -> Self {
        /// # Safety
        /// The arguments are the parts of one `Vec<T>`, given up by its owner.
        unsafe fn release<T>(start: NonNull<u8>, count: usize, capacity: usize) {
            // SAFETY: the caller's promise.
            drop(unsafe { Vec::from_raw_parts(start.as_ptr().cast::<T>(), count, capacity) });
        }
        let mut values = ManuallyDrop::new(values);
        let (count, capacity) = (values.len(), values.capacity());
        let start = NonNull::new(values.as_mut_ptr().cast::<u8>()).unwrap_or(NonNull::dangling());
        Self::new(Memory::Adopted { start, count, capacity, release: release::<T> }, count * size_of::<T>())
    }

    /// Memory of a device: a handle for the backend that can use it. It has no host view, so guards are refused.
    #[must_use]
    pub fn foreign(bytes: usize, handle: Arc<dyn Any + Send + Sync>) -> Self {
        Self::new(Memory::Foreign(handle), bytes)
    }

    /// Adopts memory that somebody else has, and that `keeper` keeps alive: a framework's tensor, part of a mapping.
    ///
    /// # Safety
    /// `start..start + bytes` stays mapped, readable and writable as long as `keeper` lives. It is touched by no one but through
    /// this region's guards and holds; while the region is open or receiving, by others too, but only with copies that may race
    /// ([`Hold::read_bytes`], [`Hold::write_bytes`], another process's stores).
    #[must_use]
    pub unsafe fn adopt(start: NonNull<u8>, bytes: usize, keeper: Arc<dyn Any + Send + Sync>) -> Self {
        Self::new(Memory::Part { start, _keeper: keeper }, bytes)
    }

    fn new(memory: Memory, bytes: usize) -> Self {
        Self { inner: Arc::new(Inner { memory, bytes, borrow: Borrow::default() }) }
    }

    /// Its size in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.inner.bytes
    }

    /// For backends: what was given to [`Region::foreign`].
    #[must_use]
    pub fn foreign_handle(&self) -> Option<&(dyn Any + Send + Sync)> {
        match &self.inner.memory {
            Memory::Foreign(handle) => Some(&**handle),
            _ => None,
        }
    }

    /// Whether two handles are the same memory.
    #[must_use]
    pub fn same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// The start of its host memory. The pointer may be used only under a hold, a guard or an epoch.
    fn start(&self) -> Result<NonNull<u8>, AccessError> {
        match self.inner.memory {
            Memory::Heap(start) | Memory::Adopted { start, .. } | Memory::Part { start, .. } => Ok(start),
            Memory::Foreign(_) => Err(AccessError::NoHostView),
        }
    }

    /// Its content as a slice of `T`, shared with other readers.
    ///
    /// # Errors
    /// [`AccessError`] while it is written, open to peers or received into, and when `T` does not fit.
    pub fn read<T: Pod>(&self) -> Result<ReadGuard<'_, T>, AccessError> {
        let (start, count) = self.typed::<T>()?;
        self.begin_read()?;
        Ok(ReadGuard { region: self, start, count, _values: PhantomData })
    }

    /// Its content as a slice of `T`, alone.
    ///
    /// # Errors
    /// [`AccessError`] while anything else uses it, and when `T` does not fit.
    pub fn write<T: Pod>(&self) -> Result<WriteGuard<'_, T>, AccessError> {
        let (start, count) = self.typed::<T>()?;
        self.begin(WRITER)?;
        Ok(WriteGuard { region: self, start, count, _values: PhantomData })
    }

    fn typed<T: Pod>(&self) -> Result<(NonNull<T>, usize), AccessError> {
        let start = self.start()?.cast::<T>();
        let (bytes, size) = (self.bytes(), size_of::<T>());
        if size == 0 || bytes % size != 0 {
            return Err(AccessError::Ragged { bytes, size });
        }
        if bytes == 0 {
            return Ok((NonNull::dangling(), 0));
        }
        if !start.is_aligned() {
            return Err(AccessError::Misaligned { align: align_of::<T>() });
        }
        Ok((start, bytes / size))
    }

    fn begin_read(&self) -> Result<(), AccessError> {
        self.inner.borrow.begin_read().map_err(refusal)
    }

    fn begin(&self, state: u32) -> Result<(), AccessError> {
        self.inner.borrow.begin(state).map_err(refusal)
    }
}

fn refusal(state: u32) -> AccessError {
    match state {
        WRITER => AccessError::BeingWritten,
        OPEN => AccessError::Open,
        RECEIVING => AccessError::Receiving,
        _ => AccessError::BeingRead,
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Region").field("bytes", &self.bytes()).finish_non_exhaustive()
    }
}

/// What a [`Hold`] is for, and what it refuses to others meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// An operation reads: other readers stay allowed.
    Read,
    /// An operation writes: nobody else reads or writes.
    Write,
    /// Peers may put and get: all guards and holds are refused.
    Open,
    /// A collective in flight lets peers write: all guards and holds are refused.
    Receive,
}

/// The right of a backend to use a region. Guards and other holds are granted or refused beside it as its [`Use`] says.
///
/// When dropped, a hold to read or write gives the right back. One that peers take part in (`Open`, `Receive`) does not: after a
/// failure they may still be writing, so that the region stays refused for good. [`Hold::release`] gives it back.
#[derive(Debug)]
#[must_use = "the right ends with the hold"]
pub struct Hold {
    region: Region,
    usage: Use,
    returns: bool,
}

impl Hold {
    /// Takes the right, if the region's state allows it. Never blocks.
    ///
    /// # Errors
    /// [`AccessError`]: what uses the region now.
    pub fn take(region: &Region, usage: Use) -> Result<Self, AccessError> {
        match usage {
            Use::Read => region.begin_read()?,
            Use::Write => region.begin(WRITER)?,
            Use::Open => region.begin(OPEN)?,
            Use::Receive => region.begin(RECEIVING)?,
        }
        Ok(Self { region: region.clone(), usage, returns: matches!(usage, Use::Read | Use::Write) })
    }

    /// What it is for.
    #[must_use]
    pub fn usage(&self) -> Use {
        self.usage
    }

    /// The region.
    #[must_use]
    pub fn region(&self) -> &Region {
        &self.region
    }

    /// The start of the memory, for backends with unsafe code. Valid while the hold lives: for reads only under [`Use::Read`]; under
    /// [`Use::Open`] and [`Use::Receive`] for accesses that may race with those of others (never a Rust reference).
    ///
    /// # Errors
    /// [`AccessError::NoHostView`] for memory of a device.
    pub fn start(&self) -> Result<NonNull<u8>, AccessError> {
        self.region.start()
    }

    /// Copies `to.len()` bytes from `offset` on out of the region. Under [`Use::Open`] and [`Use::Receive`] others may be writing:
    /// then what arrives is some mix of old and new bytes.
    ///
    /// # Errors
    /// [`AccessError::Beyond`], [`AccessError::NoHostView`].
    pub fn read_bytes(&self, offset: usize, to: &mut [u8]) -> Result<(), AccessError> {
        let from = self.place(offset, to.len())?;
        // SAFETY: the range lies within the region, which this hold keeps alive and readable; other accesses meanwhile are reads,
        // or copies that may race with this one. `to` is a place of its own.
        unsafe { copy::copy(from.as_ptr(), to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    /// Copies `from` into the region, from `offset` on.
    ///
    /// # Errors
    /// [`AccessError::BeingRead`] under [`Use::Read`]; [`AccessError::Beyond`], [`AccessError::NoHostView`].
    pub fn write_bytes(&self, offset: usize, from: &[u8]) -> Result<(), AccessError> {
        if self.usage == Use::Read {
            return Err(AccessError::BeingRead);
        }
        let to = self.place(offset, from.len())?;
        // SAFETY: the range lies within the region, which this hold keeps alive. The hold is not one to read, so no reference to
        // the region exists, and other accesses meanwhile are copies that may race with this one.
        unsafe { copy::copy(from.as_ptr(), to.as_ptr(), from.len()) };
        Ok(())
    }

    /// The start of a range of the region.
    fn place(&self, offset: usize, bytes: usize) -> Result<NonNull<u8>, AccessError> {
        let (start, limit) = (self.region.start()?, self.region.bytes());
        match offset.checked_add(bytes) {
            // SAFETY: the offset lies within the region.
            Some(end) if end <= limit => Ok(unsafe { start.add(offset) }),
            end => Err(AccessError::Beyond { end: end.unwrap_or(usize::MAX), bytes: limit }),
        }
    }

    /// Gives the right back: the operation is over and no peer touches the region any more.
    pub fn release(mut self) {
        self.returns = true;
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        match (self.returns, self.usage) {
            (false, _) => {}
            (true, Use::Read) => self.region.inner.borrow.end_read(),
            (true, _) => self.region.inner.borrow.end(),
        }
    }
}

/// Shared view of a region's content.
pub struct ReadGuard<'a, T: Pod> {
    region: &'a Region,
    start: NonNull<T>,
    count: usize,
    _values: PhantomData<&'a [T]>,
}

impl<T: Pod> Deref for ReadGuard<'_, T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `typed` checked size and alignment; `Pod` allows any bytes; the state word counts this reader, so no
        // one writes until the guard is dropped, and the borrowed region keeps the memory alive.
        unsafe { core::slice::from_raw_parts(self.start.as_ptr(), self.count) }
    }
}

impl<T: Pod> Drop for ReadGuard<'_, T> {
    fn drop(&mut self) {
        self.region.inner.borrow.end_read();
    }
}

/// Exclusive view of a region's content.
pub struct WriteGuard<'a, T: Pod> {
    region: &'a Region,
    start: NonNull<T>,
    count: usize,
    _values: PhantomData<&'a mut [T]>,
}

impl<T: Pod> Deref for WriteGuard<'_, T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: as in `deref_mut`, and `&self` allows no write.
        unsafe { core::slice::from_raw_parts(self.start.as_ptr(), self.count) }
    }
}

impl<T: Pod> DerefMut for WriteGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: `typed` checked size and alignment; `Pod` allows any bytes; the state word says `WRITER`, so no one
        // else reads or writes until the guard is dropped, and the borrowed region keeps the memory alive.
        unsafe { core::slice::from_raw_parts_mut(self.start.as_ptr(), self.count) }
    }
}

impl<T: Pod> Drop for WriteGuard<'_, T> {
    fn drop(&mut self) {
        self.region.inner.borrow.end();
    }
}
