//! The socket under HTTP/2, with an eye on the frames that come in: h2 answers pings, settings and resets by itself,
//! and does not say how many there were.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

use crate::hub::now_ns;

/// Control frames that cost a peer nothing: so many at once, and so many a second.
const CONTROL_BURST: f64 = 2000.0;
const CONTROL_RATE: f64 = 1000.0;
/// Pings that came too early before a connection is ended, as in gRPC.
const PING_STRIKES: u32 = 2;

/// What was seen on one connection.
pub struct Seen {
    pub last_read_ns: Cell<u64>,
    pub resets: RefCell<Vec<u32>>,
    /// Streams begun in this turn, in order: h2 does not tell of those that were reset before it was asked.
    pub opened: RefCell<Vec<u32>>,
    opened_last: Cell<u32>,
    /// The peer broke a bound.
    pub abuse: Cell<Option<&'static str>>,
    ping_interval_ns: u64,
    last_ping_ns: Cell<u64>,
    strikes: Cell<u32>,
    tokens: Cell<f64>,
    tokens_ns: Cell<u64>,
}

impl Seen {
    pub fn new(ping_interval_ns: u64) -> Self {
        let now = now_ns();
        Seen {
            last_read_ns: Cell::new(now),
            resets: RefCell::new(Vec::new()),
            opened: RefCell::new(Vec::new()),
            opened_last: Cell::new(0),
            abuse: Cell::new(None),
            ping_interval_ns,
            last_ping_ns: Cell::new(0),
            strikes: Cell::new(0),
            tokens: Cell::new(CONTROL_BURST),
            tokens_ns: Cell::new(now),
        }
    }

    /// An answer was sent: the peer may ping again.
    pub fn answered(&self) {
        self.strikes.set(0);
        self.last_ping_ns.set(0);
    }

    /// Take from the bucket of control frames.
    pub fn control(&self, cost: f64, what: &'static str) {
        let now = self.last_read_ns.get();
        let gained = now.saturating_sub(self.tokens_ns.get()) as f64 / 1e9 * CONTROL_RATE;
        self.tokens_ns.set(now);
        let left = (self.tokens.get() + gained).min(CONTROL_BURST) - cost;
        self.tokens.set(left);
        if left < 0.0 {
            self.abuse.set(Some(what));
        }
    }

    fn ping(&self) {
        let now = self.last_read_ns.get();
        let last = self.last_ping_ns.replace(now);
        if last != 0 && now.saturating_sub(last) < self.ping_interval_ns {
            self.strikes.set(self.strikes.get() + 1);
            if self.strikes.get() > PING_STRIKES {
                self.abuse.set(Some("too_many_pings"));
            }
        }
    }

    fn frame(&self, kind: u8, flags: u8, len: usize, stream: u32) {
        match kind {
            0 if len == 0 && flags & 1 == 0 => self.control(1.0, "too many empty frames"),
            1 if stream > self.opened_last.get() => {
                self.opened_last.set(stream);
                self.opened.borrow_mut().push(stream);
            }
            2 => self.control(1.0, "too many priorities"),
            3 => self.resets.borrow_mut().push(stream),
            4 => self.control(5.0, "too many settings"),
            6 if flags & 1 == 0 => {
                self.control(1.0, "too_many_pings");
                self.ping();
            }
            _ => {}
        }
    }
}

pub enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Socket {
    fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(socket) => socket.try_write(bytes),
            Socket::Unix(socket) => socket.try_write(bytes),
        }
    }

    fn try_write_vectored(&self, bufs: &[io::IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Socket::Tcp(socket) => socket.try_write_vectored(bufs),
            Socket::Unix(socket) => socket.try_write_vectored(bufs),
        }
    }

    fn poll_write_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Socket::Tcp(socket) => socket.poll_write_ready(cx),
            Socket::Unix(socket) => socket.poll_write_ready(cx),
        }
    }

    fn try_read(&self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(socket) => socket.try_read(bytes),
            Socket::Unix(socket) => socket.try_read(bytes),
        }
    }

    fn poll_read_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Socket::Tcp(socket) => socket.poll_read_ready(cx),
            Socket::Unix(socket) => socket.poll_read_ready(cx),
        }
    }
}

/// The socket and what is to be written to it. h2 asks for a write after every frame with a body; all frames of one
/// turn are gathered here and leave in one system call.
pub struct Wire {
    socket: Socket,
    waiting: RefCell<Vec<u8>>,
    /// Whether `flush` is called at the end of a turn, so that h2's own flushes need not write.
    pub gathers: Cell<bool>,
}

