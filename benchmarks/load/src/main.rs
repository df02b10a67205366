//! Raw gRPC load over plaintext HTTP/2, on one thread.
//!
//!     grpc-load --address 127.0.0.1:9000 --path /package.Service/Method --body request.bin
//!               --mode unary|stream --streams 8 --in-flight 8 --count 20000 [--authority NAME] [--header k:v]
//!
//! unary: `streams` connections with `in-flight` calls each. stream: `streams` bidirectional streams on one connection
//! with `in-flight` messages each. The body file is one encoded message without its gRPC prefix. Answers are counted by
//! their length prefixes, not decoded; `bytes` tells whether they were what was expected. The result is one line of
//! JSON: messages, elapsed_s, failures (by grpc-status), bytes, p50_us, p99_us.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes, BytesMut};
use h2::client::{self, SendRequest};
use h2::{RecvStream, SendStream};
use http::{HeaderMap, Method, Request};
use tokio::net::TcpStream;

type Failure = Box<dyn std::error::Error>;

struct Options {
    address: String,
    path: String,
    authority: String,
    message: Bytes,
    stream: bool,
    streams: usize,
    in_flight: usize,
    count: usize,
    limit: Duration,
    headers: Vec<(String, String)>,
}

#[derive(Default)]
struct Tally {
    latencies: Vec<u32>,
    bytes: u64,
    failures: BTreeMap<String, u64>,
}

fn options() -> Result<Options, Failure> {
    let mut given: BTreeMap<String, String> = BTreeMap::new();
    let mut headers = Vec::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next().ok_or(format!("{name} needs a value"))?;
        if name == "--header" {
            let (key, text) = value.split_once(':').ok_or("--header is key:value")?;
            headers.push((key.to_string(), text.to_string()));
        } else {
            given.insert(name, value);
        }
    }
    let text = |name: &str| given.get(name).cloned();
    let number = |name: &str, default: usize| -> Result<usize, Failure> {
        Ok(text(name).map_or(Ok(default), |value| value.parse())?)
    };
    let address = text("--address").ok_or("--address is missing")?;
    let body = std::fs::read(text("--body").ok_or("--body is missing")?)?;
    let mut message = BytesMut::with_capacity(body.len() + 5);
    message.extend_from_slice(&[0]);
    message.extend_from_slice(&u32::try_from(body.len())?.to_be_bytes());
    message.extend_from_slice(&body);
    Ok(Options {
        authority: text("--authority").unwrap_or_else(|| address.clone()),
        path: text("--path").ok_or("--path is missing")?,
        message: message.freeze(),
        stream: text("--mode").as_deref() == Some("stream"),
        streams: number("--streams", 1)?,
        in_flight: number("--in-flight", 1)?,
        count: number("--count", 1000)?,
        limit: Duration::from_secs(number("--limit-s", 60)? as u64),
        address,
        headers,
    })
}

async fn connect(options: &Options) -> Result<SendRequest<Bytes>, Failure> {
    let socket = TcpStream::connect(&options.address).await?;
    socket.set_nodelay(true)?;
    let (sender, connection) = client::Builder::new()
        .initial_window_size(1 << 24)
        .initial_connection_window_size(1 << 26)
        .handshake(socket)
        .await?;
    tokio::task::spawn_local(async move {
        // Errors show up in the streams.
        let _ = connection.await;
    });
    Ok(sender)
}

fn request(options: &Options) -> Result<Request<()>, Failure> {
    let mut building = Request::builder()
        .method(Method::POST)
        .uri(format!("http://{}{}", options.authority, options.path))
        .header("content-type", "application/grpc")
        .header("te", "trailers");
    for (key, value) in &options.headers {
        building = building.header(key, value);
    }
    Ok(building.body(())?)
}

fn status(headers: &HeaderMap) -> Option<String> {
    headers.get("grpc-status").map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
}

/// Send bytes as the peer's window allows.
async fn send(stream: &mut SendStream<Bytes>, mut data: Bytes, end: bool) -> Result<(), Failure> {
    while !data.is_empty() {
        stream.reserve_capacity(data.len());
        while stream.capacity() == 0 {
            match std::future::poll_fn(|context| stream.poll_capacity(context)).await {
                Some(granted) => {
                    granted?;
                }
                None => return Err("the stream is closed".into()),
            }
        }
        let now = data.split_to(stream.capacity().min(data.len()));
        let last = data.is_empty();
        stream.send_data(now, end && last)?;
    }
    Ok(())
}

async fn one_call(sender: &mut SendRequest<Bytes>, options: &Options, tally: &mut Tally) -> Result<(), Failure> {
    let began = Instant::now();
    std::future::poll_fn(|context| sender.poll_ready(context)).await?;
    let (response, mut outgoing) = sender.send_request(request(options)?, false)?;
    send(&mut outgoing, options.message.clone(), true).await?;
    let (head, mut body) = response.await?.into_parts();
    let mut code = status(&head.headers);
    while let Some(chunk) = body.data().await {
        let chunk = chunk?;
        tally.bytes += chunk.len() as u64;
        body.flow_control().release_capacity(chunk.len())?;
    }
    if code.is_none() {
        code = body.trailers().await?.as_ref().and_then(status);
    }
    match code.as_deref() {
        Some("0") => tally.latencies.push(began.elapsed().as_micros() as u32),
        other => *tally.failures.entry(other.unwrap_or("none").to_string()).or_default() += 1,
    }
    Ok(())
}

