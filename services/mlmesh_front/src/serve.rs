//! The serving thread: connections, calls, deadlines. Everything here belongs to that one thread.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::future::Future;
use std::os::fd::{FromRawFd, RawFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::*};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{FuturesUnordered, Stream as _};
use h2::server::{Connection, SendResponse};
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, HeaderName, HeaderValue, Method as HttpMethod, Request, Response};
use slab::Slab;
use tokio::sync::Notify;

use crate::hub::{locked, now_ns, Event, Hub, Out, Payload, ReadEnd, Shared};
use crate::meter::{Metered, Seen, Socket, Wire};
use crate::wire::{self, Body, Encoding, Frames, Metadata, Status};

/// Unread bytes of one stream that the peer may have on its way.
const STREAM_WINDOW: u32 = 256 * 1024;
/// So wide that streams which nobody reads do not hold up others; their own windows bound them.
const CONNECTION_WINDOW: u32 = 64 * 1024 * 1024;
const FRAME_MAX: u32 = 64 * 1024;
const HANDSHAKE_S: u64 = 10;
/// Messages read ahead of an ordinary method.
const READ_AHEAD: usize = 4;
/// Bytes of one stream in Python's hands, beyond its first message.
const PENDING_BYTES: usize = 4 * 1024 * 1024;
const UNSENT_BYTES: usize = 1024 * 1024;
/// A call reset so soon after its begin was not given up by somebody who waited.
const RAPID_RESET_NS: u64 = 20_000_000;
const RAPID_RESET_COST: f64 = 1.0;
const LATE_RESET_COST: f64 = 0.02;
/// Deadlines so short are no reason to give a call up.
const SHORT_DEADLINE_NS: u64 = 1_000_000;
/// Answers' bytes on one connection that nobody reads, before it gets no more calls.
const CONNECTION_UNSENT: usize = 64 * 1024 * 1024;
/// How long the end of a stream waits for the next words of a peer that has not ended its side.
const LINGER_NS: u64 = 20_000_000;
/// The same for a peer that goes on sending.
const LINGER_MAX_NS: u64 = 250_000_000;
/// Messages that are put together at once take so much; up to this size each they do not count.
const ASSEMBLED_MAX: usize = 256 * 1024 * 1024;
const ASSEMBLED_FREE: usize = 64 * 1024;
/// Time for last words after everything was ended.
const FAREWELL_MS: u64 = 300;

pub struct World {
    hub: Arc<Hub>,
    calls: RefCell<Slab<Entry>>,
    generation: Cell<u32>,
    deadlines: RefCell<BTreeSet<(u64, u64)>>,
    deadline_changed: Notify,
    connections: RefCell<Slab<Rc<Conn>>>,
    going: Cell<bool>,
    stopped: Notify,
    /// Announced bytes of large messages that have not come to their end.
    assembling: Cell<usize>,
}

/// One connection.
struct Conn {
    peer: Arc<str>,
    seen: Rc<Seen>,
    streams: RefCell<HashMap<u32, u64>>,
    waker: RefCell<Option<Waker>>,
    graceful: Cell<bool>,
    kill: Cell<bool>,
    unsent: Arc<AtomicUsize>,
}

impl Conn {
    fn wake(&self) {
        if let Some(waker) = &*self.waker.borrow() {
            waker.wake_by_ref();
        }
    }
}

/// One call.
struct Entry {
    generation: u32,
    conn: Rc<Conn>,
    stream_id: u32,
    shared: Arc<Shared>,
    respond: Option<SendResponse<Bytes>>,
    send: Option<SendStream<Bytes>>,
    reader: Rc<Reader>,
    /// A stream of a direct method.
    lane: bool,
    slots: VecDeque<Slot>,
    base: u64,
    read: u64,
    eof: bool,
    closing: bool,
    handed: Option<u64>,
    lane_begun: bool,
    lane_told: bool,
    /// When `expire` looks at it; 0: never.
    timer_ns: u64,
    /// An end that waits for the peer to have said what it has to say.
    lingering: Option<Status>,
    /// When that end is sent at the latest.
    linger_end_ns: u64,
    /// What is wrong with the message after those that were read; told when they are answered.
    refusal: Option<Status>,
}

#[derive(Default)]
struct Slot {
    answers: Vec<Payload>,
    len: usize,
    done: bool,
    failed: bool,
}

