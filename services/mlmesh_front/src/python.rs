//! What Python sees: the server, an ordinary call, a direct call. All of it on the event loop's thread.

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering::*};
use std::sync::{Arc, Mutex, OnceLock};

use bytes::{BufMut, Bytes, BytesMut};
use http::header::{HeaderName, HeaderValue};
use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyString, PyTuple};

use crate::hub::{locked, now_ns, Config, Counters, Event, Held, Hub, Method, Out, Payload, ReadEnd, Shared, Tracked};
use crate::serve::{self, Listener};
use crate::wire::{self, Body, Metadata, Status};

/// Pieces up to this size are copied together; larger ones go out as they are.
const COPY_MAX: usize = 16 * 1024;
/// Bursts handled before the event loop gets its turn.
const ROUNDS: usize = 2;

const OPEN: u8 = 0;
const READABLE: u8 = 1;
const WRITABLE: u8 = 2;
const CANCELLED: u8 = 3;
const LANE: u8 = 4;
const IDLE: u8 = 5;
const ORDINARY: u8 = 6;

/// What Python gives at the start.
struct Hooks {
    to_status: Py<PyAny>,
    make_context: Py<PyAny>,
    broken: Py<PyAny>,
    busy: Status,
    no_deadline: Status,
}

#[pyclass(frozen, module = "mlmesh_front")]
pub struct Front {
    hub: Arc<Hub>,
    hooks: Arc<OnceLock<Hooks>>,
    methods: Mutex<Vec<(String, Method)>>,
    listeners: Mutex<Vec<Listener>>,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
    handed: Arc<Handed>,
}

/// What direct methods handed back in this burst.
type Handed = Mutex<Vec<(Arc<Shared>, Body)>>;
/// Of a method: started, handled by code, by bucket, seconds, received, sent.
type Counts = (u64, Vec<u64>, Vec<u64>, f64, u64, u64);
/// The message that was handed over, and the error that ended the stream.
type LaneEnd<'py> = (Option<Bound<'py, PyBytes>>, Option<Py<PyAny>>);

