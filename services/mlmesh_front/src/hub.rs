//! Where the two threads meet: what came in for Python, and what Python wants sent.
//!
//! The serving thread never takes the interpreter's lock; Python never waits for the serving thread.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering::*};
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use http::HeaderMap;
use pyo3::prelude::*;
use tokio::sync::Notify;

use crate::wire::{Body, Metadata, Status, CODES};

/// Seconds of a method's histogram; the same as in mlmesh_runtime.telemetry, checked there.
pub const BUCKETS: [f64; 15] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

/// Bounds that do not change while the server lives.
pub struct Config {
    pub receive_max: usize,
    pub send_max: usize,
    pub streams_max: u32,
    pub header_max: usize,
    pub keepalive_ns: u64,
    pub keepalive_timeout_ns: u64,
    pub ping_interval_ns: u64,
    pub credit: usize,
    pub calls_max: usize,
}

/// A method that is served.
pub struct Method {
    pub request_streaming: bool,
    pub direct: Option<Py<PyAny>>,
    pub deadline_required: bool,
    pub counters: Counters,
    /// Goes with every status; Python sets it anew now and then.
    pub trailers: Mutex<Metadata>,
    pub has_trailers: AtomicBool,
}

/// What is counted of direct calls.
#[derive(Default)]
pub struct Counters {
    pub started: AtomicU64,
    pub handled: [AtomicU64; CODES],
    pub buckets: [AtomicU64; BUCKETS.len() + 1],
    pub nanoseconds: AtomicU64,
    pub received: AtomicU64,
    pub sent: AtomicU64,
}

impl Counters {
    pub fn ended(&self, code: u8, ns: u64) {
        self.handled[usize::from(code).min(CODES - 1)].fetch_add(1, Relaxed);
        let seconds = ns as f64 / 1e9;
        let bucket = BUCKETS.iter().position(|&bound| seconds <= bound).unwrap_or(BUCKETS.len());
        self.buckets[bucket].fetch_add(1, Relaxed);
        self.nanoseconds.fetch_add(ns, Relaxed);
    }
}

/// What both threads know of one call. `key` finds the serving thread's part of it, which may be gone.
pub struct Shared {
    pub hub: Arc<Hub>,
    pub key: u64,
    pub method: usize,
    pub headers: HeaderMap,
    pub peer: Arc<str>,
    pub deadline_ns: u64,
    pub started_ns: u64,
    /// Answered, cancelled, expired, or the connection is lost.
    pub gone: AtomicBool,
    /// Messages (and bytes of them) that were read and are neither answered nor taken.
    pub pending: AtomicUsize,
    pub pending_bytes: AtomicUsize,
    /// Answers (and bytes of them) that are not on the connection yet.
    pub unsent: AtomicUsize,
    pub unsent_bytes: AtomicUsize,
    /// The reader waits for one of the above to fall.
    pub stalled: AtomicBool,
    /// A direct method gets the stream's messages.
    pub lane: AtomicBool,
    /// Messages that came and went.
    pub moves: AtomicUsize,
    /// A direct method has this unary call; it is counted here and not by a task in Python.
    pub taken: AtomicBool,
    pub stream: Mutex<Stream>,
}

/// What Python knows of a stream. Only Python's thread locks it, but for `write_wanted`.
#[derive(Default)]
pub struct Stream {
    pub reads: VecDeque<Body>,
    pub read_end: Option<ReadEnd>,
    pub read_wanted: bool,
    pub write_wanted: bool,
    /// The message from which on the ordinary method answers.
    pub handed: Option<(u64, Body)>,
    pub context: Option<Py<PyAny>>,
    pub error: Option<Py<PyAny>>,
}

/// Why nothing more can be read.
#[derive(Clone)]
pub enum ReadEnd {
    Eof,
    Broken,
}

