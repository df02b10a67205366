"""PNG by its chunks: every length and checksum right, dimensions bounded, nothing behind the end. Nothing is expanded.

Rules: ISO/IEC 15948, sections 5 and 11.2.
"""

import zlib

from mlmesh_registry.formats.source import Refused, Source, Walk

SIGNATURE = b"\x89PNG\r\n\x1a\n"
PIXELS_MAX = 1 << 26
_CHUNKS_MAX = 1 << 20
_PIECE = 1 << 16
# Bit depths that each colour type may have.
_DEPTHS = {0: {1, 2, 4, 8, 16}, 2: {8, 16}, 3: {1, 2, 4, 8}, 4: {8, 16}, 6: {8, 16}}
_HEADER_BYTES = 13


def walk(source: Source, size_bytes: int) -> Walk[None]:
    """Refuse what is not one whole image."""
    yield from source.take(len(SIGNATURE))
    pixels = False
    for number in range(_CHUNKS_MAX):
        length = int.from_bytes((yield from source.take(4)), "big")
        kind = yield from source.take(4)
        if length > size_bytes - source.here or not kind.isalpha():
            raise Refused(f"chunk {number} is cut or no chunk")
        if (kind == b"IHDR") != (number == 0):
            raise Refused("its header is not where it belongs")
        body = yield from _body(source, kind, length)
        if kind == b"IHDR":
            _check_header(body)
        pixels = pixels or kind == b"IDAT"
        if kind == b"IEND":
            if length or not pixels or source.here != size_bytes:
                raise Refused("it has no pixels, or something behind its end")
            return
    raise Refused(f"it has more than {_CHUNKS_MAX} chunks")


def _body(source: Source, kind: bytes, length: int) -> Walk[bytes]:
    """Pass a chunk's bytes and its checksum; the bytes where there are few of them."""
    checksum, left, piece = zlib.crc32(kind), length, b""
    while left:
        piece = yield from source.take(min(left, _PIECE))
        checksum = zlib.crc32(piece, checksum)
        left -= len(piece)
    if int.from_bytes((yield from source.take(4)), "big") != checksum:
        raise Refused(f"a chunk {kind.decode()} fails its checksum")
    return piece


def _check_header(body: bytes) -> None:
    if len(body) != _HEADER_BYTES:
        raise Refused("its header has another length")
    width, height = int.from_bytes(body[:4], "big"), int.from_bytes(body[4:8], "big")
    depth, colour, compression, filtering, interlace = body[8:]
    if not (width and height and width * height <= PIXELS_MAX):
        raise Refused(f"it is {width} x {height}; at least one pixel, at most {PIXELS_MAX}")
    if depth not in _DEPTHS.get(colour, ()) or compression or filtering or interlace > 1:
        raise Refused("its header asks for what the standard does not have")