#[pymethods]
impl Front {
    #[new]
    #[pyo3(signature = (*, receive_max, send_max, streams_max, header_max, keepalive_s, keepalive_timeout_s, ping_interval_s, credit, calls_max))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        receive_max: usize,
        send_max: usize,
        streams_max: u32,
        header_max: usize,
        keepalive_s: f64,
        keepalive_timeout_s: f64,
        ping_interval_s: f64,
        credit: usize,
        calls_max: usize,
    ) -> PyResult<Self> {
        let ns = |seconds: f64| (seconds * 1e9) as u64;
        let hub = Hub::new(Config {
            receive_max,
            send_max,
            streams_max,
            header_max,
            keepalive_ns: ns(keepalive_s).max(1),
            keepalive_timeout_ns: ns(keepalive_timeout_s).max(1),
            ping_interval_ns: ns(ping_interval_s),
            credit: credit.max(1),
            calls_max,
        })?;
        Ok(Front {
            hub: Arc::new(hub),
            hooks: Default::default(),
            methods: Default::default(),
            listeners: Default::default(),
            thread: Default::default(),
            handed: Default::default(),
        })
    }

    /// Serve a path. Returns the method's number.
    #[pyo3(signature = (path, *, request_streaming, direct=None, deadline_required=false))]
    fn add_method(
        &self,
        path: String,
        request_streaming: bool,
        direct: Option<Py<PyAny>>,
        deadline_required: bool,
    ) -> usize {
        let mut methods = locked(&self.methods);
        let method = Method {
            request_streaming,
            direct,
            deadline_required,
            counters: Counters::default(),
            trailers: Default::default(),
            has_trailers: AtomicBool::new(false),
        };
        methods.push((path, method));
        methods.len() - 1
    }

    /// Serve a listening socket, which is the server's from now on.
    #[pyo3(signature = (fd, *, unix))]
    fn listen(&self, fd: RawFd, unix: bool) {
        locked(&self.listeners).push(Listener { fd, unix });
    }

    /// Begin to serve.
    #[pyo3(signature = (*, to_status, make_context, broken, busy, no_deadline))]
    fn start(
        &self,
        py: Python<'_>,
        to_status: Py<PyAny>,
        make_context: Py<PyAny>,
        broken: Py<PyAny>,
        busy: Bound<'_, PyAny>,
        no_deadline: Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let _ = py;
        let hooks = Hooks { to_status, make_context, broken, busy: status(&busy)?, no_deadline: status(&no_deadline)? };
        if self.hooks.set(hooks).is_err() {
            return Err(PyRuntimeError::new_err("the server was started already"));
        }
        let mut methods = Vec::new();
        let mut paths = std::collections::HashMap::new();
        for (path, method) in locked(&self.methods).drain(..) {
            paths.insert(path, methods.len());
            methods.push(method);
        }
        let _ = self.hub.methods.set(methods);
        let _ = self.hub.paths.set(paths);
        let listeners = std::mem::take(&mut *locked(&self.listeners));
        let hub = self.hub.clone();
        let thread = std::thread::Builder::new().name("mlmesh-front".into()).spawn(move || {
            let served = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| serve::run(hub.clone(), listeners)));
            if served.is_err() {
                hub.closed.store(true, Release);
                hub.push(Event::Idle);
                hub.signal();
            }
        })?;
        *locked(&self.thread) = Some(thread);
        Ok(())
    }

    /// Send this metadata with the status of every call of a method from now on.
    fn set_trailers(&self, method: usize, trailers: Bound<'_, PyAny>) -> PyResult<()> {
        let method = self.hub.method(method);
        let found = metadata(&trailers)?;
        method.has_trailers.store(!found.is_empty(), Release);
        *locked(&method.trailers) = found;
        Ok(())
    }

    /// Readable when `pump` has something to do.
    fn fileno(&self) -> RawFd {
        self.hub.fd()
    }

    /// Hand what came to the direct methods; return the rest as (kind, key, object).
    ///
    /// `room` is how many direct unary calls may be in flight; `unusual`: 0 none are, 1 sampled ones, 2 all.
    fn pump<'py>(&self, py: Python<'py>, room: i64, unusual: u8) -> PyResult<(Bound<'py, PyList>, bool)> {
        let events = PyList::empty(py);
        self.hub.clear_signal();
        self.hub.gather(true);
        let mut more = true;
        for _ in 0..ROUNDS {
            let came = self.hub.take();
            if came.is_empty() {
                more = self.hub.sleep();
                if !more {
                    break;
                }
                continue;
            }
            if let Err(error) = self.burst(py, came, room, unusual, &events) {
                // Not the caller's to handle, and the rest must go on.
                error.write_unraisable(py, None);
            }
        }
        let trash = std::mem::take(&mut locked(&self.hub.trash).0);
        drop(trash);
        self.hub.gather(false);
        Ok((events, more))
    }

    /// Direct unary calls that Python has not answered.
    fn in_flight(&self) -> i64 {
        self.hub.in_flight.load(Relaxed)
    }

    /// What was counted of each method's direct calls: (started, handled by code, by bucket, seconds, received, sent).
    fn counters(&self) -> Vec<Counts> {
        let Some(methods) = self.hub.methods.get() else { return Vec::new() };
        methods
            .iter()
            .map(|method| {
                let counters = &method.counters;
                (
                    counters.started.load(Relaxed),
                    counters.handled.iter().map(|count| count.load(Relaxed)).collect(),
                    counters.buckets.iter().map(|count| count.load(Relaxed)).collect(),
                    counters.nanoseconds.load(Relaxed) as f64 / 1e9,
                    counters.received.load(Relaxed),
                    counters.sent.load(Relaxed),
                )
            })
            .collect()
    }

    /// Connections that were ended for what their peer did, by reason.
    fn ended_connections(&self) -> std::collections::HashMap<&'static str, u64> {
        locked(&self.hub.abuses).clone()
    }

    /// Close the ports, tell every peer to open nothing new, close connections as their calls end.
    fn graceful(&self) {
        self.hub.send(Out::Graceful);
    }

    /// End everything that is left.
    fn kill(&self) {
        self.hub.send(Out::Kill);
    }

    /// Whether nothing more comes.
    fn ended(&self) -> bool {
        self.hub.closed.load(Acquire)
    }

    /// Wait for the serving thread's end, on whatever thread.
    fn wait(&self, py: Python<'_>) {
        let thread = locked(&self.thread).take();
        if let Some(thread) = thread {
            py.detach(|| {
                let _ = thread.join();
            });
        }
    }

    /// Let go of everything, on the event loop's thread.
    fn join(&self, py: Python<'_>) {
        self.wait(py);
        for listener in locked(&self.listeners).drain(..) {
            unsafe { libc::close(listener.fd) };
        }
        drop(self.hub.take());
        drop(self.hub.take_out());
        drop(std::mem::take(&mut locked(&self.hub.trash).0));
    }
}