pub fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Shared {
    /// How much a writer may leave unsent before it waits.
    pub const UNSENT_BYTES: usize = 64 * 1024;

    fn sent(self: &Arc<Self>, len: usize, first: bool) {
        self.unsent.fetch_sub(usize::from(first), AcqRel);
        self.moves.fetch_add(usize::from(first), Relaxed);
        let left = self.unsent_bytes.fetch_sub(len, AcqRel) - len;
        if left <= Self::UNSENT_BYTES {
            let mut stream = locked(&self.stream);
            if std::mem::take(&mut stream.write_wanted) {
                drop(stream);
                self.hub.push(Event::Writable(self.clone()));
                self.hub.signal();
            }
        }
        if self.stalled.load(Acquire) {
            self.hub.send(Out::Credit { key: self.key });
        }
    }

    /// A message is answered or taken.
    pub fn settled(&self, len: usize) {
        self.pending.fetch_sub(1, AcqRel);
        self.pending_bytes.fetch_sub(len, AcqRel);
    }
}

/// What happens for Python to look at.
pub enum Event {
    /// A unary call of a direct method.
    Direct(Arc<Shared>, Body),
    /// A call of an ordinary method; its request where it is not a stream.
    Open(Arc<Shared>, Option<Body>),
    Message(Arc<Shared>, u64, Body),
    End(Arc<Shared>, ReadEnd),
    Writable(Arc<Shared>),
    /// Nobody waits for the answer any more; the code says why.
    Cancelled(Arc<Shared>, u8),
    /// The slots of a direct stream are done: to its end, to what was handed over, or to an error.
    Lane(Arc<Shared>),
    /// Every connection is closed.
    Idle,
}

/// What Python wants done.
pub enum Out {
    Reply {
        key: u64,
        payload: Payload,
    },
    Fail {
        key: u64,
        status: Status,
    },
    /// Of a direct stream's message: answers, and whether there are more.
    Slot {
        key: u64,
        slot: u64,
        payload: Option<Payload>,
        last: bool,
    },
    SlotFail {
        key: u64,
        slot: u64,
    },
    HandOver {
        key: u64,
        slot: u64,
    },
    /// A direct stream reads no more; what was read is answered.
    Close {
        key: u64,
    },
    Lane {
        key: u64,
    },
    Headers {
        key: u64,
        metadata: Metadata,
    },
    Write {
        key: u64,
        payload: Payload,
    },
    End {
        key: u64,
        status: Status,
    },
    Credit {
        key: u64,
    },
    /// All that was read before a message that cannot be was taken.
    Refused {
        key: u64,
    },
    Graceful,
    Kill,
}

/// An encoded message with its frame's head, in pieces.
pub struct Payload {
    pub first: Bytes,
    pub rest: Vec<Bytes>,
}

/// Memory of Python's that goes out as it is; freed on Python's thread.
pub struct Held {
    ptr: *const u8,
    len: usize,
    buffer: Option<pyo3::buffer::PyUntypedBuffer>,
    hub: Arc<Hub>,
}

// The buffer is pinned by its export, and only freed by Python's thread (through `Hub.trash`).
unsafe impl Send for Held {}
unsafe impl Sync for Held {}

impl Held {
    pub fn new(hub: Arc<Hub>, buffer: pyo3::buffer::PyUntypedBuffer) -> Self {
        Held { ptr: buffer.buf_ptr() as *const u8, len: buffer.len_bytes(), buffer: Some(buffer), hub }
    }
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        unsafe { std::slice::from_raw_parts(self.ptr, self.len) }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            locked(&self.hub.trash).0.push(buffer);
            self.hub.signal();
        }
    }
}

/// A piece of an answer that counts until it is on the connection.
pub struct Tracked {
    bytes: Bytes,
    first: bool,
    shared: Arc<Shared>,
}

impl Tracked {
    pub fn wrap(shared: &Arc<Shared>, bytes: Bytes, first: bool) -> Bytes {
        shared.unsent.fetch_add(usize::from(first), AcqRel);
        shared.unsent_bytes.fetch_add(bytes.len(), AcqRel);
        Bytes::from_owner(Tracked { bytes, first, shared: shared.clone() })
    }
}

impl AsRef<[u8]> for Tracked {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        self.shared.sent(self.bytes.len(), self.first);
    }
}