/// What a call shares with the future that reads its requests.
#[derive(Default)]
struct Reader {
    closed: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

impl Reader {
    fn wake(&self) {
        if let Some(waker) = self.waker.borrow_mut().take() {
            waker.wake();
        }
    }
}

pub struct Listener {
    pub fd: RawFd,
    pub unix: bool,
}

/// Serve until `Out::Kill`. Called on its own thread.
pub fn run(hub: Arc<Hub>, listeners: Vec<Listener>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .event_interval(31)
        .build_local(Default::default());
    let Ok(runtime) = runtime else {
        hub.closed.store(true, Release);
        return;
    };
    let world = Rc::new(World {
        hub: hub.clone(),
        calls: Default::default(),
        generation: Cell::new(1),
        deadlines: Default::default(),
        deadline_changed: Notify::new(),
        connections: Default::default(),
        going: Cell::new(false),
        stopped: Notify::new(),
        assembling: Cell::new(0),
    });
    runtime.block_on(async {
        let mut accepting = Vec::new();
        for listener in listeners {
            accepting.push(tokio::task::spawn_local(accept(world.clone(), listener)));
        }
        tokio::task::spawn_local(expire(world.clone()));
        world.clone().obey(accepting).await;
    });
    runtime.shutdown_timeout(Duration::from_millis(200));
    hub.closed.store(true, Release);
    hub.push(Event::Idle);
    hub.signal();
}

async fn accept(world: Rc<World>, listener: Listener) {
    enum Any {
        Tcp(tokio::net::TcpListener),
        Unix(tokio::net::UnixListener),
    }
    let any = unsafe {
        if listener.unix {
            tokio::net::UnixListener::from_std(std::os::unix::net::UnixListener::from_raw_fd(listener.fd))
                .map(Any::Unix)
        } else {
            tokio::net::TcpListener::from_std(std::net::TcpListener::from_raw_fd(listener.fd)).map(Any::Tcp)
        }
    };
    let Ok(any) = any else { return };
    loop {
        let accepted = match &any {
            Any::Tcp(listener) => listener.accept().await.map(|(socket, address)| {
                let _ = socket.set_nodelay(true);
                let peer = match address {
                    std::net::SocketAddr::V4(v4) => format!("ipv4:{v4}"),
                    std::net::SocketAddr::V6(v6) => format!("ipv6:{v6}"),
                };
                (Socket::Tcp(socket), peer)
            }),
            Any::Unix(listener) => {
                listener.accept().await.map(|(socket, _)| (Socket::Unix(socket), String::from("unix:")))
            }
        };
        match accepted {
            Ok((socket, peer)) => {
                tokio::task::spawn_local(connection(world.clone(), socket, peer));
            }
            // Out of descriptors, most likely: they come back.
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// Answer what its caller waits for no longer.
async fn expire(world: Rc<World>) {
    loop {
        let next = world.deadlines.borrow().first().copied();
        let Some((deadline, key)) = next else {
            world.deadline_changed.notified().await;
            continue;
        };
        let now = now_ns();
        if deadline > now {
            let wait = Duration::from_nanos(deadline - now);
            let _ = tokio::time::timeout(wait, world.deadline_changed.notified()).await;
            continue;
        }
        world.deadlines.borrow_mut().remove(&(deadline, key));
        if world.with(key, |entry| entry.lingering.is_some()) == Some(true) {
            world.leave(key);
        } else {
            world.cancel(key, Status::new(wire::DEADLINE_EXCEEDED, "Deadline Exceeded"), true);
        }
        world.hub.signal();
    }
}

async fn connection(world: Rc<World>, socket: Socket, peer: String) {
    let config = &world.hub.config;
    let seen = Rc::new(Seen::new(config.ping_interval_ns));
    let conn = Rc::new(Conn {
        peer: peer.into(),
        seen: seen.clone(),
        streams: Default::default(),
        waker: Default::default(),
        graceful: Cell::new(world.going.get()),
        kill: Cell::new(false),
        unsent: Arc::new(AtomicUsize::new(0)),
    });
    let _guard = Connected::new(&world, &conn);
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME_MAX)
        .max_concurrent_streams(config.streams_max)
        .max_header_list_size((config.header_max * 4) as u32)
        .max_send_buffer_size(1024 * 1024)
        .max_concurrent_reset_streams(64)
        // Calls reset before they were looked at: after a moment of no CPU they may be many. `resets` has the bound.
        .max_pending_accept_reset_streams(1000)
        .reset_stream_duration(Duration::from_millis(100));
    let wire = Rc::new(Wire::new(socket));
    let handshake = builder.handshake::<_, Bytes>(Metered::new(wire.clone(), seen));
    if let Ok(Ok(mut http)) = tokio::time::timeout(Duration::from_secs(HANDSHAKE_S), handshake).await {
        let pings = http.ping_pong();
        let wake_at = tokio::time::sleep(Duration::from_nanos(config.keepalive_ns));
        let mut serving = Serving {
            world: world.clone(),
            conn: conn.clone(),
            readers: FuturesUnordered::new(),
            pings,
            pinged_ns: 0,
            timer: Box::pin(wake_at),
            told_graceful: false,
        };
        wire.gathers.set(true);
        std::future::poll_fn(|cx| {
            let polled = serving.poll(&mut http, cx);
            match wire.flush(cx) {
                Poll::Ready(Err(_)) => Poll::Ready(()),
                _ => polled,
            }
        })
        .await;
    }
}

/// A connection on the books; off them however it ends.
struct Connected {
    world: Rc<World>,
    conn: Rc<Conn>,
    place: usize,
}

impl Connected {
    fn new(world: &Rc<World>, conn: &Rc<Conn>) -> Self {
        let place = world.connections.borrow_mut().insert(conn.clone());
        Connected { world: world.clone(), conn: conn.clone(), place }
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        let world = &self.world;
        world.connections.borrow_mut().remove(self.place);
        let left: Vec<u64> = self.conn.streams.borrow().values().copied().collect();
        for key in left {
            world.cancel(key, Status::new(wire::CANCELLED, ""), false);
        }
        if world.going.get() && world.connections.borrow().is_empty() {
            world.hub.push(Event::Idle);
            world.stopped.notify_one();
        }
        world.hub.signal();
    }
}

struct Serving {
    world: Rc<World>,
    conn: Rc<Conn>,
    readers: FuturesUnordered<Pin<Box<dyn Future<Output = ()>>>>,
    pings: Option<h2::PingPong>,
    pinged_ns: u64,
    timer: Pin<Box<tokio::time::Sleep>>,
    told_graceful: bool,
}

impl Serving {
    fn poll(&mut self, http: &mut Connection<Metered, Bytes>, cx: &mut Context<'_>) -> Poll<()> {
        {
            let mut waker = self.conn.waker.borrow_mut();
            if !waker.as_ref().is_some_and(|old| old.will_wake(cx.waker())) {
                *waker = Some(cx.waker().clone());
            }
        }
        if self.conn.kill.get() {
            http.abrupt_shutdown(Reason::CANCEL);
            let _ = http.poll_closed(cx);
            return Poll::Ready(());
        }
        if self.conn.graceful.get() && !self.told_graceful {
            self.told_graceful = true;
            http.graceful_shutdown();
        }
        let mut over = false;
        loop {
            match http.poll_accept(cx) {
                Poll::Ready(Some(Ok((request, respond)))) => self.open(request, respond, cx),
                Poll::Ready(ended) => {
                    over = true;
                    if let Some(Err(error)) = ended {
                        self.broken(&error);
                    }
                    break;
                }
                Poll::Pending => break,
            }
        }
        self.resets();
        while let Poll::Ready(Some(())) = Pin::new(&mut self.readers).poll_next(cx) {}
        if self.world.hub.has_events() {
            self.world.hub.signal();
        }
        if over {
            return Poll::Ready(());
        }
        if let Some(abuse) = self.conn.seen.abuse.get() {
            *locked(&self.world.hub.abuses).entry(abuse).or_insert(0) += 1;
            http.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
            // What it had sent is dropped with the connection; give the goodbye a moment to leave.
            let _ = http.poll_closed(cx);
            return Poll::Ready(());
        }
        if self.keepalive(cx) {
            return Poll::Ready(());
        }
        Poll::Pending
    }

    /// h2 ended the connection for what the peer sent.
    fn broken(&self, error: &h2::Error) {
        if error.is_library() {
            let calm = error.reason() == Some(Reason::ENHANCE_YOUR_CALM);
            let reason = if calm { "too much to be calm" } else { "broken HTTP/2" };
            *locked(&self.world.hub.abuses).entry(reason).or_insert(0) += 1;
        }
    }

    /// True when the peer does not answer any more.
    fn keepalive(&mut self, cx: &mut Context<'_>) -> bool {
        let config = &self.world.hub.config;
        if let Some(pings) = &mut self.pings {
            if self.pinged_ns != 0 {
                match pings.poll_pong(cx) {
                    Poll::Ready(Ok(_)) => self.pinged_ns = 0,
                    Poll::Ready(Err(_)) => return true,
                    Poll::Pending => {}
                }
            }
        }
        while self.timer.as_mut().poll(cx).is_ready() {
            let now = now_ns();
            let read = self.conn.seen.last_read_ns.get();
            let next = if self.pinged_ns != 0 {
                let due = self.pinged_ns.max(read) + config.keepalive_timeout_ns;
                if due <= now {
                    *locked(&self.world.hub.abuses).entry("no answer to a ping").or_insert(0) += 1;
                    return true;
                }
                due
            } else {
                let due = read + config.keepalive_ns;
                if due <= now {
                    if let Some(pings) = &mut self.pings {
                        if pings.send_ping(h2::Ping::opaque()).is_ok() && pings.poll_pong(cx).is_pending() {
                            self.pinged_ns = now;
                        }
                    }
                    now + config.keepalive_timeout_ns
                } else {
                    due
                }
            };
            let wait = Duration::from_nanos(next.saturating_sub(now).max(1_000_000));
            self.timer.as_mut().reset(tokio::time::Instant::now() + wait);
        }
        false
    }

    /// Streams that the peer gave up.
    fn resets(&self) {
        let opened = std::mem::take(&mut *self.conn.seen.opened.borrow_mut());
        if self.conn.seen.resets.borrow().is_empty() {
            return;
        }
        let resets = std::mem::take(&mut *self.conn.seen.resets.borrow_mut());
        let now = now_ns();
        for stream in resets {
            let key = self.conn.streams.borrow().get(&stream).copied();
            let Some(key) = key else {
                // Never looked at, or answered meanwhile: what a peer does whose deadline ended as ours did.
                let rapid = opened.binary_search(&stream).is_ok();
                let cost = if rapid { RAPID_RESET_COST } else { LATE_RESET_COST };
                self.conn.seen.control(cost, "too many resets");
                continue;
            };
            let rapid = self.world.with(key, |entry| {
                let (begun, deadline) = (entry.shared.started_ns, entry.shared.deadline_ns);
                let expired = deadline != 0 && now >= deadline && deadline - begun > SHORT_DEADLINE_NS;
                now.saturating_sub(begun) < RAPID_RESET_NS && !expired
            });
            if rapid == Some(true) {
                self.conn.seen.control(RAPID_RESET_COST, "too many resets");
            }
            self.world.cancel(key, Status::new(wire::CANCELLED, ""), false);
        }
    }

    fn open(&mut self, request: Request<RecvStream>, mut respond: SendResponse<Bytes>, cx: &mut Context<'_>) {
        let world = &self.world;
        let config = &world.hub.config;
        let (parts, recv) = request.into_parts();
        let headers = parts.headers;
        let typed = headers.get("content-type").is_some_and(|value| {
            value
                .as_bytes()
                .strip_prefix(b"application/grpc")
                .is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
        });
        if parts.method != HttpMethod::POST || !typed {
            let mut response = Response::new(());
            *response.status_mut() =
                if typed { http::StatusCode::METHOD_NOT_ALLOWED } else { http::StatusCode::UNSUPPORTED_MEDIA_TYPE };
            let _ = respond.send_response(response, true);
            return;
        }
        if let Err(status) = wire::check_metadata(&headers, config.header_max) {
            return refuse(respond, status);
        }
        let path = parts.uri.path();
        let Some(&method) = world.hub.paths.get().and_then(|paths| paths.get(path)) else {
            return refuse(respond, Status::new(wire::UNIMPLEMENTED, "Method not found!"));
        };
        let encoding = match headers.get("grpc-encoding") {
            None => Encoding::Identity,
            Some(value) => match Encoding::parse(value.as_bytes()) {
                Some(encoding) => encoding,
                None => {
                    let name = String::from_utf8_lossy(&value.as_bytes()[..value.len().min(64)]).into_owned();
                    return refuse(
                        respond,
                        Status::new(wire::UNIMPLEMENTED, format!("Compression algorithm '{name}' not supported.")),
                    );
                }
            },
        };
        let timeout = match headers.get("grpc-timeout") {
            None => None,
            Some(value) => match wire::timeout_ns(value.as_bytes()) {
                None => return refuse(respond, Status::new(wire::INTERNAL, "Error parsing 'grpc-timeout' metadata")),
                parsed => parsed,
            },
        };
        let mut calls = world.calls.borrow_mut();
        if calls.len() >= config.calls_max || self.conn.unsent.load(Acquire) > CONNECTION_UNSENT {
            drop(calls);
            return refuse(respond, Status::new(wire::RESOURCE_EXHAUSTED, "too many calls are open"));
        }
        let started_ns = now_ns();
        let deadline_ns = timeout.map_or(0, |timeout| started_ns + timeout);
        let stream_id = u32::from(respond.stream_id());
        let generation = world.generation.get();
        world.generation.set(generation.wrapping_add(1).max(1));
        let vacant = calls.vacant_entry();
        let key = u64::from(generation) << 32 | vacant.key() as u64;
        let shared = Arc::new(Shared {
            hub: world.hub.clone(),
            key,
            method,
            headers,
            peer: self.conn.peer.clone(),
            deadline_ns,
            started_ns,
            gone: AtomicBool::new(false),
            pending: AtomicUsize::new(0),
            pending_bytes: AtomicUsize::new(0),
            unsent: AtomicUsize::new(0),
            unsent_bytes: AtomicUsize::new(0),
            stalled: AtomicBool::new(false),
            lane: AtomicBool::new(false),
            moves: AtomicUsize::new(0),
            taken: AtomicBool::new(false),
            stream: Default::default(),
        });
        let reader = Rc::new(Reader::default());
        let served = world.hub.method(method);
        let streams = served.request_streaming;
        vacant.insert(Entry {
            generation,
            conn: self.conn.clone(),
            stream_id,
            shared: shared.clone(),
            respond: Some(respond),
            send: None,
            reader: reader.clone(),
            lane: streams && served.direct.is_some(),
            slots: VecDeque::new(),
            base: 0,
            read: 0,
            eof: false,
            closing: false,
            handed: None,
            lane_begun: false,
            lane_told: false,
            timer_ns: deadline_ns,
            lingering: None,
            linger_end_ns: 0,
            refusal: None,
        });
        drop(calls);
        self.conn.streams.borrow_mut().insert(stream_id, key);
        if deadline_ns != 0 {
            let mut deadlines = world.deadlines.borrow_mut();
            deadlines.insert((deadline_ns, key));
            if deadlines.first() == Some(&(deadline_ns, key)) {
                world.deadline_changed.notify_one();
            }
        }
        if streams {
            world.hub.push(Event::Open(shared.clone(), None));
        }
        let direct = !streams && served.direct.is_some();
        let mut reading = Reading {
            world: world.clone(),
            shared,
            reader,
            recv,
            frames: Frames::new(config.receive_max),
            encoding,
            streams,
            direct,
            whole: None,
            inflating: None,
            ended: false,
            reserved: 0,
        };
        // Most requests are here already, and need no future of their own.
        let mut idle = Context::from_waker(Waker::noop());
        if reading.poll(&mut idle).is_pending() {
            self.readers.push(Box::pin(reading));
            // Polled by the caller, with a waker that counts.
            let _ = cx;
        }
    }
}

/// Reads a call's messages and hands them on.
struct Reading {
    world: Rc<World>,
    shared: Arc<Shared>,
    reader: Rc<Reader>,
    recv: RecvStream,
    frames: Frames,
    encoding: Encoding,
    streams: bool,
    direct: bool,
    whole: Option<Body>,
    inflating: Option<tokio::task::JoinHandle<Result<Body, Status>>>,
    ended: bool,
    reserved: usize,
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.reserve(0);
    }
}

impl Future for Reading {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        Reading::poll(this, cx)
    }
}

impl Reading {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            if self.reader.closed.get() {
                return Poll::Ready(());
            }
            if let Some(inflating) = &mut self.inflating {
                match Pin::new(inflating).poll(cx) {
                    Poll::Pending => return self.wait(cx),
                    Poll::Ready(result) => {
                        self.inflating = None;
                        match result.unwrap_or_else(|_| Err(Status::new(wire::INTERNAL, "decompression failed"))) {
                            Ok(body) => self.message(body),
                            Err(status) => return self.refuse(status),
                        }
                        continue;
                    }
                }
            }
            if self.full() {
                self.shared.stalled.store(true, SeqCst);
                if self.full() {
                    return self.wait(cx);
                }
                self.shared.stalled.store(false, SeqCst);
            }
            match self.frames.next() {
                Err(status) => return self.refuse(status),
                Ok(Some((false, body))) => {
                    self.message(body);
                    continue;
                }
                Ok(Some((true, body))) => {
                    let (encoding, max) = (self.encoding, self.world.hub.config.receive_max);
                    let work = move || wire::inflate(&body, encoding, max);
                    self.inflating = Some(tokio::task::spawn_blocking(work));
                    continue;
                }
                Ok(None) => {
                    if !self.reserve(self.frames.announced()) {
                        return self
                            .refuse(Status::new(wire::RESOURCE_EXHAUSTED, "too many large messages are on their way"));
                    }
                }
            }
            if self.ended {
                if self.frames.partial() {
                    return self.refuse(Status::new(wire::INTERNAL, "the last message is cut off"));
                }
                return self.end();
            }
            match self.recv.poll_data(cx) {
                Poll::Pending => return self.wait(cx),
                Poll::Ready(Some(Ok(bytes))) => {
                    let _ = self.recv.flow_control().release_capacity(bytes.len());
                    self.frames.push(bytes);
                    if self.shared.gone.load(Acquire) {
                        self.world.linger(self.shared.key);
                    }
                }
                Poll::Ready(Some(Err(_))) => {
                    self.broken();
                    return Poll::Ready(());
                }
                Poll::Ready(None) => {
                    self.ended = true;
                }
            }
        }
    }

    fn wait(&self, cx: &mut Context<'_>) -> Poll<()> {
        *self.reader.waker.borrow_mut() = Some(cx.waker().clone());
        Poll::Pending
    }

    /// Whether Python has enough of this stream for now.
    fn full(&self) -> bool {
        if !self.streams {
            return false;
        }
        let shared = &self.shared;
        if shared.gone.load(SeqCst) {
            return false;
        }
        let pending = shared.pending.load(SeqCst);
        let unsent = shared.unsent.load(SeqCst);
        let most = if shared.lane.load(SeqCst) { self.world.hub.config.credit } else { READ_AHEAD };
        pending + unsent >= most
            || (pending > 0 && shared.pending_bytes.load(SeqCst) > PENDING_BYTES)
            || shared.unsent_bytes.load(SeqCst) > UNSENT_BYTES
    }

    /// Count a large message in, by its announced length; 0 counts it out. False: there are too many.
    fn reserve(&mut self, announced: usize) -> bool {
        let wanted = if announced > ASSEMBLED_FREE { announced } else { 0 };
        if wanted == self.reserved {
            return true;
        }
        let others = self.world.assembling.get() - self.reserved;
        let most = ASSEMBLED_MAX.max(32 * self.world.hub.config.receive_max);
        if wanted > 0 && others + wanted > most {
            return false;
        }
        self.world.assembling.set(others + wanted);
        self.reserved = wanted;
        true
    }

    fn message(&mut self, body: Body) {
        self.reserve(0);
        let hub = &self.world.hub;
        if !self.streams {
            if self.whole.is_none() {
                self.whole = Some(body);
            }
            return;
        }
        if self.shared.gone.load(Acquire) {
            return; // refused; read only for its end
        }
        let slot = self.world.with(self.shared.key, |entry| {
            let slot = entry.read;
            entry.read += 1;
            if entry.lane && entry.handed.is_none() {
                entry.slots.push_back(Slot { len: body.len(), ..Slot::default() });
            }
            slot
        });
        let Some(slot) = slot else { return };
        self.shared.moves.fetch_add(1, Relaxed);
        self.shared.pending.fetch_add(1, SeqCst);
        self.shared.pending_bytes.fetch_add(body.len(), SeqCst);
        hub.push(Event::Message(self.shared.clone(), slot, body));
    }

    /// The peer has sent all it will.
    fn end(&mut self) -> Poll<()> {
        let hub = &self.world.hub;
        if self.streams {
            let lingers = self.world.with(self.shared.key, |entry| {
                entry.eof = true;
                entry.lingering.is_some()
            });
            if lingers == Some(true) {
                self.world.leave(self.shared.key);
                return Poll::Ready(());
            }
            hub.push(Event::End(self.shared.clone(), ReadEnd::Eof));
            self.world.lane(self.shared.key);
        } else if let Some(body) = self.whole.take() {
            if self.direct {
                hub.push(Event::Direct(self.shared.clone(), body));
            } else {
                hub.push(Event::Open(self.shared.clone(), Some(body)));
            }
        } else {
            return self.refuse(Status::new(wire::UNIMPLEMENTED, "the request has no message"));
        }
        Poll::Ready(())
    }

    fn broken(&mut self) {
        if self.streams {
            self.world.hub.push(Event::End(self.shared.clone(), ReadEnd::Broken));
        }
        // A reset is told by the connection; this is for what h2 itself found wrong.
        self.world.cancel(self.shared.key, Status::new(wire::CANCELLED, ""), false);
    }

    fn refuse(&mut self, status: Status) -> Poll<()> {
        let key = self.shared.key;
        if self.streams && !self.shared.gone.load(Acquire) {
            self.world.with(key, |entry| entry.refusal = Some(status));
            self.world.hub.push(Event::End(self.shared.clone(), ReadEnd::Broken));
            self.world.lane(key);
        } else {
            self.world.cancel(key, status, true);
        }
        Poll::Ready(())
    }
}