/// More than this is not copied, and not gathered beyond.
const GATHERED_MAX: usize = 64 * 1024;
const DIRECT_MIN: usize = 16 * 1024;

impl Wire {
    pub fn new(socket: Socket) -> Self {
        Wire { socket, waiting: RefCell::new(Vec::new()), gathers: Cell::new(false) }
    }

    /// Write what waits. Pending when the peer does not take it.
    pub fn flush(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut waiting = self.waiting.borrow_mut();
        let mut written = 0;
        let result = loop {
            if written == waiting.len() {
                break Poll::Ready(Ok(()));
            }
            match self.socket.try_write(&waiting[written..]) {
                Ok(0) => break Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Ok(count) => written += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => match self.socket.poll_write_ready(cx) {
                    Poll::Ready(Ok(())) => {}
                    Poll::Ready(Err(error)) => break Poll::Ready(Err(error)),
                    Poll::Pending => break Poll::Pending,
                },
                Err(error) => break Poll::Ready(Err(error)),
            }
        };
        waiting.drain(..written);
        if waiting.is_empty() && waiting.capacity() > GATHERED_MAX {
            *waiting = Vec::new();
        }
        result
    }

    fn write(&self, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let total: usize = bufs.iter().map(|buf| buf.len()).sum();
        if total >= DIRECT_MIN || self.waiting.borrow().len() + total > GATHERED_MAX {
            match self.flush(cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => return Poll::Pending,
            }
        }
        if total >= DIRECT_MIN {
            loop {
                match self.socket.try_write_vectored(bufs) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => match self.socket.poll_write_ready(cx) {
                        Poll::Ready(Ok(())) => {}
                        Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                        Poll::Pending => return Poll::Pending,
                    },
                    done => return Poll::Ready(done),
                }
            }
        }
        let mut waiting = self.waiting.borrow_mut();
        for buf in bufs {
            waiting.extend_from_slice(buf);
        }
        Poll::Ready(Ok(total))
    }
}

pub struct Metered {
    wire: Rc<Wire>,
    seen: Rc<Seen>,
    /// Bytes until the next frame's head.
    skip: usize,
    head: [u8; 9],
    filled: usize,
}

impl Metered {
    pub fn new(wire: Rc<Wire>, seen: Rc<Seen>) -> Self {
        // The preface comes first.
        Metered { wire, seen, skip: 24, head: [0; 9], filled: 0 }
    }

    fn look(&mut self, mut bytes: &[u8]) {
        self.seen.last_read_ns.set(now_ns());
        while !bytes.is_empty() {
            if self.skip > 0 {
                let count = self.skip.min(bytes.len());
                self.skip -= count;
                bytes = &bytes[count..];
                continue;
            }
            let count = (9 - self.filled).min(bytes.len());
            self.head[self.filled..self.filled + count].copy_from_slice(&bytes[..count]);
            self.filled += count;
            bytes = &bytes[count..];
            if self.filled == 9 {
                self.filled = 0;
                let head = &self.head;
                let len = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
                let stream = u32::from_be_bytes([head[5] & 0x7f, head[6], head[7], head[8]]);
                self.skip = len;
                self.seen.frame(head[3], head[4], len, stream);
            }
        }
    }
}

impl AsyncRead for Metered {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let this = &mut *self;
            // A read only ever writes to what it is given, and says how far.
            let unfilled = unsafe {
                let unfilled = buf.unfilled_mut();
                std::slice::from_raw_parts_mut(unfilled.as_mut_ptr().cast::<u8>(), unfilled.len())
            };
            match this.wire.socket.try_read(unfilled) {
                Ok(count) => {
                    let before = buf.filled().len();
                    unsafe { buf.assume_init(count) };
                    buf.advance(count);
                    this.look(&buf.filled()[before..]);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => match this.wire.socket.poll_read_ready(cx) {
                    Poll::Ready(Ok(())) => {}
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                    Poll::Pending => return Poll::Pending,
                },
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for Metered {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.wire.write(cx, &[io::IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.wire.write(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.wire.gathers.get() {
            return Poll::Ready(Ok(()));
        }
        self.wire.flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.wire.flush(cx) {
            Poll::Ready(Ok(())) => {}
            other => return other,
        }
        let socket = match &self.wire.socket {
            Socket::Tcp(socket) => socket.as_raw_fd(),
            Socket::Unix(socket) => socket.as_raw_fd(),
        };
        unsafe { libc::shutdown(socket, libc::SHUT_WR) };
        Poll::Ready(Ok(()))
    }
}