pub struct Trash(pub Vec<pyo3::buffer::PyUntypedBuffer>);
unsafe impl Send for Trash {}

pub struct Hub {
    pub config: Config,
    pub methods: std::sync::OnceLock<Vec<Method>>,
    pub paths: std::sync::OnceLock<std::collections::HashMap<String, usize>>,
    inbox: Mutex<Vec<Event>>,
    outbox: Mutex<Vec<Out>>,
    signalled: AtomicBool,
    out_signalled: AtomicBool,
    /// While Python handles a burst its answers are gathered.
    gathering: AtomicBool,
    pub out_ready: Notify,
    pub trash: Mutex<Trash>,
    event: OwnedFd,
    /// Direct unary calls in Python's hands.
    pub in_flight: AtomicI64,
    pub closed: AtomicBool,
    /// Connections that were ended for what their peer did.
    pub abuses: Mutex<std::collections::HashMap<&'static str, u64>>,
}

impl Hub {
    pub fn new(config: Config) -> std::io::Result<Self> {
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        Ok(Hub {
            config,
            methods: Default::default(),
            paths: Default::default(),
            inbox: Default::default(),
            outbox: Default::default(),
            signalled: AtomicBool::new(false),
            out_signalled: AtomicBool::new(false),
            gathering: AtomicBool::new(false),
            out_ready: Notify::new(),
            trash: Mutex::new(Trash(Vec::new())),
            event: unsafe { OwnedFd::from_raw_fd(fd) },
            in_flight: AtomicI64::new(0),
            closed: AtomicBool::new(false),
            abuses: Default::default(),
        })
    }

    pub fn fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    pub fn method(&self, index: usize) -> &Method {
        &self.methods.get().expect("methods are set before calls come")[index]
    }

    /// Leave something for Python; it looks when `signal` is called.
    pub fn push(&self, event: Event) {
        locked(&self.inbox).push(event);
    }

    /// Leave something to be looked at before all else.
    pub fn push_front(&self, mut events: Vec<Event>) {
        if !events.is_empty() {
            let mut inbox = locked(&self.inbox);
            events.append(&mut inbox);
            *inbox = events;
        }
    }

    pub fn has_events(&self) -> bool {
        !locked(&self.inbox).is_empty()
    }

    /// Wake Python, once for all that is there.
    pub fn signal(&self) {
        if !self.signalled.swap(true, AcqRel) {
            let one = 1u64.to_ne_bytes();
            unsafe { libc::write(self.fd(), one.as_ptr().cast(), 8) };
        }
    }

    pub fn clear_signal(&self) {
        let mut count = [0u8; 8];
        unsafe { libc::read(self.fd(), count.as_mut_ptr().cast(), 8) };
    }

    /// Take what is there. `signalled` stays set, so that nobody writes to the event while Python is awake.
    pub fn take(&self) -> Vec<Event> {
        std::mem::take(&mut *locked(&self.inbox))
    }

    /// Python goes back to sleep; True when something came meanwhile and it must not.
    pub fn sleep(&self) -> bool {
        self.signalled.store(false, SeqCst);
        if self.has_events() {
            self.signalled.store(true, SeqCst);
            return true;
        }
        false
    }

    /// Ask for something to be sent or done.
    pub fn send(&self, out: Out) {
        let mut outbox = locked(&self.outbox);
        outbox.push(out);
        let many = outbox.len() % 16 == 0;
        drop(outbox);
        if many || !self.gathering.load(Relaxed) {
            self.flush();
        }
    }

    pub fn gather(&self, on: bool) {
        self.gathering.store(on, Relaxed);
        if !on && !locked(&self.outbox).is_empty() {
            self.flush();
        }
    }

    fn flush(&self) {
        if !self.out_signalled.swap(true, AcqRel) {
            self.out_ready.notify_one();
        }
    }

    pub fn take_out(&self) -> Vec<Out> {
        self.out_signalled.store(false, Release);
        std::mem::take(&mut *locked(&self.outbox))
    }
}

/// Nanoseconds of the clock that Python's time.monotonic_ns() reads.
pub fn now_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}