impl Front {
    fn burst<'py>(
        &self,
        py: Python<'py>,
        came: Vec<Event>,
        room: i64,
        unusual: u8,
        events: &Bound<'py, PyList>,
    ) -> PyResult<()> {
        let hooks = self.hooks.get().expect("started");
        let count = self.hub.methods.get().map_or(0, Vec::len);
        let mut bursts: Vec<Option<Bound<'py, PyList>>> = vec![None; count];
        let mut add = |method: usize, call: Bound<'py, PyAny>| -> PyResult<()> {
            bursts[method].get_or_insert_with(|| PyList::empty(py)).append(call)
        };
        for event in came {
            match event {
                Event::Direct(shared, body) => {
                    if shared.gone.load(Acquire) {
                        continue;
                    }
                    if unusual == 2 || (unusual == 1 && wire::sampled(&shared.headers)) {
                        self.event(py, events, OPEN, shared, Some(body))?;
                        continue;
                    }
                    let method = self.hub.method(shared.method);
                    method.counters.started.fetch_add(1, Relaxed);
                    shared.taken.store(true, Release);
                    if method.deadline_required && shared.deadline_ns == 0 {
                        self.hub.send(Out::Fail { key: shared.key, status: hooks.no_deadline.clone() });
                        continue;
                    }
                    if self.hub.in_flight.load(Relaxed) >= room {
                        self.hub.send(Out::Fail { key: shared.key, status: hooks.busy.clone() });
                        continue;
                    }
                    self.hub.in_flight.fetch_add(1, Relaxed);
                    let index = shared.method;
                    add(index, self.direct(py, shared, body, None)?)?;
                }
                Event::Message(shared, slot, body) => {
                    if shared.gone.load(Acquire) {
                        continue;
                    }
                    if shared.lane.load(Acquire) {
                        self.hub.method(shared.method).counters.received.fetch_add(1, Relaxed);
                        let index = shared.method;
                        add(index, self.direct(py, shared, body, Some(slot))?)?;
                    } else {
                        let mut stream = locked(&shared.stream);
                        stream.reads.push_back(body);
                        let wanted = std::mem::take(&mut stream.read_wanted);
                        drop(stream);
                        if wanted {
                            self.event(py, events, READABLE, shared, None)?;
                        }
                    }
                }
                Event::End(shared, end) => {
                    let mut stream = locked(&shared.stream);
                    stream.read_end = Some(end);
                    let wanted = std::mem::take(&mut stream.read_wanted);
                    drop(stream);
                    if wanted {
                        self.event(py, events, READABLE, shared, None)?;
                    }
                }
                Event::Open(shared, body) => self.event(py, events, OPEN, shared, body)?,
                Event::Writable(shared) => self.event(py, events, WRITABLE, shared, None)?,
                Event::Lane(shared) => self.event(py, events, LANE, shared, None)?,
                Event::Cancelled(shared, code) => events.append((CANCELLED, shared.key, code))?,
                Event::Idle => events.append((IDLE, 0, py.None()))?,
            }
        }
        for (index, calls) in bursts.into_iter().enumerate() {
            if let Some(calls) = calls {
                self.dispatch(py, index, &calls, events)?;
            }
        }
        Ok(())
    }

    fn dispatch<'py>(
        &self,
        py: Python<'py>,
        method: usize,
        calls: &Bound<'py, PyList>,
        events: &Bound<'py, PyList>,
    ) -> PyResult<()> {
        let hooks = self.hooks.get().expect("started");
        let Some(direct) = &self.hub.method(method).direct else { return Ok(()) };
        if let Err(error) = direct.call1(py, (calls,)) {
            hooks.broken.call1(py, (error.value(py), calls))?;
        }
        let handed = std::mem::take(&mut *locked(&self.handed));
        if handed.is_empty() {
            return Ok(());
        }
        for (shared, body) in handed {
            let Some(slot) = locked(&shared.stream).handed.as_ref().map(|handed| handed.0) else {
                // A unary call.
                self.event(py, events, ORDINARY, shared, Some(body))?;
                continue;
            };
            // What came in the same burst after it is the ordinary method's too.
            for call in calls.iter() {
                let call = call.cast::<DirectCall>()?.get();
                if Arc::ptr_eq(&call.shared, &shared) && call.slot.is_some_and(|other| other > slot) {
                    if let Some(body) = locked(&call.body).take() {
                        locked(&shared.stream).reads.push_back(body);
                    }
                }
            }
            drop(body);
            self.hub.send(Out::HandOver { key: shared.key, slot });
        }
        Ok(())
    }

    fn direct<'py>(
        &self,
        py: Python<'py>,
        shared: Arc<Shared>,
        body: Body,
        slot: Option<u64>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let call = DirectCall {
            shared,
            slot,
            body: Mutex::new(Some(body)),
            ended: AtomicBool::new(false),
            context: OnceLock::new(),
            hooks: self.hooks.clone(),
            handed: self.handed.clone(),
        };
        Ok(Bound::new(py, call)?.into_any())
    }

    fn event(
        &self,
        py: Python<'_>,
        events: &Bound<'_, PyList>,
        kind: u8,
        shared: Arc<Shared>,
        body: Option<Body>,
    ) -> PyResult<()> {
        let key = shared.key;
        if kind == OPEN || kind == ORDINARY {
            let call = Bound::new(py, Call { shared, body: Mutex::new(body) })?;
            events.append((kind, key, call))
        } else {
            events.append((kind, key, py.None()))
        }
    }
}