fn refuse(mut respond: SendResponse<Bytes>, status: Status) {
    let mut response = grpc_response();
    status.write(response.headers_mut());
    let _ = respond.send_response(response, true);
}

fn grpc_response() -> Response<()> {
    let mut response = Response::new(());
    let headers = response.headers_mut();
    headers.reserve(4);
    headers.insert("content-type", HeaderValue::from_static("application/grpc"));
    headers.insert("grpc-accept-encoding", HeaderValue::from_static("identity, deflate, gzip"));
    response
}

impl Entry {
    /// Send the headers, where that was not done.
    fn begin(&mut self, metadata: Metadata) {
        let Some(mut respond) = self.respond.take() else { return };
        let mut response = grpc_response();
        for (name, value) in metadata {
            response.headers_mut().append(name, value);
        }
        self.send = respond.send_response(response, false).ok();
    }

    fn write(&mut self, payload: Payload) {
        self.begin(Vec::new());
        self.conn.seen.answered();
        if let Some(send) = &mut self.send {
            for piece in std::iter::once(payload.first).chain(payload.rest) {
                let _ = send.send_data(counted(&self.conn.unsent, piece), false);
            }
        }
    }

    fn finish(&mut self, status: &Status) {
        self.conn.seen.answered();
        if let Some(respond) = self.respond.take() {
            let mut status = status.clone();
            self.add_trailers(|name, value| {
                if !status.metadata.iter().any(|(known, _)| known == name) {
                    status.metadata.push((name.clone(), value.clone()));
                }
            });
            return refuse(respond, status);
        }
        let mut trailers = HeaderMap::with_capacity(4 + status.metadata.len());
        status.write(&mut trailers);
        self.add_trailers(|name, value| {
            trailers.entry(name).or_insert_with(|| value.clone());
        });
        if let Some(send) = &mut self.send {
            let _ = send.send_trailers(trailers);
        }
    }

