//! Cuts an encoded ModelInferRequest into what one client's requests repeat and what differs.
//!
//! The contract is `split_python` of `mlmesh_inference.oip.wire`; a test holds the two equal.

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};

const HEADER_BYTES_MAX: usize = 4096;
const CONTENTS_MAX: usize = 64;

const ID: u8 = 0x1a;
const INPUT: u8 = 0x2a;
const CONTENTS: u8 = 0x2a;
const RAW: u8 = 0x3a;

struct Cut {
    header: Vec<u8>,
    name: (usize, usize),
    spans: Vec<usize>,
}

/// A length of up to four bytes, and where it ends.
fn length(message: &[u8], at: usize) -> Option<(usize, usize)> {
    let mut value = 0usize;
    for place in 0..4 {
        let byte = *message.get(at + place)?;
        value |= usize::from(byte & 0x7f) << (7 * place);
        if byte < 0x80 {
            return Some((value, at + place + 1));
        }
    }
    None
}

fn cut(message: &[u8]) -> Option<Cut> {
    let mut made =
        Cut { header: Vec::with_capacity(message.len().min(256)), name: (0, 0), spans: Vec::with_capacity(4) };
    let (mut at, mut kept) = (0, 0);
    while at < message.len() {
        let (size, start) = length(message, at + 1)?;
        let end = start + size;
        match message[at] {
            0x0a | 0x12 | 0x22 | 0x2a | 0x32 => {
                at = end;
                continue;
            }
            RAW if made.spans.len() < 2 * CONTENTS_MAX => made.spans.extend([start, end]),
            ID if made.name.1 == 0 && start == at + 2 => made.name = (at, end),
            _ => return None,
        }
        made.header.extend_from_slice(&message[kept..at]);
        at = end;
        kept = end;
    }
    if at != message.len() {
        return None;
    }
    if made.spans.is_empty() {
        cut_typed(message, &mut made)?;
    } else {
        made.header.extend_from_slice(&message[kept..]);
    }
    let name = &message[made.name.0..made.name.1];
    if made.header.len() > HEADER_BYTES_MAX || std::str::from_utf8(name).is_err() {
        return None;
    }
    if name.len() <= 2 {
        made.name = (0, 0);
    }
    Some(made)
}

/// The elements of typed contents cut out of a message whose records are in order; None where they are not plain.
fn cut_typed(message: &[u8], made: &mut Cut) -> Option<()> {
    made.header.clear();
    made.header.push(0);
    let (mut at, mut kept) = (0, 0);
    while at < message.len() {
        let (size, start) = length(message, at + 1)?;
        let end = start + size;
        match message[at] {
            ID => {
                made.header.extend_from_slice(&message[kept..at]);
                kept = end;
            }
            INPUT if made.spans.len() < 2 * CONTENTS_MAX => {
                let first = elements(message, start, end)?;
                made.spans.extend([first, end]);
                made.header.extend_from_slice(&message[kept..first]);
                kept = end;
            }
            INPUT => return None,
            _ => {}
        }
        if made.header.len() > HEADER_BYTES_MAX {
            return None;
        }
        at = end;
    }
    made.header.extend_from_slice(&message[kept..]);
    if made.spans.is_empty() {
        return None;
    }
    Some(())
}

/// Where the elements of an input begin that end with it.
fn elements(message: &[u8], mut at: usize, end: usize) -> Option<usize> {
    while at < end {
        let (size, start) = length(message, at + 1)?;
        let stop = start + size;
        match message[at] {
            CONTENTS => {
                if stop != end || !matches!(*message.get(start)?, 0x32 | 0x3a) {
                    return None;
                }
                let (size, first) = length(message, start + 1)?;
                return if first + size == end { Some(first) } else { None };
            }
            0x0a | 0x12 | 0x1a | 0x22 => at = stop,
            _ => return None,
        }
    }
    None
}

/// (header, id, spans) of an encoded ModelInferRequest; None for what is not plain.
#[pyfunction]
#[allow(clippy::type_complexity)]
pub fn split<'py>(
    py: Python<'py>,
    message: &Bound<'py, PyBytes>,
) -> PyResult<Option<(Bound<'py, PyBytes>, Bound<'py, PyBytes>, Bound<'py, PyTuple>)>> {
    let message = message.as_bytes();
    let Some(made) = cut(message) else { return Ok(None) };
    let name = &message[made.name.0..made.name.1];
    Ok(Some((PyBytes::new(py, &made.header), PyBytes::new(py, name), PyTuple::new(py, &made.spans)?)))
}