/// One unary call, or one message of a stream: `mlmesh_runtime.direct.DirectCall`.
#[pyclass(frozen, module = "mlmesh_front")]
pub struct DirectCall {
    shared: Arc<Shared>,
    slot: Option<u64>,
    body: Mutex<Option<Body>>,
    ended: AtomicBool,
    context: OnceLock<Py<PyAny>>,
    hooks: Arc<OnceLock<Hooks>>,
    handed: Arc<Handed>,
}

impl Drop for DirectCall {
    fn drop(&mut self) {
        if !self.ended.load(Relaxed) {
            self.count_out();
            if self.slot.is_none() && !self.shared.gone.load(Acquire) {
                // Forgotten: nobody can answer it any more.
                let status = Status::new(wire::INTERNAL, "the call was dropped without an answer");
                self.shared.hub.send(Out::Fail { key: self.shared.key, status });
            }
        }
    }
}

impl DirectCall {
    /// Mark the end; False when it was before.
    fn end(&self) -> bool {
        if self.ended.swap(true, Relaxed) {
            return false;
        }
        self.count_out();
        if self.slot.is_some() && self.after_handed() {
            return false;
        }
        true
    }

    fn count_out(&self) {
        if self.slot.is_none() {
            self.shared.hub.in_flight.fetch_sub(1, Relaxed);
        }
    }

    fn after_handed(&self) -> bool {
        let Some(slot) = self.slot else { return false };
        locked(&self.shared.stream).handed.as_ref().is_some_and(|handed| slot > handed.0)
    }

    fn gone(&self) -> bool {
        let deadline = self.shared.deadline_ns;
        self.shared.gone.load(Acquire) || (deadline != 0 && now_ns() >= deadline)
    }