/// Counts whole gRPC messages in what comes.
struct Messages {
    body: RecvStream,
    buffer: BytesMut,
}

impl Messages {
    /// Sizes of the messages that came with the next piece; None at the end.
    async fn next(&mut self, sizes: &mut Vec<usize>) -> Result<bool, Failure> {
        let Some(chunk) = self.body.data().await else { return Ok(false) };
        let chunk = chunk?;
        self.body.flow_control().release_capacity(chunk.len())?;
        self.buffer.extend_from_slice(&chunk);
        while self.buffer.len() >= 5 {
            let size = u32::from_be_bytes([self.buffer[1], self.buffer[2], self.buffer[3], self.buffer[4]]) as usize;
            if self.buffer.len() < size + 5 {
                break;
            }
            self.buffer.advance(size + 5);
            sizes.push(size + 5);
        }
        Ok(true)
    }
}

async fn one_stream(mut sender: SendRequest<Bytes>, options: &Options, count: usize) -> Result<Tally, Failure> {
    let mut tally = Tally::default();
    std::future::poll_fn(|context| sender.poll_ready(context)).await?;
    let (response, mut outgoing) = sender.send_request(request(options)?, false)?;
    let mut sent_at: VecDeque<Instant> = VecDeque::new();
    let mut sent = 0;
    while sent < options.in_flight.min(count) {
        sent_at.push_back(Instant::now());
        send(&mut outgoing, options.message.clone(), false).await?;
        sent += 1;
    }
    let (head, body) = response.await?.into_parts();
    if let Some(code) = status(&head.headers) {
        *tally.failures.entry(code).or_default() += 1;
        return Ok(tally);
    }
    let mut messages = Messages { body, buffer: BytesMut::new() };
    let mut sizes = Vec::new();
    let began = Instant::now();
    while tally.latencies.len() < count && began.elapsed() < options.limit {
        sizes.clear();
        if !messages.next(&mut sizes).await? {
            break;
        }
        let now = Instant::now();
        let mut again = BytesMut::new();
        for size in &sizes {
            let first = sent_at.pop_front().ok_or("an answer without a request")?;
            tally.latencies.push(now.duration_since(first).as_micros() as u32);
            tally.bytes += *size as u64;
            if sent < count {
                sent_at.push_back(now);
                again.extend_from_slice(&options.message);
                sent += 1;
            }
        }
        if !again.is_empty() {
            send(&mut outgoing, again.freeze(), false).await?;
        }
    }
    let _ = outgoing.send_data(Bytes::new(), true);
    while messages.next(&mut sizes).await? {}
    if let Some(code) = messages.body.trailers().await?.as_ref().and_then(status) {
        if code != "0" {
            *tally.failures.entry(code).or_default() += 1;
        }
    }
    Ok(tally)
}

async fn run(options: &'static Options) -> Result<(Vec<Tally>, Duration), Failure> {
    let mut running = Vec::new();
    let connections = if options.stream { 1 } else { options.streams };
    let mut senders = Vec::new();
    for _ in 0..connections {
        senders.push(connect(options).await?);
    }
    let began = Instant::now();
    if options.stream {
        let share = options.count / options.streams;
        for _ in 0..options.streams {
            let sender = senders[0].clone();
            running.push(tokio::task::spawn_local(async move {
                one_stream(sender, options, share).await.map_err(|error| error.to_string())
            }));
        }
    } else {
        let callers = options.streams * options.in_flight;
        for caller in 0..callers {
            let mut sender = senders[caller % connections].clone();
            running.push(tokio::task::spawn_local(async move {
                let mut tally = Tally::default();
                for _ in 0..options.count / callers {
                    if began.elapsed() > options.limit {
                        break;
                    }
                    if let Err(error) = one_call(&mut sender, options, &mut tally).await {
                        *tally.failures.entry(error.to_string()).or_default() += 1;
                    }
                }
                Ok(tally)
            }));
        }
    }
    let mut tallies = Vec::new();
    for task in running {
        tallies.push(task.await??);
    }
    Ok((tallies, began.elapsed()))
}

fn main() -> Result<(), Failure> {
    let options: &'static Options = Box::leak(Box::new(options()?));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let local = tokio::task::LocalSet::new();
    let (tallies, elapsed) = runtime.block_on(local.run_until(run(options)))?;
    let mut latencies: Vec<u32> = tallies.iter().flat_map(|tally| tally.latencies.iter().copied()).collect();
    latencies.sort_unstable();
    let at = |share: f64| latencies.get(((latencies.len() as f64 * share) as usize).min(latencies.len().max(1) - 1));
    let mut failures: BTreeMap<&str, u64> = BTreeMap::new();
    for tally in &tallies {
        for (code, count) in &tally.failures {
            *failures.entry(code).or_default() += count;
        }
    }
    let failures: Vec<String> = failures.iter().map(|(code, count)| format!("{code:?}: {count}")).collect();
    println!(
        "{{\"messages\": {}, \"elapsed_s\": {:.6}, \"bytes\": {}, \"p50_us\": {}, \"p99_us\": {}, \"failures\": {{{}}}}}",
        latencies.len(),
        elapsed.as_secs_f64(),
        tallies.iter().map(|tally| tally.bytes).sum::<u64>(),
        at(0.5).unwrap_or(&0),
        at(0.99).unwrap_or(&0),
        failures.join(", ")
    );
    Ok(())
}
