//! gRPC as it is on the wire: message frames, timeouts, metadata, statuses.

use std::collections::VecDeque;
use std::io::Read;

use bytes::Bytes;
use http::header::{HeaderMap, HeaderName, HeaderValue};

pub const OK: u8 = 0;
pub const CANCELLED: u8 = 1;
pub const DEADLINE_EXCEEDED: u8 = 4;
pub const RESOURCE_EXHAUSTED: u8 = 8;
pub const UNIMPLEMENTED: u8 = 12;
pub const INTERNAL: u8 = 13;
pub const UNAVAILABLE: u8 = 14;
pub const CODES: usize = 17;

/// How a call ends.
#[derive(Clone, Debug, Default)]
pub struct Status {
    pub code: u8,
    pub message: String,
    pub metadata: Metadata,
}

pub type Metadata = Vec<(HeaderName, HeaderValue)>;

impl Status {
    pub fn new(code: u8, message: impl Into<String>) -> Self {
        Status { code, message: message.into(), metadata: Vec::new() }
    }

    /// Put the status into trailers.
    pub fn write(&self, headers: &mut HeaderMap) {
        headers.insert(HeaderName::from_static("grpc-status"), HeaderValue::from(u16::from(self.code)));
        if !self.message.is_empty() {
            headers.insert(HeaderName::from_static("grpc-message"), percent_encoded(&self.message));
        }
        for (name, value) in &self.metadata {
            headers.append(name.clone(), value.clone());
        }
    }
}

fn percent_encoded(text: &str) -> HeaderValue {
    let mut out = Vec::with_capacity(text.len() + 8);
    for &byte in text.as_bytes() {
        if (0x20..=0x7e).contains(&byte) && byte != b'%' {
            out.push(byte);
        } else {
            out.push(b'%');
            out.push(b"0123456789ABCDEF"[usize::from(byte >> 4)]);
            out.push(b"0123456789ABCDEF"[usize::from(byte & 15)]);
        }
    }
    HeaderValue::from_bytes(&out).unwrap_or_else(|_| HeaderValue::from_static(""))
}

/// `grpc-timeout` in nanoseconds: digits (eight at most, by the protocol; more are taken as grpcio takes them) and a unit.
pub fn timeout_ns(value: &[u8]) -> Option<u64> {
    let (unit, digits) = value.split_last()?;
    if digits.is_empty() || digits.len() > 18 {
        return None;
    }
    let mut number = 0u64;
    for digit in digits {
        if !digit.is_ascii_digit() {
            return None;
        }
        number = number * 10 + u64::from(digit - b'0');
    }
    let scale = match unit {
        b'H' => 3_600_000_000_000,
        b'M' => 60_000_000_000,
        b'S' => 1_000_000_000,
        b'm' => 1_000_000,
        b'u' => 1_000,
        b'n' => 1,
        _ => return None,
    };
    Some(number.saturating_mul(scale).min(i64::MAX as u64 / 4))
}

/// Compression of messages in one direction of a call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Encoding {
    Identity,
    Gzip,
    Deflate,
}

impl Encoding {
    pub fn parse(value: &[u8]) -> Option<Encoding> {
        match value {
            b"identity" => Some(Encoding::Identity),
            b"gzip" => Some(Encoding::Gzip),
            b"deflate" => Some(Encoding::Deflate),
            _ => None,
        }
    }
}

/// One encoded message, in the pieces it came in.
pub enum Body {
    One(Bytes),
    Many(VecDeque<Bytes>, usize),
}

impl Body {
    pub fn len(&self) -> usize {
        match self {
            Body::One(bytes) => bytes.len(),
            Body::Many(_, len) => *len,
        }
    }

    pub fn pieces(&self) -> impl Iterator<Item = &[u8]> {
        let (one, many) = match self {
            Body::One(bytes) => (Some(bytes), None),
            Body::Many(pieces, _) => (None, Some(pieces)),
        };
        one.into_iter().chain(many.into_iter().flatten()).map(|bytes| &bytes[..])
    }
}

/// Takes message frames apart as bytes come; holds no more than one message and what came with it.
pub struct Frames {
    chunks: VecDeque<Bytes>,
    have: usize,
    head: Option<(bool, usize)>,
    max: usize,
}

impl Frames {
    pub fn new(max: usize) -> Self {
        Frames { chunks: VecDeque::new(), have: 0, head: None, max }
    }

    pub fn push(&mut self, bytes: Bytes) {
        if !bytes.is_empty() {
            self.have += bytes.len();
            self.chunks.push_back(bytes);
        }
    }

    /// Whether a message was begun and has not come to its end.
    pub fn partial(&self) -> bool {
        self.have > 0 || self.head.is_some()
    }

    /// Bytes of the message that is being put together, as it was announced.
    pub fn announced(&self) -> usize {
        self.head.map_or(0, |head| head.1)
    }