    /// An answer as it goes out. Ok(None): too large, and the call was failed for it.
    fn payload(&self, py: Python<'_>, pieces: &Bound<'_, PyTuple>) -> PyResult<Result<Payload, Status>> {
        let tracked = self.slot.is_some().then_some(&self.shared);
        payload(py, &self.shared.hub, pieces, tracked)
    }

    fn fail_with(&self, py: Python<'_>, found: Status) -> PyResult<()> {
        match self.slot {
            None => self.shared.hub.send(Out::Fail { key: self.shared.key, status: found }),
            Some(slot) => {
                let told = (found.code, found.message).into_pyobject(py)?;
                self.slot_failed(slot, told.into_any().unbind());
            }
        }
        Ok(())
    }

    fn slot_failed(&self, slot: u64, error: Py<PyAny>) {
        locked(&self.shared.stream).error.get_or_insert(error);
        self.shared.hub.send(Out::SlotFail { key: self.shared.key, slot });
    }
}

#[pymethods]
impl DirectCall {
    #[getter]
    fn request<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        match &*locked(&self.body) {
            Some(body) => to_bytes(py, body),
            None => Ok(PyBytes::new(py, b"")),
        }
    }

    #[getter]
    fn deadline_ns(&self) -> u64 {
        self.shared.deadline_ns
    }

    #[getter]
    fn streaming(&self) -> bool {
        self.slot.is_some()
    }

    fn metadata<'py>(&self, py: Python<'py>, name: &str) -> Option<Bound<'py, PyString>> {
        let value = self.shared.headers.get_all(name).iter().next_back()?;
        if name.ends_with("-bin") || wire::reserved(name) {
            return None;
        }
        Some(PyString::new(py, &String::from_utf8_lossy(value.as_bytes())))
    }

    fn context<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        if let Some(context) = self.context.get() {
            return Ok(context.bind(py).clone());
        }
        if self.slot.is_some() {
            if let Some(context) = &locked(&self.shared.stream).context {
                return Ok(context.bind(py).clone());
            }
        }
        let hooks = self.hooks.get().expect("started");
        let call = Bound::new(py, Call { shared: self.shared.clone(), body: Mutex::new(None) })?;
        let context = hooks.make_context.call1(py, (call,))?;
        Ok(self.context.get_or_init(|| context).bind(py).clone())
    }

    fn done(&self) -> bool {
        self.ended.load(Relaxed) || self.gone() || self.after_handed()
    }

    #[pyo3(signature = (*payload))]
    fn reply(&self, py: Python<'_>, payload: &Bound<'_, PyTuple>) -> PyResult<()> {
        if self.ended.load(Relaxed) || self.shared.gone.load(Acquire) {
            self.end();
            return Ok(());
        }
        let made = self.payload(py, payload)?;
        if !self.end() {
            return Ok(());
        }
        let key = self.shared.key;
        match (made, self.slot) {
            (Err(status), _) => return self.fail_with(py, status),
            (Ok(payload), None) => self.shared.hub.send(Out::Reply { key, payload }),
            (Ok(payload), Some(slot)) => {
                self.shared.hub.send(Out::Slot { key, slot, payload: Some(payload), last: true });
            }
        }
        Ok(())
    }

    #[pyo3(signature = (*payload))]
    fn send(&self, py: Python<'_>, payload: &Bound<'_, PyTuple>) -> PyResult<()> {
        let Some(slot) = self.slot else {
            return Err(PyTypeError::new_err("send: a unary call has one answer; use reply"));
        };
        if self.done() {
            return Ok(());
        }
        match self.payload(py, payload)? {
            Ok(payload) => {
                self.shared.hub.send(Out::Slot { key: self.shared.key, slot, payload: Some(payload), last: false });
            }
            Err(status) => {
                if self.end() {
                    return self.fail_with(py, status);
                }
            }
        }
        Ok(())
    }

    fn finish(&self) -> PyResult<()> {
        let Some(slot) = self.slot else {
            return Err(PyTypeError::new_err("finish: a unary call has one answer; use reply or fail"));
        };
        if self.end() {
            self.shared.hub.send(Out::Slot { key: self.shared.key, slot, payload: None, last: true });
        }
        Ok(())
    }

    fn fail(&self, py: Python<'_>, error: Bound<'_, PyAny>) -> PyResult<()> {
        if !self.end() {
            return Ok(());
        }
        match self.slot {
            Some(slot) => self.slot_failed(slot, error.unbind()),
            None => {
                if self.shared.gone.load(Acquire) {
                    return Ok(());
                }
                let hooks = self.hooks.get().expect("started");
                let told = hooks.to_status.call1(py, (error,))?;
                let status = status(told.bind(py))?;
                self.shared.hub.send(Out::Fail { key: self.shared.key, status });
            }
        }
        Ok(())
    }

    fn generic(&self) -> PyResult<()> {
        if !self.end() {
            return Ok(());
        }
        let Some(body) = locked(&self.body).take() else { return Ok(()) };
        let shared = &self.shared;
        match self.slot {
            None => {
                shared.taken.store(false, Release);
                shared.hub.method(shared.method).counters.started.fetch_sub(1, Relaxed);
                locked(&self.handed).push((shared.clone(), body));
            }
            Some(slot) => {
                shared.lane.store(false, Release);
                locked(&shared.stream).handed = Some((slot, body));
                locked(&self.handed).push((shared.clone(), Body::One(Bytes::new())));
            }
        }
        Ok(())
    }
}