    /// What goes with every status of the method.
    fn add_trailers(&self, mut add: impl FnMut(&HeaderName, &HeaderValue)) {
        let method = self.shared.hub.method(self.shared.method);
        if method.has_trailers.load(Acquire) {
            for (name, value) in locked(&method.trailers).iter() {
                add(name, value);
            }
        }
    }
}

impl World {
    fn with<T>(&self, key: u64, act: impl FnOnce(&mut Entry) -> T) -> Option<T> {
        let mut calls = self.calls.borrow_mut();
        let entry = calls.get_mut(key as u32 as usize).filter(|entry| entry.generation == (key >> 32) as u32)?;
        Some(act(entry))
    }

    /// Take a call off the books.
    fn remove(&self, key: u64) -> Option<Entry> {
        let mut calls = self.calls.borrow_mut();
        let index = key as u32 as usize;
        calls.get(index).filter(|entry| entry.generation == (key >> 32) as u32)?;
        let entry = calls.remove(index);
        drop(calls);
        entry.conn.streams.borrow_mut().remove(&entry.stream_id);
        if entry.timer_ns != 0 {
            self.deadlines.borrow_mut().remove(&(entry.timer_ns, key));
        }
        entry.shared.gone.store(true, Release);
        entry.reader.closed.set(true);
        entry.reader.wake();
        Some(entry)
    }