    /// The next whole message and whether it is compressed. What is too large is refused by its announced length.
    pub fn next(&mut self) -> Result<Option<(bool, Body)>, Status> {
        if self.head.is_none() {
            if self.have < 5 {
                return Ok(None);
            }
            let mut head = [0u8; 5];
            let mut filled = 0;
            while filled < 5 {
                let front = &mut self.chunks[0];
                let count = front.len().min(5 - filled);
                head[filled..filled + count].copy_from_slice(&front[..count]);
                let _ = front.split_to(count);
                filled += count;
                if front.is_empty() {
                    self.chunks.pop_front();
                }
            }
            self.have -= 5;
            let len = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
            if head[0] > 1 {
                return Err(Status::new(INTERNAL, format!("Bad GRPC frame type 0x{:02x}", head[0])));
            }
            if len > self.max {
                let text = format!("Received message larger than max ({} vs. {})", len, self.max);
                return Err(Status::new(RESOURCE_EXHAUSTED, text));
            }
            self.head = Some((head[0] == 1, len));
        }
        let Some((compressed, len)) = self.head else { return Ok(None) };
        if self.have < len {
            return Ok(None);
        }
        self.head = None;
        self.have -= len;
        if len == 0 {
            return Ok(Some((compressed, Body::One(Bytes::new()))));
        }
        if self.chunks[0].len() >= len {
            let body = if self.chunks[0].len() == len {
                self.chunks.pop_front().unwrap_or_default()
            } else {
                self.chunks[0].split_to(len)
            };
            return Ok(Some((compressed, Body::One(body))));
        }
        let mut pieces = VecDeque::new();
        let mut left = len;
        while left > 0 {
            let Some(mut front) = self.chunks.pop_front() else { break };
            if front.len() > left {
                pieces.push_back(front.split_to(left));
                self.chunks.push_front(front);
                left = 0;
            } else {
                left -= front.len();
                pieces.push_back(front);
            }
        }
        Ok(Some((compressed, Body::Many(pieces, len))))
    }
}

/// Undo a message's compression, up to `max` bytes. Slow: not for the thread that serves connections.
pub fn inflate(body: &Body, encoding: Encoding, max: usize) -> Result<Body, Status> {
    let source = Pieces { pieces: body.pieces().collect(), at: 0 };
    let mut out = Vec::new();
    let limit = max as u64 + 1;
    let result = match encoding {
        Encoding::Gzip => flate2::read::GzDecoder::new(source).take(limit).read_to_end(&mut out),
        Encoding::Deflate => flate2::read::ZlibDecoder::new(source).take(limit).read_to_end(&mut out),
        Encoding::Identity => {
            let text = "Compressed flag set in message, but no compression was announced";
            return Err(Status::new(INTERNAL, text));
        }
    };
    if out.len() > max {
        let text = format!("Decompressed message larger than max ({} vs. {})", out.len(), max);
        return Err(Status::new(RESOURCE_EXHAUSTED, text));
    }
    match result {
        Ok(_) => Ok(Body::One(Bytes::from(out))),
        Err(_) => Err(Status::new(INTERNAL, "Unexpected error decompressing the message")),
    }
}

struct Pieces<'a> {
    pieces: VecDeque<&'a [u8]>,
    at: usize,
}

impl Read for Pieces<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        while let Some(front) = self.pieces.front() {
            let rest = &front[self.at..];
            if rest.is_empty() {
                self.pieces.pop_front();
                self.at = 0;
                continue;
            }
            let count = rest.len().min(out.len());
            out[..count].copy_from_slice(&rest[..count]);
            self.at += count;
            return Ok(count);
        }
        Ok(0)
    }
}

const BASE64: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

pub fn base64_encoded(raw: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(raw.len().div_ceil(3) * 4);
    for chunk in raw.chunks(3) {
        let group = (u32::from(chunk[0]) << 16)
            | (u32::from(chunk.get(1).copied().unwrap_or(0)) << 8)
            | u32::from(chunk.get(2).copied().unwrap_or(0));
        for position in 0..=chunk.len() {
            out.push(BASE64[(group >> (18 - 6 * position) & 63) as usize]);
        }
    }
    out
}

/// Standard base64, padded or not; None for what is not.
pub fn base64_decoded(text: &[u8]) -> Option<Vec<u8>> {
    let text = match text {
        [rest @ .., b'=', b'='] => rest,
        [rest @ .., b'='] => rest,
        all => all,
    };
    let mut out = Vec::with_capacity(text.len() * 3 / 4);
    for chunk in text.chunks(4) {
        if chunk.len() == 1 {
            return None;
        }
        let mut group = 0u32;
        for &byte in chunk {
            let value = match byte {
                b'A'..=b'Z' => byte - b'A',
                b'a'..=b'z' => byte - b'a' + 26,
                b'0'..=b'9' => byte - b'0' + 52,
                b'+' | b'-' => 62,
                b'/' | b'_' => 63,
                _ => return None,
            };
            group = group << 6 | u32::from(value);
        }
        group <<= 6 * (4 - chunk.len() as u32);
        let bytes = group.to_be_bytes();
        out.extend_from_slice(&bytes[1..chunk.len()]);
    }
    Some(out)
}

/// Whether a request header is the protocol's own and not metadata.
pub fn reserved(name: &str) -> bool {
    matches!(name, "te" | "content-type" | "content-length" | "grpc-encoding" | "grpc-accept-encoding" | "grpc-timeout")
}

/// Whether metadata is within bounds and what it says it is.
pub fn check_metadata(headers: &HeaderMap, max: usize) -> Result<(), Status> {
    let mut bytes = 0;
    for (name, value) in headers {
        bytes += name.as_str().len() + value.len() + 32;
        if name.as_str().ends_with("-bin") {
            let parts = value.as_bytes().split(|&byte| byte == b',');
            if parts.into_iter().any(|part| base64_decoded(part.trim_ascii()).is_none()) {
                let text = format!("Error parsing '{name}' metadata: illegal base64 encoding");
                return Err(Status::new(INTERNAL, text));
            }
        }
    }
    if bytes > max {
        let text = format!("received metadata size exceeds hard limit ({bytes} vs. {max})");
        return Err(Status::new(RESOURCE_EXHAUSTED, text));
    }
    Ok(())
}

/// Whether a W3C traceparent asks for recording.
pub fn sampled(headers: &HeaderMap) -> bool {
    headers.get("traceparent").is_some_and(|value| {
        value
            .as_bytes()
            .get(54)
            .is_some_and(|flags| matches!(flags, b'1' | b'3' | b'5' | b'7' | b'9' | b'b' | b'd' | b'f'))
    })
}