/// A call that a task of Python's answers.
#[pyclass(frozen, module = "mlmesh_front")]
pub struct Call {
    shared: Arc<Shared>,
    body: Mutex<Option<Body>>,
}

#[pymethods]
impl Call {
    #[getter]
    fn key(&self) -> u64 {
        self.shared.key
    }

    #[getter]
    fn method(&self) -> usize {
        self.shared.method
    }

    #[getter]
    fn peer(&self) -> &str {
        &self.shared.peer
    }

    #[getter]
    fn deadline_ns(&self) -> u64 {
        self.shared.deadline_ns
    }

    /// Whether the peer is gone, gave up, was answered, or its time is over.
    fn gone(&self) -> bool {
        self.shared.gone.load(Acquire)
    }

    /// All metadata, in the order received; values of names that end in "-bin" are bytes.
    fn metadata<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let mut items: Vec<Bound<'py, PyTuple>> = Vec::with_capacity(self.shared.headers.len());
        for (name, value) in &self.shared.headers {
            let name = name.as_str();
            if wire::reserved(name) {
                continue;
            }
            if name.ends_with("-bin") {
                for part in value.as_bytes().split(|&byte| byte == b',') {
                    if let Some(raw) = wire::base64_decoded(part.trim_ascii()) {
                        items.push((name, PyBytes::new(py, &raw)).into_pyobject(py)?);
                    }
                }
            } else {
                items.push((name, String::from_utf8_lossy(value.as_bytes())).into_pyobject(py)?);
            }
        }
        PyTuple::new(py, items)
    }

    /// The request of a call that has one; once.
    fn request<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        match locked(&self.body).take() {
            Some(body) => to_bytes(py, &body),
            None => Ok(PyBytes::new(py, b"")),
        }
    }

    /// The next request: bytes; None when there is none yet (READABLE follows); False at the end; True when broken.
    fn read<'py>(&self, py: Python<'py>) -> PyResult<Py<PyAny>> {
        let mut stream = locked(&self.shared.stream);
        let Some(body) = stream.reads.pop_front() else {
            return Ok(match &stream.read_end {
                Some(ReadEnd::Eof) => false.into_pyobject(py)?.to_owned().into_any().unbind(),
                Some(ReadEnd::Broken) => {
                    self.shared.hub.send(Out::Refused { key: self.shared.key });
                    true.into_pyobject(py)?.to_owned().into_any().unbind()
                }
                None => {
                    stream.read_wanted = true;
                    py.None()
                }
            });
        };
        drop(stream);
        self.settled(body.len());
        Ok(to_bytes(py, &body)?.into_any().unbind())
    }

    /// Send a message. False when the writer is to wait for WRITABLE. None: it is too large.
    fn write(&self, py: Python<'_>, message: Bound<'_, PyAny>) -> PyResult<Option<bool>> {
        let shared = &self.shared;
        let pieces = PyTuple::new(py, [message])?;
        match payload(py, &shared.hub, &pieces, Some(shared))? {
            Err(_) => Ok(None),
            Ok(payload) => {
                shared.hub.send(Out::Write { key: shared.key, payload });
                if shared.unsent_bytes.load(Acquire) <= Shared::UNSENT_BYTES {
                    return Ok(Some(true));
                }
                locked(&shared.stream).write_wanted = true;
                if shared.unsent_bytes.load(Acquire) <= Shared::UNSENT_BYTES {
                    locked(&shared.stream).write_wanted = false;
                    return Ok(Some(true));
                }
                Ok(Some(false))
            }
        }
    }

    fn send_headers(&self, items: Bound<'_, PyAny>) -> PyResult<()> {
        self.shared.hub.send(Out::Headers { key: self.shared.key, metadata: metadata(&items)? });
        Ok(())
    }

    /// The end: (code, message, trailing metadata).
    fn end(&self, told: Bound<'_, PyAny>) -> PyResult<()> {
        let status = status(&told)?;
        self.shared.hub.send(Out::End { key: self.shared.key, status });
        Ok(())
    }

    /// Give the stream's messages to the direct method; LANE follows at their end. Holds `context` until `stop_lane`.
    fn start_lane(&self, context: Py<PyAny>) {
        let shared = &self.shared;
        let mut stream = locked(&shared.stream);
        stream.context = Some(context);
        let early: Vec<Body> = stream.reads.drain(..).collect();
        drop(stream);
        shared.lane.store(true, SeqCst);
        // They were read first, so they are the first slots.
        let events = early.into_iter().enumerate();
        shared.hub.push_front(events.map(|(slot, body)| Event::Message(shared.clone(), slot as u64, body)).collect());
        shared.hub.send(Out::Lane { key: shared.key });
        shared.hub.signal();
    }

    /// Let the direct method go; returns the message handed over, and the error that ended the stream.
    fn stop_lane<'py>(&self, py: Python<'py>) -> PyResult<LaneEnd<'py>> {
        self.shared.lane.store(false, SeqCst);
        let mut stream = locked(&self.shared.stream);
        stream.context = None;
        let error = stream.error.take();
        let handed = stream.handed.as_mut().map(|handed| std::mem::replace(&mut handed.1, Body::One(Bytes::new())));
        drop(stream);
        let first = match handed {
            Some(body) => {
                self.settled(body.len());
                Some(to_bytes(py, &body)?)
            }
            None => None,
        };
        Ok((first, error))
    }

    /// Read no more of a direct stream; what was read is answered, then LANE follows.
    fn close_lane(&self) {
        self.shared.hub.send(Out::Close { key: self.shared.key });
    }

    /// (messages in the direct method's hands, messages received and sent so far): changes while something moves.
    fn moved(&self) -> (usize, usize) {
        (self.shared.pending.load(Relaxed), self.shared.moves.load(Relaxed))
    }
}