    /// End a call that Python did not end, and tell Python.
    fn cancel(&self, key: u64, status: Status, tell_peer: bool) {
        let Some(mut entry) = self.remove(key) else { return };
        if tell_peer {
            entry.finish(&status);
        } else if let Some(mut respond) = entry.respond.take() {
            respond.send_reset(Reason::CANCEL);
        } else if let Some(send) = &mut entry.send {
            send.send_reset(Reason::CANCEL);
        }
        if entry.shared.taken.load(Acquire) {
            self.count(&entry, status.code);
        }
        self.hub.push(Event::Cancelled(entry.shared.clone(), status.code));
    }

    fn count(&self, entry: &Entry, code: u8) {
        let shared = &entry.shared;
        self.hub.method(shared.method).counters.ended(code, now_ns().saturating_sub(shared.started_ns));
    }

    /// Let the end of a stream wait while its peer still sends: grpc.aio's client tells of its own write that failed,
    /// and not of the status, when the end comes in the middle of one (github.com/grpc/grpc/issues/36066).
    fn linger(&self, key: u64) {
        let changed = self.with(key, |entry| {
            entry.lingering.as_ref()?;
            let until = entry.linger_end_ns.min(now_ns() + LINGER_NS);
            Some((std::mem::replace(&mut entry.timer_ns, until), until))
        });
        let Some(Some((before, until))) = changed else { return };
        let mut deadlines = self.deadlines.borrow_mut();
        deadlines.remove(&(before, key));
        deadlines.insert((until, key));
        if deadlines.first() == Some(&(until, key)) {
            self.deadline_changed.notify_one();
        }
    }