impl Call {
    fn settled(&self, len: usize) {
        self.shared.settled(len);
        if self.shared.stalled.load(SeqCst) {
            self.shared.hub.send(Out::Credit { key: self.shared.key });
        }
    }
}

fn to_bytes<'py>(py: Python<'py>, body: &Body) -> PyResult<Bound<'py, PyBytes>> {
    match body {
        Body::One(bytes) => Ok(PyBytes::new(py, bytes)),
        Body::Many(pieces, len) => unsafe {
            // Not new_with: that writes zeros over everything first.
            let made = pyo3::ffi::PyBytes_FromStringAndSize(std::ptr::null(), *len as isize);
            let bytes = Bound::from_owned_ptr_or_err(py, made)?.cast_into_unchecked::<PyBytes>();
            let mut to = pyo3::ffi::PyBytes_AsString(made) as *mut u8;
            for piece in pieces {
                std::ptr::copy_nonoverlapping(piece.as_ptr(), to, piece.len());
                to = to.add(piece.len());
            }
            Ok(bytes)
        },
    }
}

enum Piece<'py> {
    Small(Bound<'py, PyBytes>),
    Buffer(PyUntypedBuffer),
}

/// A framed message: small pieces copied together, large ones as they are.
fn payload(
    py: Python<'_>,
    hub: &Arc<Hub>,
    pieces: &Bound<'_, PyTuple>,
    tracked: Option<&Arc<Shared>>,
) -> PyResult<Result<Payload, Status>> {
    let mut total = 0usize;
    let mut parts = Vec::with_capacity(pieces.len());
    for piece in pieces.iter() {
        if let Ok(bytes) = piece.cast::<PyBytes>() {
            let len = bytes.as_bytes().len();
            total += len;
            if len <= COPY_MAX {
                parts.push(Piece::Small(bytes.clone()));
                continue;
            }
        }
        let buffer = PyUntypedBuffer::get(&piece)?;
        if !buffer.is_c_contiguous() {
            return Err(PyValueError::new_err("a piece of an answer must be contiguous"));
        }
        if piece.cast::<PyBytes>().is_err() {
            total += buffer.len_bytes();
        }
        parts.push(Piece::Buffer(buffer));
    }
    if total > hub.config.send_max {
        let text = format!("Sent message larger than max ({} vs. {})", total, hub.config.send_max);
        return Ok(Err(Status::new(wire::RESOURCE_EXHAUSTED, text)));
    }
    let mut buffers: Vec<Bytes> = Vec::new();
    let mut copied = BytesMut::with_capacity(5 + total.min(COPY_MAX));
    copied.put_u8(0);
    copied.put_u32(total as u32);
    for part in parts {
        match part {
            Piece::Small(bytes) => copied.extend_from_slice(bytes.as_bytes()),
            Piece::Buffer(buffer) if buffer.len_bytes() <= COPY_MAX => {
                let held = unsafe { std::slice::from_raw_parts(buffer.buf_ptr() as *const u8, buffer.len_bytes()) };
                copied.extend_from_slice(held);
                buffer.release(py);
            }
            Piece::Buffer(buffer) => {
                if !copied.is_empty() {
                    buffers.push(copied.split().freeze());
                }
                buffers.push(Bytes::from_owner(Held::new(hub.clone(), buffer)));
            }
        }
    }
    if !copied.is_empty() {
        buffers.push(copied.freeze());
    }
    if let Some(shared) = tracked {
        for (index, bytes) in buffers.iter_mut().enumerate() {
            *bytes = Tracked::wrap(shared, std::mem::take(bytes), index == 0);
        }
    }
    let rest = if buffers.len() > 1 { buffers.split_off(1) } else { Vec::new() };
    Ok(Ok(Payload { first: buffers.pop().unwrap_or_default(), rest }))
}

fn metadata(items: &Bound<'_, PyAny>) -> PyResult<Metadata> {
    let mut made = Vec::new();
    for item in items.try_iter()? {
        let (name, value): (String, Bound<'_, PyAny>) = item?.extract()?;
        let header = HeaderName::from_bytes(name.as_bytes())
            .map_err(|_| PyValueError::new_err(format!("metadata was invalid: {name:?}")))?;
        let raw: Vec<u8> = match value.cast::<PyBytes>() {
            Ok(bytes) if name.ends_with("-bin") => wire::base64_encoded(bytes.as_bytes()),
            Ok(bytes) => bytes.as_bytes().to_vec(),
            Err(_) => value.extract::<String>()?.into_bytes(),
        };
        let value = HeaderValue::from_bytes(&raw)
            .map_err(|_| PyValueError::new_err(format!("metadata was invalid: the value of {name:?}")))?;
        made.push((header, value));
    }
    Ok(made)
}

/// (code, message, trailing metadata)
fn status(told: &Bound<'_, PyAny>) -> PyResult<Status> {
    let (code, message, items): (u8, String, Bound<'_, PyAny>) = told.extract()?;
    Ok(Status { code, message, metadata: metadata(&items)? })
}