    /// Send the end that Python gave.
    fn leave(&self, key: u64) {
        if let Some(mut entry) = self.remove(key) {
            let status = entry.lingering.take().unwrap_or_default();
            entry.finish(&status);
        }
    }

    /// Do what Python asks, until it says `Kill`.
    async fn obey(self: Rc<Self>, mut accepting: Vec<tokio::task::JoinHandle<()>>) {
        loop {
            self.hub.out_ready.notified().await;
            for out in self.hub.take_out() {
                match out {
                    Out::Graceful => {
                        accepting.drain(..).for_each(|task| task.abort());
                        // The sockets close when the tasks are dropped, on their next turn.
                        tokio::task::yield_now().await;
                        self.going.set(true);
                        for (_, conn) in self.connections.borrow().iter() {
                            conn.graceful.set(true);
                            conn.wake();
                        }
                        if self.connections.borrow().is_empty() {
                            self.hub.push(Event::Idle);
                        }
                    }
                    Out::Kill => {
                        accepting.drain(..).for_each(|task| task.abort());
                        self.going.set(true);
                        return self.farewell().await;
                    }
                    other => self.apply(other),
                }
            }
            if self.hub.has_events() {
                self.hub.signal();
            }
        }
    }

    /// End what is left, give its last words a moment, and drop the connections.
    async fn farewell(&self) {
        let keys: Vec<u64> =
            self.calls.borrow().iter().map(|(index, entry)| u64::from(entry.generation) << 32 | index as u64).collect();
        for key in keys {
            if self.with(key, |entry| entry.lingering.is_some()) == Some(true) {
                self.leave(key);
            } else {
                self.cancel(key, Status::new(wire::UNAVAILABLE, "the server is going away"), true);
            }
        }
        for (_, conn) in self.connections.borrow().iter() {
            conn.graceful.set(true);
            conn.wake();
        }
        self.hub.signal();
        let left = async {
            while !self.connections.borrow().is_empty() {
                self.stopped.notified().await;
            }
        };
        let _ = tokio::time::timeout(Duration::from_millis(FAREWELL_MS), left).await;
        for (_, conn) in self.connections.borrow().iter() {
            conn.kill.set(true);
            conn.wake();
        }
        tokio::task::yield_now().await;
        tokio::task::yield_now().await;
    }

    fn apply(&self, out: Out) {
        match out {
            Out::Reply { key, payload } => {
                if let Some(mut entry) = self.remove(key) {
                    entry.write(payload);
                    entry.finish(&Status::default());
                    self.count(&entry, wire::OK);
                }
            }
            Out::Fail { key, status } => {
                if let Some(mut entry) = self.remove(key) {
                    entry.finish(&status);
                    self.count(&entry, status.code);
                }
            }
            Out::Slot { key, slot, payload, last } => {
                let ready = self.with(key, |entry| {
                    let Some(place) = slot.checked_sub(entry.base) else { return false };
                    let Some(found) = entry.slots.get_mut(place as usize) else { return false };
                    found.answers.extend(payload);
                    found.done |= last;
                    place == 0
                });
                if ready == Some(true) {
                    self.lane(key);
                }
            }
            Out::SlotFail { key, slot } => {
                self.with(key, |entry| {
                    let Some(place) = slot.checked_sub(entry.base) else { return };
                    if let Some(found) = entry.slots.get_mut(place as usize) {
                        found.done = true;
                        found.failed = true;
                    }
                });
                self.lane(key);
            }
            Out::HandOver { key, slot } => {
                self.with(key, |entry| {
                    entry.handed = Some(slot);
                    let keep = slot.saturating_sub(entry.base) as usize;
                    entry.slots.truncate(keep);
                });
                self.lane(key);
            }
            Out::Close { key } => {
                self.with(key, |entry| {
                    entry.closing = true;
                    entry.reader.closed.set(true);
                    entry.reader.wake();
                });
                self.lane(key);
            }
            Out::Lane { key } => {
                self.with(key, |entry| {
                    entry.lane_begun = true;
                    entry.shared.stalled.store(false, SeqCst);
                    entry.reader.wake();
                });
                self.lane(key);
            }
            Out::Headers { key, metadata } => {
                self.with(key, |entry| entry.begin(metadata));
            }
            Out::Write { key, payload } => {
                self.with(key, |entry| entry.write(payload));
            }
            Out::End { key, status } => {
                let lingers = self.with(key, |entry| {
                    entry.lingering = Some(status);
                    if entry.eof || !self.hub.method(entry.shared.method).request_streaming {
                        return false;
                    }
                    entry.linger_end_ns = now_ns() + LINGER_MAX_NS;
                    entry.shared.gone.store(true, Release);
                    entry.reader.wake();
                    true
                });
                match lingers {
                    Some(true) => self.linger(key),
                    _ => self.leave(key),
                }
            }
            Out::Refused { key } => {
                if let Some(Some(status)) = self.with(key, |entry| entry.refusal.take()) {
                    self.cancel(key, status, true);
                }
            }
            Out::Credit { key } => {
                self.with(key, |entry| {
                    entry.shared.stalled.store(false, SeqCst);
                    entry.reader.wake();
                });
            }
            Out::Graceful | Out::Kill => {}
        }
    }

    /// Send a direct stream's answers that are due, and tell Python when there is nothing more to do.
    fn lane(&self, key: u64) {
        let told = self.with(key, |entry| {
            if !entry.lane_begun || entry.lane_told {
                return None;
            }
            let counters = &self.hub.method(entry.shared.method).counters;
            let mut settled = false;
            let mut failed = false;
            while let Some(first) = entry.slots.front_mut() {
                let answers = std::mem::take(&mut first.answers);
                let (done, len) = (first.done, first.len);
                failed = first.failed;
                for payload in answers {
                    counters.sent.fetch_add(1, Relaxed);
                    entry.write(payload);
                }
                if !done || failed {
                    break;
                }
                entry.shared.settled(len);
                settled = true;
                entry.slots.pop_front();
                entry.base += 1;
            }
            if settled && entry.shared.stalled.load(SeqCst) {
                entry.shared.stalled.store(false, SeqCst);
                entry.reader.wake();
            }
            let empty = entry.slots.is_empty();
            if empty && !failed && entry.handed.is_none() && entry.refusal.is_some() {
                entry.lane_told = true;
                return Some(None);
            }
            let over = failed
                || entry.handed.is_some_and(|slot| entry.base >= slot && empty)
                || (empty && entry.handed.is_none() && (entry.eof || entry.closing) && entry.base == entry.read);
            if !over {
                return None;
            }
            entry.lane_told = true;
            Some(Some(entry.shared.clone()))
        });
        match told {
            Some(Some(Some(shared))) => {
                self.hub.push(Event::Lane(shared));
                self.hub.signal();
            }
            Some(Some(None)) => {
                self.apply(Out::Refused { key });
                self.hub.signal();
            }
            _ => {}
        }
    }
}

/// Bytes large enough to matter, counted until they are on the connection.
fn counted(unsent: &Arc<AtomicUsize>, bytes: Bytes) -> Bytes {
    if bytes.len() < 16 * 1024 {
        return bytes;
    }
    struct Counted(Bytes, Arc<AtomicUsize>);
    impl AsRef<[u8]> for Counted {
        fn as_ref(&self) -> &[u8] {
            &self.0
        }
    }
    impl Drop for Counted {
        fn drop(&mut self) {
            self.1.fetch_sub(self.0.len(), AcqRel);
        }
    }
    unsent.fetch_add(bytes.len(), AcqRel);
    Bytes::from_owner(Counted(bytes, unsent.clone()))
}
